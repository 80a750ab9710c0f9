"""A pair made ready for a template: its options shuffled and labelled, its answer turned into a label; or the reason why it cannot be."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_instruct.records import InstructionPair, PairKind
from megatron_instruct.templates.bank import comparable
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import numerals
from megatron_instruct.templates.slots import parse


class ReadyPair(NamedTuple):
    """What the slots of templates are filled with. A tuple, since one is made for each pair."""

    kind: PairKind
    slots: Mapping[str, str]
    """question; options: header and labelled options, or nothing; answer: with options, the label of the right one, or its text where
    labels do not tell options apart; rationale, or nothing."""
    reasoned: bool
    """There is a rationale."""

    @property
    def asked(self) -> str:
        """The question with its options."""
        question, options = self.slots["question"], self.slots["options"]
        return f"{question}\n{options}" if options else question


def make_ready(pair: InstructionPair, draws: Draws, number: int, place: int) -> ReadyPair | str:
    """Return the pair ready for templates, or the reason why it must be set aside.

    number, place: of the one-shot example, and of the pair in it; the choice that shuffles its options is named after them.
    """
    rationale, kind = pair.rationale.strip() if pair.rationale is not None else "", pair.kind
    if not rationale and kind in ("chain_of_thought", "options_chain_of_thought"):
        return "rationale missing"
    question, answer, options = pair.question.strip(), pair.answer.strip(), ""
    if pair.options or kind in ("options", "options_chain_of_thought"):
        choices = _choices(pair, draws)
        if isinstance(choices, str):
            return choices
        options, answer = _labelled(*choices, draws=draws, order_name=f"option_order/{number}/{place}")
    return ReadyPair(
        _KINDS[bool(options), bool(rationale)],
        {"question": question, "options": options, "answer": answer, "rationale": rationale},
        bool(rationale),
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
    if "" in options:
        return "empty option"
    if len(set(options)) < len(options):
        return "repeated option"
    answer, plain_answer, none_of_these = pair.answer.strip(), comparable(pair.answer), draws.none_of_these
    compared = [comparable(option) for option in options]
    shuffled = len(options)
    if plain_answer in none_of_these or not none_of_these.isdisjoint(compared):
        says_none = [option in none_of_these for option in compared]
        if plain_answer in none_of_these and answer not in options:
            if any(says_none):
                answer = options[says_none.index(True)]
            else:
                options.append(answer)
                compared.append(plain_answer)
                says_none.append(True)
        in_order = sorted(range(len(options)), key=says_none.__getitem__)
        options, compared = [options[place] for place in in_order], [compared[place] for place in in_order]
        shuffled = len(options) - sum(says_none)
    if answer in options:
        return options, options.index(answer), shuffled
    if compared.count(plain_answer) != 1:
        return "answer fits several options" if plain_answer in compared else "answer is no option"
    return options, compared.index(plain_answer), shuffled


def _labelled(options: Sequence[str], right: int, shuffled: int, *, draws: Draws, order_name: str) -> tuple[str, str]:
    """Return the block of options and the answer."""
    order = draws.order(order_name, shuffled)
    order += range(shuffled, len(options))
    style = draws.style("option_labels")
    numbering = style["numbering"].text
    labels = _labels(style["label"].source, numbering, len(options))
    lines = [label + options[place] for label, place in zip(labels, order, strict=True)]
    numeral = numerals(numbering, len(options))[order.index(right)]
    block = draws.text("option_headers") + draws.text("option_ends").join(lines)
    return block, style["answer"].fill({"n": numeral, "option": options[right]})


@lru_cache(maxsize=4096)
def _labels(label: str, numbering: str, count: int) -> tuple[str, ...]:
    template = parse(label)
    return tuple(template.fill({"n": numeral}) for numeral in numerals(numbering, count))
