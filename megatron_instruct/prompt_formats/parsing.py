"""Completions of a synthesizer -> instruction-response pairs, and what was dropped with its reason; and pairs -> the same form.

The form (arXiv:2406.14491 and the public synthesizer's card): chunks that end with an end marker, each a question marker, a question, an
answer marker, an answer. Inside, four kinds of pairs: free-form; a question that lists options; a question that asks to think step by step,
whose answer gives a rationale and then the answer; both. Does not know: prompts, texts, filters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_instruct.files import encodable
from megatron_instruct.records import InstructionPair, PairKind


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLayout:
    """How a pair is written; part of a prompt format."""

    question: str
    """Marker in front of the question."""
    answer: str
    """Marker in front of the answer."""
    end: str
    """Marker that ends a pair."""
    blank: str = " "
    """Between a marker and what it is in front of."""
    separator: str = " "
    """Between a question and its answer."""
    before_end: str = " "
    """In front of the end marker."""
    between: str = "\n\n"
    """Between two pairs."""
    complete_at_stop: bool = False
    """A last pair without its end marker counts when the synthesizer stopped by itself."""
    options: str = "Options:"
    """Line in front of the options, each a line that begins with "- "."""
    think: str = "Let's think step by step."
    """Line at the end of a question that asks for a rationale."""
    therefore: str = "Therefore, the answer is"
    """Begins the line that gives the answer after a rationale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A piece of a completion, or a pair, that is not kept."""

    reason: str
    """Short and countable."""
    content: str
    detail: str = ""
    """What was measured, where the reason does not say it all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """A completion taken apart."""

    pairs: tuple[InstructionPair, ...]
    dropped: tuple[Dropped, ...]


class _NoPair(Exception):
    """A chunk is no pair, for the reason that it carries."""


def parse_pairs(completion: str, layout: PairLayout, *, stopped: bool) -> Parsed:
    """Take the pairs out of a completion.

    stopped: the synthesizer ended by itself, rather than at the limit of new tokens.
    Nothing is lost: every visible piece becomes a pair or is among the dropped, and where there is none, the completion is.
    What is no Unicode, half of a surrogate pair, is replaced, since no file could hold it.
    """
    completion = encodable(completion)
    *chunks, tail = completion.split(layout.end)
    pairs: list[InstructionPair] = []
    dropped: list[Dropped] = []
    if stopped and layout.complete_at_stop and tail.strip():
        chunks, tail = [*chunks, tail], ""
    for chunk in chunks:
        if not chunk.strip():
            if not layout.complete_at_stop:
                dropped.append(Dropped(reason="empty pair", content=chunk + layout.end))
            continue
        try:
            pair = _pair(chunk, layout)
            if any(pair.question.casefold() == earlier.question.casefold() for earlier in pairs):
                raise _NoPair("repeated question")
            pairs.append(pair)
        except _NoPair as reason:
            dropped.append(Dropped(reason=str(reason), content=chunk.strip()))
    if tail.strip():
        dropped.append(Dropped(reason="incomplete pair", content=tail.strip()))
    if not pairs and not dropped:
        dropped.append(Dropped(reason="empty completion", content=completion))
    return Parsed(pairs=tuple(pairs), dropped=tuple(dropped))


def write_pairs(pairs: Sequence[InstructionPair], layout: PairLayout) -> str:
    """Write pairs in the form that `parse_pairs` reads."""
    return layout.between.join(_written(pair, layout) for pair in pairs)


def _pair(chunk: str, layout: PairLayout) -> InstructionPair:
    """Read one chunk, without its end marker."""
    question, answer = _two_parts(chunk, layout.question, layout.answer)
    question, thinks = _without_request_to_think(question, layout)
    question, options = _without_options(question, layout)
    rationale = None
    if thinks:
        rationale, found, answer = (part.strip() for part in answer.rpartition(layout.therefore))
        if not found:
            raise _NoPair("no answer after the rationale")
        answer = answer.removeprefix(":").removeprefix("：").strip()
    if not question or not answer or rationale == "":
        raise _NoPair("empty question or answer")
    if "\0" in chunk:
        raise _NoPair("NUL character")  # no document may hold one
    return InstructionPair(question=question, answer=answer, kind=kind_of(options, rationale), options=options, rationale=rationale)


def _two_parts(chunk: str, first: str, second: str) -> tuple[str, str]:
    chunk = chunk.strip()
    if not chunk.startswith(first):
        raise _NoPair("no marker at the beginning")
    if chunk.count(second) != 1 or chunk.count(first) != 1:
        raise _NoPair("not exactly one question and one answer")
    before, _, after = chunk.removeprefix(first).partition(second)
    return before.strip(), after.strip()


def _without_request_to_think(question: str, layout: PairLayout) -> tuple[str, bool]:
    if not question.endswith(layout.think):
        return question, False
    return question.removesuffix(layout.think).strip(), True


def _without_options(question: str, layout: PairLayout) -> tuple[str, tuple[str, ...]]:
    """Take a trailing list of options off the question; a list in which a line is no option is part of the question."""
    found = re.fullmatch(rf"(?:(.*)\n)?{re.escape(layout.options)}[ \t\r]*\n(.*)", question, re.DOTALL)
    lines = [line.strip() for line in found[2].split("\n") if line.strip()] if found else []
    if not found or not lines or not all(line.startswith("- ") and line[2:].strip() for line in lines):
        return question, ()
    return (found[1] or "").strip(), tuple(line[2:].strip() for line in lines)


def kind_of(options: Sequence[str], rationale: str | None) -> PairKind:
    """Return the kind of a pair that has these options and this rationale."""
    if options:
        return "options" if rationale is None else "options_chain_of_thought"
    return "free_form" if rationale is None else "chain_of_thought"


def written_question(pair: InstructionPair, layout: PairLayout, *, marker: bool = True) -> str:
    """Write a question alone, with its options and its request to think, after its marker or without one."""
    question = pair.question
    if pair.options:
        question += f"\n{layout.options}\n" + "\n".join(f"- {option}" for option in pair.options)
    if pair.rationale is not None:
        question += f"\n{layout.think}"
    return f"{layout.question}{layout.blank}{question}" if marker else question


def read_answer(text: str, layout: PairLayout) -> str:
    """Return the answer at the beginning of a completion that a question alone was answered with; after a rationale, where there is one."""
    answer = text.lstrip().removeprefix(layout.answer).lstrip().partition(layout.end)[0].strip()
    return answer.rpartition(layout.therefore)[2].strip(" :：\n") if layout.therefore in answer else answer


def _written(pair: InstructionPair, layout: PairLayout) -> str:
    answer = pair.answer if pair.rationale is None else f"{pair.rationale}\n{layout.therefore}{layout.blank}{pair.answer}"
    return f"{written_question(pair, layout)}{layout.separator}{layout.answer}{layout.blank}{answer}{layout.before_end}{layout.end}"
