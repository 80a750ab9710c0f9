"""Damaged files: what is sound is read, what is not is named, and nothing altered is taken for sound."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_instruct.corpora.parts import plan_parts, read_part
from megatron_instruct.corpora.read import BrokenRecord, Record, read_records

ROWS = [{"id": str(number), "text": f"Entry {number}: a ‘kludge’ 漢字.\n" * (number % 7 + 1)} for number in range(200)]
ENCODED = [json.dumps(row).encode() + b"\n" for row in ROWS]
LINES = b"".join(ENCODED)
ZSTANDARD = zstandard.ZstdCompressor(write_checksum=True)


def read(path: Path) -> tuple[list[Record], list[BrokenRecord]]:
    items = list(read_records(path))
    assert [item for part in plan_parts([path], part_bytes=500) for item in read_part(part)] == items, "parts see the same damage"
    return [item for item in items if isinstance(item, Record)], [item for item in items if isinstance(item, BrokenRecord)]


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", ZSTANDARD.compress)])
def test_a_truncated_file_gives_what_is_before_its_end(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / name
    path.write_bytes((pack(LINES[:9000]) + pack(LINES[9000:]))[:-30])
    records, broken = read(path)
    assert 9000 // max(map(len, ENCODED)) < len(records) <= 200
    assert [record.value for record in records] == ROWS[: len(records)]
    (end,) = broken
    assert (end.reason, end.line) == ("truncated file", len(records) + 1)
    assert LINES.startswith(b"".join(ENCODED[: len(records)]) + end.raw.encode())
    assert "fetch it again" in end.detail


def test_a_complete_last_record_without_its_line_end_is_kept(tmp_path: Path) -> None:
    path, frame = tmp_path / "a.jsonl.zst", ZSTANDARD.compressobj()
    start = frame.compress(ENCODED[0] + ENCODED[1].rstrip(b"\n")) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path.write_bytes(start)
    records, broken = read(path)
    assert [record.value for record in records] == ROWS[:2]
    assert [(item.reason, item.line, item.raw) for item in broken] == [("truncated file", 3, "")]


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", ZSTANDARD.compress)])
@pytest.mark.parametrize("place", range(1, 30, 4))
def test_no_record_of_an_altered_member_is_taken(tmp_path: Path, name: str, pack: Callable[[bytes], bytes], place: int) -> None:
    good, altered = pack(b"".join(ENCODED[:50])), bytearray(pack(b"".join(ENCODED[50:])))
    altered[len(altered) * place // 30] ^= 0x10
    (tmp_path / name).write_bytes(good + altered)
    records, broken = read(tmp_path / name)
    assert [item.reason for item in broken] in (["damaged file"], ["truncated file"])
    assert [record.value for record in records[:50]] == ROWS[:50]
    if broken[0].reason == "damaged file":
        assert len(records) == 50


def test_what_is_not_compressed_or_has_a_tail_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(LINES)
    records, broken = read(path)
    assert (records, [(item.reason, item.line) for item in broken]) == ([], [("damaged file", 1)])
    path.write_bytes(gzip.compress(LINES) + b"tail")
    records, broken = read(path)
    assert (len(records), [(item.reason, item.line) for item in broken]) == (200, [("damaged file", 201)])
    path.write_bytes(gzip.compress(LINES) + bytes(100))
    assert len(read(path)[0]) == 200, "zeros pad a file"
    assert not read(path)[1]


def test_frames_that_carry_no_text_are_passed_over(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + ZSTANDARD.compress(LINES) + skipped)
    records, broken = read(tmp_path / "a.jsonl.zst")
    assert (len(records), broken) == (200, [])


def parquet(path: Path, **settings: object) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=50, **settings)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "no footer", "not parquet"])
def test_a_parquet_file_without_a_sound_footer_is_one_damage(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    content = parquet(path)
    path.write_bytes({"cut": content[:2000], "no footer": content[:-208] + bytes(200) + content[-8:], "not parquet": LINES}[damage])
    records, broken = read(path)
    assert (records, [(item.reason, item.line) for item in broken]) == ([], [("damaged file", 1)])


def test_a_flipped_page_costs_the_rest_of_its_row_group_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = bytearray(parquet(path, write_page_checksum=True, compression="none", use_dictionary=False))
    content[content.index(b"Entry 70:")] ^= 1
    path.write_bytes(content)
    records, broken = read(path)
    assert [record.value for record in records] == ROWS[:50] + ROWS[100:]
    assert [(item.reason, item.line) for item in broken] == [("damaged row group", 51)]
    assert "rows 51 to 100 cannot be read" in broken[0].detail


def arrow(path: Path) -> bytearray:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=50)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("cut", [1, 8, 20, 3000])
def test_an_arrow_stream_that_ends_early_gives_the_batches_before(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(arrow(path)[:-cut])
    records, broken = read(path)
    assert len(records) == (200 if cut <= 8 else 150)
    assert [record.value for record in records] == ROWS[: len(records)]
    assert [(item.reason, item.line) for item in broken] == [("truncated file", len(records) + 1)]


def test_text_of_a_table_that_is_no_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    for path, content in ((tmp_path / "a.arrow", arrow(tmp_path / "a.arrow")), (tmp_path / "a.parquet", None)):
        content = content or bytearray(parquet(path, compression="none", use_dictionary=False))
        content[content.index(b"Entry 70:")] = 0xFF
        path.write_bytes(content)
        records, broken = read(path)
        assert [record.value for record in records] == ROWS[:70] + ROWS[71:]
        assert [(item.reason, item.line) for item in broken] == [("invalid UTF-8", 71)]


def test_offsets_that_point_out_of_an_arrow_batch_are_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    content = arrow(path)
    offset = len(ROWS[50]["id"])
    place = content.index(offset.to_bytes(4, "little") + (2 * offset).to_bytes(4, "little"), 3000)
    content[place : place + 4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    records, broken = read(path)
    assert broken
    assert len(records) + len(broken) == 200
    assert {item.reason for item in broken} <= {"unreadable row", "invalid UTF-8"}
