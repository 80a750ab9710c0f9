"""Filters: which parsed pairs are kept. Each is a pure function from a pair and where it stands to a reason for dropping it, or None.

Comes in: a pair, its text, the pairs of that text kept so far. Does not know: engines, prompts. Overlaps are counted in content words
(letters and digits; two characters each in Chinese, Japanese and Korean), cut to their first letters so that inflections agree.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from megatron_instruct.errors import ConfigError, did_you_mean
from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.parsing import Dropped

_STEM = 6
"""Letters of a word that are compared."""
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]+|[^\W_぀-ヿ㐀-鿿가-힯]+")
_CJK = re.compile(r"[぀-ヿ㐀-鿿가-힯]")
_NOTE = re.compile(r"\[[^\]]*\]")
_BEFORE = 80
"""Characters of the text before an answer, bracketed notes left out, in which the subject of its question may be named."""


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Which pairs are kept."""

    filters: tuple[str, ...] = ("length", "repetition", "question", "answer", "options", "duplicate", "grounding", "relevance")
    """Filters, applied in this order: length, repetition, question, answer, options, duplicate, grounding, relevance."""
    max_question_characters: int = 400
    """length: characters of the longest question, without its options."""
    max_answer_characters: int = 1200
    """length: characters of the longest answer, with its rationale."""
    max_repetition: float = 0.5
    """repetition: largest share of the words of a question or an answer that may belong to repeated sequences of three."""
    max_question_overlap: float = 0.8
    """duplicate: largest share of content words that two questions about one text may have in common."""
    min_grounding: float = 0.7
    """grounding: smallest share of the answer's content words that the text must hold."""
    min_relevance: float = 0.6
    """relevance: smallest share of the question's content words that the text, or the answer, must hold."""

    def __post_init__(self) -> None:
        for name in self.filters:
            if name not in FILTERS:
                raise ConfigError(f"filters: {name!r} is unknown{did_you_mean(name, FILTERS)}")
        for name in ("max_repetition", "max_question_overlap", "min_grounding", "min_relevance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be from 0 to 1.")
        for name in ("max_question_characters", "max_answer_characters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")


def keep(
    pairs: Sequence[InstructionPair], text: str, settings: FilterSettings, *, language: str
) -> tuple[list[InstructionPair], list[Dropped]]:
    """Divide the pairs of a text into those that pass every filter and those dropped, with the first reason."""
    kept: list[InstructionPair] = []
    dropped: list[Dropped] = []
    for pair in pairs:
        place = Place(text=text, earlier=tuple(kept), settings=settings, words=_words(language))
        reasons = (FILTERS[name](pair, place) for name in settings.filters)
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            kept.append(pair)
        else:
            dropped.append(Dropped(reason=reason, content=f"{pair.question}\n{pair.answer}"))
    return kept, dropped


