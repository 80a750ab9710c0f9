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
from functools import lru_cache
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from megatron_instruct.records import AugmentedText, InstructionPair, MShotExample, Role
from megatron_instruct.templates.bank import Bank
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import numerals
from megatron_instruct.templates.pairs import ReadyPair, make_ready
from megatron_instruct.templates.sampling import Choices

type Pieces = tuple[list[str], list[Role]]
"""Texts, and the role of each: two flat lists, since dozens of pieces make a document."""


_ANSWERED: list[Role] = ["instruction", "response", "glue"]
"""Of one pair: what is asked, the response, and what separates it from the next."""


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
    document, ends, roles = _put_together(*_pieces(shots, family, inverted, draws))
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
    document = rendering.document
    if "\0" in document.text:
        return "NUL character", f"a text of the example holds a NUL; it would be character {document.text.index(chr(0))} of the document"
    others = [document.id, document.provenance]
    pairs = [one.pair.to_json() for one in rendering.set_aside]
    for what, value in (("its text", document.text), ("an id or what is known of a pair", others), ("a pair", pairs)):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return "lone surrogate", f"half of a surrogate pair, which is no text, in {what} ({error.reason})"
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
    texts: list[str] = []
    roles: list[Role] = []
    for text, pairs in shots:
        if not pairs:
            texts.append(text)
            roles.append("context")
        else:
            asked, asked_roles = _LAYOUTS[family](pairs, draws)
            if inverted:
                texts += (*asked, between, text)
                roles += (*asked_roles, "glue", "context")
            else:
                texts += (before, text, between, *asked)
                roles += ("glue", "context", "glue", *asked_roles)
        texts.append(shot_separator)
        roles.append("glue")
    return texts[:-1], roles[:-1]


def _classic(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    texts: list[str] = []
    separator = draws.text("pair_separators")
    for pair in pairs:
        style = draws[pair.kind]
        texts += (style["ask"].of(pair), style["reply"].of(pair), separator)
    return texts[:-1], (_ANSWERED * len(pairs))[:-1]


def _dialogue(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = _speakers(draws)
    header = draws.filled("dialogue_headers", asker=asker, answerer=answerer)
    texts, roles = _turns(pairs, draws)
    return [header, *texts], ["glue", *roles]


def _numbered(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    style, numbers = draws["numbered_questions"], draws["question_numbers"]
    separator = draws.text("pair_separators")
    questions: list[str] = []
    answers: list[str] = []
    for pair, numeral in zip(pairs, numerals(numbers["numbering"].text, len(pairs)), strict=True):
        slots = {"n": numeral}
        questions += (numbers["question"].fill(slots) + pair.asked, separator)
        answers += (numbers["answer"].fill(slots), _response(pair, draws), separator)
    questions[-1] = draws.text("text_separators")
    roles: list[Role] = ["instruction", *("instruction", "glue") * len(pairs), "instruction", *_ANSWERED * len(pairs)]
    return [style["open"].text, *questions, style["close"].text, *answers[:-1]], roles[:-1]


def _few_shot(pairs: Sequence[ReadyPair], draws: Draws, *, family: str = "few_shot") -> Pieces:
    style = draws[family]
    separator = draws.text("pair_separators")
    texts = [style["open"].text]
    for pair in pairs:
        if pair is pairs[-1]:
            texts.append(style["close"].text)
        reply = style["reply"] if pair.rationale or family == "few_shot" else style["plain_reply"]
        asked = replace(pair, question=pair.asked)
        texts += (style["ask"].of(asked), reply.of(asked), separator)
    return texts[:-1], ["instruction", *_ANSWERED * (len(pairs) - 1), "instruction", *_ANSWERED[:-1]]


def _few_shot_explained(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    return _few_shot(pairs, draws, family="few_shot_explained")


def _next_turn(pairs: Sequence[ReadyPair], draws: Draws) -> Pieces:
    asker, answerer = _speakers(draws)
    names = {"asker": asker, "answerer": answerer}
    style, last, separator = draws["next_turn"], pairs[-1], draws.text("pair_separators")
    history, history_roles = _turns(pairs[:-1], draws)
    if history:
        history.append(separator)
        history_roles.append("glue")
    question = draws.filled("turns", name=asker) + last.asked
    reply = style["reply"].fill({"answer": _response(last, draws)})
    texts = [style["open"].fill(names), *history, question, separator, style["close"].fill(names), reply]
    return texts, ["instruction", *history_roles, "instruction", "glue", "instruction", "response"]


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
    texts: list[str] = []
    for pair in pairs:
        texts += (asker + pair.asked, separator, answerer, _response(pair, draws), separator)
    return texts[:-1], (["instruction", "glue", *_ANSWERED] * len(pairs))[:-1]


def _speakers(draws: Draws) -> tuple[str, str]:
    style = draws["speakers"]
    return style["asker"].text, style["answerer"].text


def _response(pair: ReadyPair, draws: Draws) -> str:
    """Return the whole response: the answer alone, or the rationale and the answer as the pair's kind words them."""
    return draws[pair.kind]["reply"].of(pair) if pair.rationale else pair.answer


def _put_together(texts: list[str], roles: list[Role]) -> tuple[str, tuple[int, ...], tuple[Role, ...]]:
    """Join the pieces; return the text, and where each run of pieces of one role ends."""
    if "" in texts:
        roles = list(itertools.compress(roles, texts))
        texts = list(filter(None, texts))
    ends_of_runs, roles_of_runs = _runs(tuple(roles))
    return "".join(texts), ends_of_runs(list(itertools.accumulate(map(len, texts)))), roles_of_runs


@lru_cache(maxsize=4096)
def _runs(roles: tuple[Role, ...]) -> tuple[Callable[[Sequence[int]], tuple[int, ...]], tuple[Role, ...]]:
    """Return what picks the end of each run of one role from the ends of pieces, and the runs' roles; few orders of roles come up."""
    last = [place for place, (role, following) in enumerate(itertools.pairwise((*roles, None))) if role != following]
    picked = operator.itemgetter(*last) if len(last) > 1 else lambda ends: (ends[-1],)
    return picked, tuple(roles[place] for place in last)


def _distinct(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the values that are not empty, each once."""
    found: list[dict[str, Any]] = []
    for value in values:
        if value and value not in found:
            found.append(dict(value))
    return found
