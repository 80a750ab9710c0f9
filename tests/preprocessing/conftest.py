"""Real tokenizers and corpora, made on the spot."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {
        "id": str(number),
        "text": f"Entry {number}. A hacker's bug, number {number * number}: “foo” und Ärger 漢字 </s> <|endoftext|>.\n" * (number % 9 + 1),
        "title": f"T{number}",
    }
    for number in range(400)
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([row["text"] for row in ROWS[:50]], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 documents in one .jsonl file."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start a tool of tools/ as a user does, in a process of its own."""

    def start_tool(tool: str, *arguments: object) -> subprocess.Popen[str]:
        command: Sequence[str] = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start_tool
