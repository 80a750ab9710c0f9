"""How a global batch and its sequences are cut over ranks: the rules that a run and a plan share. Pure values; raises ConfigError."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut into microbatches."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel: int
    train_iters: int

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one step on one data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    def microbatches(self, data_rank: int, *, start_iteration: int, iterations: int) -> Iterator[list[int]]:
        """Yield the sample numbers of each microbatch of one data-parallel rank, step after step.

        Step i holds the samples [i * global_batch_size, (i + 1) * global_batch_size) whatever the layout.
        """
        for iteration in range(start_iteration, start_iteration + iterations):
            for microbatch in range(self.num_microbatches):
                first = iteration * self.global_batch_size + (microbatch * self.data_parallel + data_rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


def cut_batch(layout: ParallelLayout, *, global_batch_size: int, micro_batch_size: int, train_iters: int) -> BatchPlan:
    """Return the checked cut of the global batch."""
    unit = micro_batch_size * layout.data
    if global_batch_size % unit:
        near = max(unit, round(global_batch_size / unit) * unit)
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size * data_parallel_size "
            f"= {micro_batch_size} * {layout.data} = {unit}; use {near} or change micro_batch_size."
        )
    plan = BatchPlan(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, data_parallel=layout.data, train_iters=train_iters
    )
    if layout.virtual_pipeline is not None and plan.num_microbatches % layout.pipeline:
        raise ConfigError(
            f"the interleaved schedule needs a number of microbatches ({plan.num_microbatches}) that is a multiple of "
            f"pipeline_model_parallel_size={layout.pipeline}; change global_batch_size or micro_batch_size."
        )
    return plan


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
