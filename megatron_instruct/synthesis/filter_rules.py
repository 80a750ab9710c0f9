"""The filters that look at one pair and its text. Each is a pure function that returns why a pair is dropped, or None.

A new filter is a function here, a line in FILTERS, and its settings in filter_settings.py. Overlaps are counted in content words
(content_words.py). Does not know: engines, prompts, other texts.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from unicodedata import normalize

from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.contamination import Contamination
from megatron_instruct.synthesis.content_words import Words, content_words, folded, plain_words
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.language import Writing, foreign_to, writing_of

_NOTE = re.compile(r"\[[^\]]*\]")
_BEFORE = 80
"""Characters of the text before an answer, bracketed notes left out, in which the subject of its question may be named."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a pair is dropped."""

    reason: str
    """Short and countable."""
    detail: str = ""
    """What was measured."""


@dataclass(kw_only=True)
class Place:
    """Where a pair stands."""

    text: str
    settings: FilterSettings
    words: Words
    contamination: Contamination | None
    earlier: list[InstructionPair] = field(default_factory=list)
    """Pairs of the text that were kept."""

    @cached_property
    def content(self) -> frozenset[str]:
        """Content words of the text."""
        return frozenset(content_words(self.text, self.words))

    @cached_property
    def ngrams(self) -> frozenset[tuple[str, ...]]:
        """Sequences of content words of the text, of the length that grounding asks for and of every shorter one."""
        words, longest = content_words(self.text, self.words), self.settings.grounding_ngram
        return frozenset(gram for size in range(1, longest + 1) for gram in _ngrams(words, size))

    @cached_property
    def writing(self) -> Writing:
        """Script and language of the text."""
        return writing_of(self.text)


type Rule = Callable[[InstructionPair, Place], Drop | None]


def length(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop what is too long to be a question or an answer."""
    if len(pair.question) > place.settings.max_question_characters:
        return Drop("question too long", f"{len(pair.question)} characters")
    characters = len(pair.answer + (pair.rationale or ""))
    return Drop("answer too long", f"{characters} characters") if characters > place.settings.max_answer_characters else None


def repetition(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop what goes in circles, as small models do."""
    for part in (pair.question, pair.answer, pair.rationale or ""):
        triples = Counter(_ngrams(plain_words(part), 3))
        repeated = sum(count for count in triples.values() if count > 1)
        if triples.total() >= 4 and repeated / triples.total() > place.settings.max_repetition:
            return Drop("repetition", f"{repeated / triples.total():.2f} of its sequences of three words come again")
    return None


def language(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop a question or an answer that is in another script or language than the text."""
    for name, part in (("question", pair.question), ("answer", f"{pair.rationale or ''} {pair.answer}")):
        if (foreign := foreign_to(place.writing, part)) is not None:
            return Drop(f"{name} in another language", f"{foreign}, and the text is in {_named(place.writing)}")
    return None


def question(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop a question without content."""
    return None if content_words(pair.question, place.words) else Drop("question without content")


def answer(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop an answer that is a question itself, that is the question again, or that says it has none."""
    if pair.answer.rstrip("\"'”’ ").endswith(("?", "？")):
        return Drop("answer is a question")
    said = folded(pair.answer)
    if said == folded(pair.question):
        return Drop("answer repeats the question")
    if said.strip(" .。") in place.words.none_of_these and pair.options:
        return None
    phrase = next((phrase for phrase in place.words.no_answers if phrase in said), None)
    return None if phrase is None else Drop("answer says that there is none", phrase)


def options(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop options that leave no choice, repeat, or lack the answer; that none of them is right may be an answer, too."""
    if not pair.options:
        return None
    plain = [folded(option).strip(" .。") for option in pair.options]
    if len(set(plain)) < max(len(plain), 2):
        return Drop("options repeat or leave no choice", f"{len(plain)} options, {len(set(plain))} of them different")
    said = folded(pair.answer).strip(" .。")
    return None if said in plain or said in place.words.none_of_these else Drop("answer is not among the options")


def duplicate(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop a question or an answer that the text's earlier pairs have already."""
    mine = set(content_words(pair.question, place.words))
    for earlier in place.earlier:
        theirs = set(content_words(earlier.question, place.words))
        overlap = len(mine & theirs) / max(len(mine | theirs), 1)
        alike = _starts(pair.question) == _starts(earlier.question)
        if folded(pair.question) == folded(earlier.question) or (
            alike and (mine == theirs or overlap > place.settings.max_question_overlap)
        ):
            return Drop("duplicate question", f"overlap {overlap:.2f} with: {earlier.question}")
        if folded(pair.answer) == folded(earlier.answer) and not pair.options:
            return Drop("duplicate answer", f"to: {earlier.question}")
    return None


def grounding(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop an answer whose n-grams of content words are not in the text; of a chain of thought, the steps are judged.

    Without content words, such as "yes", there is nothing to judge.
    """
    words = content_words(pair.rationale or pair.answer, place.words)
    wanted = _ngrams(words, min(place.settings.grounding_ngram, len(words)))
    share = _share(wanted, place.ngrams)
    if not wanted or share >= place.settings.min_grounding:
        return None
    return Drop("answer not grounded in the text", f"{share:.2f} of its {len(wanted)} n-grams")


def relevance(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop a question that is not about the text, or that has nothing to do with its answer.

    An answer taken from the text word for word must share a content word with its question, or stand shortly behind one.
    """
    wanted = content_words(pair.question, place.words)
    share = _share(wanted, place.content.union(content_words(pair.answer, place.words)))
    if share < place.settings.min_relevance:
        return Drop("question not about the text", f"{share:.2f} of its words")
    text, answer = normalize("NFC", place.text), normalize("NFC", pair.answer)
    position = text.find(answer)
    if position >= 0 and wanted:
        before = _NOTE.sub("", text[:position])[-_BEFORE:]
        if not set(wanted) & set(content_words(f"{before} {answer}", place.words)):
            return Drop("question not about its answer")
    return None


def contamination(pair: InstructionPair, place: Place) -> Drop | None:
    """Drop a pair that repeats an evaluation file."""
    if place.contamination is None:
        return None
    for part in ("\n".join((pair.question, *pair.options)), "\n".join((pair.rationale or "", pair.answer))):
        if (overlap := place.contamination.find(part)) is not None:
            return Drop("overlaps an evaluation", f"{overlap.file}: {overlap.ngram}")
    return None


FILTERS: dict[str, Rule] = {
    "length": length,
    "repetition": repetition,
    "language": language,
    "question": question,
    "answer": answer,
    "options": options,
    "duplicate": duplicate,
    "grounding": grounding,
    "relevance": relevance,
    "contamination": contamination,
}
"""The filters by name."""
NEED_WORDS = ("grounding", "relevance")
"""Those that tell content words from others; they say nothing of a language whose words filters.yaml does not have."""


def _named(writing: Writing) -> str:
    return " or ".join(sorted(writing.languages or writing.scripts)) or "no known script"


def _starts(question: str) -> str:
    return folded(question).split(maxsplit=1)[0]


def _share[T](wanted: Sequence[T], known: frozenset[T]) -> float:
    return sum(word in known for word in wanted) / len(wanted) if wanted else 1.0


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False)) if size else []
