"""Named sizes (presets.yaml) and single dimensions -> an Architecture."""

import importlib.resources
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_instruct.errors import ConfigError, did_you_mean
from megatron_instruct.models.architecture import Architecture, RopeScaling

DIMENSIONS = (
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "rotary_base",
    "tie_embeddings",
)
"""What single settings say of a model."""
_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def preset(name: str) -> dict[str, Any]:
    """Return the dimensions of a preset, or raise ConfigError with the closest name."""
    text = importlib.resources.files("megatron_instruct.models").joinpath("presets.yaml").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = yaml.safe_load(text)
    if name not in presets:
        raise ConfigError(f"preset={name!r} is unknown{did_you_mean(name, presets)}")
    dimensions = presets[name]
    if "rope_scaling" in dimensions:
        dimensions["rope_scaling"] = RopeScaling(**dimensions["rope_scaling"])
    return dimensions


def make_architecture(given: Mapping[str, Any], *, preset_name: str | None, vocab_size: int, seq_length: int) -> Architecture:
    """Combine a preset with the dimensions that are not None in `given`, which win over it."""
    dimensions = preset(preset_name) if preset_name else {}
    dimensions |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in _REQUIRED if name not in dimensions]
    if missing:
        raise ConfigError(f"the model's size is not given: set preset, or {', '.join(missing)}.")
    heads = dimensions["num_attention_heads"]
    if "kv_channels" not in dimensions:
        if dimensions["hidden_size"] % heads:
            raise ConfigError(
                f"hidden_size={dimensions['hidden_size']} is not a multiple of num_attention_heads={heads}; "
                "change either, or set kv_channels (the size of one head)."
            )
        dimensions["kv_channels"] = dimensions["hidden_size"] // heads
    defaults = {"family": "llama", "num_query_groups": heads, "max_position_embeddings": seq_length}
    return Architecture(**{**defaults, **dimensions, "vocab_size": vocab_size})
