"""An M-shot example -> one instruction-augmented text with the role of every character (arXiv:2406.14491, section 2.2).

Comes in: an example, a bank, a seed. Goes out: the document, and the pairs that no template can take, with reasons. Pure.
Layouts: classic (pair after pair), dialogue (pairs as turns), numbered (all questions, then all answers), few_shot (all pairs but the
last are examples, the last is the test), next_turn (a dialogue whose last turn is to be written). In any of them the pairs may come
before the text ("inverted"). Roles: context is the raw text, instruction all that leads up to a response, response what a model
should write, glue what holds the parts together. Does not know: files, tokens.
"""

import itertools
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

from megatron_instruct.records import AugmentedText, InstructionPair, MShotExample, Role
from megatron_instruct.templates.bank import Bank
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import numerals
from megatron_instruct.templates.pairs import ReadyPair, make_ready
from megatron_instruct.templates.sampling import Choices

type Pieces = list[str]
"""A text and its role, a text and its role, and so on: one flat list, since dozens of pieces make a document."""


class SetAside(Struct, frozen=True, kw_only=True):
    """A pair that is not in the document, and why."""

    reason: str
    raw_text_id: str
    pair: InstructionPair


class Rendering(Struct, frozen=True, kw_only=True):
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
    shots = _ready_shots(example, draws, set_aside)
    counts = [len(pairs) for _, pairs in shots if pairs]
    layout = draws.layout(min(counts)) if counts else "raw"
    inverted = bool(counts) and draws.inverted()
    explained = layout == "few_shot" and any(pair.rationale for _, pairs in shots for pair in pairs)
    family = "few_shot_explained" if explained else layout
    document, ends, roles = _put_together(_pieces(shots, family, inverted, draws))
    provenance = {
        "raw_texts": [shot.id for shot in example.shots],
        "synthesis": _distinct([pair.provenance for shot in example.shots for pair in shot.pairs]),
        "seed": seed,
        "bank": {"language": bank.language, "version": bank.version, "sha256": bank.fingerprint},
        "layout": layout,
        "inverted": inverted,
        "drawn": draws.drawn,
    }
    return Rendering(
        document=AugmentedText(id=example.id, text=document, ends=ends, roles=roles, provenance=provenance),
        layout=layout,
        inverted=inverted,
        pairs=sum(counts),
        set_aside=tuple(set_aside),
    )


def fault_of(rendering: Rendering) -> tuple[str, str] | None:
    """Return reason and detail of why no file may hold what was rendered, or what was left out of it; None where it may."""
    text = rendering.document.text
    if "\0" in text:
        return "NUL character", f"a text of the example holds a NUL; it would be character {text.index(chr(0))} of the document"
    try:
        for one in (text, *(json.dumps(one.pair.to_json(), ensure_ascii=False) for one in rendering.set_aside)):
            one.encode()
    except UnicodeEncodeError as error:
        return "lone surrogate", f"half of a surrogate pair, which is no text ({error.reason})"
    return None


def _ready_shots(example: MShotExample, draws: Draws, set_aside: list[SetAside]) -> list[tuple[str, list[ReadyPair]]]:
    """Return each raw text with the pairs that templates can take, and append the others to `set_aside`."""
    shots: list[tuple[str, list[ReadyPair]]] = []
    first = 0
    for shot in example.shots:
        pairs: list[ReadyPair] = []
        for number, pair in enumerate(shot.pairs, first):
            ready = make_ready(pair, draws, number)
            if isinstance(ready, str):
                set_aside.append(SetAside(reason=ready, raw_text_id=shot.id, pair=pair))
            else:
                pairs.append(ready)
        first += len(shot.pairs)
        shots.append((shot.text, pairs))
    return shots


def _pieces(shots: Sequence[tuple[str, Sequence[ReadyPair]]], family: str, inverted: bool, draws: Draws) -> Pieces:
    """Return the raw texts and their pairs, in the order of the layout."""
    before = between = shot_separator = ""
    if family != "raw":
        between = draws.text("text_separators")
        if inverted:
            between += draws.text("inversions") if draws.has_reading_prefix() else ""
        else:
            before = draws.text("reading_prefixes") if draws.has_reading_prefix() else ""
            between += draws.text("bridges") if family == "classic" and draws.has_bridge() else ""
    if len(shots) > 1:
        shot_separator = draws.text("shot_separators")
    pieces: Pieces = []
    for text, pairs in shots:
        if not pairs:
            pieces += (text, "context")
        elif inverted:
            pieces += _LAYOUTS[family](pairs, draws)
            pieces += (between, "glue", text, "context")
        else:
            pieces += (before, "glue", text, "context", between, "glue")
            pieces += _LAYOUTS[family](pairs, draws)
        pieces += (shot_separator, "glue")
    return pieces[:-2]


