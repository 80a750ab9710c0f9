"""Which pairs are kept: the filters in their order, and what each goes by."""

from dataclasses import dataclass
from typing import Literal

from megatron_instruct.errors import ConfigError, did_you_mean

DEFAULT_FILTERS = (
    "length",
    "repetition",
    "language",
    "question",
    "answer",
    "options",
    "duplicate",
    "grounding",
    "relevance",
    "contamination",
)
STAGES: tuple[tuple[str, ...], ...] = (DEFAULT_FILTERS, ("second_answer", "judge"), ("near_duplicate",))
"""Those that look at one pair and its text; that ask the engine; that compare with the pairs of all texts. They work in this order."""


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Which pairs are kept."""

    filters: tuple[str, ...] = DEFAULT_FILTERS
    """Filters, applied in this order; the word `default` stands for the default ones. See docs/synthesis.md for what each drops."""
    max_question_characters: int = 400
    """length: characters of the longest question, without its options."""
    max_answer_characters: int = 1200
    """length: characters of the longest answer, with its rationale."""
    max_repetition: float = 0.5
    """repetition: largest share of the words of a question or an answer that may belong to repeated sequences of three."""
    max_question_overlap: float = 0.8
    """duplicate: largest share of content words that two questions about one text may have in common."""
    min_grounding: float = 0.7
    """grounding: smallest share of the n-grams of the answer's content words that the text must hold."""
    grounding_ngram: int = 1
    """grounding: content words in a row that make an n-gram."""
    min_relevance: float = 0.6
    """relevance: smallest share of the question's content words that the text, or the answer, must hold."""
    decontaminate: tuple[str, ...] = ()
    """contamination: evaluation files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt, .yaml) that no pair may repeat."""
    decontamination_ngram: int = 13
    """contamination: words in a row that a pair may not share with an evaluation file."""
    min_agreement: float = 0.5
    """second_answer: smallest F1 of the words of the answer and of the one that is given when only the question is asked."""
    max_similarity: float = 0.8
    """near_duplicate: largest similarity (Jaccard, of sequences of four characters) to a pair that was kept before."""
    near_duplicate_of: Literal["question", "pair"] = "question"
    """near_duplicate: what must be alike, the question alone or question and answer."""

    def __post_init__(self) -> None:
        stages = [self._stage(name) for name in self.names]
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"filters: {name!r} is named {self.names.count(name)} times; name it once.")
        if stages != sorted(stages):
            raise ConfigError(
                f"filters: {', '.join(self.names)}: those that ask the engine ({', '.join(STAGES[1])}) come after those that look at a "
                f"pair alone, and {', '.join(STAGES[2])} comes last; change the order."
            )
        for name in ("max_repetition", "max_question_overlap", "min_grounding", "min_relevance", "min_agreement", "max_similarity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be from 0 to 1.")
        for name in ("max_question_characters", "max_answer_characters", "grounding_ngram", "decontamination_ngram"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.decontaminate and "contamination" not in self.names:
            raise ConfigError("decontaminate names files, and contamination is not among the filters; add it, or leave them out.")

    @property
    def names(self) -> tuple[str, ...]:
        """The filters, with the defaults named one by one."""
        return tuple(one for name in self.filters for one in (DEFAULT_FILTERS if name == "default" else (name,)))

    def of_stage(self, stage: int) -> tuple[str, ...]:
        """Return the filters of one of STAGES."""
        return tuple(name for name in self.names if name in STAGES[stage])

    @staticmethod
    def _stage(name: str) -> int:
        for number, names in enumerate(STAGES):
            if name in names:
                return number
        raise ConfigError(f"filters: {name!r} is unknown{did_you_mean(name, [*(one for names in STAGES for one in names), 'default'])}")
