"""Modules of the CPU layer spec: attention and norm that torch's CPU kernels do well, exact in fp32.

Shapes: S sequence, B batch, H query heads, G key/value groups, D head size, C hidden size; all of this rank.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule


class ScaledDotProductAttention(MegatronModule):  # type: ignore[misc]
    """Causal core attention on torch's scaled_dot_product_attention, which never makes the S x S matrix of scores."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        assert config.context_parallel_size == 1, "the layout is checked before"
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return [S, B, H * D]. attention_mask: [B or 1, 1, S, S], True where attention is forbidden; None for causal."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query_SBHD, key_SBGD, value_SBGD))
        output_BHSD = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=key.size(1) != query.size(1),
        )
        return output_BHSD.permute(2, 0, 1, 3).reshape(query_SBHD.size(0), query_SBHD.size(1), -1)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for sequence parallelism, which megatron-core's wrapper of it refuses (0.19.2)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        if config.sequence_parallel:
            self.weight.sequence_parallel = True  # type: ignore[attr-defined]
