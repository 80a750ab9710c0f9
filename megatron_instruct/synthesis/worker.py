"""Shards in a row through one engine: what one process does, whether it is the only one or one of many on many machines.

A worker opens the next shard while the last texts of the one before are in work, so that its engine is busy throughout; only a few are open
at a time. Does not know: how many workers there are, and who gives out the shards.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_instruct.prompt_formats.prompt_format import PromptFormat, load_prompt_format
from megatron_instruct.synthesis.chains import ColumnPlan
from megatron_instruct.synthesis.config import SynthesizeConfig
from megatron_instruct.synthesis.engines.engine import Engine, EngineSettings, load_engine
from megatron_instruct.synthesis.filters import Filters
from megatron_instruct.synthesis.intake import Texts
from megatron_instruct.synthesis.prompts import load_prompts
from megatron_instruct.synthesis.schedule import ColumnWork, Limits, Schedule, Usage
from megatron_instruct.synthesis.second_pass import load_checks
from megatron_instruct.synthesis.shard import Asking, ColumnResult, OpenShard, has_answers, read_shard, work_on_column
from megatron_instruct.tokenizer import load_tokenizer

INTAKE = "intake"
_OPEN = 4
"""Shards open at a time, at least."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker needs to know; small, and the same for all."""

    config: SynthesizeConfig
    folder: Path
    """Of the shards and of the texts."""
    synthesizer: str
    """Name and revision, kept with every pair."""

    def shard(self, number: int) -> Path:
        return self.folder / f"{number:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """Which columns, and how many texts, each shard has."""

    columns: ColumnPlan
    size: int
    """Texts, about."""

    def __len__(self) -> int:
        return -(-len(self.columns) // self._columns_each)

    def members(self, number: int) -> range:
        """Return the numbers of a shard's columns."""
        first = number * self._columns_each
        return range(first, min(first + self._columns_each, len(self.columns)))

    def texts(self, number: int) -> int:
        """Count the texts of a shard."""
        return sum(len(self.columns[column]) for column in self.members(number))

    @property
    def _columns_each(self) -> int:
        return max(self.size // self.columns.rounds, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NextShard:
    """A shard that is a worker's from now on."""

    number: int
    last: bool
    """None is left after it, unless one comes back from a worker that is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was done since the last report."""

    texts: int = 0
    finished_shard: int | None = None
    usage: Usage = field(default_factory=Usage)


class Worker:
    """Works on the shards that it is given until there are no more."""

    def __init__(self, assignment: Assignment, next_shard: Callable[[], NextShard | None], report: Callable[[Report], None]) -> None:
        """next_shard: gives the next shard, None when there is none left."""
        config = assignment.config
        prompt_format = load_prompt_format(config.prompt_format, config.structured_output)
        prompts = load_prompts(prompt_format, load_tokenizer(config.tokenizer_folder), config.tokenizer_folder)
        self._assignment, self._next_shard, self._report = assignment, next_shard, report
        self._asking = Asking(
            prompt_format=prompt_format,
            prompts=prompts,
            filters=Filters(config.filtering, language=prompt_format.language),
            checks=load_checks(prompt_format, prompts, config.filtering, max_new_tokens=config.max_new_tokens),
            synthesizer=assignment.synthesizer,
            max_new_tokens=config.max_new_tokens,
            longest_prompt=config.longest_prompt,
        )
        self._columns: list[ColumnWork] = []
        """Of the last shard that was opened, those not taken up yet, in reverse order."""
        self._open: set[OpenShard] = set()
        self._last_is_open = False

    def run(self) -> None:
        """Raises EngineError when the engine is dead for good."""
        config = self._assignment.config
        limits = Limits(retries=config.retries, restarts=config.restarts, failures_in_a_row=config.failures_in_a_row)
        with Texts(self._assignment.folder / INTAKE) as self._texts:
            self._plan = ShardPlan(columns=ColumnPlan(len(self._texts), config.rounds), size=config.shard_size)
            worked = any(has_answers(self._assignment.shard(number)) for number in range(len(self._plan)))
            schedule = Schedule(self._load_engine, limits, lambda usage: self._report(Report(usage=usage)), worked_before=worked)
            try:
                schedule.run(self._next_column, lambda: len(self._columns) if self._last_is_open else None)
            finally:
                for shard in self._open:
                    shard.journal.close()

    def _load_engine(self) -> Engine:
        engine = load_engine(self._assignment.config.engine, engine_settings(self._assignment.config, self._asking.prompt_format))
        self._most_open = _OPEN + engine.capacity // max(len(self._plan.members(0)), 1)
        return engine

    _most_open = _OPEN

    def _next_column(self, idle: bool) -> ColumnWork | None:
        """Return the next column, if there is any. idle: nothing is in work, so that no open shard will be finished before."""
        while not self._columns and (idle or len(self._open) < self._most_open) and (shard := self._next_shard()) is not None:
            self._last_is_open = shard.last
            if read_shard(self._assignment.shard(shard.number)) is None:
                self._open_shard(shard.number)
            else:  # its worker was lost before it could say so
                self._report(Report(finished_shard=shard.number))
        return self._columns.pop() if self._columns else None

    def _open_shard(self, number: int) -> None:
        members = self._plan.members(number)
        shard = OpenShard(self._assignment.shard(number), len(members))
        self._open.add(shard)

        def work(place: int, column: int) -> ColumnWork:
            def done(result: ColumnResult) -> None:
                self._report(Report(texts=result.counts["texts"]))
                if shard.add(place, result):
                    self._open.remove(shard)
                    self._report(Report(finished_shard=number))

            texts = (self._texts[index] for index in self._plan.columns[column])
            return ColumnWork(steps=work_on_column(texts, self._asking), journal=shard.journal, done=done)

        self._columns = [work(place, column) for place, column in enumerate(members)][::-1]


def engine_settings(config: SynthesizeConfig, prompt_format: PromptFormat) -> EngineSettings:
    """Return what an engine is loaded with."""
    return EngineSettings(
        model=config.model,
        tokenizer=config.tokenizer_folder,
        max_model_len=config.max_model_len,
        temperature=config.temperature,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        dtype=config.dtype,
        structured=prompt_format.structured_output != "none",
        in_flight=config.in_flight,
        script=config.script,
        **asdict(config.vllm),
        **asdict(config.server),
    )
