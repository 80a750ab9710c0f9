"""The words of the method (arXiv:2406.14491), as values that stages exchange through JSON lines.

raw text -> (synthesis) -> M-shot example: one-shot examples in sequence, each a raw text with its pairs
         -> (templates) -> instruction-augmented text: one document, with the role of every character.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import msgspec
from msgspec import Struct, field

from megatron_instruct.errors import InputError

PairKind = Literal["free_form", "options", "chain_of_thought", "options_chain_of_thought"]
PAIR_KINDS = get_args(PairKind)
Role = Literal["context", "instruction", "response", "glue"]
TokenRole = Literal["context", "instruction", "response", "glue", "end_of_document", "padding"]
"""What a token of a data set is: the role of its characters, or one that was added."""
ROLE_CODES: dict[TokenRole, int] = {role: code for code, role in enumerate(get_args(TokenRole))}
"""The byte that stands for each role in the file PREFIX.roles."""
ROLES_SUFFIX = ".roles"
"""End of the name of the file beside PREFIX.bin that holds one byte per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawText:
    """One document of a raw corpus."""

    id: str
    """Unique in its corpus."""
    text: str


class InstructionPair(Struct, frozen=True, kw_only=True, gc=False):
    """One instruction and its response, grounded in a raw text."""

    question: str
    """The instruction without its options and without a request to think step by step."""
    answer: str
    """The response; with options, the text of the right one."""
    kind: PairKind = "free_form"
    options: tuple[str, ...] = ()
    """Choices in the order they were written; empty unless kind has options."""
    rationale: str | None = None
    """Steps that lead to the answer; None unless kind is a chain of thought."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: synthesizer, revision, prompt format, round, filters passed."""

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answer": self.answer,
            "kind": self.kind,
            "options": list(self.options),
            "rationale": self.rationale,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> "InstructionPair":
        """where: file and line, named in the InputError of a value that is no pair."""
        value = _mapping(value, where)
        kind = value.get("kind", "free_form")
        if kind not in PAIR_KINDS:
            raise InputError(f"{where}: pair kind {kind!r} is none of {', '.join(PAIR_KINDS)}.")
        options, rationale, provenance = value.get("options") or [], value.get("rationale"), value.get("provenance") or {}
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise InputError(f"{where}: 'options' is {options!r}; it must be a list of strings.")
        if not isinstance(rationale, str | None):
            raise InputError(f"{where}: 'rationale' is {rationale!r}; it must be a string or null.")
        return cls(
            question=_text(value, "question", where),
            answer=_text(value, "answer", where),
            kind=cast(PairKind, kind),
            options=tuple(options),
            rationale=rationale,
            provenance=_mapping(provenance, f"{where}: 'provenance'"),
        )


class OneShotExample(Struct, frozen=True, kw_only=True, gc=False):
    """A raw text and the pairs grounded in it; no pairs where none could be parsed: the text then stays raw."""

    id: str
    """The raw text's id."""
    text: str
    pairs: tuple[InstructionPair, ...]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "pairs": [pair.to_json() for pair in self.pairs]}

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> "OneShotExample":
        value = _mapping(value, where)
        pairs = value.get("pairs")
        if not isinstance(pairs, list):
            raise InputError(f"{where}: 'pairs' is {type(pairs).__name__}; it must be a list of pairs.")
        return cls(
            id=_text(value, "id", where),
            text=_text(value, "text", where),
            pairs=tuple(InstructionPair.from_json(pair, where=where) for pair in pairs),
        )


class MShotExample(Struct, frozen=True, kw_only=True, gc=False):
    """One-shot examples in sequence, each written by the synthesizer with the earlier ones before it. One line of examples.jsonl."""

    id: str
    """Id of the first raw text of the chain."""
    shots: tuple[OneShotExample, ...]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "shots": [shot.to_json() for shot in self.shots]}

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> "MShotExample":
        """Raise InputError, which names `where` and the field, for a value that is no example."""
        try:
            example = msgspec.convert(value, cls)
        except msgspec.ValidationError:
            return cls._checked_from_json(value, where=where)
        return example if example._is_complete() else cls._checked_from_json(value, where=where)

    @classmethod
    def from_line(cls, line: bytes | str) -> "MShotExample | None":
        """Read a line of JSON without anything between; None for one that is no example, or where from_json has to say what is wrong."""
        try:
            example = _example_decoder()(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return example if example._is_complete() else None

    def _is_complete(self) -> bool:
        """Whether there are shots and no text is blank, which msgspec does not look at."""
        texts = [text for shot in self.shots for pair in shot.pairs for text in (pair.question, pair.answer)]
        texts += [text for shot in self.shots for text in (shot.id, shot.text)]
        return bool(self.shots) and bool(self.id.strip()) and all(texts) and not any(map(str.isspace, texts))

    @classmethod
    def _checked_from_json(cls, value: Any, *, where: str) -> "MShotExample":
        """Do it field by field, and say which one is wrong."""
        value = _mapping(value, where)
        shots = value.get("shots")
        if not isinstance(shots, list) or not shots:
            raise InputError(f"{where}: 'shots' must be a non-empty list of one-shot examples; this is not an example file of synthesis.")
        return cls(id=_text(value, "id", where), shots=tuple(OneShotExample.from_json(shot, where=where) for shot in shots))


@functools.cache
def _example_decoder() -> Callable[[bytes | str], MShotExample]:
    return msgspec.json.Decoder(MShotExample).decode


class Span(NamedTuple):
    """Characters [start, end) of a document, and what they are."""

    start: int
    end: int
    role: Role


class AugmentedText(Struct, frozen=True, kw_only=True, gc=False):
    """A rendered M-shot example: ONE document. One line of augmented.jsonl."""

    id: str
    text: str
    ends: tuple[int, ...]
    """Where the spans of characters of one role end; the first starts at 0, each other one where the one before ends."""
    roles: tuple[Role, ...]
    """What the characters of each span are."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Raw text ids, and the name of every template drawn."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """In order, without gap or overlap, from 0 to len(text)."""
        return tuple(map(Span, (0, *self.ends[:-1]), self.ends, self.roles))

    def to_json(self) -> dict[str, Any]:
        spans = list(zip((0, *self.ends[:-1]), self.ends, self.roles, strict=True))
        return {"id": self.id, "text": self.text, "spans": spans, "provenance": dict(self.provenance)}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed, not a {type(value).__name__}.")
    return value


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {key!r} is {text!r}; it must be a non-empty string.")
    return text
