"""A corpus cut into parts: every record once, with its place, however it is cut."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_instruct.corpora.lines import line_blocks
from megatron_instruct.corpora.parts import Part, plan_parts, read_part
from megatron_instruct.corpora.read import BrokenRecord, read_records
from megatron_instruct.errors import InputError

ROWS = [{"id": str(number), "text": f"Entry {number}: a ‘kludge’ 漢字.\n" * (number % 7 + 1)} for number in range(500)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.mark.parametrize("part_bytes", [1, 50, 777, 10_000_000])
@pytest.mark.parametrize("last", [b"", b'{"text": "a last line without an end"}', b"\n\n\n"])
def test_parts_give_every_record_once_with_its_line(tmp_path: Path, part_bytes: int, last: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES[:6000].replace(b"\n", b"\n\n", 5) + last)
    small = [tmp_path / f"{number}.txt" for number in range(3)]
    for file in small:
        file.write_bytes(b"text")
    files = [small[0], path, *small[1:]]
    whole = [item for file in files for item in read_records(file)]
    parts = plan_parts(files, part_bytes=part_bytes)
    assert [item for part in parts for item in read_part(part)] == whole
    assert len(parts) == (1 if part_bytes == 10_000_000 else len(parts))
    lines = sum(piece.lines or 0 for part in parts for piece in part.slices)
    assert lines == len(path.read_bytes().splitlines())


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(("part_bytes", "least"), [(1, 50), (3000, 5), (10_000_000, 1)])
def test_tables_are_cut_between_groups_of_rows(tmp_path: Path, name: str, part_bytes: int, least: int) -> None:
    path, table = tmp_path / name, pyarrow.Table.from_pylist(ROWS)
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=10)
    parts = plan_parts([path], part_bytes=part_bytes)
    assert least <= len(parts) <= 50
    assert sum(piece.size for part in parts for piece in part.slices) == pytest.approx(path.stat().st_size, abs=500)
    whole = list(read_records(path))
    assert [item for part in parts for item in read_part(part)] == whole
    assert len(whole) == 500
    assert [part.lines for part in parts if part.lines is not None] == ([] if least == 1 else [len(list(read_part(p))) for p in parts])
    assert str(parts[-1]) == (str(path) if least == 1 else f"{path} lines {whole[-(parts[-1].lines or 0)].line} to 500")


def test_a_file_of_blank_lines_is_noticed_however_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n \r\n" * 100)
    items = [item for part in plan_parts([path], part_bytes=10) for item in read_part(part)]
    assert [item.reason for item in items if isinstance(item, BrokenRecord)] == ["empty file"]


@pytest.mark.parametrize("read", [lambda part: list(read_part(part)), lambda part: list(line_blocks(part.slices[0]))])
def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path, read: Callable[[Part], object]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a line"}\n' * 100)
    parts = plan_parts([path], part_bytes=500)
    read(parts[-1])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"a\.jsonl became shorter while it was read: .* lines \d+ to 100 is not all there"):
        read(parts[-1])
