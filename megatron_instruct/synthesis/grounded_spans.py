"""Where a text says what an answer says: the spans of the text, word for word, for the eye.

Comes in: a text, an answer. Goes out: spans of the text. Does not know: pages, filters.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_instruct.synthesis.content_words import plain_words, word_places

_SHORTEST = 3
"""Words in a row that count; fewer are met by chance, unless they are the whole answer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text, and which answers it grounds."""

    text: str
    answers: tuple[int, ...]
    """Numbers of the answers; empty for a part that grounds none."""


def grounded_spans(text: str, answer: str) -> list[tuple[int, int]]:
    """Return the spans of `text` whose words stand in `answer` in the same order, the longest first found; none overlap.

    Case and what stands between words make no difference. An answer shorter than three words must be there as a whole.
    """
    places, said = word_places(text), plain_words(answer)
    words = [word for _, _, word in places]
    starts: dict[str, list[int]] = {}
    for number, word in enumerate(words):
        starts.setdefault(word, []).append(number)
    spans: list[tuple[int, int]] = []
    least, here = min(_SHORTEST, len(said)), 0
    while here < len(said):
        size, first = max(((_common(said, here, words, start), -start) for start in starts.get(said[here], ())), default=(0, 0))
        if size >= least > 0:
            spans.append((places[-first][0], places[-first + size - 1][1]))
            here += size
        else:
            here += 1
    return _merged(spans)


def pieces(text: str, answers: Sequence[str]) -> list[Piece]:
    """Cut a text where the span of an answer begins or ends; joined, the pieces are the text. Answers are numbered from 1."""
    spans = [(start, end, number) for number, answer in enumerate(answers, 1) for start, end in grounded_spans(text, answer)]
    bounds = sorted({0, len(text), *(place for start, end, _ in spans for place in (start, end))})
    return [
        Piece(text[start:end], tuple(sorted({number for first, last, number in spans if first <= start and end <= last})))
        for start, end in itertools.pairwise(bounds)
    ]


def _common(one: Sequence[str], here: int, two: Sequence[str], there: int) -> int:
    """Count the words that are equal from two places on."""
    size = 0
    while here + size < len(one) and there + size < len(two) and one[here + size] == two[there + size]:
        size += 1
    return size


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
