"""What a model is, apart from how it is laid out over ranks: the values that a checkpoint carries.

Source of the names: megatron-core's TransformerConfig. Families differ in which options they allow, not in code.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_instruct.errors import ConfigError

Family = Literal["llama", "mistral"]
_COUNTS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of the Llama or Mistral kind: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Size of one attention head."""
    vocab_size: int
    """Rows of the embedding that mean something, before padding for tensor parallelism."""
    max_position_embeddings: int
    rotary_base: float = 10000.0
    rotary_linear_factor: float = 1.0
    """Rotary frequencies are divided by this (linear position interpolation)."""
    rope_scaling: RopeScaling | None = None
    layernorm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    """Whether the output layer is the word embedding."""
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}; change either."
            )

    @property
    def num_parameters(self) -> int:
        """Number of parameters, without vocabulary padding."""
        hidden, head = self.hidden_size, self.kv_channels
        attention = hidden * head * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        layer = attention + 3 * hidden * self.ffn_hidden_size + 2 * hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + hidden

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training step per token, forward and backward, without recomputation.

        6 per weight of every matrix product (the output layer counts, the embedding look-up does not), and causal attention:
        12 · layers · heads · head size · seq_length / 2 (PaLM, arXiv:2204.02311, appendix B, halved for the causal mask).
        """
        embedding = self.vocab_size * self.hidden_size
        matrices = self.num_parameters - (embedding if not self.tie_embeddings else 0)
        return 6.0 * matrices + 6.0 * self.num_layers * self.num_attention_heads * self.kv_channels * seq_length

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Architecture":
        scaling = value.get("rope_scaling")
        return cls(**{**value, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})
