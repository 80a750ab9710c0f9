"""A pair made ready for a template: its options shuffled and labelled, its answer turned into a label; or the reason why it cannot be."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_instruct.records import InstructionPair, PairKind
from megatron_instruct.templates.bank import comparable
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import NUMBERINGS


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyPair:
    """What the slots of templates are filled with."""

    kind: PairKind
    question: str
    options: str
    """Header and labelled options, or nothing."""
    answer: str
    """With options, the label of the right one, or its text where labels do not tell options apart."""
    rationale: str | None

    @property
    def asked(self) -> str:
        """The question with its options."""
        return f"{self.question}\n{self.options}" if self.options else self.question

    def slots(self) -> dict[str, str]:
        return {"question": self.question, "options": self.options, "answer": self.answer, "rationale": self.rationale or ""}


def make_ready(pair: InstructionPair, draws: Draws, order_name: str) -> ReadyPair | str:
    """Return the pair ready for templates, or the reason why it must be set aside.

    order_name: name of the choice that shuffles this pair's options.
    """
    rationale = (pair.rationale or "").strip()
    has_options = bool(pair.options) or pair.kind in ("options", "options_chain_of_thought")
    if not rationale and pair.kind in ("chain_of_thought", "options_chain_of_thought"):
        return "rationale missing"
    answer, options = pair.answer.strip(), ""
    if has_options:
        choices = _choices(pair, draws)
        if isinstance(choices, str):
            return choices
        options, answer = _labelled(*choices, draws=draws, order_name=order_name)
    return ReadyPair(
        kind=_KINDS[has_options, bool(rationale)],
        question=pair.question.strip(),
        options=options,
        answer=answer,
        rationale=rationale or None,
    )


_KINDS: dict[tuple[bool, bool], PairKind] = {
    (False, False): "free_form",
    (False, True): "chain_of_thought",
    (True, False): "options",
    (True, True): "options_chain_of_thought",
}
"""By what the pair holds, (options, rationale), so that neither is lost whatever kind it claims to be."""


def _choices(pair: InstructionPair, draws: Draws) -> tuple[list[str], int, int] | str:
    """Return the options, the place of the right one, and how many to shuffle (a last "none of these" keeps its place)."""
    options = [option.strip() for option in pair.options]
    if not options:
        return "options missing"
    if not all(options):
        return "empty option"
    if len(set(options)) < len(options):
        return "repeated option"
    answer, plain_answer = pair.answer.strip(), comparable(pair.answer)
    says_none = [comparable(option) in draws.none_of_these for option in options]
    if plain_answer in draws.none_of_these and answer not in options:
        if any(says_none):
            answer = options[says_none.index(True)]
        else:
            options.append(answer)
            says_none.append(True)
    if any(says_none):
        options = [option for option, none in sorted(zip(options, says_none, strict=True), key=lambda choice: choice[1])]
    places = [place for place, option in enumerate(options) if option == answer]
    places = places or [place for place, option in enumerate(options) if comparable(option) == plain_answer]
    if len(places) != 1:
        return "answer fits several options" if places else "answer is no option"
    return options, places[0], len(options) - sum(says_none)


def _labelled(options: Sequence[str], right: int, shuffled: int, *, draws: Draws, order_name: str) -> tuple[str, str]:
    """Return the block of options and the answer."""
    order = [*draws.order(order_name, shuffled), *range(shuffled, len(options))]
    style = draws.style("option_labels")
    numerals = [NUMBERINGS[style["numbering"].fill({})](number) for number in range(1, len(options) + 1)]
    lines = [style["label"].fill({"n": numeral}) + options[place] for numeral, place in zip(numerals, order, strict=True)]
    block = draws.text("option_headers") + draws.text("option_ends").join(lines)
    return block, style["answer"].fill({"n": numerals[order.index(right)], "option": options[right]})
