"""What the tests of synthesis share: a tokenizer with BOS, and the tool with the scripted engine on a corpus of numbered texts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

COMPLETION = (
    "<QUE> What is entry {id}? <ANS> It is about a bug. </END>\n\n<QUE> Which bug is told of? <ANS> The bug number one. </END>\n\n<QUE> Cut"
)
"""Two pairs and an unfinished one."""


@pytest.fixture(scope="session")
def synthesizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with BOS and EOS, in a folder as a model's; one token a byte, so that lengths are easy to know."""
    folder = tmp_path_factory.mktemp("synthesizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<s>", "</s>", *alphabet])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@dataclass(frozen=True)
class Bench:
    """A folder with a corpus and a script, and the command line that uses them."""

    folder: Path
    model: Path

    def corpus(self, rows: int | Sequence[dict[str, Any] | str], name: str = "corpus.jsonl") -> Path:
        """Write rows as they are, or so many numbered texts, all of which ground the scripted pairs."""
        if isinstance(rows, int):
            more = "The bug number one is told of here. "
            rows = [{"id": f"t{n:03d}", "text": f"Entry t{n:03d} is about a bug. " + more * (n % 3 + 1)} for n in range(rows)]
        path = self.folder / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return path

    def script(self, **script: Any) -> Path:
        path = self.folder / "script.yaml"
        path.write_text(yaml.safe_dump({"completion": COMPLETION, **script}))
        return path

    def arguments(self, corpus: Path, output: str = "out", **settings: Any) -> list[str]:
        """The command line of tools/synthesize.py with the scripted engine."""
        if not (self.folder / "script.yaml").is_file():
            self.script()
        given = {"input": corpus, "output_dir": self.folder / output, "model": self.model, "engine": "scripted"}
        given |= {"script": self.folder / "script.yaml", **settings}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def outputs(self, output: str) -> dict[str, bytes]:
        """Every file that a run left, but for its lock."""
        files = (file for file in sorted((self.folder / output).rglob("*")) if file.is_file() and file.name != "lock")
        return {str(file.relative_to(self.folder / output)): file.read_bytes() for file in files}


@pytest.fixture
def bench(tmp_path: Path, synthesizer_folder: Path) -> Bench:
    return Bench(tmp_path, synthesizer_folder)


@pytest.fixture
def synthesize(bench: Bench, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the tool in this process on a corpus; return its exit status and all that it printed."""
    from megatron_instruct.synthesis.run import main

    def run(corpus: Path, output: str = "out", **settings: Any) -> tuple[int, str]:
        status = main(bench.arguments(corpus, output, **settings))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run
