"""Multiple-choice questions from held-out documents that nobody has labelled.

Comes in: documents (id, text, title where there is one). Goes out: questions, and the documents that make none with the reason.
Continuation: the beginning of a document is shown, its true continuation stands among continuations of other documents, all of
one length. Definition: a document is shown with its headword masked, the headword stands among those of other documents.
Each question draws from a stream of its own, so that it does not depend on the order of the documents or on how many questions
are asked. Texts are cut at characters, at a blank where there is one near, so that languages without blanks work as well.
Does not know: files, models, lm-eval.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Style = Literal["continuation", "definition"]

CONTINUATION_CHARACTERS = 120
"""Length of each choice of a continuation question: about 25 English words."""
BEGINNING_CHARACTERS = (100, 320)
"""Least and greatest length of the beginning that a continuation question shows."""
DEFINITION_CHARACTERS = (80, 400)
"""Least and greatest length of the text that a definition question shows."""
MASK = "____"
_NEAR = 24
"""A cut moves back by at most this many characters to fall on a blank."""
_SHORT_TITLE = 3
"""Titles of at most this many characters are masked as whole words only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A held-out document."""

    id: str
    text: str
    title: str | None = None
    """The headword, where the corpus has a key "title"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with one right choice."""

    id: str
    """The document's id."""
    query: str
    choices: tuple[str, ...]
    """Each is appended to the query as it is: it begins with the blank that stands between them."""
    gold: int
    """Position of the right choice, from 0."""
    sources: tuple[str, ...]
    """Id of the document that each choice is taken from."""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "query": self.query,
            "choices": list(self.choices),
            "gold": self.gold,
            "sources": list(self.sources),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What was made of the documents, in their order."""

    asked: tuple[Question, ...]
    rejected: Mapping[str, str]
    """Reason by id of a document that makes no question."""
    left_over: int
    """Documents beyond the greatest number of questions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """What a document offers: a query, and the choice that is right for it and wrong for others."""

    id: str
    query: str
    choice: str
    separator: str


def make_questions(documents: Sequence[Document], *, style: Style, choices: int, seed: int, max_questions: int | None = None) -> Questions:
    """Make one question of each document that allows it.

    choices: number of choices a question, the right one included. max_questions: ask only those of the documents that come first
    in an order drawn from `seed`. Documents that are too short or, for definitions, have no title offer no choice either.
    """
    rejected: dict[str, str] = {}
    candidates: list[_Candidate] = []
    for document in documents:
        made = _continuation(document) if style == "continuation" else _definition(document)
        if isinstance(made, str):
            rejected[document.id] = made
        else:
            candidates.append(made)
    others = sorted(candidates, key=lambda candidate: candidate.id)
    drawn = sorted(candidates, key=lambda candidate: _stream(seed, "order:" + candidate.id).random()) if max_questions else candidates
    asked: dict[str, Question] = {}
    for candidate in drawn:
        if len(asked) == max_questions:
            break
        question = _question(candidate, others, choices=choices, stream=_stream(seed, candidate.id))
        if question is None:
            rejected[candidate.id] = f"fewer than {choices - 1} other documents with a different choice"
        else:
            asked[candidate.id] = question
    keep = [asked[document.id] for document in documents if document.id in asked]
    left_over = len(documents) - len(keep) - len(rejected)
    return Questions(asked=tuple(keep), rejected=rejected, left_over=left_over)


def _stream(seed: int, name: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{seed}\0{name}".encode()).digest())


def _question(candidate: _Candidate, by_id: Sequence[_Candidate], *, choices: int, stream: random.Random) -> Question | None:
    """Draw the wrong choices: the documents in an order of this question's own stream, each text once. by_id: all of them, in order.

    The document itself drops out, since the right choice is drawn already.
    """
    drawn = [candidate]
    seen, query = {candidate.choice.casefold()}, candidate.query.casefold()
    for place in _shuffled(len(by_id), stream):
        if len(drawn) == choices:
            break
        other = by_id[place]
        choice = other.choice.casefold()
        if choice not in seen and choice not in query:
            seen.add(choice)
            drawn.append(other)
    if len(drawn) < choices:
        return None
    stream.shuffle(drawn)
    return Question(
        id=candidate.id,
        query=candidate.query,
        choices=tuple(candidate.separator + one.choice for one in drawn),
        gold=drawn.index(candidate),
        sources=tuple(one.id for one in drawn),
    )


def _shuffled(count: int, stream: random.Random) -> Iterator[int]:
    """Yield 0 … count - 1 in random order, each drawn when it is asked for: Fisher and Yates's shuffle, of which few questions need more
    than the beginning. What was not moved is not kept."""
    moved = dict[int, int]()
    for last in range(count - 1, -1, -1):
        place = stream.randrange(last + 1)
        yield moved.get(place, place)
        moved[place] = moved.pop(last, last)


def _continuation(document: Document) -> _Candidate | str:
    """Cut the document in two: a beginning of about half of it, and a continuation of fixed length."""
    text = " ".join(document.text.split())
    least, greatest = BEGINNING_CHARACTERS
    needed = least + CONTINUATION_CHARACTERS + _NEAR
    if len(text) < needed:
        return f"shorter than the {needed} characters that a beginning and a continuation need"
    cut = _blank_before(text, max(least + _NEAR, min(greatest, len(text) - CONTINUATION_CHARACTERS, len(text) // 2)))
    separator = " " if text[cut] == " " else ""
    rest = text[cut:].lstrip()
    end = len(rest) if len(rest) <= CONTINUATION_CHARACTERS else _blank_before(rest, CONTINUATION_CHARACTERS)
    return _Candidate(id=document.id, query=text[:cut], choice=rest[:end], separator=separator)


def _definition(document: Document) -> _Candidate | str:
    """Show the text without its headword."""
    title = " ".join((document.title or "").split())
    if not title:
        return "no title"
    text = " ".join(document.text.split())
    text = text.removeprefix(title).lstrip()
    word = r"\w*" if len(title) > _SHORT_TITLE else r"\b"
    begin = r"\b" if title[0].isalnum() else ""
    end = word if title[-1].isalnum() else ""
    masked = re.sub(begin + re.escape(title) + end, MASK, text, flags=re.IGNORECASE)
    least, greatest = DEFINITION_CHARACTERS
    if len(masked) < least:
        return f"shorter than the {least} characters that a definition needs"
    shown = masked if len(masked) <= greatest else masked[: _blank_before(masked, greatest)] + " …"
    return _Candidate(id=document.id, query=f"{shown}\n\nThe term that is defined here, {MASK}, is:", choice=title, separator=" ")


def _blank_before(text: str, position: int) -> int:
    """Return the position of the last blank at or a little before `position`, or `position` itself where there is none."""
    found = text.rfind(" ", max(position - _NEAR, 1), position + 1)
    return position if found < 0 else found
