"""What a model is, apart from how it is laid out over ranks: the values that a checkpoint carries.

Source of the names: megatron-core's TransformerConfig. Families differ in which parts they have (FAMILIES), not in code.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_instruct.errors import ConfigError, did_you_mean

Dtype = Literal["fp32", "bf16", "fp16"]
"""Types of weights."""
Family = Literal["llama", "mistral", "qwen2", "qwen3", "mixtral"]
_COUNTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class FamilyParts:
    """Which parts a family has besides RMSNorm, SwiGLU, rotary positions and grouped-query attention, which all of them have."""

    qkv_bias: bool = False
    """Whether query, key and value have biases."""
    qk_norm: bool = False
    """Whether each head's query and key are normalised (RMSNorm) before the rotation."""
    experts: bool = False
    """Whether each feed-forward layer is a mixture of experts."""
    window: bool = False
    """Whether attention may be limited to a sliding window."""
    window_from_a_layer_on: bool = False
    """Whether the first layers may attend to everything where the others have a window."""
    free_head_size: bool = True
    """Whether the size of a head may differ from hidden_size / num_attention_heads (vLLM 0.32 reads no head_dim of a Qwen2)."""


FAMILIES: dict[Family, FamilyParts] = {
    "llama": FamilyParts(),
    "mistral": FamilyParts(window=True),
    "qwen2": FamilyParts(qkv_bias=True, window=True, window_from_a_layer_on=True, free_head_size=False),
    "qwen3": FamilyParts(qk_norm=True, window=True, window_from_a_layer_on=True),
    "mixtral": FamilyParts(experts=True, window=True),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ConfigError(f"rope scaling llama3: factor={self.factor} must be at least 1.")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope scaling llama3: low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}."
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"rope scaling llama3: original_max_position_embeddings={self.original_max_position_embeddings} must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of one of the FAMILIES."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of a feed-forward layer; of one expert where there are several."""
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
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included; None for all before it."""
    first_window_layer: int = 0
    """Layers before this one attend to everything even where there is a sliding window."""
    num_experts: int | None = None
    """Experts of each feed-forward layer; None where there is one for all tokens."""
    experts_per_token: int | None = None
    """Experts that compute each token, of the highest router scores."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of the router in training (Switch Transformer, arXiv:2101.03961, section 2.2)."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"family={self.family!r} is unknown{did_you_mean(self.family, FAMILIES)}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("layernorm_epsilon", "init_method_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and finite.")
        if not 0 < self.rotary_base < math.inf:
            raise ConfigError(f"rotary_base={self.rotary_base} must be above 0 and finite.")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}; change either."
            )
        if self.kv_channels % 2:
            raise ConfigError(f"kv_channels={self.kv_channels} must be even: rotary positions turn pairs of channels.")
        if self.rotary_linear_factor <= 0 or (self.rotary_linear_factor != 1.0 and self.rope_scaling is not None):
            raise ConfigError(
                f"rotary_linear_factor={self.rotary_linear_factor} must be positive, and 1 where rope_scaling is set; drop one of them."
            )
        if not self.parts.free_head_size and self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ConfigError(
                f"kv_channels={self.kv_channels} must be hidden_size / num_attention_heads = {self.hidden_size} / "
                f"{self.num_attention_heads} in the family {self.family}, of which vLLM knows no other; use family qwen3 or change it."
            )
        self._check_window()
        self._check_experts()

    def _check_window(self) -> None:
        if self.sliding_window is not None and (self.sliding_window < 1 or not self.parts.window):
            raise ConfigError(
                f"sliding_window={self.sliding_window} is not possible in the family {self.family}; it must be at least 1, and the "
                f"families that have one are {', '.join(name for name, parts in FAMILIES.items() if parts.window)}."
            )
        if not 0 <= self.first_window_layer < self.num_layers:
            raise ConfigError(f"first_window_layer={self.first_window_layer} must be a layer, 0 to {self.num_layers - 1}.")
        if self.first_window_layer and (self.sliding_window is None or not self.parts.window_from_a_layer_on):
            raise ConfigError(f"first_window_layer={self.first_window_layer} needs a sliding_window, in the family qwen2 or qwen3.")

    def _check_experts(self) -> None:
        if not self.parts.experts:
            for name in ("num_experts", "experts_per_token", "router_aux_loss_coef"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}={getattr(self, name)} goes with the family mixtral, and this one is {self.family}; drop it.")
            return
        if self.num_experts is None or self.experts_per_token is None:
            raise ConfigError(f"the family {self.family} needs num_experts and experts_per_token; set both.")
        if not 2 <= self.experts_per_token <= self.num_experts:
            # the scores of a single chosen expert are softmaxed to 1, whatever the router says: megatron-core refuses that
            raise ConfigError(f"experts_per_token={self.experts_per_token} must be 2 to num_experts={self.num_experts}.")
        if self.router_aux_loss_coef is not None and self.router_aux_loss_coef < 0:
            raise ConfigError(f"router_aux_loss_coef={self.router_aux_loss_coef} must not be negative.")

    @property
    def parts(self) -> FamilyParts:
        """What the family has."""
        return FAMILIES[self.family]

    @property
    def num_parameters(self) -> int:
        """Number of parameters, without vocabulary padding."""
        return self._parameters(self.num_experts or 1)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that compute one token: of the experts, those that the router chooses."""
        return self._parameters(self.experts_per_token or 1)

    def _parameters(self, experts: int) -> int:
        hidden, head = self.hidden_size, self.kv_channels
        attention = hidden * head * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        attention += head * (self.num_attention_heads + 2 * self.num_query_groups) if self.parts.qkv_bias else 0
        attention += 2 * head if self.parts.qk_norm else 0
        router = hidden * (self.num_experts or 0)
        layer = attention + router + experts * 3 * hidden * self.ffn_hidden_size + 2 * hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + hidden

    def flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training step per token, forward and backward, without recomputation.

        6 per weight of every matrix product (the output layer counts, the embedding look-up does not), and causal attention:
        12 · layers · heads · head size · seq_length / 2 (PaLM, arXiv:2204.02311, appendix B, halved for the causal mask).
        """
        embedding = self.vocab_size * self.hidden_size
        matrices = self.num_active_parameters - (embedding if not self.tie_embeddings else 0)
        return 6.0 * matrices + 6.0 * self.num_layers * self.num_attention_heads * self.kv_channels * seq_length

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Architecture":
        scaling = value.get("rope_scaling")
        return cls(**{**value, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})
