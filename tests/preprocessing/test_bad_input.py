"""Bad input, damaged files and bad outputs, through the whole stage with real tokenizers: stopped and named, or set aside and counted.

Under --on-error reject, documents in = documents out + rejects, whatever comes in.
"""

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.run import main, run

ROOT = Path(__file__).resolve().parents[2]


def preprocess(inputs: list[Path], prefix: Path, tokenizer: Path, **settings: Any) -> Manifest:
    given = {"input": tuple(map(str, inputs)), "output_prefix": prefix, "tokenizer_model": tokenizer, "workers": 1, **settings}
    return run(PreprocessConfig(**given))["text"]


def rejects_of(prefix: Path) -> list[dict[str, Any]]:
    file = prefix.with_name(f"{prefix.name}_text_document.rejects.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def texts_of(prefix: Path, tokenizer: Path) -> list[str]:
    decoder = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    dataset = IndexedDataset(prefix.with_name(f"{prefix.name}_text_document"))
    return [decoder.decode(dataset.document(number).tolist(), skip_special_tokens=False) for number in range(len(dataset))]


BAD_LINES = {
    b'{"text": "cut': "broken JSON",
    b'{"text": "a"} {"text": "b"}': "broken JSON",
    b"not JSON at all": "broken JSON",
    b"[" * 3000: "broken JSON",
    b"{'text': 'single quotes'}": "broken JSON",
    b'[{"text": "an array"}]': "not an object",
    b'"a string"': "not an object",
    b"null": "not an object",
    b"17": "not an object",
    b'{"Text": "another key"}': "missing text",
    b"{}": "missing text",
    b'{"text": null}': "text is no string",
    b'{"text": 5}': "text is no string",
    b'{"text": ["a"]}': "text is no string",
    b'{"text": {"a": "b"}}': "text is no string",
    b'{"text": ""}': "empty text",
    b'{"text": " \\n\\u3000"}': "empty text",
    b'{"text": "half \\ud83d of a pair"}': "lone surrogate",
    b'{"text": "other half \\udc80"}': "lone surrogate",
    b'{"text": "\xff\xfe"}': "invalid UTF-8",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"text": "Latin 1: \xe4"}': "invalid UTF-8",
    b'{"text": "a\\u0000b"}': "NUL character",
    b'{"text": "wide \xe6\xbc\xa2\\u0000"}': "NUL character",
    b'{"text": "raw \0"}': "NUL character",
    b"\0\0\0\0": "NUL character",
}


def test_each_bad_line_is_set_aside_with_its_reason_and_no_good_one_is_lost(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(b'{"text": "good %d"}\n%b\n' % (number, line) for number, line in enumerate(BAD_LINES)))
    manifest = preprocess([path], tmp_path / "a", tokenizer_folder, on_error="reject", partitions=5, workers=2)
    assert manifest.counts["documents_in"] == 2 * len(BAD_LINES)
    assert manifest.rejected == Counter(BAD_LINES.values())
    assert texts_of(tmp_path / "a", tokenizer_folder) == [f"good {number}" for number in range(len(BAD_LINES))]
    rejects = rejects_of(tmp_path / "a")
    assert [(row["line"], row["reason"]) for row in rejects] == [(2 * n + 2, reason) for n, reason in enumerate(BAD_LINES.values())]
    assert {row["path"] for row in rejects} == {str(path)}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "a\\u0000b"}', "NUL character: 'text' holds a NUL at character 1"),
        (b'{"text": "raw \0"}', "NUL character: the line holds a NUL byte"),
        (b"{}", "missing text: no key 'text'; its keys are none"),
        (b'[{"text": "a"}, {"text": "b"}]', "not an object: an array of 2; write one object a line"),
    ],
)
def test_the_run_stops_at_a_bad_line_with_its_place(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], line: bytes, told: str
) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    given = {"--input": tmp_path / "c.jsonl", "--output-prefix": tmp_path / "out" / "a", "--tokenizer-model": tokenizer_folder}
    assert main([word for flag, value in given.items() for word in (flag, str(value))] + ["--workers", "1"]) == 3
    assert f"{tmp_path / 'c.jsonl'}:3: {told}" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("a_text_document*"))


