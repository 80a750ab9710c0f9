"""Entries -> rows of the collection's form: a context, and questions that are answered by its sentences.

Comes in: an `Entry`. Goes out: {"context", "QA_list", "QA_type", "rc_name"}. The question of a FAQ is its author's own; further questions
are made from the form of a sentence ("To do A, use B." asks: "How do you do A?"), and each answer stands in the context word for word.
Does not know: packages, files.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from sources import Entry

from megatron_instruct.prompt_formats.parsing import PairLayout

Pair = tuple[str, str]
_SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z\"(])")
_LONGEST_CONTEXT, _SHORTEST_CONTEXT = 750, 160
"""Characters."""
_LONGEST_ANSWER = 260
_VERBS = "uses|provides|supports|contains|allows|returns|describes|includes|requires|means|consists of|refers to|creates|takes|runs"
_SUBJECT = r"((?:(?:The|A|An) )?[A-Za-z0-9][\w.+/-]*(?: [\w.+/-]+){0,4}?)"
_NO_SUBJECT = re.compile(
    r"(?:It|This|That|These|Those|They|There|Here|He|She|We|You|I|One|What|Which|If|When|While|As|In|On|For|To|So|But|And|Some|Such|Each|Most"
    r"|Many|Other|Another|All|Both|However|Since|Because|Although|Also|Then|Now|Note|Not|Unfortunately|Usually|Common|Suppose)\b|.*\b(?:that|which|who|and)\b"
)
_HEADWORD = re.compile(r"\w[\w.+/ -]{1,39}")
_TEXTS = PairLayout(question="", answer="", end="")
"""For the words that the form of pairs puts around options and steps."""


def faq_row(entry: Entry, name: str) -> dict[str, Any] | None:
    """Return the row of a question of a FAQ: its first sentences answer it. None where it gives none."""
    context = _context(entry.paragraphs)
    sentences = _sentences(context)
    if (
        not entry.heading.endswith("?")
        or len(sentences) < 3
        or _first(sentences).endswith((":", "?"))
        or not 12 <= len(entry.heading) <= 140
    ):
        return None
    pairs = [(entry.heading, _first(sentences)), *_derived(sentences[1:], set(_first(sentences).split()))]
    return _row(context, pairs[:4], name)


def definition_row(entry: Entry, name: str) -> dict[str, Any] | None:
    """Return the row of a dictionary's entry: the first sentence says what it is."""
    body = _context(entry.paragraphs)
    sentences = _sentences(body)
    if len(sentences) < 2 or not _HEADWORD.fullmatch(entry.heading) or len(sentences[0]) > _LONGEST_ANSWER or re.match(r"\d\. ", body):
        return None
    plural = entry.heading.endswith("s") and not entry.heading.endswith(("ss", "us", "is"))
    article = "" if plural or entry.heading[0].isupper() or not re.match("An? ", sentences[0]) else sentences[0].split()[0].lower() + " "
    first = f"What {'are' if plural else 'is'} {article}{entry.heading}?"
    further = _derived(sentences[1:], set())
    return _row(f"{entry.heading}\n\n{body}", [(first, sentences[0]), *further][:4], name) if further else None


def choice_row(entry: Entry, others: Sequence[Entry], name: str, *, thinks: bool) -> dict[str, Any] | None:
    """Return a row whose question has options: which term does the text explain? thinks: with the step that leads to the answer."""
    body = _context(entry.paragraphs)
    sentences = _sentences(body)
    if len(sentences) < 2 or not _HEADWORD.fullmatch(entry.heading) or len(sentences[0]) > _LONGEST_ANSWER or re.match(r"\d\. ", body):
        return None
    draw = random.Random(entry.heading)
    named = [other.heading for other in others if _HEADWORD.fullmatch(other.heading) and other.heading != entry.heading]
    wrong = draw.sample(named, 3)
    options = draw.sample([*wrong, entry.heading], len(wrong) + 1)
    question = f"Which term does the text explain?\n{_TEXTS.options}\n" + "\n".join(f"- {option}" for option in options)
    answer = entry.heading
    if thinks:
        question = f"{question}\n{_TEXTS.think}"
        answer = f"The text says of {entry.heading}: {sentences[0]}\n{_TEXTS.therefore} {answer}"
    row = _row(f"{entry.heading}\n\n{body}", [(question, answer), *_derived(sentences[1:], set())][:3], name)
    return {**row, "QA_type": "options_chain_of_thought" if thinks else "options"}


