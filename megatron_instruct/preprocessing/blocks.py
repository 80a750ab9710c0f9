"""A part of the corpus -> blocks of documents, about a megabyte each, read with as little work per document as possible.

Comes in: a `Part`. Goes out: blocks whose texts lie in one list for each JSON key, ready to be encoded together. Lines of a .jsonl file
that hold nothing but plain or rendered documents are read by msgspec; what it refuses goes to the careful readers of corpora, one line
at a time, which say what is wrong or accept it. So a line's fate depends on the line alone. Does not know: tokens.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET

from megatron_instruct.corpora.lines import BLOCK_BYTES, is_utf8, json_lines, line_blocks
from megatron_instruct.corpora.parts import Part, Slice, read_part
from megatron_instruct.corpora.read import BrokenRecord, Record
from megatron_instruct.preprocessing.documents import Document, DocumentMaker, Spans, checked_spans, rendered_document
from megatron_instruct.records import MShotExample
from megatron_instruct.templates.rendering import Rendering

_BLOCK_DOCUMENTS = 1 << 14
_BREAK, _OPEN, _CLOSE = b"\n{}"
_HIGH_BITS = np.uint64(0x8080808080808080)
_NOT_DECODED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass
class Block:
    """Documents in the order of the input, and the records between them that are none."""

    path: Path
    columns: tuple[list[str], ...]
    """Texts of the documents, a list for each JSON key."""
    numbers: list[int] = field(default_factory=list)
    """Line, or row, of each document."""
    raw: list[bytes | dict[str, Any]] = field(default_factory=list)
    """Each document as it was read; nothing where `content` has them all."""
    content: bytes | None = None
    """The lines of the documents, where every line is one."""
    spans: dict[int, Spans] = field(default_factory=dict)
    """Roles of the documents that have them, by their place in the block."""
    rendered: dict[int, Rendering] = field(default_factory=dict)
    """How the documents that were rendered here came about, by their place in the block."""
    broken: list[BrokenRecord] = field(default_factory=list)

    @cached_property
    def _lines(self) -> list[bytes]:
        return (self.content or b"").split(b"\n")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.numbers)

    def reject(self, place: int, reason: str, detail: str) -> BrokenRecord:
        """Return one of the documents as a broken record."""
        number, raw = self.numbers[place], self.raw[place] if self.content is None else self._lines[place]
        if isinstance(raw, bytes):
            return BrokenRecord(self.path, number, reason, detail, raw.decode("utf-8", "backslashreplace").rstrip("\r\n"))
        return Record(self.path, number, raw).broken(reason, detail)

    def add(self, item: Document | BrokenRecord, number: int, raw: bytes | dict[str, Any]) -> None:
        if isinstance(item, BrokenRecord):
            self.broken.append(item)
            return
        place = len(self.numbers)
        for column, text in zip(self.columns, item.texts, strict=True):
            column.append(text)
        self.numbers.append(number)
        self.raw.append(raw)
        if item.spans is not None:
            self.spans[place] = item.spans
        if item.rendering is not None:
            self.rendered[place] = item.rendering


class BlockReader:
    """Reads parts into blocks."""

    def __init__(self, json_keys: tuple[str, ...], maker: DocumentMaker) -> None:
        self._keys, self._maker = json_keys, maker
        self._names = [f"text_{place}" for place in range(len(json_keys))]
        self._decode = _row_decoder(dict(zip(self._names, json_keys, strict=True)))

    def blocks(self, part: Part) -> Iterator[Block]:
        """Yield the documents of a part in order."""
        for piece in part.slices:
            if piece.path.suffix == ".jsonl" and piece.end > piece.start:
                yield from self._fast(piece)
            else:
                yield from self._careful(read_part(Part(slices=(piece,))))

    def _fast(self, piece: Slice) -> Iterator[Block]:
        number, found = piece.first_line, False
        for content in line_blocks(piece):
            all_utf8 = content.isascii() or is_utf8(beside_ascii(content))
            block = self._decoded(content, piece.path, number) if all_utf8 else None
            block = block or self._line_by_line(content, piece.path, number, all_utf8=all_utf8)
            found = found or len(block) + len(block.broken) > 0
            number += len(block) if block.content is not None else content.count(b"\n")
            yield block
        if piece.whole and not found:
            yield from self._careful(read_part(Part(slices=(piece,))))  # a file of blank lines: let its reader say so

    def _decoded(self, content: bytes, path: Path, number: int) -> Block | None:
        """Return the block when every line is a plain document, else None."""
        if self._decode is None:
            return None
        try:
            rows = self._decode(content)
        except _NOT_DECODED:
            return None
        if len(rows) != _lines_of_objects(content):
            return None
        columns = tuple(list(map(operator.attrgetter(name), rows)) for name in self._names)
        for column in columns:
            if not all(column) or any(map(str.isspace, column)) or any(map(operator.contains, column, repeat("\0"))):
                return None
        return Block(path, columns, numbers=list(range(number, number + len(rows))), content=content)

    def _line_by_line(self, content: bytes, path: Path, first: int, *, all_utf8: bool) -> Block:
        block, examples = self._empty_block(path), False
        for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), first):
            document = self._at_once(line, examples=examples) if all_utf8 or is_utf8(line) else None
            if document is not None:
                block.add(document, number, line)
                examples = document.rendering is not None  # then the next line is likely one, too
                continue
            examples = False
            for item in json_lines([line], path, first_line=number):
                block.add(item if isinstance(item, BrokenRecord) else self._maker.document(item), number, line)
        return block

    def _at_once(self, line: bytes, *, examples: bool) -> Document | None:
        """Return the document of a line when it is of a known kind and nothing is wrong with it. examples: what to look for first."""
        if examples:
            return self._example(line)
        return self._plain(line) or self._augmented(line) or self._example(line)

    def _plain(self, line: bytes) -> Document | None:
        """Return the document of a line when it is a plain one and nothing is wrong with it."""
        block = self._decoded(line, Path(), 0)
        return Document(texts=tuple(texts[0] for texts in block.columns)) if block is not None else None

    def _augmented(self, line: bytes) -> Document | None:
        """Return the document of a line of render_templates.py, when nothing is wrong with it."""
        if self._keys != ("text",):
            return None
        try:
            row = _AUGMENTED.decode(line)
        except _NOT_DECODED:
            return None
        spans = checked_spans(row.spans, row.text) if row.text.strip() and "\0" not in row.text else None
        return None if spans is None or isinstance(spans, str) else Document(texts=(row.text,), spans=spans)

    def _example(self, line: bytes) -> Document | None:
        """Return the document of a line that msgspec takes for an example; it takes no lone surrogate."""
        example = MShotExample.from_line(line) if self._keys == ("text",) else None
        rendering = self._maker.rendering(example) if example is not None else None
        return rendered_document(rendering) if rendering is not None and "\0" not in rendering.document.text else None

    def _careful(self, items: Iterable[Record | BrokenRecord]) -> Iterator[Block]:
        block, characters = None, 0
        for item in items:
            if block is None or block.path != item.path or characters >= BLOCK_BYTES // 2 or len(block) >= _BLOCK_DOCUMENTS:
                if block is not None:
                    yield block
                block, characters = self._empty_block(item.path), 0
            made = item if isinstance(item, BrokenRecord) else self._maker.document(item)
            block.add(made, item.line, item.value if isinstance(item, Record) else {})
            characters += 0 if isinstance(made, BrokenRecord) else sum(map(len, made.texts))
        if block is not None:
            yield block

    def _empty_block(self, path: Path) -> Block:
        return Block(path, tuple([] for _ in self._keys))


class _Augmented(msgspec.Struct, gc=False):
    """A line of augmented.jsonl, as far as it is needed."""

    id: msgspec.Raw
    text: str
    spans: list[tuple[int, int, str]]
    provenance: msgspec.Raw
    shots: msgspec.UnsetType = UNSET  # an example is none of these


_AUGMENTED = msgspec.json.Decoder(_Augmented)


def _row_decoder(names: Mapping[str, str]) -> Callable[[bytes], list[Any]] | None:
    """Return the decoder of lines of plain documents. names: JSON key of each field. None where only the careful readers will do."""
    if {"spans", "shots"} & set(names.values()):
        return None
    fields: list[Any] = [(name, str) for name in names]
    fields += [(mark, msgspec.UnsetType, UNSET) for mark in ("spans", "shots")]  # what has these may be no plain one, and is refused
    return msgspec.json.Decoder(msgspec.defstruct("Row", fields, rename=dict(names), gc=False)).decode_lines


def _lines_of_objects(content: bytes) -> int | None:
    """Return the number of lines when each, if it is JSON, is one object or several; None where msgspec may not read all lines at once.

    It would take an object over two lines, too. But where one line ends with "}" and the next begins with "{", no object goes on: neither
    inside an object nor inside an array does one come right after the other.
    """
    if content.endswith(b"\r\n"):
        content = content.replace(b"\r\n", b"\n")  # neither JSON nor the bounds of its lines depend on it
    characters = np.frombuffer(content, dtype=np.uint8)
    breaks = characters == _BREAK
    lines = int(np.count_nonzero(breaks)) + (not content.endswith(b"\n"))
    between_objects = breaks[1:-1]
    between_objects &= characters[:-2] == _CLOSE
    between_objects &= characters[2:] == _OPEN
    all_are = content.startswith(b"{") and content.endswith((b"}", b"}\n")) and np.count_nonzero(between_objects) == lines - 1
    return lines if all_are else None


def beside_ascii(content: bytes) -> bytes:
    """Return the eight bytes around each one that is not ASCII, and the eight behind: enough to tell whether all is UTF-8, and far less.

    So a character that goes on in the next eight is whole, and what follows it there is what followed it in the content.
    """
    whole = len(content) // 8
    eights = np.frombuffer(content, dtype=np.uint64, count=whole)
    wanted = (eights & _HIGH_BITS) != 0
    wanted[1:] |= wanted[:-1]
    return b"".join((eights[wanted].data, content[8 * whole :]))
