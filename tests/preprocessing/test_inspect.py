"""inspect_data.py: says what is there, and exits non-zero on any fault."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, write_index
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


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Folder with a sound data set of three rendered documents, with roles."""
    folder = tmp_path_factory.mktemp("pristine")
    parts = [("Context. ", "context"), ("Wörter? ", "instruction"), ("Antwort.", "response"), ("\n", "glue"), ("Ende.", "context")]
    spans, end = [], 0
    for text, role in parts:
        spans.append([end, end := end + len(text), role])
    row = {"id": "1", "text": "".join(text for text, _ in parts), "spans": spans, "provenance": {}}
    (folder / "augmented.jsonl").write_text((json.dumps(row) + "\n") * 3)
    source = (str(folder / "augmented.jsonl"),)
    run(PreprocessConfig(input=source, output_prefix=folder / "r", tokenizer_model=tokenizer_folder, append_eod=True, workers=1))
    return folder


@pytest.fixture
def with_roles(tmp_path: Path, pristine: Path) -> Path:
    """Prefix of a copy, as if it had been made where it is."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "r_text_document.manifest.json"
    path.write_text(path.read_text().replace(str(pristine), str(tmp_path)))
    return tmp_path / "r_text_document"


def test_documents_are_shown_with_their_roles(with_roles: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--data-path", str(with_roles), "--tokenizer-model", str(tokenizer_folder), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "[context]Context. [instruction]Wörter? [response]Antwort.[glue]\n[context]Ende.[end_of_document]<|endoftext|>\n" in out.replace(
        "Context.[instruction] ", "Context. [instruction]"
    ).replace("?[response] ", "? [response]")
    assert "3 of 3 documents end with the end-of-document token (100.0%)" in out
    assert "roles of tokens: context " in out


def test_documents_that_are_not_there_are_said_to_be_missing_one_by_one(
    with_roles: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    flags = ["--data-path", str(with_roles), "--tokenizer-model", str(tokenizer_folder)]
    assert main([*flags, "--show", "9", "--documents", "7", "1", "3"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "there is no document" in line] == [
        f"--- there is no document {number}; the data set has 3" for number in (7, 3)
    ]
    assert out.count("[end_of_document]") == 4
    assert main([*flags, "--json", "--show", "1"]) == 2
    assert "json prints what was found for programs, and no documents" in capsys.readouterr().err


def test_findings_as_json(with_roles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--data-path", str(with_roles), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["found"]["documents"], report["rejected"], report["faults"]) == (3, 0, [])
    assert sum(report["found"]["roles"].values()) == report["found"]["tokens"]


def flip(suffix: str, place: int = 0, mask: int = 1) -> Callable[[Path], None]:
    """Change bits of one byte."""

    def damage(data: Path) -> None:
        content = bytearray(data.with_suffix(suffix).read_bytes())
        content[place] ^= mask
        data.with_suffix(suffix).write_bytes(content)

    return damage


def cut(suffix: str, count: int) -> Callable[[Path], None]:
    """Take bytes from the end of a file."""

    def damage(data: Path) -> None:
        data.with_suffix(suffix).write_bytes(data.with_suffix(suffix).read_bytes()[:-count])

    return damage


def change_index(which: str, value: int) -> Callable[[Path], None]:
    """Set the second entry of one of the index's three arrays."""

    def damage(data: Path) -> None:
        sequences = len(IndexedDataset(data).sequence_lengths)
        place, size = {"lengths": (34, 4), "offsets": (34 + 4 * sequences, 8), "bounds": (34 + 12 * sequences, 8)}[which]
        content = bytearray(data.with_suffix(".idx").read_bytes())
        content[place + size : place + 2 * size] = value.to_bytes(size, "little", signed=True)
        data.with_suffix(".idx").write_bytes(content)

    return damage


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(data: Path) -> None:
        path = data.with_name(data.name + ".manifest.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda data: data.with_name(data.name + suffix).unlink()


def take_the_manifest_of_another_data_set(data: Path) -> None:
    other = data.with_name("other")
    for suffix in (".bin", ".idx", ".roles", ".rejects.jsonl"):
        shutil.copyfile(f"{data}{suffix}", f"{other}{suffix}")
    change_manifest(lambda content: [output.update(path=output["path"].replace(data.name, "other")) for output in content["outputs"]])(data)


def change_the_input(data: Path) -> None:
    source = data.with_name("augmented.jsonl")
    source.write_bytes(source.read_bytes().replace(b"Ende", b"Fine"))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the tokens": (flip(".bin"), r"r_text_document\.bin has the SHA-256 \w+…; its manifest says \w+…: it was changed"),
    "a byte of the lengths": (flip(".idx", 34), "sequence 1 does not start where the one before it ends"),
    "a byte of the bounds": (flip(".idx", -1), r"r_text_document\.idx has the SHA-256"),
    "a role for another": (flip(".roles", mask=2), r"r_text_document\.roles has the SHA-256"),
    "an unknown role": (flip(".roles", mask=64), "holds 1 bytes that stand for no role, such as 64"),
    "the end of the tokens": (cut(".bin", 2), r"r_text_document\.bin has \d+ bytes; the index describes"),
    "half a token": (cut(".bin", 1), r"r_text_document\.bin has \d+ bytes, which is no multiple of 2"),
    "the end of the index": (cut(".idx", 8), r"r_text_document\.idx has \d+ bytes; 3 sequences and 4 document bounds take"),
    "the end of the roles": (cut(".roles", 1), r"r_text_document\.roles has roles of \d+ tokens; the data set has"),
    "a negative length": (change_index("lengths", -1), "sequence 1 has a negative length"),
    "a wrong offset": (change_index("offsets", 2), "sequence 1 does not start where the one before it ends"),
    "a bound out of order": (change_index("bounds", 3), "the document bounds are not in order"),
    "no tokens": (remove(".bin"), r"r_text_document\.bin: no such file"),
    "no index": (remove(".idx"), r"r_text_document\.idx: no such file"),
    "no roles": (remove(".roles"), r"r_text_document\.roles has None bytes where its manifest says"),
    "no rejects": (remove(".rejects.jsonl"), r"rejects\.jsonl has None bytes where its manifest says"),
    "no manifest": (remove(".manifest.json"), "pass --adopt-data"),
    "another's manifest": (take_the_manifest_of_another_data_set, "it is that of another data set"),
    "a count": (
        change_manifest(lambda content: content["counts"].update(documents_in=4)),
        r"4 documents came in, but 3 \+ 0 rejected are there",
    ),
    "roles without a word in the manifest": (
        change_manifest(lambda content: content["outputs"].pop(next(i for i, o in enumerate(content["outputs"]) if "roles" in o["path"]))),
        "the manifest knows of no roles",
    ),
    "the input": (change_the_input, r"the input \S*augmented\.jsonl was changed after the data set was made from it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_fault_is_named_and_exits_with_3_and_nothing_is_mended(
    with_roles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, words = DAMAGE[damage]
    change(with_roles)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["--data-path", str(with_roles)]) == 3
    printed = capsys.readouterr()
    assert re.search(rf"FAULT: .*{words}", printed.out), printed.out
    assert str(with_roles) in printed.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_inputs_that_are_gone_are_no_fault(with_roles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "augmented.jsonl").unlink()
    capsys.readouterr()
    assert main(["--data-path", str(with_roles)]) == 0
    assert "1 inputs are no longer where they were read" in capsys.readouterr().out


def test_inputs_named_from_another_folder_are_those_that_were_read(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "texts.jsonl").write_bytes(corpus.read_bytes())
    (tmp_path / "here" / "texts.jsonl").write_text('{"text": "Another file of this name."}\n')
    monkeypatch.chdir(tmp_path / "there")
    run(PreprocessConfig(input=("texts.jsonl",), output_prefix=Path("../data/x"), tokenizer_model=tokenizer_folder, workers=1))
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()
    assert main(["--data-path", "../data/x_text_document"]) == 0
    assert "no longer" not in capsys.readouterr().out
    (tmp_path / "there" / "texts.jsonl").write_text("changed")
    assert main(["--data-path", "../data/x_text_document"]) == 3
    assert f"the input {tmp_path}/there/texts.jsonl was changed" in capsys.readouterr().out


def test_another_tokenizer_is_a_fault(data: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.add_tokens(["<extra>"])
    (tmp_path / "other").mkdir()
    model.save(str(tmp_path / "other" / "tokenizer.json"))
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert main(["--data-path", str(data), "--tokenizer-model", str(tmp_path / "other")]) == 3
    assert "made with another tokenizer" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    size = 400_000_000
    with open(tmp_path / "d.bin", "wb") as stream:
        stream.truncate(size)
    with open(tmp_path / "d.idx", "wb") as stream:
        write_index(stream, np.dtype("<u2"), [np.full(1000, size // 2000, dtype=np.int32)])
    code = (
        "from megatron_instruct.preprocessing.inspection import main\n"
        f"status = main(['--data-path', {str(tmp_path / 'd')!r}, '--adopt-data'])\n"
        "print(status, *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, kibibytes = done.stdout.splitlines()[-1].split()
    assert status == "0"
    assert "1,000 documents" in done.stdout
    assert int(kibibytes) < 200_000, "less than half of the file"


def test_data_of_another_tool_can_be_adopted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove(".manifest.json")(data)
    assert main(["--data-path", str(data), "--adopt-data"]) == 0
    assert "OK, as far as files without a manifest can be checked" in capsys.readouterr().out
    assert main(["--data-path", str(data), "--show", "1"]) == 2
