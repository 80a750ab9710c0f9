"""Settings of the model."""

import math
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Family


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model. With --load these come from the checkpoint, and what is given must agree with it."""

    preset: str | None = None
    """Named size, such as 500M, 1.3B, 7B, 8B or 70B; single dimensions below override it."""
    family: Family | None = None
    """Model family (default llama)."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layers."""
    num_attention_heads: int | None = None
    """Query heads."""
    group_query_attention: bool = False
    """Share key/value heads among query heads; needs num_query_groups."""
    num_query_groups: int | None = None
    """Key/value heads (default: as many as query heads)."""
    kv_channels: int | None = None
    """Size of one head (default: hidden_size / num_attention_heads)."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is meant for, in tokens (default: seq_length)."""
    rotary_base: float | None = None
    """Base of the rotary frequencies (default 10000)."""
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included, in the families that may have a window (default: all before it)."""
    tie_embeddings: bool | None = None
    """Use the word embedding as output layer."""
    init_method_std: float | None = None
    """Standard deviation of initial weights (default 0.02)."""
    make_vocab_size_divisible_by: int = 128
    """Pad the embedding to a multiple of this times the tensor ranks, in rows."""
    transformer_config: dict[str, str] = field(default_factory=dict)
    """Any other field of megatron-core's TransformerConfig: NAME VALUE pairs; values are read as YAML."""

    def __post_init__(self) -> None:
        if self.group_query_attention and self.num_query_groups is None:
            raise ConfigError("group_query_attention=True needs num_query_groups; set it to the number of key/value heads.")
        for name in ("rotary_base", "init_method_std"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name}={value} must be a positive number.")
        if self.make_vocab_size_divisible_by < 1:
            raise ConfigError(f"make_vocab_size_divisible_by={self.make_vocab_size_divisible_by} must be at least 1, which pads nothing.")

    @property
    def extra_settings(self) -> dict[str, Any]:
        """The values of transformer_config with their types."""
        return {name: yaml.safe_load(value) for name, value in self.transformer_config.items()}
