"""inspect_data.py: says what is there, and exits non-zero on any fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.inspection import main
from megatron_instruct.preprocessing.run import run


@pytest.fixture
def data(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Path:
    """Prefix of a sound data set."""
    run(PreprocessConfig(input=(str(corpus),), output_prefix=tmp_path / "a", tokenizer_model=tokenizer_folder, append_eod=True, workers=1))
    return tmp_path / "a_text_document"


def test_a_sound_data_set_is_described_and_decoded(data: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--data-path", str(data), "--tokenizer-model", str(tokenizer_folder), "--show", "1", "--documents", "399"]) == 0
    out = capsys.readouterr().out
    assert "400 documents" in out
    assert "400 of 400 documents end with the end-of-document token" in out
    assert "\n  OK\n" in out
    assert "+ end of document\nEntry 0. A hacker's bug, number 0: “foo” und Ärger 漢字 </s> <|endoftext|>." in out
    assert "--- document 399" in out


def change_token(data: Path) -> None:
    content = bytearray(data.with_suffix(".bin").read_bytes())
    content[0] ^= 1
    data.with_suffix(".bin").write_bytes(content)


def cut(data: Path) -> None:
    data.with_suffix(".bin").write_bytes(data.with_suffix(".bin").read_bytes()[:-2])


def remove_manifest(data: Path) -> None:
    data.with_name(data.name + ".manifest.json").unlink()


def change_counts(data: Path) -> None:
    path = data.with_name(data.name + ".manifest.json")
    content = json.loads(path.read_text())
    content["counts"]["documents_in"] += 1
    path.write_text(json.dumps(content))


def remove_index(data: Path) -> None:
    data.with_suffix(".idx").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_token, "it was changed"),
        (cut, "the index describes"),
        (remove_manifest, "pass --adopt-data"),
        (change_counts, "401 documents came in, but 400 + 0 rejected are there"),
        (remove_index, "no such file"),
    ],
)
def test_a_fault_is_named_and_exits_with_3(
    data: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: str
) -> None:
    damage(data)
    capsys.readouterr()
    assert main(["--data-path", str(data)]) == 3
    printed = capsys.readouterr()
    assert words in printed.out
    assert str(data) in printed.err


def test_another_tokenizer_is_a_fault(data: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.add_tokens(["<extra>"])
    (tmp_path / "other").mkdir()
    model.save(str(tmp_path / "other" / "tokenizer.json"))
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert main(["--data-path", str(data), "--tokenizer-model", str(tmp_path / "other")]) == 3
    assert "made with another tokenizer" in capsys.readouterr().out


def test_data_of_another_tool_can_be_adopted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_manifest(data)
    assert main(["--data-path", str(data), "--adopt-data"]) == 0
    assert "OK, as far as files without a manifest can be checked" in capsys.readouterr().out
    assert main(["--data-path", str(data), "--show", "1"]) == 2