ROWS = [{"text": f"Entry {number}: ‘é’ 漢字"} for number in range(90)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def damaged_files(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Write files, and return for each the number of documents that it gives and the reasons of its rejects."""
    settings = {"row_group_size": 30, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "page.parquet", **settings)
    page = bytearray((folder / "page.parquet").read_bytes())
    page[page.index(b"Entry 45:")] ^= 1
    frame = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    started = frame.compress(LINES[:2000]) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    altered = bytearray(gzip.compress(LINES))
    altered[-6] ^= 1
    contents: dict[str, tuple[bytes, int, list[str]]] = {
        "bom.jsonl": (b"\xef\xbb\xbf" + LINES, 90, []),
        "crlf.jsonl": (LINES.replace(b"\n", b"\r\n"), 90, []),
        "array.jsonl": (json.dumps(ROWS).encode(), 0, ["not an object"]),
        "zero.jsonl": (b"", 0, ["empty file"]),
        "zero.jsonl.gz": (b"", 0, ["empty file"]),
        "zero.parquet": (b"", 0, ["damaged file"]),
        "zero.txt": (b"", 0, ["empty file"]),
        "blank.txt": (b" \n", 0, ["empty text"]),
        "blank.jsonl": (b"\n\r\n", 0, ["empty file"]),
        "cut.jsonl.zst": (started, LINES[:2000].count(b"\n"), ["truncated file"]),
        "altered.jsonl.gz": (gzip.compress(LINES) + bytes(altered), 90, ["damaged file"]),
        "footer.parquet": (bytes(page[:-20]), 0, ["damaged file"]),
        "page.parquet": (bytes(page), 60, ["damaged row group"]),
        "utf16.txt": ("text".encode("utf-16"), 0, ["invalid UTF-8"]),
        "nul.txt": (b"a\0b", 0, ["NUL character"]),
    }
    for name, (content, _, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: (documents, reasons) for name, (_, documents, reasons) in contents.items()}


@pytest.mark.parametrize("partitions", [1, 40])
def test_damaged_files_give_what_is_sound_and_one_reject_for_each_damage(tmp_path: Path, tokenizer_folder: Path, partitions: int) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    expected = damaged_files(corpus)
    manifest = preprocess([corpus], tmp_path / "a", tokenizer_folder, on_error="reject", partitions=partitions)
    rejects = rejects_of(tmp_path / "a")
    assert [(Path(row["path"]).name, row["reason"]) for row in rejects] == [
        (name, reason) for name in sorted(expected) for reason in expected[name][1]
    ]
    documents = sum(count for count, _ in expected.values())
    assert manifest.counts["documents"] == len(IndexedDataset(tmp_path / "a_text_document")) == documents
    assert manifest.counts["documents_in"] == documents + len(rejects) == documents + sum(manifest.rejected.values())
    assert texts_of(tmp_path / "a", tokenizer_folder)[: 2 * 90] == 2 * [row["text"] for row in ROWS], "altered.jsonl.gz, bom.jsonl"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cut.jsonl.zst", r"cut.jsonl.zst:\d+: truncated file: the file ends early"),
        ("altered.jsonl.gz", r"altered.jsonl.gz:91: damaged file: .*fetch it again"),
        ("page.parquet", r"page.parquet:31: damaged row group: rows 31 to 60 cannot be read"),
        ("footer.parquet", r"footer.parquet:1: damaged file: not a readable Parquet file"),
    ],
)
def test_the_run_stops_at_a_damaged_file_and_writes_nothing(tmp_path: Path, tokenizer_folder: Path, name: str, told: str) -> None:
    damaged_files(tmp_path)
    with pytest.raises(InputError, match=told):
        preprocess([tmp_path / name], tmp_path / "out" / "a", tokenizer_folder)
    assert not list((tmp_path / "out").glob("a_text_document*"))


def test_a_folder_named_like_a_file_and_links_are_read_and_an_empty_folder_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    with pytest.raises(InputError, match=r"x.jsonl: the folder holds no file of a known suffix"):
        preprocess([folder], tmp_path / "a", tokenizer_folder)
    (tmp_path / "elsewhere").write_bytes(b'{"text": "linked"}\n')
    (folder / "link.jsonl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "again.jsonl").symlink_to(folder / "link.jsonl")
    preprocess([folder, tmp_path / "again.jsonl"], tmp_path / "a", tokenizer_folder)
    assert texts_of(tmp_path / "a", tokenizer_folder) == ["linked"]


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "</s>"}\n{"text": "<s>a</s><unk>"}\n')
    preprocess([tmp_path / "c.jsonl"], tmp_path / "a", model, append_eod=True)
    dataset = IndexedDataset(tmp_path / "a_text_document")
    ids = [dataset.document(number).tolist() for number in range(2)]
    assert [document[-1] for document in ids] == [2, 2]
    assert not {0, 1, 2} & {token for document in ids for token in document[:-1]}
    assert len(ids[0]) > 2


def test_other_inputs_never_go_to_a_prefix_in_use(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    preprocess([corpus], tmp_path / "a", tokenizer_folder)
    before = (tmp_path / "a_text_document.bin").read_bytes()
    (tmp_path / "other.jsonl").write_bytes(b'{"text": "other"}\n')
    with pytest.raises(ConfigError, match="made from other inputs; choose another output or remove"):
        preprocess([tmp_path / "other.jsonl"], tmp_path / "a", tokenizer_folder)
    assert (tmp_path / "a_text_document.bin").read_bytes() == before


def as_a_plain_user(*flags: object) -> subprocess.CompletedProcess[str]:
    """Run the tool as one to whom permissions apply."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, flags), "--workers", "1"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may do everything, and setpriv is not installed")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_unreadable_file_is_named(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    corpus.chmod(0)
    done = as_a_plain_user(
        "--input", corpus, "--output-prefix", tmp_path / "a", "--tokenizer-model", tokenizer_folder, "--on-error", "reject"
    )
    assert done.returncode == 1
    assert f"Permission denied: '{corpus}'" in done.stderr
    assert not list(tmp_path.glob("a_text_document*"))


def test_a_read_only_output_folder_is_named(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    done = as_a_plain_user("--input", corpus, "--output-prefix", folder / "a", "--tokenizer-model", tokenizer_folder)
    assert done.returncode == 1
    assert f"Permission denied: '{folder}/a" in done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a disk is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--input", str(corpus), "--tokenizer-model", str(tokenizer_folder), "--workers", "1", "--partitions", "4"]
    status = []
    for size in ("64k", "256k", "16m"):  # too small for a part, for what is merged of the parts, and for nothing
        remount(disk, f"size={size}")
        status.append(main([*given, "--output-prefix", str(disk / "a")]))
        told = capsys.readouterr().err
        if status[-1]:
            assert "No space left on device" in told
            assert str(disk / "a") in told
            assert not list(disk.glob("*.manifest.json"))
    assert status == [1, 1, 0]
    assert main([*given, "--output-prefix", str(tmp_path / "roomy" / "a")]) == 0
    assert {file.name: file.read_bytes() for file in disk.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "roomy").iterdir()
    }


MEASURED = """
import resource, sys
from megatron_instruct.preprocessing.run import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_a_line_of_50_mb_is_one_document_in_bounded_memory(tmp_path: Path, tokenizer_folder: Path) -> None:
    row = json.dumps({"comment": "Wörter " * 6_250_000, "text": "A short text."}, ensure_ascii=False)
    assert len(row.encode()) >= 50_000_000
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"text": "before"}}\n{row}\n{{"text": "after"}}\n', encoding="utf-8")
    given = {"--input": path, "--output-prefix": tmp_path / "a", "--tokenizer-model": tokenizer_folder, "--workers": 1}
    words = [str(word) for flag in given.items() for word in flag]
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert texts_of(tmp_path / "a", tokenizer_folder) == ["before", "A short text.", "after"]
    assert int(done.stdout.split()[-1]) < 500, "MiB of the largest worker: about 60, and the line in a few forms"


NOT_AN_OBJECT_A_LINE = [
    b'{"text":\n"one"}\n{"text": "two"} {"text": "three"}\n{"text": "four"}',
    b'{"text": "one"}{"text": "two"}\n{"text": "three"}\n',
    b'{"text": "one", "more": [{}\n{"text": "two"}]}\n{"text": "three"}\n',
    b'{"text": "one"}\n\n{"text": "two"}\n{"text": "three"}',
    b'{"text": "one"}\r\n{"text": "two"}\r\n \t{"text": "three"} \r\n',
    b'{"text": "one"}\r{"text": "two"}\r\n{"text": "three"}\n',
    b'\n\n{"text": "one"}\n{"text": "two", "more": "}\n{"}\n{"text": "three"}',
]


@pytest.mark.parametrize("content", NOT_AN_OBJECT_A_LINE)
def test_lines_are_read_at_once_only_where_each_is_an_object(tmp_path: Path, tokenizer_folder: Path, content: bytes) -> None:
    """A compressed file is read by the careful readers alone, a line at a time."""
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    found = []
    for name in ("a.jsonl", "a.jsonl.gz"):
        prefix = tmp_path / name.replace(".", "_") / "a"
        manifest = preprocess([tmp_path / name], prefix, tokenizer_folder, append_eod=True, on_error="reject")
        files = [prefix.with_name(f"a_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx", "rejects.jsonl")]
        found.append((manifest.counts, manifest.rejected, *(file.replace(b".jsonl.gz", b".jsonl") for file in files)))
    assert found[0] == found[1]