def _row(context: str, pairs: Sequence[Pair], name: str) -> dict[str, Any]:
    return {"context": context, "QA_list": [{"Q": q, "A": a} for q, a in pairs], "QA_type": "free_form", "rc_name": name}


def _context(paragraphs: Sequence[str]) -> str:
    """Return whole paragraphs from the beginning, as many as fit; sentences of the first where it alone does not."""
    context = ""
    for paragraph in paragraphs:
        if len(context) + len(paragraph) > _LONGEST_CONTEXT:
            break
        context = f"{context}\n\n{paragraph}".strip()
    if not context and paragraphs:
        for sentence in _SENTENCE.split(paragraphs[0]):
            if len(context) + len(sentence) > _LONGEST_CONTEXT:
                break
            context = f"{context} {sentence}".strip()
    return context if len(context) >= _SHORTEST_CONTEXT else ""


def _sentences(context: str) -> list[str]:
    found = [sentence for paragraph in context.split("\n\n") for sentence in _SENTENCE.split(paragraph)]
    return [sentence for sentence in found if len(sentence) >= 12]


def _first(sentences: Sequence[str]) -> str:
    """Return the beginning of the answer: one sentence, or two where the first is short and the second goes on from it."""
    first = sentences[0]
    return f"{first} {sentences[1]}" if len(first) < 30 and len(first + sentences[1]) < _LONGEST_ANSWER else first


def _derived(sentences: Sequence[str], known: set[str]) -> list[Pair]:
    """Return the questions that forms of sentences ask, each with its sentence as the answer."""
    pairs: list[Pair] = []
    for sentence in sentences:
        if 30 <= len(sentence) <= _LONGEST_ANSWER and not {*sentence.split()} <= known and sentence[-1] == "." and ":" not in sentence:
            question = _question(sentence)
            if question is not None and 15 <= len(question) <= 120 and all(question != earlier for earlier, _ in pairs):
                pairs.append((question, sentence))
    return pairs


def _question(sentence: str) -> str | None:
    if match := re.match(r"To ([a-z]+ [^,]{4,70}), ", sentence):
        return f"How do you {match[1]}?"
    if match := re.match(r"If you (want|need|wish|would like) to ([^,]{6,70}), ", sentence):
        return f"What should you do if you {match[1]} to {match[2]}?"
    if match := re.match(r"(If|When) ((?!you want|you need|.*(?:ed|was|were|had) )[^,]{10,80}), ", sentence):
        return f"What happens {match[1].lower()} {match[2]}?"
    if match := re.match(r"You (can|should|must|may|need to) (?:also )?([^,;]{8,60}?) (?:by|with|using) ", sentence):
        return f"How {match[1].replace('need to', 'can').replace('may', 'can')} you {match[2]}?"
    if (match := re.match(rf"{_SUBJECT} (is|are|was|were|can|cannot) ([^,;]{{3,60}}) because ", sentence)) and _is_subject(match[1]):
        return f"Why {match[2]} {_lower(match[1])} {match[3]}?"
    if (
        match := re.match(
            rf"{_SUBJECT} (is|are|was|were) (?:an? |the |one of |used (?:to|for|by) |designed (?:to|for) |written |developed )", sentence
        )
    ) and _is_subject(match[1]):
        return _about(match[1], match[2], sentence)
    if (match := re.match(rf"{_SUBJECT} ({_VERBS}) ", sentence)) and _is_subject(match[1]):
        verb, _, rest = match[2].partition(" ")
        return f"What does {_lower(match[1])} {verb.removesuffix('s')}{' ' + rest if rest else ''}?"
    return None


def _about(subject: str, verb: str, sentence: str) -> str:
    rest = sentence[len(subject) + len(verb) + 2 :]
    if rest.startswith(("used ", "designed ")):
        return f"What {verb} {_lower(subject)} {rest.split()[0]} for?"
    if rest.startswith(("written ", "developed ")):
        by = re.match(r"\w+ (?:in \S+ )?by ", rest)
        return (
            f"Who {rest.split()[0].replace('written', 'wrote')} {_lower(subject)}?"
            if by
            else f"How {verb} {_lower(subject)} {rest.split()[0]}?"
        )
    return f"What {verb} {_lower(subject)}?"


def _is_subject(words: str) -> bool:
    return not _NO_SUBJECT.match(words) and not re.search(r"(?:ed|ing|ly)$", words.split()[-1])


def _lower(subject: str) -> str:
    return re.sub(r"^(The|An?) ", lambda match: match[0].lower(), subject)
