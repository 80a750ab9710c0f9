"""The fast tokenizer: proved on a sample of the very input, told in the manifest, and without effect on the result."""

import gzip
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.documents import DocumentMaker, render_options
from megatron_instruct.preprocessing.sample import sample_texts

Preprocess = Callable[..., dict[str, Manifest]]
Outputs = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def maker() -> DocumentMaker:
    return DocumentMaker(("text",), render_options(seed=1, language=None, bank=None, extend_bank=None))


def test_the_sample_is_spread_over_files_and_lines_and_passes_over_faults(
    tmp_path: Path, jargon: list[dict[str, str]], maker: DocumentMaker
) -> None:
    lines = [json.dumps({"text": f"{number}: {entry['text']}"}) for number, entry in enumerate(jargon)]
    lines[3] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    texts = sample_texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], maker)
    numbers = [int(text.partition(":")[0]) for text in texts]
    assert {number * 10 // len(jargon) for number in numbers} == set(range(10)), "every tenth of the file is looked at"
    assert numbers.count(0) == 2, "and the compressed file from its start"
    assert 50_000 < sum(map(len, texts)) < 500_000
    assert texts == sample_texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], maker)


def test_examples_are_sampled_as_they_will_be_encoded(examples: Path, maker: DocumentMaker) -> None:
    first = json.loads(examples.read_text(encoding="utf-8").splitlines()[0])
    text = sample_texts([examples], maker)[0]
    assert first["shots"][0]["pairs"][0]["question"] in text


def test_gigatoken_and_the_library_write_the_same_bytes(
    tmp_path: Path, examples: Path, corpus: Path, mistral_v1: Path, preprocess: Preprocess, outputs: Outputs
) -> None:
    pytest.importorskip("gigatoken")
    manifests = {}
    for choice in ("gigatoken", "none"):
        settings = {"append_eod": True, "fast_tokenizer": choice, "partitions": 3}
        manifests[choice] = preprocess([corpus, examples], tmp_path / choice / "a", mistral_v1, **settings)["text"]
    fast, slow = outputs(tmp_path / "gigatoken"), outputs(tmp_path / "none")
    for suffix in ("bin", "idx", "roles", "rejects.jsonl"):
        assert fast[f"a_text_document.{suffix}"] == slow[f"a_text_document.{suffix}"]
    facts = manifests["gigatoken"].facts["encoding"]
    assert facts["backend"] == f"gigatoken {metadata.version('gigatoken')}"
    assert facts["proved_texts"] > 50
    assert manifests["none"].facts["encoding"]["backend"] == "library"
    assert manifests["none"].settings == manifests["gigatoken"].settings
