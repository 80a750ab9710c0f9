"""How a global batch and its sequences are cut over ranks: the rules that a run and a plan share. Pure values; raises ConfigError."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """A global batch that grows at the start of a run, as Megatron-LM's --rampup-batch-size."""

    start: int
    """Sequences of the first step."""
    increment: int
    """Sequences that are added, again and again, until the global batch size is reached."""
    samples: int
    """Sequences over which it grows; each size takes an equal share of them."""

    def size(self, consumed: int, global_batch_size: int) -> int:
        """Return the sequences of the step that begins after so many sequences."""
        if consumed > self.samples:
            return global_batch_size
        increments = (global_batch_size - self.start) // self.increment
        share = self.samples / increments if increments else 0.0
        done = int(consumed / share) if share else increments
        return min(global_batch_size, self.start + done * self.increment)

    def sizes(self, global_batch_size: int) -> list[int]:
        """Return every size that a step can have."""
        return [*range(self.start, global_batch_size, self.increment), global_batch_size]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut into microbatches."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel: int
    train_iters: int
    ramp: BatchRamp | None = None

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Samples of the first 0, 1, 2, … steps, as long as the batch grows; empty where it does not."""
        ends = [0]
        while self.ramp is not None and len(ends) <= self.train_iters:
            size = self.ramp.size(ends[-1], self.global_batch_size)
            if size == self.global_batch_size and ends[-1] > self.ramp.samples:
                break
            ends.append(ends[-1] + size)
        return ends

    def samples_before(self, iterations: int) -> int:
        """Return the samples of the first steps."""
        growing = min(iterations, len(self._ends) - 1)
        return self._ends[growing] + (iterations - growing) * self.global_batch_size

    def batch_size(self, iteration: int) -> int:
        """Return the sequences of a step, counted from 1."""
        return self.samples_before(iteration) - self.samples_before(iteration - 1)

    def num_microbatches_of(self, iteration: int) -> int:
        """Return the microbatches of a step, counted from 1, on one data-parallel rank."""
        return self.batch_size(iteration) // (self.micro_batch_size * self.data_parallel)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step of the whole global batch on one data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    def microbatches(self, data_rank: int, *, start_iteration: int, iterations: int) -> Iterator[list[int]]:
        """Yield the sample numbers of each microbatch of one data-parallel rank, step after step.

        Step i + 1 holds the samples [samples_before(i), samples_before(i + 1)) whatever the layout.
        """
        for iteration in range(start_iteration, start_iteration + iterations):
            for microbatch in range(self.num_microbatches_of(iteration + 1)):
                first = self.samples_before(iteration) + (microbatch * self.data_parallel + data_rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


def cut_batch(
    layout: ParallelLayout, *, global_batch_size: int, micro_batch_size: int, train_iters: int, ramp: BatchRamp | None = None
) -> BatchPlan:
    """Return the checked cut of the global batch, and of every smaller one that it grows from."""
    unit = micro_batch_size * layout.data
    if global_batch_size % unit:
        near = max(unit, round(global_batch_size / unit) * unit)
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size * data_parallel_size "
            f"= {micro_batch_size} * {layout.data} = {unit}; use {near} or change micro_batch_size."
        )
    plan = BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel=layout.data,
        train_iters=train_iters,
        ramp=ramp,
    )
    odd = next((size for size in ramp.sizes(global_batch_size) if size % unit), None) if ramp is not None else None
    if ramp is not None and odd is not None:
        raise ConfigError(
            f"rampup_batch_size={ramp.start} {ramp.increment} {ramp.samples} has steps of {odd} sequences, not a multiple of "
            f"micro_batch_size * data_parallel_size = {micro_batch_size} * {layout.data} = {unit}; "
            f"make both of its sizes multiples of {unit}."
        )
    for size in {global_batch_size, *(ramp.sizes(global_batch_size) if ramp is not None else ())}:
        if layout.virtual_pipeline is not None and size // unit % layout.pipeline:
            raise ConfigError(
                f"the interleaved schedule needs a number of microbatches ({size // unit}) that is a multiple of "
                f"pipeline_model_parallel_size={layout.pipeline}; change global_batch_size, rampup_batch_size or micro_batch_size."
            )
    return plan


def check_positions(architecture: Architecture, seq_length: int) -> Architecture:
    """Return the model. Raises ConfigError for a sequence that is longer than it is meant for."""
    if seq_length > architecture.max_position_embeddings:
        raise ConfigError(
            f"seq_length={seq_length} is longer than the model's max_position_embeddings={architecture.max_position_embeddings}; lower it."
        )
    return architecture


def check_sequence(layout: ParallelLayout, seq_length: int) -> None:
    """Raise ConfigError for a sequence that cannot be divided over the ranks."""
    parts = 2 * layout.context if layout.context > 1 else 1
    if seq_length % parts:
        raise ConfigError(f"seq_length={seq_length} is not a multiple of 2 * context_parallel_size = {parts}; change either.")
    if layout.sequence_parallel and seq_length % (layout.context * layout.tensor):
        raise ConfigError(
            f"seq_length={seq_length} is not a multiple of context_parallel_size * tensor_model_parallel_size "
            f"= {layout.context} * {layout.tensor}, as sequence_parallel needs; change either."
        )
