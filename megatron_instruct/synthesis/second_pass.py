"""Filters that ask the engine again about each pair: whether a second answer agrees with the first, and what a judge says.

Each is pure: it gives the prompt of a question about a pair, and makes a verdict of what was answered; who asks, and when, is known
elsewhere. Sources: consistency filter of AdaMLLM (arXiv:2411.19930); a model as judge (arXiv:2306.05685).
"""

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from megatron_instruct.errors import ConfigError
from megatron_instruct.prompt_formats.parsing import read_answer
from megatron_instruct.prompt_formats.prompt_format import PromptFormat
from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.content_words import plain_words
from megatron_instruct.synthesis.filter_rules import Drop
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.prompts import Prompts

_LONGEST_VERDICT = 8
"""Tokens of a verdict: its first word is enough."""


class Check(Protocol):
    """A filter that asks."""

    name: str
    max_new_tokens: int

    def question(self, pair: InstructionPair, text: str) -> list[int]:
        """Return the token ids of what is asked about a pair of a text."""
        ...

    def verdict(self, pair: InstructionPair, completion: str) -> Drop | None:
        """Return why the pair is dropped after this answer, or None."""
        ...


class SecondAnswer:
    """Asks for the answer to the question alone; the two answers must have words in common."""

    name = "second_answer"

    def __init__(self, prompt_format: PromptFormat, prompts: Prompts, settings: FilterSettings, max_new_tokens: int) -> None:
        if prompt_format.kind == "chat" and not prompt_format.second_answer:
            raise _no_key(prompt_format, "second_answer")
        self.max_new_tokens = max_new_tokens
        self._layout, self._prompts, self._least = prompt_format.pair, prompts, settings.min_agreement

    def question(self, pair: InstructionPair, text: str) -> list[int]:
        return self._prompts.encode_question(text, pair)

    def verdict(self, pair: InstructionPair, completion: str) -> Drop | None:
        second = self._prompts.escaping.restore(read_answer(completion, self._layout))
        agreement = word_f1(pair.answer, second)
        if agreement >= self._least:
            return None
        return Drop("second answer disagrees", f"F1 {agreement:.2f} with: {second}")


class Judge:
    """Asks whether the text makes the answer right; what is neither yes nor no drops the pair, too."""

    name = "judge"
    max_new_tokens = _LONGEST_VERDICT

    def __init__(self, prompt_format: PromptFormat, prompts: Prompts, settings: FilterSettings, max_new_tokens: int) -> None:
        if prompt_format.judge is None:
            raise _no_key(prompt_format, "judge")
        self._judge, self._prompts = prompt_format.judge, prompts

    def question(self, pair: InstructionPair, text: str) -> list[int]:
        return self._prompts.encode_judgement(text, pair)

    def verdict(self, pair: InstructionPair, completion: str) -> Drop | None:
        said = completion.strip().lstrip("*_\"'“「# ").casefold()
        if said.startswith(self._judge.keep.casefold()):
            return None
        return Drop("judged wrong" if said.startswith(self._judge.drop.casefold()) else "judge gave no verdict", completion.strip())


CHECKS: dict[str, Callable[[PromptFormat, Prompts, FilterSettings, int], Check]] = {"second_answer": SecondAnswer, "judge": Judge}
"""The filters that ask, by name."""


def load_checks(prompt_format: PromptFormat, prompts: Prompts, settings: FilterSettings, *, max_new_tokens: int) -> tuple[Check, ...]:
    """Return the filters that ask, in their order. Raises ConfigError for one that the prompt format has no words for."""
    return tuple(CHECKS[name](prompt_format, prompts, settings, max_new_tokens) for name in settings.of_stage(1))


def word_f1(first: str, second: str) -> float:
    """Return the harmonic mean of the shares of words that two texts have in common; 1 where neither has a word."""
    one, two = Counter(plain_words(first)), Counter(plain_words(second))
    if not one or not two:
        return float(one == two)
    return 2 * (one & two).total() / (one.total() + two.total())


def _no_key(prompt_format: PromptFormat, name: str) -> ConfigError:
    kind = " of kind chat" if prompt_format.kind == "markers" else ""
    return ConfigError(
        f"filters: {name} needs a prompt format{kind} with the key {name!r}, and {prompt_format.name} is none; "
        "use another prompt_format, or leave the filter out."
    )
