"""Small frozen values that everything else of a run follows from, made by pure functions from the settings."""

import dataclasses
import os

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.batches import BatchPlan, check_sequence, cut_batch
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.settings.parallel import ParallelOptions


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
        expert=options.expert_model_parallel_size,
        expert_tensor=options.expert_tensor_parallel_size,
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
    if options.recompute_num_layers is not None:
        of_stages = [layout.layers_of_stage(architecture.num_layers, stage) for stage in {0, layout.pipeline - 1}]
        layers = min(of_stages) // (layout.virtual_pipeline or 1)
        if options.recompute_num_layers > layers:
            raise ConfigError(
                f"recompute_num_layers={options.recompute_num_layers} is more than the {layers} layers of a pipeline stage "
                "or chunk; lower it."
            )
    return layout


def check_model_settings(config: PretrainConfig, architecture: Architecture) -> None:
    """Raise ConfigError for settings that a model of this kind does not have."""
    given = config.experts.megatron_fields
    if given and architecture.num_experts is None:
        raise ConfigError(
            f"{', '.join(given)}: the family {architecture.family} has no experts; drop what is about them, or train a mixture of experts."
        )
    if config.parallel.use_megatron_fsdp and architecture.num_experts is not None:
        raise ConfigError(
            f"use_megatron_fsdp=True does not go with the experts of the family {architecture.family}, whose shards are not tried; divide "
            "them by expert_model_parallel_size, and the optimizer's state by use_distributed_optimizer=True."
        )


def plan_batches(config: PretrainConfig, layout: ParallelLayout) -> BatchPlan:
    """Return the checked cut of the global batch."""
    batch = config.batch
    plan = cut_batch(
        layout,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        train_iters=batch.train_iters,
        ramp=batch.ramp,
    )
    check_sequence(layout, batch.seq_length)
    if layout.context > 1 and config.data.reset_attention_mask:
        raise ConfigError(
            f"reset_attention_mask=True does not go with context_parallel_size={layout.context}: documents would be cut "
            "between ranks; drop either."
        )
    return plan
