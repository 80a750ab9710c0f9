"""The words of a text that say something, cut so that inflections agree; what filters compare. And what they know of each language.

Letters and digits make words; in Chinese, Japanese and Korean, every two characters that follow each other do. Source of the words that are
left out: filters.yaml.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_STEM = 6
"""Letters of a word that are compared."""
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]+|[^\W_぀-ヿ㐀-鿿가-힯]+")
FIRST_CJK = "\u3040"
"""The first character of the scripts that are written without blanks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Words:
    """What is known of a language; empty for one that filters.yaml does not have."""

    silent: frozenset[str]
    """Say nothing of what a sentence is about, or make a question of it."""
    no_answers: tuple[str, ...]
    none_of_these: frozenset[str]


@functools.cache
def words_of(language: str) -> Words:
    """Return what is known of a language."""
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "filters.yaml").read_text(encoding="utf-8"))
    return Words(
        silent=frozenset(" ".join(content[key].get(language, "") for key in ("function_words", "question_words")).split()),
        no_answers=tuple(content["no_answers"].get(language, ())),
        none_of_these=frozenset(content["none_of_these"].get(language, ())),
    )


def plain_words(text: str) -> list[str]:
    """Return all words of a text without their case, in order; each Chinese, Japanese or Korean character is one."""
    words: list[str] = []
    for run in _WORD.findall(text.casefold()):
        if run[0] >= FIRST_CJK:
            words += run
        else:
            words.append(run)
    return words


@functools.lru_cache(maxsize=512)
def content_words(text: str, words: Words) -> tuple[str, ...]:
    """Return the stems of the words that say something, in order, with repeats."""
    found: list[str] = []
    silent = words.silent
    for run in _WORD.findall(text.casefold()):
        if run[0] >= FIRST_CJK:
            pairs = [run[i : i + 2] for i in range(max(len(run) - 1, 1))]
            found += [pair for pair in pairs if pair not in silent]
        elif run not in silent:
            found.append((run.removesuffix("s") if len(run) > 3 else run)[:_STEM])
    return tuple(found)
