"""Parquet -> records, by row groups. Also: where a .parquet file can be cut.

A row group whose check sum, compression or encoding is wrong gives the rows before the damage, then one `BrokenRecord` that names the rows
that are lost; the next row group is read on. A file whose footer is wrong is one `BrokenRecord`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.items import BrokenRecord, Record, Slice
from megatron_instruct.corpora.tables import BATCH_BYTES, damage, load_pyarrow, raise_if_refused, rows_of, table_errors

_MOST_ROWS = 1024
_BUFFER = 1 << 20
"""Bytes of a column read at a time; without it pyarrow reads a row group's whole column."""


def read_parquet(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """Read a .parquet file, or row groups [start, end) of one."""
    file = _opened(piece.path)
    if isinstance(file, BrokenRecord):
        yield file
        return
    with file:
        row = piece.first_line
        for group in range(file.num_row_groups) if piece.whole else range(piece.start, piece.end):
            yield from _read_group(file, group, piece.path, row)
            row += file.metadata.row_group(group).num_rows


def _read_group(file: Any, group: int, path: Path, first_row: int) -> Iterator[Record | BrokenRecord]:
    about = file.metadata.row_group(group)
    row, end = first_row, first_row + about.num_rows
    try:
        for batch in file.iter_batches(batch_size=_batch_rows(about), row_groups=[group], use_threads=False):
            yield from rows_of(batch, path, row)
            row += batch.num_rows
    except table_errors() as error:
        raise_if_refused(error)
        yield damage(path, row, "damaged row group", f"rows {row:,} to {end - 1:,} cannot be read ({error})")
    else:
        if row != end:
            yield damage(path, row, "damaged row group", f"{row - first_row:,} rows where the footer says {about.num_rows:,}")


def _batch_rows(group: Any) -> int:
    bytes_per_row = max(group.total_byte_size // max(group.num_rows, 1), 1)
    return max(1, min(_MOST_ROWS, int(BATCH_BYTES // bytes_per_row)))


def _opened(path: Path) -> Any:
    pyarrow = load_pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except table_errors() as error:
        raise_if_refused(error)
        return damage(path, 1, "damaged file", f"not a readable Parquet file ({error})")


def cut_parquet(path: Path, part_bytes: int) -> list[Slice]:
    """Cut a .parquet file between row groups into slices of about `part_bytes` bytes; none where it cannot or need not be cut."""
    size = path.stat().st_size
    file = _opened(path) if size > part_bytes else None
    if file is None or isinstance(file, BrokenRecord):
        return []
    with file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    rows, weights = [group.num_rows for group in groups], [max(group.total_byte_size, 1) for group in groups]
    slices: list[Slice] = []
    start, first_row, share = 0, 1, size / max(sum(weights), 1)
    for end in range(1, len(groups) + 1):
        weight = int(sum(weights[start:end]) * share)
        if weight < part_bytes and end < len(groups):
            continue
        lines = sum(rows[start:end])
        slices.append(Slice(path=path, start=start, end=end, first_line=first_row, lines=lines, whole=False, size=weight))
        start, first_row = end, first_row + lines
    return slices if len(slices) > 1 and sum(rows) > 0 else []
