"""A corpus cut into parts that can be read apart, by several processes or one after another.

Comes in: files. Goes out: parts in the order of the input; read one after another they give every record once, with the line it
has in its file. A large .jsonl file is cut between lines, a .parquet file between row groups, an .arrow file between record batches; a
file of any other kind stays whole, since it can only be read from its start. Small neighbours share a part.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.formats import format_of
from megatron_instruct.corpora.items import BrokenRecord, Record, Slice, whole_file
from megatron_instruct.corpora.read import read_slice
from megatron_instruct.fingerprints import State
from megatron_instruct.threads import in_threads

__all__ = ["Part", "Slice", "plan_parts", "read_part", "total_lines", "usual_parts"]
_SMALLEST_PART, _LARGEST_PART, _USUAL_PARTS = 1 << 22, 1 << 26, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is read in one piece of work: a slice of a large file, or several small files."""

    slices: tuple[Slice, ...]
    states: tuple[State, ...] | None = None
    """Of the file of each slice, before any was read; None where machines may see other times of a file."""

    def as_of(self, states: Mapping[Path, State]) -> "Part":
        """Return this part of files in these states, so that what is made of changed ones is never finished."""
        return replace(self, states=tuple(states[piece.path] for piece in self.slices))

    @property
    def lines(self) -> int | None:
        """Number of lines, where it is known before reading."""
        return total_lines(self.slices)

    def to_json(self) -> list[list[Any]]:
        """Return what tells this part from others, for a plan of the work."""
        return [[str(piece.path), piece.start, piece.end] for piece in self.slices]

    def __str__(self) -> str:
        first, last = self.slices[0], self.slices[-1]
        return str(first) if len(self.slices) == 1 else f"{first} to {last} ({len(self.slices)} pieces)"


def total_lines(pieces: Iterable[Part | Slice]) -> int | None:
    """Return the lines of all pieces, None where those of one are not known before reading."""
    counts = [piece.lines for piece in pieces]
    return None if None in counts else sum(count for count in counts if count is not None)


def usual_parts(files: Sequence[Path], wanted: int | None = None) -> list[Part]:
    """Cut files into parts for several workers. wanted: how many; None: as many as their size suggests."""
    total = sum(file.stat().st_size for file in files)
    usual = min(max(total // _USUAL_PARTS, _SMALLEST_PART), _LARGEST_PART)
    return plan_parts(files, part_bytes=usual if wanted is None else max(-(-total // wanted), 1))


def plan_parts(files: Sequence[Path], *, part_bytes: int) -> list[Part]:
    """Cut files into parts of about `part_bytes` bytes, each at least one line."""
    parts: list[Part] = []
    gathered: list[Slice] = []
    size = 0
    for piece in _slices(files, part_bytes):
        if gathered and size + piece.size > part_bytes:
            parts.append(Part(slices=tuple(gathered)))
            gathered, size = [], 0
        gathered.append(piece)
        size += piece.size
    return [*parts, Part(slices=tuple(gathered))] if gathered else parts


def read_part(part: Part) -> Iterator[Record | BrokenRecord]:
    """Yield the records of one part in order."""
    for piece in part.slices:
        yield from read_slice(piece)


def _slices(files: Sequence[Path], part_bytes: int) -> Iterator[Slice]:
    def cut(path: Path) -> list[Slice]:
        form = format_of(path)
        slices = form.cut(path, part_bytes) if form is not None and form.cut is not None else []
        return slices or [whole_file(path)]

    return itertools.chain.from_iterable(in_threads(cut, files))
