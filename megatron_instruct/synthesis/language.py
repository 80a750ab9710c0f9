"""In which script and language something is written, by its letters and its commonest words: without a model, without a network.

A pair that is written in what its text is not written in is noticed; where words do not decide, nothing is said. Source of the words:
languages.yaml. Does not know: pairs.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_instruct.synthesis.content_words import folded

_SCRIPTS = {
    "Latin": "A-Za-zÀ-ÖØ-öø-ʯḀ-ỿ",
    "Cyrillic": "Ѐ-ԯ",
    "Greek": "Ͱ-Ͽἀ-῿",
    "Arabic": "؀-ۿݐ-ݿ",
    "Hebrew": "֐-׿",
    "Devanagari": "ऀ-ॿ",
    "Bengali": "ঀ-৿",
    "Tamil": "஀-௿",
    "Thai": "฀-๿",
    "Georgian": "Ⴀ-ჿ",
    "Armenian": "԰-֏",
    "Hangul": "ᄀ-ᇿ가-힯",
    "Kana": "぀-ヿ",
    "Han": "㐀-䶿一-鿿豈-﫿",
}
_RUNS = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in _SCRIPTS.items()))
_LOOKED_AT = 8_000
"""Characters of a text that decide what it is written in."""
_RARE = 0.05
"""Share of a text's letters below which a script does not belong to it."""
_FEW = 3
"""Common words that a text must have before they say which language it is in."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What a text is written in."""

    scripts: frozenset[str]
    languages: frozenset[str]
    """Those whose common words it has; empty where it has too few to tell."""
    words: frozenset[str]


def writing_of(text: str) -> Writing:
    """Say what a text is written in."""
    runs = _runs(text[:_LOOKED_AT])
    letters = Counter[str]()
    for script, run in runs:
        letters[script] += len(run)
    scores = _scores([run for _, run in runs])
    best = max(scores.values(), default=0)
    return Writing(
        scripts=frozenset(script for script, count in letters.items() if count > _RARE * letters.total()),
        languages=frozenset(language for language, score in scores.items() if score * 3 >= best) if best >= _FEW else frozenset(),
        words=frozenset(run for _, run in runs),
    )


def foreign_to(writing: Writing, text: str) -> str | None:
    """Return the script or language that most of `text` is in, where `writing` is in another; words that it quotes do not count."""
    if not writing.scripts:
        return None
    runs = _runs(text)
    new = [(script, run) for script, run in runs if run not in writing.words]
    strange = Counter[str]()
    for script, run in new:
        if script not in writing.scripts:
            strange[script] += len(run)
    if strange and strange.total() * 2 > sum(len(run) for _, run in runs):
        return strange.most_common(1)[0][0]
    if not writing.languages:
        return None
    common = _common()
    foreign = Counter[str]()
    for _, run in new:
        if (languages := common.get(run)) is not None and writing.languages.isdisjoint(languages):
            foreign.update(languages)
    language, score = max(foreign.items(), key=lambda item: item[1], default=("", 0))
    if score < 2:
        return None
    of_both = [languages for _, run in runs if not writing.languages.isdisjoint(languages := common.get(run, ()))]
    own = sum(language not in languages for languages in of_both)
    return language if score > 2 * own else None


def _runs(text: str) -> list[tuple[str, str]]:
    """Return the words of a text with their scripts."""
    return [(match.lastgroup or "", match[0]) for match in _RUNS.finditer(folded(text))]


def _scores(words: list[str]) -> Counter[str]:
    """Count the words that each language has among its commonest."""
    common = _common()
    scores = Counter[str]()
    for word, count in Counter(words).items():
        for language in common.get(word, ()):
            scores[language] += count
    return scores


@functools.cache
def _common() -> dict[str, tuple[str, ...]]:
    """Return the languages of each common word."""
    profiles: dict[str, str] = yaml.safe_load((Path(__file__).parent / "languages.yaml").read_text(encoding="utf-8"))
    words: dict[str, tuple[str, ...]] = {}
    for language, text in profiles.items():
        for word in dict.fromkeys(text.split()):
            words[word] = (*words.get(word, ()), language)
    return words
