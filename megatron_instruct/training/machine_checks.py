"""What the model is built with, and whether this machine and megatron-core can: said before processes meet and a GPU is taken."""

import dataclasses
import os
from collections.abc import Mapping

import torch

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.build import BuildOptions, make_transformer_config
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.platform.device import Machine, compute_capability
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.fp8 import check_fp8, fp8_emulation, fp8_fields
from megatron_instruct.training.settings.parallel import ParallelOptions


def build_options(config: PretrainConfig) -> BuildOptions:
    """Return what of the build is neither architecture nor layout."""
    return BuildOptions(
        dtype=config.dtype,
        seed=config.batch.seed,
        recompute=config.parallel.recompute_granularity,
        recompute_method=config.parallel.recompute_method or "uniform",
        recompute_num_layers=config.parallel.recompute_num_layers or 1,
        experts=config.experts.megatron_fields,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        fp8_emulation=fp8_emulation(config.fp8),
        transformer_config={**config.model.extra_settings, **fp8_fields(config.fp8)},
        fuse_weight_gradients=not config.parallel.use_megatron_fsdp,
    )


def check_connections(options: ParallelOptions, environment: Mapping[str, str], *, is_cuda: bool) -> None:
    """Raise ConfigError where the environment lets a GPU do one thing at a time, and Megatron-FSDP gathers while it computes."""
    if options.use_megatron_fsdp and is_cuda and environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ConfigError("use_megatron_fsdp=True does not go with CUDA_DEVICE_MAX_CONNECTIONS=1; unset it, or set it to 8.")


def check_machine(config: PretrainConfig, architecture: Architecture, layout: ParallelLayout, machine: Machine) -> None:
    """Raise ConfigError for what this machine cannot compute, and for settings that megatron-core itself refuses."""
    check_connections(config.parallel, os.environ, is_cuda=machine.is_cuda)
    if config.parallel.use_megatron_fsdp and config.model.extra_settings.get("gradient_accumulation_fusion") and not machine.is_cuda:
        raise ConfigError(
            "gradient_accumulation_fusion=True goes with use_megatron_fsdp=True on GPUs alone; drop it from transformer_config."
        )
    tokens = layout.tokens_of_rank(config.batch.micro_batch_size, config.batch.seq_length)
    check_fp8(config.fp8, architecture, layout, tokens=tokens, capability=compute_capability(machine))
    _check_transformer_config(architecture, layout, machine, build_options(config))


def check_transformer_config(config: PretrainConfig, architecture: Architecture, layout: ParallelLayout) -> None:
    """Raise ConfigError for settings that megatron-core refuses on any GPU. Needs none, nor the kernels that are installed beside it."""
    options = build_options(config)
    kernels = {"apply_rope_fusion": False, "gradient_accumulation_fusion": options.fuse_weight_gradients}
    options = dataclasses.replace(options, transformer_config={**kernels, **(options.transformer_config or {})})
    _check_transformer_config(architecture, layout, Machine(kind="cuda", backend="nccl", device=torch.device("cuda")), options)


def _check_transformer_config(architecture: Architecture, layout: ParallelLayout, machine: Machine, options: BuildOptions) -> None:
    try:
        make_transformer_config(architecture, layout, machine, options)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core does not take these settings: {str(error).strip() or type(error).__name__}") from error
