"""Raw corpora as a stream of objects: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt.

Comes in: files, folders and glob patterns. Goes out: one object per line or row, with the place it was read at.
What cannot be read comes out as a `BrokenRecord` with its reason, so that the caller decides: stop or set aside. That is a line or a row,
a file with nothing in it, or the place where a damaged file cannot be read on. OSError is left to say what a disk or a permission refuses.
Does not know: what the objects mean, beyond `raw_text`, which takes the id and the text out of one.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.find import REJECTS, find_files, require_outside
from megatron_instruct.corpora.formats import FORMATS, format_of
from megatron_instruct.corpora.items import BrokenRecord, Record, Slice, whole_file
from megatron_instruct.corpora.lines import json_lines
from megatron_instruct.errors import InputError
from megatron_instruct.records import RawText

__all__ = [
    "REJECTS",
    "BrokenRecord",
    "Record",
    "find_files",
    "json_lines",
    "raw_text",
    "read_records",
    "read_slice",
    "require_outside",
    "text_of",
]


def read_records(path: Path) -> Iterator[Record | BrokenRecord]:
    """Yield the objects of one file in order, with what cannot be read as `BrokenRecord`."""
    return read_slice(whole_file(path))


def read_slice(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """Yield the objects of a slice of a file. A file without any gives one `BrokenRecord`."""
    form = format_of(piece.path)
    if form is None:
        raise InputError(f"input {piece.path}: unknown suffix; known: {', '.join(FORMATS)}.")
    return _or_empty(form.read(piece), piece.path) if piece.whole else form.read(piece)


def _or_empty(records: Iterator[Record | BrokenRecord], path: Path) -> Iterator[Record | BrokenRecord]:
    first = next(records, None)
    yield first or BrokenRecord(path, 1, "empty file", "the file holds no document", "")
    yield from records


def text_of(record: Record, key: str) -> str | BrokenRecord:
    """Return the text at `key` of an object: a string with a visible character that is proper Unicode without NUL."""
    text = record.value.get(key)
    if type(text) is str and text and not text.isspace() and _is_unicode_without_nul(text):
        return text
    if key not in record.value:
        return record.broken("missing text", f"no key {key!r}; its keys are {', '.join(map(repr, record.value)) or 'none'}")
    if not isinstance(text, str):
        return record.broken("text is no string", f"{key!r} is a {type(text).__name__}")
    if not text or text.isspace():
        return record.broken("empty text", f"{key!r} has no visible character")
    if "\0" in text:
        return record.broken("NUL character", f"{key!r} holds a NUL at character {text.index(chr(0))}")
    return record.broken("lone surrogate", f"{key!r} holds half of a surrogate pair, which is no text")


def raw_text(record: Record, *, text_key: str = "text", id_key: str = "id") -> RawText | BrokenRecord:
    """Take the raw text out of an object.

    An object whose id is absent or null is given one of its file's name, its line and a digest of its text. That stays unique where files
    of several folders have one name, but for repeated texts, and does not depend on where the corpus lies.
    """
    text = text_of(record, text_key)
    if isinstance(text, BrokenRecord):
        return text
    given: Any = record.value.get(id_key)
    return RawText(id=_made_id(record, text) if given is None else str(given), text=text)


def _made_id(record: Record, text: str) -> str:
    return f"{record.path.name}:{record.line}:{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _is_unicode_without_nul(text: str) -> bool:
    try:
        return b"\0" not in text.encode()  # three times as fast as to search a text of wide characters, most of whose bytes are zero
    except UnicodeEncodeError:
        return False
