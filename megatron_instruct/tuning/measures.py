"""What a synthesizer wrote against gold pairs -> the measures of it. Pure functions.

- parseable: pieces of the completions that are pairs, over all pieces.
- grounded: pairs that pass the filter `grounding`, over the pairs parsed.
- distinct: different questions, over the pairs parsed; distinct_per_text: different questions, over the texts.
- answer_f1: token F1 of the answer to each gold question, asked alone, with its gold answer; 0 where there is none. Mean over questions.
- pair_f1: for each gold pair the best token F1 with a pair that was written for its text, question, options, rationale and answer together.
  Mean over gold pairs.

Token F1 is that of SQuAD (arXiv:1606.05250): without case, punctuation and articles. Does not know: files.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

_ARTICLES = frozenset(("a", "an", "the"))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’")


@dataclass(kw_only=True)
class WrittenFor:
    """What was written for one text."""

    gold: Sequence[tuple[str, str]]
    """Questions and answers, options and rationales with these, as in what is written."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Parsed, and grounded."""
    ungrounded: list[tuple[str, str]] = field(default_factory=list)
    """Parsed, and not grounded; what is not known apart stands in the question."""
    unparsed: int = 0
    """Pieces that are no pairs."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The measures of a set of texts; None where there is nothing to count."""

    texts: int
    pieces: int
    pairs: int
    questions: int
    """Gold questions that were asked."""
    parseable: float | None
    grounded: float | None
    distinct: float | None
    distinct_per_text: float
    answer_f1: float | None
    pair_f1: float


MEASURES = ("parseable", "grounded", "distinct", "distinct_per_text", "answer_f1", "pair_f1")


def measure(texts: Sequence[WrittenFor], answers: Sequence[tuple[str, str]]) -> Measures:
    """Return the measures. answers: what was answered ("" where nothing was) and the gold answer, for each question."""
    parsed = [pair for text in texts for pair in (*text.pairs, *text.ungrounded)]
    pieces = len(parsed) + sum(text.unparsed for text in texts)
    different = len({tuple(tokens(question)) for question, _ in parsed})
    matches = [
        max((token_f1(" ".join(pair), " ".join(gold)) for pair in (*text.pairs, *text.ungrounded)), default=0.0)
        for text in texts
        for gold in text.gold
    ]
    return Measures(
        texts=len(texts),
        pieces=pieces,
        pairs=len(parsed),
        questions=len(answers),
        parseable=_share(len(parsed), pieces),
        grounded=_share(sum(len(text.pairs) for text in texts), len(parsed)),
        distinct=_share(different, len(parsed)),
        distinct_per_text=different / len(texts) if texts else 0.0,
        answer_f1=_share(sum(token_f1(answer, gold) for answer, gold in answers), len(answers)),
        pair_f1=sum(matches) / len(matches) if matches else 0.0,
    )


def token_f1(text: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the tokens; 1 where neither has any."""
    one, two = Counter(tokens(text)), Counter(tokens(gold))
    if not one or not two:
        return float(one == two)
    return 2 * (one & two).total() / (one.total() + two.total())


def tokens(text: str) -> list[str]:
    """Return the words of a text without case, punctuation and articles."""
    return [word for word in text.casefold().translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]


def _share(count: float, total: int) -> float | None:
    return count / total if total else None
