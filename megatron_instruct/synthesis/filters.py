"""The pairs of a text through the filters that look at one pair: divided into those kept and those dropped, with the first reason.

Comes in: pairs, their text. Does not know: engines, prompts, other texts.
"""

from collections.abc import Sequence

from megatron_instruct.prompt_formats.parsing import Dropped
from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.contamination import Contamination, evaluation_files
from megatron_instruct.synthesis.content_words import words_of
from megatron_instruct.synthesis.filter_rules import FILTERS, NEED_WORDS, Drop, Place
from megatron_instruct.synthesis.filter_settings import FilterSettings


class Filters:
    """The filters of a run, with what they need to know."""

    def __init__(self, settings: FilterSettings, *, language: str) -> None:
        """language: of the prompt format. Raises InputError for an evaluation file that cannot be read."""
        self.settings = settings
        self._words = words_of(language)
        named = settings.of_stage(0)
        self.silent = [name for name in named if name in NEED_WORDS and not self._words.silent]
        """Those that say nothing, since they need words of the language that nobody wrote down."""
        self._rules = [(name, FILTERS[name]) for name in named if name not in self.silent]
        self.passed = [name for name, _ in self._rules if name != "contamination" or settings.decontaminate]
        """What a pair that is kept has passed."""
        self._contamination: Contamination | None = None
        if settings.decontaminate:
            self._contamination = Contamination(evaluation_files(settings.decontaminate), settings.decontamination_ngram)

    def keep(self, pairs: Sequence[InstructionPair], text: str) -> tuple[list[InstructionPair], list[Dropped]]:
        """Divide the pairs of a text."""
        place = Place(text=text, settings=self.settings, words=self._words, contamination=self._contamination)
        dropped: list[Dropped] = []
        for pair in pairs:
            reasons = (rule(pair, place) for _, rule in self._rules)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                place.earlier.append(pair)
            else:
                dropped.append(dropped_pair(pair, reason))
        return place.earlier, dropped


def dropped_pair(pair: InstructionPair, drop: Drop) -> Dropped:
    """Return a pair as something that is not kept."""
    question = "\n".join((pair.question, *(f"- {option}" for option in pair.options)))
    answer = pair.answer if pair.rationale is None else f"{pair.rationale}\n{pair.answer}"
    return Dropped(reason=drop.reason, content=f"{question}\n{answer}", detail=drop.detail)
