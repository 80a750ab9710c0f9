"""A pair made ready for a template: its options shuffled and labelled, its answer turned into a label; or the reason why it cannot be."""

from collections.abc import Set
from functools import lru_cache

from msgspec import Struct

from megatron_instruct.records import InstructionPair, PairKind
from megatron_instruct.templates.bank import comparable
from megatron_instruct.templates.draws import Draws
from megatron_instruct.templates.numbering import numerals
from megatron_instruct.templates.slots import parse


class ReadyPair(Struct, frozen=True, gc=False):
    """What the slots of templates are filled with, by the names of the slots."""

    question: str
    options: str
    """Header and labelled options, or nothing."""
    answer: str
    """With options, the label of the right one, or its text where labels do not tell options apart."""
    rationale: str
    """Or nothing."""
    kind: PairKind
    """What the pair holds, so that nothing is lost whatever kind it claims to be."""

    @property
    def asked(self) -> str:
        """The question with its options."""
        return f"{self.question}\n{self.options}" if self.options else self.question


def make_ready(pair: InstructionPair, draws: Draws, number: int) -> ReadyPair | str:
    """Return the pair ready for templates, or the reason why it must be set aside. number: of the pair in its example, from 0."""
    rationale, kind = pair.rationale, pair.kind
    rationale = rationale.strip() if rationale is not None else ""
    if not rationale and kind in ("chain_of_thought", "options_chain_of_thought"):
        return "rationale missing"
    if not pair.options and kind not in ("options", "options_chain_of_thought"):
        return ReadyPair(pair.question.strip(), "", pair.answer.strip(), rationale, "chain_of_thought" if rationale else "free_form")
    choices = _choices(pair, draws)
    if isinstance(choices, str):
        return choices
    options, answer = _labelled(choices, draws, number)
    return ReadyPair(pair.question.strip(), options, answer, rationale, "options_chain_of_thought" if rationale else "options")


type _Choices = tuple[list[str], int, int]
"""The options, the place of the right one, and how many to shuffle (a last "none of these" keeps its place)."""


def _choices(pair: InstructionPair, draws: Draws) -> _Choices | str:
    """Return the choices of a pair with options, or why there are none."""
    options = [option.strip() for option in pair.options]
    if not options:
        return "options missing"
    if "" in options:
        return "empty option"
    if len(set(options)) < len(options):
        return "repeated option"
    answer = pair.answer.strip()
    if answer in options and not draws.bank.may_say_none_of_these(options):
        return options, options.index(answer), len(options)
    return _compared_choices(options, answer, draws.bank.none_of_these)


def _compared_choices(options: list[str], answer: str, none_of_these: Set[str]) -> _Choices | str:
    """Do it where the answer repeats no option exactly, or one may say that none is right."""
    plain_answer = comparable(answer)
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


def _labelled(choices: _Choices, draws: Draws, number: int) -> tuple[str, str]:
    """Return the block of options and the answer."""
    options, right, shuffled = choices
    order = draws.order(number, shuffled)
    if shuffled < len(options):
        order = (*order, *range(shuffled, len(options)))
    style = draws["option_labels"]
    block, labels = _block(style["label"].source, style["numbering"].text, draws.text("option_ends"), len(options))
    lines = block % (draws.text("option_headers"), *[options[place] for place in order])
    return lines, style["answer"].fill({"n": labels[order.index(right)], "option": options[right]})


@lru_cache(maxsize=4096)
def _block(label: str, numbering: str, end: str, count: int) -> tuple[str, tuple[str, ...]]:
    """Return a block of options, with "%s" for the header and for each option, and the numerals in their labels."""
    template, found = parse(label), numerals(numbering, count)
    labels = [template.fill({"n": numeral}).replace("%", "%%") for numeral in found]
    return "%s" + end.replace("%", "%%").join(f"{label}%s" for label in labels), found
