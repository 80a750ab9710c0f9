"""JSON lines -> records. Also: where a .jsonl file can be cut.

Every line is parsed by msgspec, which is three times as fast as the json module and takes nothing that json refuses. What msgspec does
not take is examined by json, which also knows NaN, numbers beyond a float, and escapes of lone surrogates: the outcome is json's.
A byte order mark before an object and carriage returns before line ends are passed over, as are blank lines.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from megatron_instruct.corpora.items import BrokenRecord, Record, Slice
from megatron_instruct.errors import InputError

BLOCK_BYTES = _CHUNK = 1 << 20
_BUFFER = 1 << 18


def json_lines(lines: Iterable[bytes], path: Path, *, first_line: int = 1) -> Iterator[Record | BrokenRecord]:
    """Yield the object of each line that is not blank. first_line: number of the first of `lines` in the file `path`."""
    decode = msgspec.json.Decoder().decode
    number = first_line - 1
    for line in lines:
        number += 1
        try:
            value = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if line.strip():
                yield examined(line, path, number)
        else:
            yield Record(path, number, value) if type(value) is dict else _no_object(value, line, path, number)


def examined(line: bytes, path: Path, number: int) -> Record | BrokenRecord:
    """Return what the json module says of a line that is not blank."""
    if b"\0" in line:
        return broken(path, number, "NUL character", "the line holds a NUL byte", line)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return broken(path, number, "invalid UTF-8", str(error), line)
    except (ValueError, RecursionError) as error:
        array = "; a .jsonl file holds one object a line, not an array" if number == 1 and line.lstrip().startswith(b"[") else ""
        return broken(path, number, "broken JSON", f"{error}{array}", line)
    return Record(path, number, value) if isinstance(value, dict) else _no_object(value, line, path, number)


def broken(path: Path, line: int, reason: str, detail: str, raw: bytes) -> BrokenRecord:
    """Return a line that cannot be read; bytes that are no UTF-8 are spelled out."""
    return BrokenRecord(path, line, reason, detail, raw.decode("utf-8", "backslashreplace").rstrip("\r\n"))


def _no_object(value: object, line: bytes, path: Path, number: int) -> BrokenRecord:
    what = f"an array of {len(value)}; write one object a line" if isinstance(value, list) else f"a {type(value).__name__}"
    return broken(path, number, "not an object", what, line)


def read_lines(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """Read a .jsonl file, or bytes [start, end) of one."""
    with open(piece.path, "rb", buffering=_BUFFER) as stream:
        stream.seek(piece.start)
        lines = stream if piece.whole else _lines_before(stream, piece)
        yield from json_lines(lines, piece.path, first_line=piece.first_line)


def _lines_before(stream: IO[bytes], piece: Slice) -> Iterator[bytes]:
    left = piece.end - piece.start
    for line in stream:
        yield line
        left -= len(line)
        if left <= 0:
            return
    if left > 0:
        raise _shorter(piece)


def _shorter(piece: Slice) -> InputError:
    return InputError(f"{piece.path} became shorter while it was read: {piece} is not all there; run the same command again.")


def line_blocks(piece: Slice) -> Iterator[bytes]:
    """Yield a slice of a .jsonl file in blocks of whole lines, about BLOCK_BYTES each."""
    left = piece.end - piece.start
    with open(piece.path, "rb") as stream:
        stream.seek(piece.start)
        while left > 0:
            content = stream.read(min(BLOCK_BYTES, left))
            if not content:
                raise _shorter(piece)
            if not content.endswith(b"\n"):
                content += stream.readline()
            left -= len(content)
            yield content


def is_utf8(content: bytes) -> bool:
    """Whether all of it is UTF-8, which msgspec checks in what it returns only."""
    try:
        return content.isascii() or bool(content.decode())
    except UnicodeDecodeError:
        return False


def cut_lines(path: Path, part_bytes: int) -> list[Slice]:
    """Cut a .jsonl file between lines into slices of about `part_bytes` bytes, each at least one line."""
    with open(path, "rb") as stream:
        return list(_cut(stream, path, path.stat().st_size, part_bytes))


def _cut(stream: IO[bytes], path: Path, size: int, part_bytes: int) -> Iterator[Slice]:
    start, first_line = 0, 1
    if _is_blank(stream):
        part_bytes = size  # so that it is read in one piece, and noticed to be empty
    while start < size:
        lines, left, last = 0, part_bytes, b""
        while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
            lines, left, last = lines + chunk.count(b"\n"), left - len(chunk), chunk[-1:]
        if last != b"\n":
            stream.readline()
            lines += 1
        end, whole = stream.tell(), start == 0 and stream.tell() == size
        yield Slice(path=path, start=start, end=end, first_line=first_line, lines=lines, whole=whole, size=end - start)
        start, first_line = end, first_line + lines


def _is_blank(stream: IO[bytes]) -> bool:
    """Return whether a file holds nothing but white space; it is at its start before and after."""
    blank = all(chunk.isspace() for chunk in iter(lambda: stream.read(_CHUNK), b""))
    stream.seek(0)
    return blank
