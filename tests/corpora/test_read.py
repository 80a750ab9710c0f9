"""Corpus readers: every record once with its place, everything unreadable named."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_instruct.corpora.parts import plan_parts, read_part
from megatron_instruct.corpora.read import BrokenRecord, Record, find_files, raw_text, read_records
from megatron_instruct.errors import InputError

ROWS = [{"id": str(number), "text": f"Entry {number}: a ‘kludge’ 漢字.\n" * (number % 7 + 1)} for number in range(50)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def in_every_format(folder: Path) -> list[Path]:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    frames = zstandard.ZstdCompressor().compress(LINES[:1000]) + zstandard.ZstdCompressor().compress(LINES[1000:])
    return [
        write(folder / "a.jsonl", LINES),
        write(folder / "a.jsonl.gz", gzip.compress(LINES)),
        write(folder / "a.jsonl.zst", frames),
        folder / "a.parquet",
    ]


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    for path in in_every_format(tmp_path):
        records = [item for item in read_records(path) if isinstance(item, Record)]
        assert [record.value for record in records] == ROWS, path
        assert [record.line for record in records] == list(range(1, 51)), path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (item,) = read_records(write(tmp_path / "essay.txt", "One.\n\nTwo ü.".encode()))
    assert isinstance(item, Record)
    assert item.value == {"id": "essay.txt", "text": "One.\n\nTwo ü."}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "broken JSON"),
        (b"[1]", "not an object"),
        (b"null", "not an object"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        (b'{"body": "x"}', "missing text"),
        (b'{"text": null}', "text is no string"),
        (b'{"text": 5}', "text is no string"),
        (b'{"text": " \\n"}', "empty text"),
        (b'{"text": "a \\ud800 b"}', "lone surrogate"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_what_is_no_text_comes_out_with_its_reason_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}')
    items = [raw_text(item) if isinstance(item, Record) else item for item in read_records(path)]
    broken = [item for item in items if isinstance(item, BrokenRecord)]
    assert [(item.reason, item.line, item.where) for item in broken] == [(reason, 3, f"{path}:3")]
    assert len(items) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_an_empty_file_is_not_passed_over(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"")
    items = [raw_text(item) if isinstance(item, Record) else item for item in read_records(path)]
    assert [item.reason for item in items if isinstance(item, BrokenRecord)] in (["empty file"], ["empty text"])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "cut in the last bytes", "overwritten", "not compressed"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str, damage: str) -> None:
    path = next(file for file in in_every_format(tmp_path) if file.name == name)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "cut in the last bytes": content[:-3],
        "overwritten": content[:middle] + b"\x00\xff" * 20 + content[middle + 40 :],
        "not compressed": LINES,
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(InputError, match=name):
        list(read_records(path))


def test_inputs_are_files_folders_and_patterns(tmp_path: Path) -> None:
    in_every_format(tmp_path)
    write(tmp_path / "rejects.jsonl", b"{}\n")
    write(tmp_path / "x.rejects.jsonl", b"{}\n")
    write(tmp_path / "notes.md", b"")
    names = [path.name for path in find_files([str(tmp_path)])]
    assert names == ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
    assert find_files([str(tmp_path / "a.parquet"), str(tmp_path / "*.jsonl.*")])[0].name == "a.parquet"
    assert len(find_files([str(tmp_path), str(tmp_path / "a.jsonl")])) == 4
    for absent in ("absent.jsonl", "*.none", "notes.md"):
        with pytest.raises(InputError, match=absent.replace("*", r"\*")):
            find_files([str(tmp_path / absent)])


@pytest.mark.parametrize("part_bytes", [1, 50, 777, 10_000_000])
@pytest.mark.parametrize("last", [b"", b'{"text": "a last line without an end"}', b"\n\n\n"])
def test_parts_give_every_record_once_with_its_line(tmp_path: Path, part_bytes: int, last: bytes) -> None:
    path = write(tmp_path / "a.jsonl", LINES.replace(b"\n", b"\n\n", 5) + last)
    small = [write(tmp_path / f"{number}.txt", b"text") for number in range(3)]
    files = [small[0], path, *small[1:]]
    whole = [item for file in files for item in read_records(file)]
    parts = plan_parts(files, part_bytes=part_bytes)
    assert [item for part in parts for item in read_part(part)] == whole
    assert len(parts) == (1 if part_bytes == 10_000_000 else len(parts))
    lines = sum(piece.lines or 0 for part in parts for piece in part.slices)
    assert lines == len(path.read_bytes().splitlines())
