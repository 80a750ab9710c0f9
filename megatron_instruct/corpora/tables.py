"""Record batches of Apache Arrow -> records. What Parquet and Arrow files have in common.

Batches come from files that may be damaged: nothing of one is looked at before pyarrow has validated it, since a wrong offset would
read foreign memory. A row that does not hold up is a `BrokenRecord`; its neighbours are not lost.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_instruct.corpora.items import BrokenRecord, Record
from megatron_instruct.errors import MissingPackageError

BATCH_BYTES = 1 << 23
"""About so much of a table becomes Python objects at a time."""


def load_pyarrow(path: Path) -> ModuleType:
    """Import pyarrow, which reading `path` needs."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError("pyarrow", extra="data", purpose=f"reading {path}") from error
    return pyarrow  # type: ignore[no-any-return]


def table_errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for a damaged file, or for a value that Python has no object for."""
    import pyarrow

    return (pyarrow.ArrowException, ValueError, OverflowError, OSError, EOFError)


def raise_if_refused(error: Exception) -> None:
    """Raise an OSError that the system gave: then the file is not damaged, the disk or a permission is at fault."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def damage(path: Path, row: int, reason: str, detail: object) -> BrokenRecord:
    """Return the place from which a table cannot be read."""
    return BrokenRecord(path, row, reason, f"{' '.join(str(detail).split())}; fetch the file again", "")


def rows_of(batch: Any, path: Path, first_row: int) -> Iterator[Record | BrokenRecord]:
    """Yield the rows of a pyarrow.RecordBatch. first_row: number of its first row in the file."""
    step = max(1, batch.num_rows * BATCH_BYTES // max(batch.get_total_buffer_size(), BATCH_BYTES))
    for start in range(0, batch.num_rows, step):
        yield from _rows(batch.slice(start, step), path, first_row + start)


def _rows(batch: Any, path: Path, first_row: int) -> Iterator[Record | BrokenRecord]:
    try:
        batch.validate(full=True)
        values = _in_microseconds(batch).to_pylist()
    except table_errors() as error:
        raise_if_refused(error)
        if batch.num_rows == 1:
            reason = "invalid UTF-8" if "utf" in str(error).lower() else "unreadable row"
            yield BrokenRecord(path, first_row, reason, " ".join(str(error).split()), "")
            return
        for row in range(batch.num_rows):
            yield from _rows(batch.slice(row, 1), path, first_row + row)
    else:
        for row, value in enumerate(values, first_row):
            yield Record(path, row, value)


def _in_microseconds(batch: Any) -> Any:
    """Times of nanoseconds become Python's own only with pandas; its microseconds do."""
    import pyarrow

    for number, column in enumerate(batch.schema):
        if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":
            coarser = pyarrow.timestamp("us", column.type.tz)
            batch = batch.set_column(number, column.name, batch.column(number).cast(coarser, safe=False))
    return batch
