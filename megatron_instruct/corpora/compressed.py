""".jsonl.gz and .jsonl.zst -> records, in memory of one line.

A compressed file is first unpacked to its end without use, so that no record of it is taken whose check sum is wrong. A file that ends
early ("truncated file") gives the records before its end; one that is altered ("damaged file") those of the members or frames before the
altered one. Either is then one `BrokenRecord`, with what is left of the line that it cut. Sources: RFC 1952 (gzip), RFC 8878 (Zstandard).
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_instruct.corpora.items import BrokenRecord, Record, Slice
from megatron_instruct.corpora.lines import broken, examined, json_lines
from megatron_instruct.errors import MissingPackageError

_CHUNK = 1 << 11
"""Compressed bytes unpacked at a time. Small, since a byte of Zstandard can stand for 32,000."""
_GZIP = 16 + zlib.MAX_WBITS
"""zlib's word for a gzip header and check sum."""
_LONGEST_WINDOW = 1 << 31


class _Member(Protocol):
    """One gzip member or Zstandard frame; a file is a sequence of them."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fault:
    reason: str
    detail: str


def read_gzip(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """Read a .jsonl.gz file."""
    return _read(piece.path, lambda: zlib.decompressobj(_GZIP), zlib.error)


def read_zstandard(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """Read a .jsonl.zst file."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError("zstandard", extra="data", purpose=f"reading {piece.path}") from error
    return _read(piece.path, zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj, zstandard.ZstdError)


def _read(path: Path, new: Callable[[], _Member], error: type[Exception]) -> Iterator[Record | BrokenRecord]:
    with open(path, "rb") as stream:
        usable, fault = _examine(stream, new, error)
        stream.seek(0)
        lines = _Lines(_first(usable, (data for data, _ in _unpacked(stream, new))), whole=fault is None)
        yield from json_lines(lines, path)
        if fault is not None:
            number, cut = lines.count + 1, lines.tail
            tail = examined(cut, path, number) if cut.strip() else None
            if isinstance(tail, Record):
                yield tail
                number, cut = number + 1, b""
            yield broken(path, number, fault.reason, fault.detail, cut)


def _examine(stream: IO[bytes], new: Callable[[], _Member], error: type[Exception]) -> tuple[int, _Fault | None]:
    """Return how many unpacked bytes can be used, and what is wrong with the rest."""
    unpacked = sound = 0
    try:
        for data, ended in _unpacked(stream, new):
            unpacked += len(data)
            if ended:
                sound = unpacked
    except EOFError:
        return unpacked, _Fault(reason="truncated file", detail="the file ends early; records after this place are lost: fetch it again")
    except error as damage:
        detail = f"the file is altered or no such file ({damage}); records after this place are lost: fetch it again"
        return sound, _Fault(reason="damaged file", detail=detail)
    return unpacked, None


def _unpacked(stream: IO[bytes], new: Callable[[], _Member]) -> Iterator[tuple[bytes, bool]]:
    """Yield unpacked bytes, and whether a member ends with them. Raises EOFError where the last member has no end."""
    member: Any = None
    while chunk := stream.read(_CHUNK):
        while chunk:
            if member is None and not (chunk := chunk.lstrip(b"\0")):
                break  # zeros that pad a member
            member = member or new()
            data = member.decompress(chunk)
            ended = member.eof
            chunk, member = (member.unused_data, None) if ended else (b"", member)
            yield data, ended
    if member is not None:
        raise EOFError


def _first(count: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the first `count` bytes of `chunks`, and touch no chunk after them."""
    while count > 0:
        chunk = next(chunks)
        yield chunk[:count]
        count -= len(chunk)


class _Lines:
    """The lines of `chunks`. Unless the file is whole, what follows the last line end is kept apart as `tail`."""

    def __init__(self, chunks: Iterable[bytes], *, whole: bool) -> None:
        self._chunks, self._whole = chunks, whole
        self.count = 0
        """Lines given so far."""
        self.tail = b""

    def __iter__(self) -> Iterator[bytes]:
        pieces: list[bytes] = []
        for chunk in self._chunks:
            first, *lines = chunk.split(b"\n")
            pieces.append(first)
            if not lines:
                continue
            yield b"".join(pieces)
            yield from lines[:-1]
            self.count += len(lines)
            pieces = [lines[-1]]
        last = b"".join(pieces)
        if self._whole:
            yield last
        else:
            self.tail = last
