"""What the tests of several rooms share: real tokenizers, the real small model, tools started as a user starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from tests.byte_level import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {
        "id": str(number),
        "text": f"Entry {number}. A hacker's bug, number {number * number}: “foo” und Ärger 漢字 </s> <|endoftext|>.\n" * (number % 9 + 1),
        "title": f"T{number}",
    }
    for number in range(400)
]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in a Hugging Face folder."""
    texts = [row["text"] for row in ROWS[:50]]
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts, vocab_size=500, named={"eos_token": "<|endoftext|>"})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 documents in one .jsonl file."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jargon() -> list[dict[str, str]]:
    """The entries of the Jargon File that the project ships."""
    lines = (ROOT / "examples" / "quickstart" / "jargon.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def smollm2_folder(pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, kept in pytest's cache from one run to the next."""
    folder = Path(pytestconfig.cache.mkdir("models")) / "SmolLM2-135M-Instruct"
    with FileLock(f"{folder}.lock"):  # pytest's workers share it
        if not (folder / "config.json").is_file():
            command = [sys.executable, str(ROOT / "examples" / "quickstart" / "smollm2.py"), str(folder)]
            subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start a tool of tools/ as a user does, in a process of its own."""

    def start_tool(tool: str, *arguments: object) -> subprocess.Popen[str]:
        command: Sequence[str] = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())

    return start_tool


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python file with arguments in `processes` processes that torchrun starts, to their end."""

    def run(processes: int, script: Path, *arguments: object, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*launcher, str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=_environment(), check=False)

    return run
