"""A finished synthesis as one self-contained page: what came out, what was set aside and why, how fast, and random examples to judge.

Comes in: the manifest, examples.jsonl and rejects.jsonl, and when requests were finished. Goes out: an HTML page. Reads the files once, a
line at a time, so a corpus of any size will do. Does not know: engines, prompts.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_instruct import __version__
from megatron_instruct.files import atomic_write
from megatron_instruct.manifest import Manifest
from megatron_instruct.pages import render_page
from megatron_instruct.synthesis.content_words import without_blanks
from megatron_instruct.synthesis.grounded_spans import pieces
from megatron_instruct.synthesis.merge import EXAMPLES, REJECTS
from megatron_instruct.synthesis.throughput import chart
from megatron_instruct.tokenizer import Tokenizer

_MEASURED_PAIRS = 20_000
"""Random pairs whose tokens are counted, at most."""
_SHOWN_OF_A_REJECT = 300
"""Characters."""
_BARS = 12
_KINDS = {
    "free_form": "free form",
    "options": "options",
    "chain_of_thought": "chain of thought",
    "options_chain_of_thought": "options with chain of thought",
}
_COUNTS = {
    "records_in": "records read",
    "records_split": "of them split, being too long",
    "texts": "texts asked about",
    "texts_with_pairs": "texts with at least one pair",
    "requests": "requests",
    "requests_retried": "of them asked again",
    "prompt_tokens": "tokens of prompts",
    "generated_tokens": "tokens generated",
    "pieces": "pieces of completions",
    "pairs_parsed": "of them pairs",
    "pairs": "pairs that passed every filter",
    "examples": "M-shot examples",
}


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the page is made from, besides the files of the result."""

    output_dir: Path
    tokenizer: Tokenizer
    answers: Mapping[int, tuple[int, int]]
    """Requests finished, and tokens generated, in each second of the clock; empty where it is not known any more."""
    examples: int
    """Random texts to show."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of a bar chart."""

    label: str
    count: int
    share: float
    """Of the longest bar."""
    percent: float
    """Of all."""


@dataclass(kw_only=True)
class _Examples:
    """What one reading of examples.jsonl gives."""

    pairs_per_text: Counter[int] = field(default_factory=Counter)
    texts_per_example: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)
    texts: "_Sample"
    pairs: "_Sample"


class _Sample:
    """Some of a stream of unknown length, each as likely as any other (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, draw: random.Random) -> None:
        self.items: list[Any] = []
        self._size, self._draw, self._seen = size, draw, 0

    def add(self, item: Any) -> None:
        self._seen += 1
        if len(self.items) < self._size:
            self.items.append(item)
        elif (place := self._draw.randrange(self._seen)) < self._size:
            self.items[place] = item


def write_report(path: Path, manifest: Manifest, options: ReportOptions) -> None:
    """Write the page."""
    page = render_page(Path(__file__).parent, "report.html.j2", _content(manifest, options), extra="synthesis")
    with atomic_write(path) as stream:
        stream.write(page)


def _content(manifest: Manifest, options: ReportOptions) -> dict[str, Any]:
    """Return all that the template shows."""
    read = _read_examples(options)
    tokens = _tokens(read.pairs.items, options.tokenizer)
    return {
        "version": __version__,
        "manifest": manifest,
        "facts": _facts(manifest, tokens),
        "counts": [(label, manifest.counts[name]) for name, label in _COUNTS.items() if name in manifest.counts],
        "pairs_per_text": bars(_grouped(read.pairs_per_text)),
        "texts_per_example": bars(_grouped(read.texts_per_example)),
        "kinds": bars({_KINDS[kind]: read.kinds[kind] for kind in _KINDS}),
        "openings": bars(_most(read.openings)),
        "tokens_per_pair": bars(_ranges(tokens)),
        "measured_pairs": len(tokens),
        "rejects": _read_rejects(options.output_dir / REJECTS),
        "chart": chart(options.answers) if options.answers else None,
        "examples": [_example(shot) for shot in read.texts.items],
        "seed": options.seed,
        "settings": [(name, _shown(value)) for name, value in manifest.settings.items()],
    }


def _read_examples(options: ReportOptions) -> _Examples:
    draw = random.Random(f"report:{options.seed}")
    read = _Examples(texts=_Sample(options.examples, draw), pairs=_Sample(_MEASURED_PAIRS, draw))
    with open(options.output_dir / EXAMPLES, encoding="utf-8") as stream:
        for line in stream:
            shots = json.loads(line)["shots"]
            read.texts_per_example[len(shots)] += 1
            for shot in shots:
                read.pairs_per_text[len(shot["pairs"])] += 1
                if shot["pairs"]:
                    read.texts.add(shot)
                for pair in shot["pairs"]:
                    read.kinds[pair["kind"]] += 1
                    read.openings[_opening(pair["question"])] += 1
                    read.pairs.add(pair)
    return read


def _tokens(pairs: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Count the tokens of questions with their options and answers with their rationales, without markers."""
    texts = ["\n".join([pair["question"], *pair["options"], pair["rationale"] or "", pair["answer"]]) for pair in pairs]
    return sorted(len(ids) for ids in tokenizer.encode_batch(texts)) if texts else []


