"""Small frozen values that everything else of a run follows from, made by pure functions from the settings."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.settings.parallel import ParallelOptions


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


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan_layout(options: ParallelOptions, architecture: Architecture, *, processes: int | None = None) -> ParallelLayout:
    """Return the checked layout over so many processes; over those that torchrun started, by default."""
    layout = ParallelLayout(
        world_size=processes or world_size(),
        tensor=options.tensor_model_parallel_size,
        context=options.context_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        sequence_parallel=options.sequence_parallel,
        layers_in_last_stage=options.decoder_last_pipeline_num_layers,
    )
    per_chunk = options.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        layers = architecture.num_layers
        if per_chunk < 1 or layers % (per_chunk * layout.pipeline) or layers // (per_chunk * layout.pipeline) < 2:
            raise ConfigError(
                f"num_layers_per_virtual_pipeline_stage={per_chunk}: num_layers={layers} must be a multiple of it times "
                f"pipeline_model_parallel_size={layout.pipeline}, at least twofold; change it or leave it out."
            )
        layout = dataclasses.replace(layout, virtual_pipeline=layers // (per_chunk * layout.pipeline))
    layout.check(architecture)
    return layout


def plan_batches(config: PretrainConfig, layout: ParallelLayout) -> BatchPlan:
    """Return the checked cut of the global batch."""
    batch = config.batch
    unit = batch.micro_batch_size * layout.data
    if batch.global_batch_size % unit:
        near = max(unit, round(batch.global_batch_size / unit) * unit)
        raise ConfigError(
            f"global_batch_size={batch.global_batch_size} is not a multiple of micro_batch_size * data_parallel_size "
            f"= {batch.micro_batch_size} * {layout.data} = {unit}; use {near} or change micro_batch_size."
        )
    plan = BatchPlan(
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        data_parallel=layout.data,
        train_iters=batch.train_iters,
    )
    if layout.virtual_pipeline is not None and plan.num_microbatches % layout.pipeline:
        raise ConfigError(
            f"the interleaved schedule needs a number of microbatches ({plan.num_microbatches}) that is a multiple of "
            f"pipeline_model_parallel_size={layout.pipeline}; change global_batch_size or micro_batch_size."
        )
    _check_sequence(config, layout)
    return plan


def _check_sequence(config: PretrainConfig, layout: ParallelLayout) -> None:
    """Raise ConfigError for a sequence that cannot be divided over the ranks."""
    length = config.batch.seq_length
    parts = 2 * layout.context if layout.context > 1 else 1
    if length % parts:
        raise ConfigError(f"seq_length={length} is not a multiple of 2 * context_parallel_size = {parts}; change either.")
    if layout.sequence_parallel and length % (layout.context * layout.tensor):
        raise ConfigError(
            f"seq_length={length} is not a multiple of context_parallel_size * tensor_model_parallel_size "
            f"= {layout.context} * {layout.tensor}, as sequence_parallel needs; change either."
        )
    if layout.context > 1 and config.data.reset_attention_mask:
        raise ConfigError(
            f"reset_attention_mask=True does not go with context_parallel_size={layout.context}: documents would be cut "
            "between ranks; drop either."
        )
