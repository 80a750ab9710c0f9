"""Modules of the CPU layer spec: attention and norm that torch's CPU kernels do well, exact in fp32.

Shapes: S sequence, B batch, H query heads, G key/value groups, D head size, C hidden size; all of this rank.
"""

import contextlib
import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_instruct.platform.cpu_attention import causal_attention, is_short
from megatron_instruct.platform.cpu_functions import rms_norm


class ScaledDotProductAttention(MegatronModule):  # type: ignore[misc]
    """Causal core attention: cpu_attention.py for short sequences, else torch's scaled_dot_product_attention, which never makes the S x S
    matrix of scores.

    Under context parallelism a rank holds the S queries of its parts of the sequence, and gathers the keys and values of all.
    """

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
        self.context_parallel_size = config.context_parallel_size
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if has_window else None
        """Tokens that a token attends to, itself included; None for all before it."""

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return [S, B, H * D]. attention_mask: [B or 1, 1, S, S], True where attention is forbidden; None for causal."""
        if self.context_parallel_size > 1:
            assert attention_mask is None, "the layout is checked before"
            group = parallel_state.get_context_parallel_group()
            key_SBGD, value_SBGD = (gather_from_sequence_parallel_region(part.contiguous(), group=group) for part in (key_SBGD, value_SBGD))
            attention_mask = _later_positions(query_SBHD.size(0), size=group.size(), rank=group.rank(), window=self.window)
        if self.window is not None and query_SBHD.size(0) > self.window and self.context_parallel_size == 1:
            attention_mask = self._add_window(attention_mask, query_SBHD.size(0), self.window)
        dropout = self.dropout if self.training else 0.0
        if attention_mask is None and not dropout and is_short(query_SBHD):
            return causal_attention(query_SBHD, key_SBGD, value_SBGD, scale=self.softmax_scale)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query_SBHD, key_SBGD, value_SBGD))
        # tensor ranks drop other positions in their heads; under sequence parallelism megatron-core is on their streams already
        own_stream = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_stream else contextlib.nullcontext():
            output_BHSD = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else ~attention_mask,
                is_causal=attention_mask is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=key.size(1) != query.size(1),
            )
        return output_BHSD.permute(2, 0, 1, 3).reshape(query_SBHD.size(0), query_SBHD.size(1), -1)

    @staticmethod
    def _add_window(attention_mask: torch.Tensor | None, sequence: int, window: int) -> torch.Tensor:
        """Return where attention is forbidden: to later tokens, to tokens before the window, and where the mask says so."""
        device = None if attention_mask is None else attention_mask.device
        allowed_SS = torch.ones(sequence, sequence, dtype=torch.bool, device=device).tril().triu(1 - window)
        return ~allowed_SS[None, None] if attention_mask is None else attention_mask | ~allowed_SS


@functools.lru_cache(maxsize=4)
def _later_positions(length: int, *, size: int, rank: int, window: int | None) -> torch.Tensor:
    """Return [1, 1, S, S * size], True where a key comes after the query, or before its window. One for all layers, to be read only.

    The sequence is cut into 2 * size parts; rank r holds part r and part 2 * size - 1 - r, so that all have as much to do
    (megatron-core's get_batch_on_this_cp_rank).
    """
    part = length // 2
    starts = [(r * part, (2 * size - 1 - r) * part) for r in range(size)]
    positions = torch.stack([torch.cat([torch.arange(start, start + part) for start in pair]) for pair in starts])
    distance_SK = positions[rank][:, None] - positions.flatten()[None, :]
    forbidden_SK = distance_SK < 0 if window is None else (distance_SK < 0) | (distance_SK >= window)
    return forbidden_SK[None, None]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for sequence parallelism, which megatron-core's wrapper of it refuses (0.19.2)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        if config.sequence_parallel:
            self.weight.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None, "it is given"
        return rms_norm(x, self.weight, self.eps) if x.dtype == self.weight.dtype == torch.float32 else super().forward(x)
