"""A record of the corpus -> a document: its texts, and who says what in them.

Comes in: an object of any corpus file. By its keys it is an example with pairs (rendered here), a rendered document (text and spans), or
plain text. Goes out: a `Document`, or a `BrokenRecord` with the reason. Does not know: tokens, files.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from msgspec import Struct

from megatron_instruct.corpora.read import BrokenRecord, Record, text_of
from megatron_instruct.errors import InputError
from megatron_instruct.files import sha256_of
from megatron_instruct.records import MShotExample, Role
from megatron_instruct.templates.bank import Bank, load_bank, shipped_bank
from megatron_instruct.templates.rendering import Rendering, fault_of, render
from megatron_instruct.templates.sampling import SAMPLING_VERSION

_EXAMPLE_KEYS = {"id", "shots"}
_AUGMENTED_KEYS = {"id", "text", "spans", "provenance"}
_TEXT_ONLY = ("text",)
_ROLES = frozenset(get_args(Role))


class Spans(NamedTuple):
    """Roles of the characters of a text, as records.AugmentedText has them: no span is empty, the last one ends with the text."""

    ends: Sequence[int]
    roles: Sequence[Role]


class Document(Struct, frozen=True, kw_only=True, gc=False):
    """One document of the data set."""

    texts: tuple[str, ...]
    """One for each JSON key."""
    spans: Spans | None = None
    """Roles of the only text; None where all of it is context."""
    rendering: Rendering | None = None
    """How it came about, where it was rendered here."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What decides how examples are rendered."""

    seed: int
    bank: Path
    extension: Path | None

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these options from others, without reading the bank's templates."""
        files = [self.bank, *([self.extension] if self.extension is not None else [])]
        for file in files:
            if not file.is_file():
                raise InputError(f"template bank {file}: no such file.")
        return {"seed": self.seed, "bank": [sha256_of(file) for file in files], "sampling": SAMPLING_VERSION}


def render_options(*, seed: int, language: str | None, bank: Path | None, extend_bank: Path | None) -> RenderOptions:
    """Resolve the flags of rendering. A bank of the user's own is read at once, so that its faults are told before any work."""
    options = RenderOptions(seed=seed, bank=bank or shipped_bank(language or "en"), extension=extend_bank)
    if bank is not None or extend_bank is not None:
        options.fingerprint()
        load_bank(options.bank, extension=options.extension)
    return options


class DocumentMaker:
    """Makes documents of records. The bank is loaded when the first example is met."""

    def __init__(self, json_keys: tuple[str, ...], options: RenderOptions) -> None:
        self._keys, self._options = json_keys, options
        self._bank: Bank | None = None

    def document(self, record: Record) -> Document | BrokenRecord:
        """Return the document that a record holds. Its roles count where "text" is the only key."""
        value = record.value
        is_example, is_augmented = value.keys() >= _EXAMPLE_KEYS, value.keys() >= _AUGMENTED_KEYS
        if (is_example or is_augmented) and self._keys != _TEXT_ONLY:
            what = "an example with pairs" if is_example else "a document with roles"
            return record.broken("roles need --json-keys text", f"{what} has no other text than its own, and several keys no roles")
        if is_example:
            try:
                example = MShotExample.from_json(value, where=record.where)
            except InputError as error:
                return record.broken("no example", str(error).removeprefix(f"{record.where}: "))
            rendering = self.rendering(example)
            fault = fault_of(rendering)
            return record.broken(*fault) if fault is not None else rendered_document(rendering)
        texts = self._texts(record)
        if isinstance(texts, BrokenRecord) or not is_augmented:
            return texts if isinstance(texts, BrokenRecord) else Document(texts=texts)
        spans = checked_spans(value["spans"], texts[0])
        return record.broken("broken spans", spans) if isinstance(spans, str) else Document(texts=texts, spans=spans)

    def _texts(self, record: Record) -> tuple[str, ...] | BrokenRecord:
        texts = []
        for key in self._keys:
            text = text_of(record, key)
            if isinstance(text, BrokenRecord):
                return text
            texts.append(text)
        return tuple(texts)

    def rendering(self, example: MShotExample) -> Rendering:
        """Render an example; fault_of has not looked at the result."""
        if self._bank is None:
            self._bank = load_bank(self._options.bank, extension=self._options.extension)
        return render(example, self._bank, seed=self._options.seed)


def rendered_document(rendering: Rendering) -> Document:
    document = rendering.document
    return Document(texts=(document.text,), spans=Spans(document.ends, document.roles), rendering=rendering)


def checked_spans(spans: Any, text: str) -> Spans | str:
    """Return the spans [start, end, role] of a rendered document as `Spans`, or what is wrong with them."""
    try:
        starts, ends, roles = zip(*spans, strict=True)
        fit = starts == (0, *ends[:-1]) and ends[-1] == len(text) and all(map(operator.lt, starts, ends))
        if fit and set(map(type, ends)) == {int} and _ROLES.issuperset(roles):
            return Spans(ends, roles)
    except (TypeError, ValueError):
        pass  # said in words below
    return _fault_of_spans(spans, text)


def _fault_of_spans(spans: Any, text: str) -> str:
    end = 0
    for number, span in enumerate(spans if isinstance(spans, list) else [spans]):
        match span:
            case [int(start), int(stop), str(role)] if role in _ROLES and start == end < stop:
                end = stop
            case _:
                return f"span {number} is {json.dumps(span)}; it must be [{end}, end, role]; roles: {', '.join(get_args(Role))}"
    return f"the spans end at {end}; the text has {len(text)} characters"


def set_aside_rows(rendering: Rendering, path: Path, line: int) -> list[Mapping[str, Any]]:
    """Return the rows of the rejects file for the pairs that no template could take; their document stays."""
    return [
        {"path": str(path), "line": line, "reason": f"pair: {one.reason}", "raw_text": one.raw_text_id, "pair": one.pair.to_json()}
        for one in rendering.set_aside
    ]
