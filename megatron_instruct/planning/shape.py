"""The dimensions of a decoder that cost memory and time, whatever its family. Pure values.

An Architecture becomes one with `shape_of`. Published models that no family of this project describes (GPT-3's kind, with two
matrices a feed-forward layer and dropout) are given directly.
"""

from dataclasses import dataclass

from megatron_instruct.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one decoder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocab: int
    gated: bool = True
    """Three matrices a feed-forward layer (SwiGLU) instead of two (GELU)."""
    dropout: bool = False
    """Dropout after attention and feed-forward, as GPT-3's kind has."""
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 1
    experts_per_token: int = 1
    window: int | None = None

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        """Width of all key heads; as wide are all value heads."""
        return self.groups * self.head_size

    @property
    def ffn_in(self) -> int:
        """Columns of the first feed-forward matrix, gate included."""
        return self.ffn * (2 if self.gated else 1)

    @property
    def attention_weights(self) -> int:
        """Weights and biases of a layer's attention that tensor ranks share."""
        return self.hidden * (2 * self.query + 2 * self.key_value) + (self.query + 2 * self.key_value if self.qkv_bias else 0)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert, or of the feed-forward layer where there are none."""
        return self.hidden * (self.ffn_in + self.ffn)

    @property
    def replicated_weights(self) -> int:
        """Weights of a layer that every tensor rank holds: norms and router."""
        return 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0) + (self.hidden * self.experts if self.experts > 1 else 0)

    def attended(self, seq_length: int) -> float:
        """Return the mean number of tokens that a token attends to."""
        window = min(self.window or seq_length, seq_length)
        return window - window**2 / (2 * seq_length)

    def flops_per_token(self, seq_length: int) -> float:
        """Return the floating-point operations of a training step per token, as Architecture.flops_per_token counts them."""
        layer = (
            self.attention_weights + self.experts_per_token * self.expert_weights + (self.hidden * self.experts if self.experts > 1 else 0)
        )
        matrices = self.layers * layer + self.vocab * self.hidden
        return 6.0 * matrices + 12.0 * self.layers * self.query * self.attended(seq_length)


def shape_of(architecture: Architecture) -> Shape:
    """Return the sizes of a model of this project."""
    return Shape(
        layers=architecture.num_layers,
        hidden=architecture.hidden_size,
        ffn=architecture.ffn_hidden_size,
        heads=architecture.num_attention_heads,
        groups=architecture.num_query_groups,
        head_size=architecture.kv_channels,
        vocab=architecture.vocab_size,
        tied=architecture.tie_embeddings,
        qkv_bias=architecture.parts.qkv_bias,
        qk_norm=architecture.parts.qk_norm,
        experts=architecture.num_experts or 1,
        experts_per_token=architecture.experts_per_token or 1,
        window=architecture.sliding_window,
    )
