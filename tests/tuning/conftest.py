"""What the tests of tuning share: a tokenizer that joins line breaks, as those of real models do, and rows of two data sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.byte_level import train_tokenizer


@pytest.fixture(scope="session")
def synthesizer_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with BOS and EOS. Two line breaks are one token at the end of a text, and two before a word."""
    texts = ["A text of words, a question and an answer.\n\n"] * 40 + ["the bug is in the text <QUE> </END> <ANS>"]
    folder = tmp_path_factory.mktemp("synthesizer-tokenizer")
    return train_tokenizer(folder, texts, vocab_size=400, named={"bos_token": "<s>", "eos_token": "</s>"})


def row(number: int, name: str, *, context: str | None = None, pairs: list[tuple[str, str]] | None = None) -> dict[str, Any]:
    """Return a row of the collection."""
    given = pairs or [(f"What is bug {number}?", f"Bug {number} is small."), (f"Who found bug {number}?", "Ada found it.")]
    text = context or f"Bug {number} is small. Ada found it. It was mended on day {number * number}."
    return {"context": text, "QA_list": [{"Q": q, "A": a} for q, a in given], "QA_type": "free_form", "rc_name": name}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)) + "\n" for one in rows), encoding="utf-8"
    )
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
