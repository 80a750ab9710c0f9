"""The settings of FP8 -> fields of megatron-core's TransformerConfig, and what a machine must be able to do.

Source: Transformer Engine 2.x, "Using FP8" (compute capabilities), megatron-core 0.19.2 (fields). Does not know: torch.
"""

from typing import Any

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.fp8_sizes import NEEDS, Capability, check_fp8_sizes
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.platform.fp8_recipe import Fp8Recipe
from megatron_instruct.training.settings.precision import Fp8Options


def _settings(options: Fp8Options) -> dict[str, Any]:
    """Return the settings under the names of TransformerConfig's fields, as far as the recipe has them; nothing without FP8."""
    if options.fp8_format is None:
        return {}
    fields: dict[str, Any] = {"fp8": options.fp8_format, "fp8_recipe": options.fp8_recipe}
    if options.fp8_recipe == "delayed":
        fields |= {
            "fp8_amax_history_len": options.fp8_amax_history_len,
            "fp8_amax_compute_algo": options.fp8_amax_compute_algo,
            "fp8_margin": options.fp8_margin,
        }
    if options.first_last_layers_bf16:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": options.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": options.num_layers_at_end_in_bf16,
        }
    return fields


def fp8_emulation(options: Fp8Options) -> Fp8Recipe | None:
    """Return what is to be emulated; None without --fp8-emulation."""
    if options.fp8_format is None or not options.fp8_emulation:
        return None
    delayed = options.fp8_recipe == "delayed"
    return Fp8Recipe(
        format=options.fp8_format,
        recipe=options.fp8_recipe,
        amax_history_len=options.fp8_amax_history_len if delayed else 1,
        amax_compute_algo=options.fp8_amax_compute_algo if delayed else "most_recent",
        margin=options.fp8_margin if delayed else 0,
        layers_left_at_start=options.num_layers_at_start_in_bf16 if options.first_last_layers_bf16 else 0,
        layers_left_at_end=options.num_layers_at_end_in_bf16 if options.first_last_layers_bf16 else 0,
    )


def fp8_identity(options: Fp8Options) -> dict[str, Any]:
    """Return what of the settings decides the result of a run."""
    return _settings(options) | ({"emulation": True} if options.fp8_emulation else {})


def fp8_fields(options: Fp8Options) -> dict[str, Any]:
    """Return what TransformerConfig is to be given; nothing without FP8, or where it is emulated."""
    return {} if options.fp8_emulation else _settings(options)


def check_fp8(
    options: Fp8Options, architecture: Architecture, layout: ParallelLayout, *, tokens: int, capability: Capability | None
) -> None:
    """Raise ConfigError for what this machine or these sizes cannot do.

    tokens: of one microbatch on one rank. capability: compute capability of the GPU; None without one.
    """
    if options.fp8_format is None:
        return
    left_out = options.num_layers_at_start_in_bf16 + options.num_layers_at_end_in_bf16
    if options.first_last_layers_bf16 and left_out >= architecture.num_layers:
        raise ConfigError(
            f"num_layers_at_start_in_bf16={options.num_layers_at_start_in_bf16} and num_layers_at_end_in_bf16="
            f"{options.num_layers_at_end_in_bf16} leave none of num_layers={architecture.num_layers} in 8 bits; lower them, or drop "
            "fp8_format."
        )
    check_fp8_sizes(options.fp8_recipe, architecture, layout, tokens=tokens)
    if options.fp8_emulation:
        return
    least, kind = NEEDS[options.fp8_recipe]
    if capability is None or capability < least:
        found = "there is no GPU" if capability is None else f"this GPU has {capability[0]}.{capability[1]}"
        raise ConfigError(
            f"fp8_format={options.fp8_format} with fp8_recipe={options.fp8_recipe} needs a GPU of compute capability "
            f"{least[0]}.{least[1]} ({kind}) or newer, and {found}; drop fp8_format, take another recipe, or name fp8_emulation."
        )
