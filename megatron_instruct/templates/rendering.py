"""An M-shot example -> one instruction-augmented text with the role of every character (arXiv:2406.14491, section 2.2).

Comes in: an example, a bank, a seed. Goes out: the document, and the pairs that no template can take, with reasons. Pure.
Layouts: classic (pair after pair), dialogue (pairs as turns), numbered (all questions, then all answers), few_shot (all pairs but the
last are examples, the last is the test), next_turn (a dialogue whose last turn is to be written). In any of them the pairs may come
before the text ("inverted"). Roles: context is the raw text, instruction all that leads up to a response, response what a model
should write, glue what holds the parts together. Does not know: files, tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_instruct.records import AugmentedText, InstructionPair, MShotExample, OneShotExample, Role, Span
from megatron_instruct.templates.bank import Bank
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import NUMBERINGS
from megatron_instruct.templates.pairs import ReadyPair, make_ready
from megatron_instruct.templates.sampling import Choices

type Chunk = tuple[str, Role]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """A pair that is not in the document, and why."""

    reason: str
    raw_text_id: str
    pair: InstructionPair


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """A document and what was left out of it. Pairs of the example = pairs + the number of set_aside."""

    document: AugmentedText
    layout: str
    """A layout, or "raw" where no pair is left: the document is then the raw text alone."""
    inverted: bool
    pairs: int
    """Pairs in the document."""
    set_aside: tuple[SetAside, ...]


def render(example: MShotExample, bank: Bank, *, seed: int) -> Rendering:
    """Render one example. The result depends on the three arguments alone."""
    draws = Draws(bank, Choices(seed, example.id))
    set_aside: list[SetAside] = []
    shots = [(shot.text, _ready_pairs(shot, number, draws, set_aside)) for number, shot in enumerate(example.shots)]
    counts = [len(pairs) for _, pairs in shots if pairs]
    layout = draws.layout(min(counts)) if counts else "raw"
    inverted = bool(counts) and draws.inverted()
    explained = any(pair.rationale is not None for _, pairs in shots for pair in pairs)
    chunks: list[Chunk] = []
    for text, pairs in shots:
        if chunks:
            chunks.append((draws.text("shot_separators"), "glue"))
        chunks += _one_shot(text, pairs, layout, inverted, explained, draws) if pairs else [(text, "context")]
    document, spans = _put_together(chunks)
    provenance = {
        "raw_texts": [shot.id for shot in example.shots],
        "synthesis": _distinct([dict(pair.provenance) for shot in example.shots for pair in shot.pairs if pair.provenance]),
        "seed": seed,
        "bank": {"language": bank.language, "version": bank.version, "sha256": bank.fingerprint},
        "layout": layout,
        "inverted": inverted,
        "drawn": draws.drawn,
    }
    return Rendering(
        document=AugmentedText(id=example.id, text=document, spans=spans, provenance=provenance),
        layout=layout,
        inverted=inverted,
        pairs=sum(counts),
        set_aside=tuple(set_aside),
    )


def _ready_pairs(shot: OneShotExample, number: int, draws: Draws, set_aside: list[SetAside]) -> list[ReadyPair]:
    """Return the pairs that templates can take, and append the others to `set_aside`."""
    pairs: list[ReadyPair] = []
    for place, pair in enumerate(shot.pairs):
        ready = make_ready(pair, draws, f"option_order/{number}/{place}")
        if isinstance(ready, ReadyPair):
            pairs.append(ready)
        else:
            set_aside.append(SetAside(reason=ready, raw_text_id=shot.id, pair=pair))
    return pairs


def _one_shot(text: str, pairs: Sequence[ReadyPair], layout: str, inverted: bool, explained: bool, draws: Draws) -> list[Chunk]:
    """Return a raw text and its pairs, in the order of the layout."""
    family = "few_shot_explained" if layout == "few_shot" and explained else layout
    pair_chunks = _LAYOUTS[family](pairs, draws)
    separator = draws.text("text_separators")
    if inverted:
        opening = draws.text("inversions") if draws.has_reading_prefix() else ""
        return [*pair_chunks, (separator + opening, "glue"), (text, "context")]
    prefix = draws.text("reading_prefixes") if draws.has_reading_prefix() else ""
    bridge = draws.text("bridges") if layout == "classic" and draws.has_bridge() else ""
    return [(prefix, "glue"), (text, "context"), (separator + bridge, "glue"), *pair_chunks]


def _classic(pairs: Sequence[ReadyPair], draws: Draws) -> list[Chunk]:
    chunks: list[Chunk] = []
    for pair in pairs:
        style = draws.style(pair.kind)
        slots = pair.slots()
        _next(chunks, draws)
        chunks += [(style["ask"].fill(slots), "instruction"), (style["reply"].fill(slots), "response")]
    return chunks


def _dialogue(pairs: Sequence[ReadyPair], draws: Draws) -> list[Chunk]:
    asker, answerer = _speakers(draws)
    return [(draws.text("dialogue_headers", asker=asker, answerer=answerer), "glue"), *_turns(pairs, draws)]


def _numbered(pairs: Sequence[ReadyPair], draws: Draws) -> list[Chunk]:
    style, numbers = draws.style("numbered_questions"), draws.style("question_numbers")
    numerals = [{"n": NUMBERINGS[numbers["numbering"].fill({})](number)} for number in range(1, len(pairs) + 1)]
    questions: list[Chunk] = []
    answers: list[Chunk] = []
    for pair, numeral in zip(pairs, numerals, strict=True):
        _next(questions, draws)
        questions.append((numbers["question"].fill(numeral) + pair.asked, "instruction"))
        _next(answers, draws)
        answers += [(numbers["answer"].fill(numeral), "instruction"), (_response(pair, draws), "response")]
    heading, answer_heading = style["open"].fill({}), style["close"].fill({})
    between: Chunk = (draws.text("text_separators"), "glue")
    return [(heading, "instruction"), *questions, between, (answer_heading, "instruction"), *answers]


def _few_shot(pairs: Sequence[ReadyPair], draws: Draws, *, family: str = "few_shot") -> list[Chunk]:
    style = draws.style(family)
    chunks: list[Chunk] = []
    for place, pair in enumerate(pairs):
        if place == len(pairs) - 1:
            _next(chunks, draws)
            chunks.append((style["close"].fill({}), "instruction"))
        elif place:
            _next(chunks, draws)
        reply = style["reply"] if pair.rationale is not None or family == "few_shot" else style["plain_reply"]
        slots = {**pair.slots(), "question": pair.asked}
        chunks += [(style["ask"].fill(slots), "instruction"), (reply.fill(slots), "response")]
    return [(style["open"].fill({}), "instruction"), *chunks]


def _few_shot_explained(pairs: Sequence[ReadyPair], draws: Draws) -> list[Chunk]:
    return _few_shot(pairs, draws, family="few_shot_explained")


def _next_turn(pairs: Sequence[ReadyPair], draws: Draws) -> list[Chunk]:
    asker, answerer = _speakers(draws)
    names = {"asker": asker, "answerer": answerer}
    style, last = draws.style("next_turn"), pairs[-1]
    history = _turns(pairs[:-1], draws)
    _next(history, draws)
    return [
        (style["open"].fill(names), "instruction"),
        *history,
        (draws.text("turns", name=asker) + last.asked, "instruction"),
        (draws.text("pair_separators"), "glue"),
        (style["close"].fill(names), "instruction"),
        (style["reply"].fill({"answer": _response(last, draws)}), "response"),
    ]


_LAYOUTS: dict[str, Callable[[Sequence[ReadyPair], Draws], list[Chunk]]] = {
    "classic": _classic,
    "dialogue": _dialogue,
    "numbered": _numbered,
    "few_shot": _few_shot,
    "few_shot_explained": _few_shot_explained,
    "next_turn": _next_turn,
}


def _turns(pairs: Sequence[ReadyPair], draws: Draws) -> list[Chunk]:
    asker, answerer = _speakers(draws)
    chunks: list[Chunk] = []
    for pair in pairs:
        _next(chunks, draws)
        chunks += [
            (draws.text("turns", name=asker) + pair.asked, "instruction"),
            (draws.text("pair_separators"), "glue"),
            (draws.text("turns", name=answerer), "instruction"),
            (_response(pair, draws), "response"),
        ]
    return chunks


def _speakers(draws: Draws) -> tuple[str, str]:
    style = draws.style("speakers")
    return style["asker"].fill({}), style["answerer"].fill({})


def _response(pair: ReadyPair, draws: Draws) -> str:
    """Return the whole response: the answer alone, or the rationale and the answer as the pair's kind words them."""
    return pair.answer if pair.rationale is None else draws.style(pair.kind)["reply"].fill(pair.slots())


def _next(chunks: list[Chunk], draws: Draws) -> None:
    """Separate what comes next from the pairs that are there already."""
    if chunks:
        chunks.append((draws.text("pair_separators"), "glue"))


def _put_together(chunks: Sequence[Chunk]) -> tuple[str, tuple[Span, ...]]:
    """Join the chunks; neighbours of one role make one span."""
    spans: list[Span] = []
    start = position = 0
    current: Role | None = None
    for text, role in chunks:
        if text and role != current:
            if current is not None:
                spans.append(Span(start=start, end=position, role=current))
            start, current = position, role
        position += len(text)
    assert current is not None, "an example has at least one raw text, which is not empty"
    return "".join(text for text, _ in chunks), (*spans, Span(start=start, end=position, role=current))


def _distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
