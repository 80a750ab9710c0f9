"""A corpus cut into parts that can be read apart, by several processes or one after another.

Comes in: files. Goes out: parts in the order of the input; read one after another they give every record once, with the line it
has in its file. A .jsonl file is cut between lines; a file of any other kind stays whole, since it can only be read from its
start. Small neighbours share a part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_instruct.corpora.read import BrokenRecord, Record, json_lines, read_records

_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Bytes [start, end) of a file."""

    path: Path
    start: int
    end: int
    first_line: int
    """Line at `start`, from 1."""
    lines: int | None
    """Lines in the slice; None where only reading tells."""
    whole: bool
    """The slice is the whole file."""

    def __str__(self) -> str:
        if self.lines is None or self.whole:
            return str(self.path)
        return f"{self.path} lines {self.first_line} to {self.first_line + self.lines - 1}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is read in one piece of work: a slice of a large file, or several small files."""

    slices: tuple[Slice, ...]

    @property
    def lines(self) -> int | None:
        """Number of lines, where it is known before reading."""
        counts = [piece.lines for piece in self.slices]
        return None if None in counts else sum(count for count in counts if count is not None)

    def __str__(self) -> str:
        first, last = self.slices[0], self.slices[-1]
        return str(first) if len(self.slices) == 1 else f"{first} to {last} ({len(self.slices)} pieces)"


def plan_parts(files: Sequence[Path], *, part_bytes: int) -> list[Part]:
    """Cut files into parts of about `part_bytes` bytes, each at least one line."""
    parts: list[Part] = []
    gathered: list[Slice] = []
    for piece in _slices(files, part_bytes):
        if gathered and sum(one.end - one.start for one in gathered) + piece.end - piece.start > part_bytes:
            parts.append(Part(slices=tuple(gathered)))
            gathered = []
        gathered.append(piece)
    return [*parts, Part(slices=tuple(gathered))] if gathered else parts


def read_part(part: Part) -> Iterator[Record | BrokenRecord]:
    """Yield the records of one part in order."""
    for piece in part.slices:
        if piece.whole:
            yield from read_records(piece.path)
            continue
        with open(piece.path, "rb") as stream:
            stream.seek(piece.start)
            yield from json_lines(_lines_before(stream, piece.end - piece.start), piece.path, first_line=piece.first_line)


def _lines_before(stream: IO[bytes], remaining: int) -> Iterator[bytes]:
    while remaining > 0 and (line := stream.readline()):
        remaining -= len(line)
        yield line


def _slices(files: Sequence[Path], part_bytes: int) -> Iterator[Slice]:
    for path in files:
        size = path.stat().st_size
        if path.suffix != ".jsonl" or size == 0:
            yield Slice(path=path, start=0, end=size, first_line=1, lines=None, whole=True)
            continue
        with open(path, "rb") as stream:
            yield from _cut(stream, path, size, part_bytes)


def _cut(stream: IO[bytes], path: Path, size: int, part_bytes: int) -> Iterator[Slice]:
    start, first_line = 0, 1
    while start < size:
        lines, left, last = 0, part_bytes, b""
        while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
            lines, left, last = lines + chunk.count(b"\n"), left - len(chunk), chunk[-1:]
        if last != b"\n":
            stream.readline()
            lines += 1
        end = stream.tell()
        yield Slice(path=path, start=start, end=end, first_line=first_line, lines=lines, whole=start == 0 and end == size)
        start, first_line = end, first_line + lines