def _classic(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    pieces: Pieces = []
    separator = draws.text("pair_separators")
    for pair in pairs:
        style = draws[pair.kind]
        pieces += (style["ask"].of(pair), "instruction", style["reply"].of(pair), "response", separator, "glue")
    return pieces[:-2]


def _dialogue(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = _speakers(draws)
    return [draws.filled("dialogue_headers", asker=asker, answerer=answerer), "glue", *_turns(pairs, draws)]


def _numbered(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    style, numbers = draws["numbered_questions"], draws["question_numbers"]
    separator = draws.text("pair_separators")
    questions: Pieces = []
    answers: Pieces = []
    for pair, numeral in zip(pairs, numerals(numbers["numbering"].text, len(pairs)), strict=True):
        slots = {"n": numeral}
        questions += (numbers["question"].fill(slots) + pair.asked, "instruction", separator, "glue")
        answers += (numbers["answer"].fill(slots), "instruction", _response(pair, draws), "response", separator, "glue")
    questions[-2:] = (draws.text("text_separators"), "glue")
    return [style["open"].text, "instruction", *questions, style["close"].text, "instruction", *answers[:-2]]


def _few_shot(pairs: Sequence[ReadyPair], draws: Draws, *, family: str = "few_shot") -> Pieces:
    style = draws[family]
    separator = draws.text("pair_separators")
    pieces: Pieces = [style["open"].text, "instruction"]
    for pair in pairs:
        if pair is pairs[-1]:
            pieces += (style["close"].text, "instruction")
        reply = style["reply"] if pair.rationale or family == "few_shot" else style["plain_reply"]
        asked = replace(pair, question=pair.asked)
        pieces += (style["ask"].of(asked), "instruction", reply.of(asked), "response", separator, "glue")
    return pieces[:-2]


def _few_shot_explained(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    return _few_shot(pairs, draws, family="few_shot_explained")


def _next_turn(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = _speakers(draws)
    names = {"asker": asker, "answerer": answerer}
    style, last, separator = draws["next_turn"], pairs[-1], draws.text("pair_separators")
    history = _turns(pairs[:-1], draws)
    return [
        *(style["open"].fill(names), "instruction"),
        *history,
        *((separator, "glue") if history else ()),
        *(draws.filled("turns", name=asker) + last.asked, "instruction"),
        *(separator, "glue"),
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
    separator = draws.text("pair_separators")
    pieces: Pieces = []
    for pair in pairs:
        pieces += (asker + pair.asked, "instruction", separator, "glue", answerer, "instruction", _response(pair, draws), "response")
        pieces += (separator, "glue")
    return pieces[:-2]


def _speakers(draws: Draws) -> tuple[str, str]:
    style = draws["speakers"]
    return style["asker"].text, style["answerer"].text


def _response(pair: ReadyPair, draws: Draws) -> str:
    """Return the whole response: the answer alone, or the rationale and the answer as the pair's kind words them."""
    return draws[pair.kind]["reply"].of(pair) if pair.rationale else pair.answer


def _put_together(pieces: Pieces) -> tuple[str, tuple[int, ...], tuple[Role, ...]]:
    """Join the pieces; return the text, and where each run of pieces of one role ends."""
    texts, roles = pieces[::2], cast(list[Role], pieces[1::2])
    if "" in texts:
        roles = list(itertools.compress(roles, texts))
        texts = list(filter(None, texts))
    is_last = [*map(operator.ne, roles, roles[1:]), True]
    ends = itertools.accumulate(map(len, texts))
    return "".join(texts), tuple(itertools.compress(ends, is_last)), tuple(itertools.compress(roles, is_last))


def _distinct(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the values that are not empty, each once."""
    found: list[dict[str, Any]] = []
    for value in values:
        if value and value not in found:
            found.append(dict(value))
    return found
