"""A chosen layout -> the settings and the command line that start it. The names are tools/pretrain.py's."""

import math
import shlex
from typing import Any

import yaml

from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.presets import DIMENSIONS
from megatron_instruct.planning.config import ModelOptions
from megatron_instruct.planning.estimate import Estimate


def model_settings(options: ModelOptions, architecture: Architecture) -> dict[str, Any]:
    """Return the settings that name the model; none where only a checkpoint can say all of it (`needs_checkpoint`)."""
    if needs_checkpoint(options, architecture):
        return {}
    if options.hf_folder is None:
        fields = ("preset", *DIMENSIONS)
        return {name: getattr(options, name) for name in fields if getattr(options, name, None) is not None}
    return {name: getattr(architecture, name) for name in DIMENSIONS}


def needs_checkpoint(options: ModelOptions, architecture: Architecture) -> bool:
    """Whether the folder's model has parts that pretrain.py takes from a checkpoint or a preset alone."""
    rare = (architecture.rope_scaling, architecture.sliding_window, architecture.num_experts)
    return options.hf_folder is not None and any(part is not None for part in rare)


def settings_yaml(
    options: ModelOptions, architecture: Architecture, estimate: Estimate, *, fp8_recipe: str, train_tokens: float, lr: float
) -> str:
    """Return what --config of pretrain.py reads."""
    execution, layout = estimate.execution, estimate.execution.layout
    settings: dict[str, Any] = {
        **model_settings(options, architecture),
        "vocab_size": architecture.vocab_size,
        "make_vocab_size_divisible_by": execution.vocab_divisor,
        "world_size": layout.world_size,
        "gpu": estimate.gpu.kind,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
    }
    if architecture.num_experts is not None:
        settings |= {"expert_model_parallel_size": layout.expert, "expert_tensor_parallel_size": layout.tensor_of_experts}
    if layout.virtual_pipeline:
        settings["num_layers_per_virtual_pipeline_stage"] = architecture.num_layers // (layout.pipeline * layout.virtual_pipeline)
    if layout.layers_in_last_stage:
        settings["decoder_last_pipeline_num_layers"] = layout.layers_in_last_stage
    settings |= {
        "seq_length": execution.seq_length,
        "micro_batch_size": execution.micro_batch_size,
        "global_batch_size": execution.global_batch_size,
        "train_iters": math.ceil(train_tokens / estimate.tokens_per_step),
        "lr": lr,
        "bf16": execution.precision != "fp32",
        "recompute_granularity": execution.recompute,
        "use_distributed_optimizer": execution.distributed_optimizer,
        "overlap_grad_reduce": True,
        "overlap_param_gather": execution.distributed_optimizer,
    }
    if execution.precision == "fp8":
        settings |= {"fp8_format": "hybrid", "fp8_recipe": fp8_recipe}
    return str(yaml.safe_dump(settings, sort_keys=False))


def command_line(estimate: Estimate, *, config: str, checkpoint: bool) -> str:
    """Return the shell script that starts it: torchrun once on each machine. What a plan cannot know is a variable with a default."""
    gpus, node = estimate.execution.layout.world_size, estimate.gpu.gpus_per_node
    nodes = max(1, gpus // node)
    where = "--standalone" if nodes == 1 else f'--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:29500"'
    load = ' --load "${LOAD:-checkpoints/base}"' if checkpoint else ""
    several = f"{nodes} machines of {node} GPUs: run this on each, HEAD_NODE naming one of them"
    machines = several if nodes > 1 else f"one machine, {gpus} GPUs"
    return f"""#!/usr/bin/env bash
# {machines}.
set -euo pipefail
torchrun {where} --nproc-per-node {min(gpus, node)} tools/pretrain.py --config {shlex.quote(config)}{load} \\
    --train-data-path "${{DATA:-data/text_document}}" --tokenizer-model "${{TOKENIZER:-tokenizer}}" --save "${{SAVE:-checkpoints/run}}" "$@"
"""
