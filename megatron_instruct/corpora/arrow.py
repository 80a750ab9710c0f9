"""Arrow streams -> records, by record batches. Also: where an .arrow file can be cut. This is what datasets' `save_to_disk` writes.

The file is a sequence of messages: a schema, record batches, an end mark; the Arrow file format is the same after eight bytes and is read,
too (source: Arrow columnar format 1.5, 'Serialization and Interprocess Communication'). A batch whose content is wrong is one
`BrokenRecord` and the next is read on; where the messages themselves break off, the rest is one ("truncated file", "damaged file").
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.items import BrokenRecord, Record, Slice
from megatron_instruct.corpora.tables import damage, load_pyarrow, raise_if_refused, rows_of, table_errors
from megatron_instruct.errors import InputError

_FILE_MAGIC = b"ARROW1\0\0"
_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_arrow(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """Read an .arrow file, or the record batches between bytes [start, end) of one."""
    pyarrow = load_pyarrow(piece.path)
    with pyarrow.OSFile(str(piece.path)) as source:
        schema = _schema(source, piece.path)
        if isinstance(schema, BrokenRecord):
            yield schema
            return
        if not piece.whole:
            source.seek(piece.start)
        row = piece.first_line
        to_the_end = piece.whole or piece.end >= source.size()  # then the end mark belongs to the slice, too
        for batch in _batches(source, schema, piece.path, row, None if to_the_end else piece.end):
            if isinstance(batch, BrokenRecord):
                yield batch
            else:
                yield from rows_of(batch, piece.path, row)
                row += batch.num_rows


def _schema(source: Any, path: Path) -> Any:
    """Read the schema at the start of a file; what comes next are its record batches."""
    import pyarrow

    magic = source.read(len(_FILE_MAGIC))
    if not magic:
        return BrokenRecord(path, 1, "empty file", "the file holds no document", "")
    source.seek(len(_FILE_MAGIC) if magic == _FILE_MAGIC else 0)
    try:
        return pyarrow.ipc.read_schema(source)
    except table_errors() as error:
        raise_if_refused(error)
        return damage(path, 1, "damaged file", f"not a readable Arrow stream ({error})")


def _batches(source: Any, schema: Any, path: Path, row: int, end: int | None) -> Iterator[Any]:
    """Yield the record batches up to byte `end`, and a `BrokenRecord` where one cannot be read."""
    import pyarrow

    while end is None or source.tell() < end:
        at = source.tell()
        try:
            message = pyarrow.ipc.read_message(source)
        except EOFError:
            source.seek(at)
            if source.read(len(_END)) != _END:
                yield damage(path, row, "truncated file", "the stream has no end mark; records after this place are lost")
            return
        except table_errors() as error:
            raise_if_refused(error)
            reason = "truncated file" if source.tell() >= source.size() else "damaged file"
            yield damage(path, row, reason, f"records after this place are lost ({error})")
            return
        if message.type == "dictionary":
            raise InputError(f"{path} has dictionary-encoded columns, which are not read; save it with plain columns.")
        batch = _batch(message, schema, path, row)
        row += 0 if isinstance(batch, BrokenRecord) else batch.num_rows
        yield batch


def _batch(message: Any, schema: Any, path: Path, row: int) -> Any:
    import pyarrow

    try:
        batch = pyarrow.ipc.read_record_batch(message, schema)
        batch.validate()
    except table_errors() as error:
        raise_if_refused(error)
        return damage(path, row, "damaged record batch", f"its rows are lost ({error})")
    if batch.num_rows > message.body.size:
        return damage(path, row, "damaged record batch", f"{batch.num_rows:,} rows in {message.body.size:,} bytes")
    return batch


def cut_arrow(path: Path, part_bytes: int) -> list[Slice]:
    """Cut an .arrow file between record batches into slices of about `part_bytes` bytes; none where it cannot or need not be cut."""
    size = path.stat().st_size
    if size <= part_bytes:
        return []
    pyarrow = load_pyarrow(path)
    slices: list[Slice] = []
    with pyarrow.memory_map(str(path)) as source:  # touches the messages' heads, not the texts
        schema = _schema(source, path)
        if isinstance(schema, BrokenRecord):
            return []
        start, first_row, rows = source.tell(), 1, 0
        for batch in _batches(source, schema, path, 1, None):
            if isinstance(batch, BrokenRecord):
                return [*slices, _slice(path, start, size, first_row, None)] if slices else []  # what is damaged stays in one piece
            rows, end = rows + batch.num_rows, source.tell()
            if end - start >= part_bytes and size - end > len(_END):
                slices.append(_slice(path, start, end, first_row, rows))
                start, first_row, rows = end, first_row + rows, 0
    return [*slices, _slice(path, start, size, first_row, rows)] if slices else []


def _slice(path: Path, start: int, end: int, first_row: int, rows: int | None) -> Slice:
    return Slice(path=path, start=start, end=end, first_line=first_row, lines=rows, whole=False, size=end - start)
