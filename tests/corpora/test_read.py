"""Corpus readers: every record once with its place, everything unreadable named."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_instruct.corpora.read import BrokenRecord, Record, raw_text, read_records
from megatron_instruct.errors import InputError
from megatron_instruct.records import RawText

ROWS = [{"id": str(number), "text": f"Entry {number}: a ‘kludge’ 漢字.\n" * (number % 7 + 1)} for number in range(50)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def in_every_format(folder: Path) -> list[Path]:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    frames = zstandard.ZstdCompressor().compress(LINES[:1000]) + zstandard.ZstdCompressor().compress(LINES[1000:])
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    with pyarrow.OSFile(str(folder / "b.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
        file.write_table(table, max_chunksize=20)
    return [
        folder / "a.arrow",
        folder / "b.arrow",
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
    assert item.value == {"text": "One.\n\nTwo ü."}


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
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
        (b'{"text": "a \\u0000 b"}', "NUL character"),
        (b'{"text": "\xe6\xbc\xa2 \\u0000"}', "NUL character"),
        (b'{"text": "a \0 b"}', "NUL character"),
        (b"\0\0\0", "NUL character"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b'{"text": "x"} {"text": "y"}', "broken JSON"),
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


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        (b'{"text": "x", "n": NaN}', "n", "nan"),
        (b'{"text": "x", "n": -Infinity}', "n", "-inf"),
        (b'{"text": "x", "n": 1e999}', "n", "inf"),
        (b'{"text": "x", "n": 123456789012345678901234567890}', "n", "123456789012345678901234567890"),
        (b'{"text": "x", "n": -9223372036854775809}', "n", "-9223372036854775809"),
        (b'{"text": "x", "n": 1, "n": 2}', "n", "2"),
        (b'{"text": "x", "n": "\\ud800"}', "n", "\ud800"),
        (b'{"text": "x", "n": ' + b"[" * 900 + b"]" * 900 + b"}", "n", "[" * 900 + "]" * 900),
        (b'\xef\xbb\xbf{"text": "x", "n": 1}', "n", "1"),
        (b'{"text": "x", "n": 1}\r', "n", "1"),
        (b' \t{"text" : "x" , "n":1 } ', "n", "1"),
    ],
)
def test_the_value_of_a_line_is_what_the_json_module_makes_of_it(tmp_path: Path, line: bytes, key: str, value: str) -> None:
    (item,) = read_records(write(tmp_path / "a.jsonl", line + b"\n"))
    assert isinstance(item, Record)
    assert str(item.value[key]) == value
    assert isinstance(raw_text(item), RawText)


def test_a_json_array_is_told_how_to_become_lines(tmp_path: Path) -> None:
    (item,) = read_records(write(tmp_path / "a.jsonl", json.dumps(ROWS).encode()))
    assert isinstance(item, BrokenRecord)
    assert (item.reason, item.detail) == ("not an object", "an array of 50; write one object a line")
    first, *_ = read_records(write(tmp_path / "a.jsonl", json.dumps(ROWS, indent=1).encode()))
    assert isinstance(first, BrokenRecord)
    assert "one object a line, not an array" in first.detail


def test_an_id_that_is_made_stays_unique_over_folders_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    ids = []
    for place in ("a", "b", "moved/a"):
        (tmp_path / place).mkdir(parents=True)
        text = {"text": f"Text of {place[-1]}", "id": None}
        (item,) = read_records(write(tmp_path / place / "part-0.jsonl", json.dumps(text).encode()))
        assert isinstance(item, Record)
        made = raw_text(item)
        assert isinstance(made, RawText)
        ids.append(made.id)
    assert ids[0].startswith("part-0.jsonl:1:")
    assert ids[0] == ids[2] != ids[1]


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.md: unknown suffix; known: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt"):
        read_records(write(tmp_path / "a.md", b"x"))