@dataclass(frozen=True, kw_only=True)
class Words:
    """What filters know of a language; empty for a language that filters.yaml does not have."""

    function: frozenset[str]
    question: frozenset[str]
    no_answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a pair stands."""

    text: str
    earlier: tuple[InstructionPair, ...]
    settings: FilterSettings
    words: Words


def content_words(text: str, words: Words) -> list[str]:
    """Return the stems of the words that say something, in order, with repeats."""
    found: list[str] = []
    for run in _WORD.findall(text.casefold()):
        if _CJK.match(run):
            found += [run[i : i + 2] for i in range(max(len(run) - 1, 1))]
        elif run not in words.function and run not in words.question:
            found.append((run.removesuffix("s") if len(run) > 3 else run)[:_STEM])
    return found


def length(pair: InstructionPair, place: Place) -> str | None:
    """Drop what is too long to be a question or an answer."""
    if len(pair.question) > place.settings.max_question_characters:
        return "question too long"
    return "answer too long" if len(pair.answer + (pair.rationale or "")) > place.settings.max_answer_characters else None


def repetition(pair: InstructionPair, place: Place) -> str | None:
    """Drop what goes in circles, as small models do."""
    for part in (pair.question, pair.answer, pair.rationale or ""):
        words = part.casefold().split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        repeated = sum(1 for triple in triples if triples.count(triple) > 1)
        if len(triples) >= 4 and repeated / len(triples) > place.settings.max_repetition:
            return "repetition"
    return None


def question(pair: InstructionPair, place: Place) -> str | None:
    """Drop a question without content."""
    return None if content_words(pair.question, place.words) else "question without content"


def answer(pair: InstructionPair, place: Place) -> str | None:
    """Drop an answer that is a question itself, that is the question again, or that says it has none."""
    if pair.answer.rstrip("\"'”’ ").endswith(("?", "？")):
        return "answer is a question"
    if pair.answer.casefold() == pair.question.casefold():
        return "answer repeats the question"
    return "answer says that there is none" if any(phrase in pair.answer.casefold() for phrase in place.words.no_answers) else None


def options(pair: InstructionPair, place: Place) -> str | None:
    """Drop options that leave no choice, repeat, or lack the answer."""
    if not pair.options:
        return None
    plain = [option.casefold().strip(" .") for option in pair.options]
    if len(set(plain)) < max(len(plain), 2):
        return "options repeat or leave no choice"
    return None if pair.answer.casefold().strip(" .") in plain else "answer is not among the options"


def duplicate(pair: InstructionPair, place: Place) -> str | None:
    """Drop a question or an answer that the text's earlier pairs have already."""
    mine = set(content_words(pair.question, place.words))
    for earlier in place.earlier:
        theirs = set(content_words(earlier.question, place.words))
        if pair.question.casefold() == earlier.question.casefold() or (
            mine == theirs and _starts(pair.question) == _starts(earlier.question)
        ):
            return "duplicate question"
        overlap = len(mine & theirs) / max(len(mine | theirs), 1)
        if overlap > place.settings.max_question_overlap and _starts(pair.question) == _starts(earlier.question):
            return "duplicate question"
        if pair.answer.casefold() == earlier.answer.casefold() and not pair.options:
            return "duplicate answer"
    return None


def grounding(pair: InstructionPair, place: Place) -> str | None:
    """Drop an answer whose words are not in the text. Without content words, such as "yes", there is nothing to judge."""
    wanted = content_words(pair.answer, place.words)
    share = _share(wanted, set(content_words(place.text, place.words)))
    return "answer not grounded in the text" if wanted and share < place.settings.min_grounding else None


def relevance(pair: InstructionPair, place: Place) -> str | None:
    """Drop a question that is not about the text, or that has nothing to do with its answer.

    An answer taken from the text word for word must share a content word with its question, or stand shortly behind one.
    """
    wanted = content_words(pair.question, place.words)
    known = {*content_words(place.text, place.words), *content_words(pair.answer, place.words)}
    if _share(wanted, known) < place.settings.min_relevance:
        return "question not about the text"
    position = place.text.find(pair.answer)
    if position >= 0 and wanted:
        before = _NOTE.sub("", place.text[:position])[-_BEFORE:]
        if not set(wanted) & set(content_words(f"{before} {pair.answer}", place.words)):
            return "question not about its answer"
    return None


def _starts(question: str) -> str:
    return question.casefold().split(maxsplit=1)[0]


def _share(wanted: Sequence[str], known: set[str]) -> float:
    return sum(word in known for word in wanted) / len(wanted) if wanted else 1.0


@functools.cache
def _words(language: str) -> Words:
    content: dict[str, Any] = yaml.safe_load((resources.files("megatron_instruct.synthesis") / "filters.yaml").read_text(encoding="utf-8"))
    return Words(
        function=frozenset(content["function_words"].get(language, "").split()),
        question=frozenset(content["question_words"].get(language, "").split()),
        no_answers=tuple(content["no_answers"].get(language, ())),
    )


FILTERS: dict[str, Callable[[InstructionPair, Place], str | None]] = {
    "length": length,
    "repetition": repetition,
    "question": question,
    "answer": answer,
    "options": options,
    "duplicate": duplicate,
    "grounding": grounding,
    "relevance": relevance,
}
"""The filters by name."""
