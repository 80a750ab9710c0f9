"""Reading takes the memory of a few records, not that of a file, a row group or what a byte of it unpacks to."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_instruct.corpora.parts import plan_parts

MEASURED = """
import resource, sys
from pathlib import Path
from megatron_instruct.corpora.parts import plan_parts, read_part
from megatron_instruct.corpora.read import text_of
import pyarrow.parquet
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
characters = sum(len(text_of(record, "text")) for part in plan_parts([Path(sys.argv[1])], part_bytes=1 << 24) for record in read_part(part))
print(characters, peak() - before)
"""
TEXT = "A text of words, told again and again. " * 50
COUNT = 80_000


def write(path: Path) -> int:
    """Write about 156 MB of text and return its number of characters."""
    texts = [f"{number} {TEXT}" for number in range(COUNT)]
    if path.suffix == ".zst":
        with zstandard.ZstdCompressor().stream_writer(path.open("wb")) as stream:
            for start in range(0, COUNT, COUNT // 8):  # lines of 20 MB that fit into a few kilobytes
                stream.write(json.dumps({"text": "".join(texts[start : start + COUNT // 8])}).encode() + b"\n")
        return sum(map(len, texts))
    table = pyarrow.table({"text": texts})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=COUNT, compression="none", use_dictionary=False)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    return sum(map(len, texts))


@pytest.mark.parametrize(("name", "most"), [("a.parquet", 70), ("a.arrow", 50), ("a.jsonl.zst", 150)])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, name: str, most: int) -> None:
    characters = write(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path / name)], capture_output=True, text=True, check=True)
    read, grown = map(int, done.stdout.split())
    assert read == characters
    assert grown < most, "MiB"


def test_one_file_keeps_several_workers_busy(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow")
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT] * COUNT}), tmp_path / "a.parquet", row_group_size=1000, use_dictionary=False)
    for name in ("a.parquet", "a.arrow"):
        path = tmp_path / name
        parts = plan_parts([path], part_bytes=path.stat().st_size // 8)
        assert 7 <= len(parts) <= 9
        assert sum(part.lines or 0 for part in parts) == COUNT
