"""Raw corpora as a stream of objects: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt.

Comes in: files, folders and glob patterns. Goes out: one object per line or row, with the place it was read at.
A line that cannot be read comes out as a `BrokenRecord` with its reason, so that the caller decides: stop or set aside; so does
a file with nothing in it. A compressed file that ends early is an InputError: nothing says what is missing.
Does not know: what the objects mean, beyond `raw_text`, which takes the id and the text out of one.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_instruct.errors import InputError, MissingPackageError
from megatron_instruct.records import RawText

REJECTS = "rejects.jsonl"
"""End of the names of files that hold what a stage set aside."""
_CHUNK = 1 << 17
"""Bytes of a compressed file read at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One object of a corpus file."""

    path: Path
    line: int
    """Line of the file, or row of the table, from 1."""
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenRecord:
    """A line that is not an object, as it was read."""

    path: Path
    line: int
    reason: str
    """Short and countable, such as "broken JSON"."""
    detail: str
    """What exactly is wrong."""
    raw: str

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Resolve files, folders and glob patterns to a list without repeats; what a folder or a pattern holds is sorted.

    Of a folder, every file of a known suffix is taken, but for the rejects of earlier stages.
    Raises InputError for an input that names nothing, or a file of unknown suffix.
    """
    found: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.is_file() and not file.name.endswith(REJECTS))
            matches = sorted(file for file in files if _reader(file) is not None)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
        if not matches:
            raise InputError(f"input {given}: no such file, folder or pattern; known suffixes: {', '.join(_READERS)}.")
        for match in matches:
            if _reader(match) is None:
                raise InputError(f"input {match}: unknown suffix; known: {', '.join(_READERS)}.")
        found += matches
    return list(dict.fromkeys(found))


def read_records(path: Path) -> Iterator[Record | BrokenRecord]:
    """Yield the objects of one file in order, with what cannot be read as `BrokenRecord`."""
    reader = _reader(path)
    if reader is None:
        raise InputError(f"input {path}: unknown suffix; known: {', '.join(_READERS)}.")
    return _or_empty(reader(path), path)


def raw_text(record: Record, *, text_key: str = "text", id_key: str = "id") -> RawText | BrokenRecord:
    """Take the raw text out of an object; an object without an id is given one from its file and line."""
    text: Any = record.value.get(text_key)
    reason = None
    if text_key not in record.value:
        reason, detail = "missing text", f"no key {text_key!r}; its keys are {', '.join(map(repr, record.value)) or 'none'}"
    elif not isinstance(text, str):
        reason, detail = "text is no string", f"{text_key!r} is a {type(text).__name__}"
    elif not text.strip():
        reason, detail = "empty text", f"{text_key!r} has no visible character"
    elif not _is_unicode(text):
        reason, detail = "lone surrogate", f"{text_key!r} holds half of a surrogate pair, which is no text"
    if reason is not None:
        return BrokenRecord(path=record.path, line=record.line, reason=reason, detail=detail, raw=json.dumps(record.value, default=str))
    return RawText(id=str(record.value.get(id_key, f"{record.path.name}:{record.line}")), text=text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_lines(lines: Iterable[bytes], path: Path, *, first_line: int = 1) -> Iterator[Record | BrokenRecord]:
    """Yield the object of each line that is not blank. first_line: number of the first of `lines` in the file `path`."""
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            yield _broken(path, number, "invalid UTF-8", str(error), line)
        except (ValueError, RecursionError) as error:
            yield _broken(path, number, "broken JSON", str(error), line)
        else:
            if isinstance(value, dict):
                yield Record(path=path, line=number, value=value)
            else:
                yield _broken(path, number, "not an object", f"a {type(value).__name__}", line)


def _broken(path: Path, line: int, reason: str, detail: str, raw: bytes) -> BrokenRecord:
    return BrokenRecord(path=path, line=line, reason=reason, detail=detail, raw=raw.decode("utf-8", "backslashreplace").rstrip("\n"))


def _or_empty(records: Iterator[Record | BrokenRecord], path: Path) -> Iterator[Record | BrokenRecord]:
    found = False
    for item in records:
        found = True
        yield item
    if not found:
        yield BrokenRecord(path=path, line=1, reason="empty file", detail="the file holds no document", raw="")


def _read_jsonl(path: Path) -> Iterator[Record | BrokenRecord]:
    with open(path, "rb") as stream:
        yield from json_lines(stream, path)


def _read_gzip(path: Path) -> Iterator[Record | BrokenRecord]:
    with gzip.open(path, "rb") as stream:
        try:
            yield from json_lines(stream, path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _cut_short(path, error) from error


def _read_zstandard(path: Path) -> Iterator[Record | BrokenRecord]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError("zstandard", extra="data", purpose=f"reading {path}") from error
    with open(path, "rb") as stream:
        try:
            yield from json_lines(_lines(_decompressed(stream, zstandard.ZstdDecompressor())), path)
        except (EOFError, zstandard.ZstdError) as error:
            raise _cut_short(path, error) from error


def _decompressed(stream: IO[bytes], decompressor: Any) -> Iterator[bytes]:
    """Decompress frame by frame, and notice an unfinished one (zstandard 0.25's stream_reader takes it for the end of the file)."""
    frame = None
    while chunk := stream.read(_CHUNK):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is unfinished")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for chunk in chunks:
        lines = chunk.split(b"\n")
        pieces.append(lines[0])
        for line in lines[1:]:
            yield b"".join(pieces)
            pieces = [line]
    yield b"".join(pieces)


def _cut_short(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: the file is cut short or corrupt ({error}); fetch it again.")


def _read_parquet(path: Path) -> Iterator[Record | BrokenRecord]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError("pyarrow", extra="data", purpose=f"reading {path}") from error
    try:
        row = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                row += 1
                yield Record(path=path, line=row, value=value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}).") from error


def _read_text(path: Path) -> Iterator[Record | BrokenRecord]:
    """A .txt file is one document."""
    content = path.read_bytes()
    try:
        yield Record(path=path, line=1, value={"id": path.name, "text": content.decode("utf-8")})
    except UnicodeDecodeError as error:
        yield _broken(path, 1, "invalid UTF-8", str(error), content)


_READERS: dict[str, Callable[[Path], Iterator[Record | BrokenRecord]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_gzip,
    ".jsonl.zst": _read_zstandard,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _reader(path: Path) -> Callable[[Path], Iterator[Record | BrokenRecord]] | None:
    return next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)
