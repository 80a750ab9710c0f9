"""What readers give and take: a record, a record that cannot be read, and the slice of a file to read.

Does not know: files' formats.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class BrokenRecord(NamedTuple):
    """What cannot be read as a record: a line, a row, or all that a damage of the file took."""

    path: Path
    line: int
    reason: str
    """Short and countable, such as "broken JSON"."""
    detail: str
    """What exactly is wrong."""
    raw: str
    """The record as it was read."""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


class Record(NamedTuple):
    """One object of a corpus file. A tuple, since one is made for each document: it takes half the time of a frozen dataclass."""

    path: Path
    line: int
    """Line of the file, or row of the table, from 1."""
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def broken(self, reason: str, detail: str) -> BrokenRecord:
        """Return this record as one that cannot be used, with its reason."""
        try:
            raw = json.dumps(self.value, default=str)
        except RecursionError:  # the parser takes a level or two more than the writer
            raw = "(nested too deeply to be written)"
        return BrokenRecord(self.path, self.line, reason, detail, raw)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A piece of a file that can be read apart from the rest."""

    path: Path
    start: int
    """Where it starts and ends: bytes of a .jsonl or .arrow file, row groups of a .parquet file."""
    end: int
    first_line: int
    """Line or row at `start`, from 1."""
    lines: int | None
    """Lines or rows in the slice; None where only reading tells."""
    whole: bool
    """The slice is the whole file."""
    size: int
    """Its share of the file's bytes."""

    def __str__(self) -> str:
        if self.lines is None or self.whole:
            return str(self.path)
        return f"{self.path} lines {self.first_line} to {self.first_line + self.lines - 1}"


def whole_file(path: Path) -> Slice:
    """Return the slice that is all of a file."""
    size = path.stat().st_size
    return Slice(path=path, start=0, end=size, first_line=1, lines=None, whole=True, size=size)