def _facts(manifest: Manifest, tokens: Sequence[int]) -> list[tuple[str, str]]:
    counts = manifest.counts
    texts, with_pairs, pairs = counts["texts"], counts["texts_with_pairs"], counts["pairs"]
    return [
        (f"{texts:,}", "texts"),
        (f"{with_pairs / texts:.0%}", f"of them with pairs ({with_pairs:,})"),
        (f"{pairs:,}", "pairs kept"),
        (f"{pairs / texts:.2f}", "pairs per text"),
        (f"{sum(tokens) / len(tokens):.1f}" if tokens else "–", "tokens per pair"),
        (f"{pairs / counts['pieces']:.0%}" if counts.get("pieces") else "–", "of what was written is kept"),
    ]


def bars(counts: Mapping[str, int]) -> list[Bar]:
    """Return counts as the lines of a bar chart."""
    most, total = max(counts.values(), default=0), sum(counts.values())
    return [
        Bar(label=label, count=count, share=count / most if most else 0.0, percent=100 * count / total if total else 0.0)
        for label, count in counts.items()
    ]


def _grouped(counts: Mapping[int, int]) -> dict[str, int]:
    """Return counts from the smallest number to the largest without gaps; what is beyond the last bar is one bar."""
    if not counts:
        return {}
    first, last = min(counts), max(counts)
    shown = {str(number): counts.get(number, 0) for number in range(first, min(last, first + _BARS - 2) + 1)}
    beyond = sum(count for number, count in counts.items() if number > first + _BARS - 2)
    return shown | ({f"{first + _BARS - 1} or more": beyond} if beyond else {})


def _opening(question: str) -> str:
    """Return the word that a question begins with; of a language without blanks, its first two characters."""
    word = question.split(maxsplit=1)[0].strip("\"'“”‘’(,.:;?!¿¡").casefold()
    return word[:2] if without_blanks(word) else word


def _most(counts: Counter[str]) -> dict[str, int]:
    """Return the most frequent, and all the others as one."""
    shown = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: _BARS - 1])
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def _ranges(tokens: Sequence[int]) -> dict[str, int]:
    """Return how many pairs have how many tokens, in ranges of a round width; the longest one in a hundred are the last bar."""
    if not tokens:
        return {}
    usual = tokens[int(len(tokens) * 0.99) - (len(tokens) > 1)]
    width = next(width for width in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if usual < width * (_BARS - 1))
    counts = Counter(min(length // width, usual // width + 1) for length in tokens)
    last = max(counts)
    return {
        f"{number * width}–{(number + 1) * width - 1}" if number <= usual // width else f"{number * width} or more": counts[number]
        for number in range(min(counts), last + 1)
    }


def _read_rejects(path: Path) -> list[dict[str, Any]]:
    """Return the reasons, the frequent ones first, each with where it was found, and its first piece as an example."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            reject = json.loads(line)
            where = reject["where"] if reject["where"] in ("corpus", "request", "completion", "filter") else "corpus"
            counts[where, reject["reason"]] += 1
            first.setdefault((where, reject["reason"]), reject)
    most = max(counts.values(), default=1)
    return [
        {
            "where": where,
            "reason": reason,
            "count": count,
            "share": count / most,
            "id": first[where, reason]["id"],
            "content": _cut(first[where, reason]["content"]),
            "detail": _cut(first[where, reason]["detail"]),
        }
        for (where, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _example(shot: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text in pieces, those that ground an answer with its number, and its pairs likewise."""
    said = [pair["rationale"] or pair["answer"] for pair in shot["pairs"]]
    return {
        "id": shot["id"],
        "pieces": pieces(shot["text"], said),
        "pairs": [{**pair, "kind": _KINDS[pair["kind"]], "round": pair["provenance"].get("round", "?")} for pair in shot["pairs"]],
        "grounded": {number for piece in pieces(shot["text"], said) for number in piece.answers},
    }


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_OF_A_REJECT else f"{text[:_SHOWN_OF_A_REJECT]} …"


def _shown(value: Any) -> str:
    return ", ".join(map(_shown, value)) if isinstance(value, list) else json.dumps(value) if not isinstance(value, str) else value


def read_answers(files: Iterable[Path]) -> dict[int, tuple[int, int]]:
    """Add up when requests were finished, from what the shards noted."""
    answers: dict[int, tuple[int, int]] = {}
    for file in files:
        for second, (requests, tokens) in json.loads(file.read_text(encoding="utf-8")).items():
            before = answers.get(int(second), (0, 0))
            answers[int(second)] = (before[0] + requests, before[1] + tokens)
    return answers
