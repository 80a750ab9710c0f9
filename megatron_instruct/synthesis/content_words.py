"""The words of a text that say something, cut so that inflections agree; what filters compare. And what they know of each language.

Letters, the marks on them, and digits make words; in scripts that are written without blanks (Chinese, Japanese, Thai, and Korean, whose
particles have none before them), every two characters that follow each other do. What is written in several ways in Unicode is one (NFC).
Source of the words that are left out: filters.yaml.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from pathlib import Path

from megatron_instruct.templates.yaml_nodes import read_yaml

WORDS = Path(__file__).parent / "filters.yaml"
_TEXTS, _LISTS = ("function_words", "question_words"), ("no_answers", "none_of_these")
"""Keys of that file."""
_STEM = 6
"""Letters of a word that are compared."""
_FIRST_CJK = "\u3040"
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
"""Characters of Chinese, Japanese and Korean."""
_FIRST_WITHOUT_BLANKS = "\u0e01"
_WITHOUT_BLANKS = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59"  # Thai
    "\u0e81-\u0ebd\u0ec0-\u0ece\u0ed0-\u0edf"  # Lao
    "\u1000-\u1049\u1050-\u109d"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd\u17e0-\u17e9" + _CJK  # Khmer
)
_HAS_BLANKS = f"[^\\W_{_WITHOUT_BLANKS}]"
_ASCII = re.compile(r"[^\W_]+")
_BEGINS_WITHOUT_BLANKS = re.compile(f"[{_WITHOUT_BLANKS}]")


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """What is known of a language; empty for one that filters.yaml does not have."""

    silent: frozenset[str]
    """Say nothing of what a sentence is about, or make a question of it."""
    no_answers: tuple[str, ...]
    none_of_these: frozenset[str]

    @property
    def fingerprint(self) -> str:
        said = [sorted(self.silent), self.no_answers, sorted(self.none_of_these)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@functools.cache
def words_of(language: str) -> Words:
    """Return what is known of a language. Raises InputError with file and line for words that are not written as the others are."""
    content = read_yaml(WORDS, "the words of languages").known_items((*_TEXTS, *_LISTS), required=True)
    found = {key: node.items().get(language) for key, node in content.items()}
    no_answers, none_of_these = ([] if (node := found[key]) is None else [item.text() for item in node.sequence()] for key in _LISTS)
    return Words(
        silent=frozenset(folded(" ".join(node.text() for key in _TEXTS if (node := found[key]) is not None)).split()),
        no_answers=tuple(map(folded, no_answers)),
        none_of_these=frozenset(map(folded, none_of_these)),
    )


def folded(text: str) -> str:
    """Return a text without its case, every letter that has a form of its own with its marks in that form."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFC", text.casefold())


def without_blanks(word: str) -> bool:
    """Say whether a word begins in a script that is written without blanks."""
    return word >= _FIRST_WITHOUT_BLANKS and _BEGINS_WITHOUT_BLANKS.match(word) is not None


def plain_words(text: str) -> list[str]:
    """Return all words of a text without their case, in order; of a script without blanks, each character is one, with its marks."""
    if text.isascii():
        return _ASCII.findall(text.casefold())
    words: list[str] = []
    for run in _runs().findall(folded(text)):
        if without_blanks(run):
            words += _characters(run)
        else:
            words.append(run)
    return words


def word_places(text: str) -> list[tuple[int, int, str]]:
    """Return the words of `plain_words`, each behind where it starts and ends in the text as it is written."""
    found: list[tuple[int, int, str]] = []
    for run in _runs().finditer(text):
        parts = _marked().finditer(text, run.start(), run.end()) if without_blanks(run[0]) else (run,)
        found += [(part.start(), part.end(), folded(part[0])) for part in parts]
    return found


@functools.lru_cache(maxsize=512)
def content_words(text: str, words: Words) -> tuple[str, ...]:
    """Return the stems of the words that say something, in order, with repeats."""
    found: list[str] = []
    silent = words.silent
    for run in _ASCII.findall(text.casefold()) if text.isascii() else _runs().findall(folded(text)):
        if without_blanks(run):
            characters = _characters(run)
            pairs = map(add, characters, characters[1:]) if len(characters) > 1 else (run,)
            found += [pair for pair in pairs if pair not in silent]
        elif run not in silent:
            found.append((run.removesuffix("s") if len(run) > 3 else run)[:_STEM])
    return tuple(found)


def _characters(run: str) -> Sequence[str]:
    """Return the characters of a script without blanks, with their marks; composed ones of Chinese, Japanese and Korean have none."""
    return run if run >= _FIRST_CJK else _marked().findall(run)


@functools.cache
def _runs() -> re.Pattern[str]:
    """Return what finds words: in a script without blanks all that stands together. Most letters are seen to have no mark fast."""
    return re.compile(f"[{_WITHOUT_BLANKS}]+|{_HAS_BLANKS}+(?:(?![ -~])[{_marks()}]+{_HAS_BLANKS}*)*")


@functools.cache
def _marked() -> re.Pattern[str]:
    """Return what finds a character and the marks on it."""
    return re.compile(f".[{_marks()}]*")


@functools.cache
def _marks() -> str:
    """Return the marks that belong to letters (Unicode's categories Mn and Mc, but for what chooses among drawings) as ranges."""
    ends: list[list[int]] = []
    for code in (*range(0x300, 0xFE00), *range(0x10000, 0x1F000)):
        if unicodedata.category(chr(code)) in ("Mn", "Mc"):
            if ends and ends[-1][1] == code - 1:
                ends[-1][1] = code
            else:
                ends.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ends)
