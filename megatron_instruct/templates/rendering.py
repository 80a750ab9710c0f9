"""An M-shot example -> one instruction-augmented text with the role of every character (arXiv:2406.14491, section 2.2).

Comes in: an example, a bank, a seed. Goes out: the document, and the pairs that no template can take, with reasons. Pure.
Layouts: classic (pair after pair), dialogue (pairs as turns), numbered (all questions, then all answers), few_shot (all pairs but the
last are examples, the last is the test), next_turn (a dialogue whose last turn is to be written). In any of them the pairs may come
before the text ("inverted"). Roles: context is the raw text, instruction all that leads up to a response, response what a model
should write, glue what holds the parts together. Does not know: files, tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_instruct.records import AugmentedText, InstructionPair, MShotExample, OneShotExample, Span
from megatron_instruct.templates.bank import Bank
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import numerals
from megatron_instruct.templates.pairs import ReadyPair, make_ready
from megatron_instruct.templates.sampling import Choices

type Pieces = list[str]
"""A text and its role, a text and its role, and so on: one flat list, since dozens of pieces make a document."""


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
    explained = any(pair.reasoned for _, pairs in shots for pair in pairs)
    pieces: Pieces = []
    for text, pairs in shots:
        if pieces:
            pieces += (draws.text("shot_separators"), "glue")
        pieces += _one_shot(text, pairs, layout, inverted, explained, draws) if pairs else [text, "context"]
    document, spans = _put_together(pieces)
    provenance = {
        "raw_texts": [shot.id for shot in example.shots],
        "synthesis": _distinct(pair.provenance for shot in example.shots for pair in shot.pairs),
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
        ready = make_ready(pair, draws, number, place)
        if isinstance(ready, str):
            set_aside.append(SetAside(reason=ready, raw_text_id=shot.id, pair=pair))
        else:
            pairs.append(ready)
    return pairs


def _one_shot(text: str, pairs: Sequence[ReadyPair], layout: str, inverted: bool, explained: bool, draws: Draws) -> Pieces:
    """Return a raw text and its pairs, in the order of the layout."""
    family = "few_shot_explained" if layout == "few_shot" and explained else layout
    pair_pieces = _LAYOUTS[family](pairs, draws)
    separator = draws.text("text_separators")
    if inverted:
        opening = draws.text("inversions") if draws.has_reading_prefix() else ""
        return [*pair_pieces, separator + opening, "glue", text, "context"]
    prefix = draws.text("reading_prefixes") if draws.has_reading_prefix() else ""
    bridge = draws.text("bridges") if layout == "classic" and draws.has_bridge() else ""
    return [prefix, "glue", text, "context", separator + bridge, "glue", *pair_pieces]


def _classic(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    pieces: Pieces = []
    separator = draws.text("pair_separators") if len(pairs) > 1 else ""
    for pair in pairs:
        style = draws.style(pair.kind)
        if pieces:
            pieces += (separator, "glue")
        pieces += (style["ask"].fill(pair.slots), "instruction", style["reply"].fill(pair.slots), "response")
    return pieces


def _dialogue(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = _speakers(draws)
    return [draws.filled("dialogue_headers", asker=asker, answerer=answerer), "glue", *_turns(pairs, draws)]


def _numbered(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    style, numbers = draws.style("numbered_questions"), draws.style("question_numbers")
    names = [{"n": numeral} for numeral in numerals(numbers["numbering"].text, len(pairs))]
    questions: Pieces = []
    answers: Pieces = []
    for pair, numeral in zip(pairs, names, strict=True):
        _next(questions, draws)
        questions += (numbers["question"].fill(numeral) + pair.asked, "instruction")
        _next(answers, draws)
        answers += (numbers["answer"].fill(numeral), "instruction", _response(pair, draws), "response")
    heading, answer_heading = style["open"].text, style["close"].text
    return [heading, "instruction", *questions, draws.text("text_separators"), "glue", answer_heading, "instruction", *answers]


def _few_shot(pairs: Sequence[ReadyPair], draws: Draws, *, family: str = "few_shot") -> Pieces:
    style = draws.style(family)
    pieces: Pieces = []
    for place, pair in enumerate(pairs):
        if place == len(pairs) - 1:
            _next(pieces, draws)
            pieces += (style["close"].text, "instruction")
        elif place:
            _next(pieces, draws)
        reply = style["reply"] if pair.reasoned or family == "few_shot" else style["plain_reply"]
        slots = {**pair.slots, "question": pair.asked}
        pieces += (style["ask"].fill(slots), "instruction", reply.fill(slots), "response")
    return [style["open"].text, "instruction", *pieces]


def _few_shot_explained(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    return _few_shot(pairs, draws, family="few_shot_explained")


def _next_turn(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = _speakers(draws)
    names = {"asker": asker, "answerer": answerer}
    style, last = draws.style("next_turn"), pairs[-1]
    history = _turns(pairs[:-1], draws)
    _next(history, draws)
    return [
        *(style["open"].fill(names), "instruction"),
        *history,
        *(draws.filled("turns", name=asker) + last.asked, "instruction"),
        *(draws.text("pair_separators"), "glue"),
        *(style["close"].fill(names), "instruction"),
        *(style["reply"].fill({"answer": _response(last, draws)}), "response"),
    ]


_LAYOUTS: dict[str, Callable[[Sequence[ReadyPair], Draws], Pieces]] = {
    "classic": _classic,
    "dialogue": _dialogue,
    "numbered": _numbered,
    "few_shot": _few_shot,
    "few_shot_explained": _few_shot_explained,
    "next_turn": _next_turn,
}


def _turns(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = (draws.filled("turns", name=name) for name in _speakers(draws))
    pieces: Pieces = []
    for pair in pairs:
        _next(pieces, draws)
        pieces += (asker + pair.asked, "instruction", draws.text("pair_separators"), "glue")
        pieces += (answerer, "instruction", _response(pair, draws), "response")
    return pieces


def _speakers(draws: Draws) -> tuple[str, str]:
    style = draws.style("speakers")
    return style["asker"].text, style["answerer"].text


def _response(pair: ReadyPair, draws: Draws) -> str:
    """Return the whole response: the answer alone, or the rationale and the answer as the pair's kind words them."""
    return draws.style(pair.kind)["reply"].fill(pair.slots) if pair.reasoned else pair.slots["answer"]


def _next(pieces: Pieces, draws: Draws) -> None:
    """Separate what comes next from the pairs that are there already."""
    if pieces:
        pieces += (draws.text("pair_separators"), "glue")


def _put_together(pieces: Pieces) -> tuple[str, tuple[Span, ...]]:
    """Join the pieces; neighbours of one role make one span."""
    texts = pieces[::2]
    starts: list[int] = []
    roles: list[str] = []
    position = 0
    current = None
    for text, role in zip(texts, pieces[1::2], strict=True):
        if role != current and text:
            starts.append(position)
            roles.append(role)
            current = role
        position += len(text)
    assert current is not None, "an example has at least one raw text, which is not empty"
    spans = map(_SPAN, zip(starts, [*starts[1:], position], roles, strict=True))
    return "".join(texts), tuple(spans)


_SPAN = partial(tuple.__new__, Span)
"""Makes a Span of its three fields: dozens a document."""


def _distinct(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the values that are not empty, each once."""
    found: list[dict[str, Any]] = []
    for value in values:
        if value and value not in found:
            found.append(dict(value))
    return found
