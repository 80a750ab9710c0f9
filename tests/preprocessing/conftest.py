"""What the tests of preprocessing share: the stage as a function, corpora of every kind, real tokenizers."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.run import run

Preprocess = Callable[..., dict[str, Manifest]]


@pytest.fixture
def preprocess() -> Preprocess:
    """Run the stage with one worker, and the settings given."""

    def run_stage(inputs: Path | Sequence[Path], prefix: Path, tokenizer: Path, **settings: Any) -> dict[str, Manifest]:
        given = [inputs] if isinstance(inputs, Path) else inputs
        config = {"input": tuple(map(str, given)), "output_prefix": prefix, "tokenizer_model": tokenizer, "workers": 1, **settings}
        return run(PreprocessConfig(**config))

    return run_stage


@pytest.fixture
def outputs() -> Callable[[Path], dict[str, bytes]]:
    """Return the content of every file in a folder."""
    return lambda folder: {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def mistral_v1() -> Path:
    """The sentencepiece model of Mistral-7B-v0.1: 32,000 pieces, with bytes for what it does not know."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


def example(number: int, text: str) -> dict[str, Any]:
    """An M-shot example of two texts with pairs of three kinds, one of which no template can take in every fifth example."""
    options = ["north", "süd", "東", "none of these"]
    pairs = [
        {"question": f"What is told of {number}?", "answer": f"That {text[:20].strip()}", "kind": "free_form"},
        {
            "question": "Wo liegt es?",
            "answer": "nowhere" if number % 5 == 0 else options[number % 4],
            "kind": "options",
            "options": options,
        },
        {"question": "How so?", "answer": "Thus.", "kind": "chain_of_thought", "rationale": "One sees it 😀 at once."},
    ]
    shots = [
        {"id": f"{number}.0", "text": text, "pairs": pairs[: 1 + number % 3]},
        {"id": f"{number}.1", "text": f"Zweiter Text über {number}: {text[:60]} 漢字。", "pairs": pairs},
    ]
    return {"id": f"{number}.0", "shots": shots}


@pytest.fixture
def examples(tmp_path: Path, jargon: list[dict[str, str]]) -> Path:
    """120 examples as synthesis writes them, over real texts."""
    path = tmp_path / "synthesis" / "examples.jsonl"
    path.parent.mkdir()
    rows = [example(number, entry["text"]) for number, entry in enumerate(jargon[:120])]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
