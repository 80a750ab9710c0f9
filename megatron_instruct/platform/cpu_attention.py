"""Causal attention of short sequences on CPU as batched matrix products, exact in fp32.

torch's kernel for CPUs never makes the scores of a whole sequence, and computes them again in the backward pass. For up to LONGEST tokens
they are few enough to be kept, one block of queries after another against the keys up to its end, all query heads of a key's group in one
product: forward and backward together take six to eight tenths of the time.

Shapes: S sequence, B batch, H query heads, G key/value groups, R = H / G, D head size, N blocks of T queries.
"""

import math
from typing import Any

import torch

LONGEST = 2048
"""Tokens; the scores kept grow with the square: 2 * S * S bytes for each query head and sequence, which at this length is half of what a
layer keeps otherwise. Selective recomputation does not keep them."""
_BLOCK = 64
_LATER = torch.full((_BLOCK, _BLOCK), -math.inf, dtype=torch.float32, device="cpu").triu(1)
"""[T, T], minus infinity where a key comes after the query."""


def is_short(query_SBHD: torch.Tensor) -> bool:
    """Return whether causal_attention takes such queries, and is the faster one."""
    length = query_SBHD.size(0)
    return query_SBHD.dtype == torch.float32 and query_SBHD.device.type == "cpu" and length <= LONGEST and length % _BLOCK == 0


def causal_attention(query_SBHD: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, *, scale: float | None) -> torch.Tensor:
    """Return [S, B, H * D]. scale: of the scores, None for 1 / sqrt(D). Only for what is_short."""
    scale = 1 / math.sqrt(query_SBHD.size(3)) if scale is None else scale
    output: torch.Tensor = _CausalAttention.apply(query_SBHD, key_SBGD, value_SBGD, scale)  # type: ignore[no-untyped-call]
    return output


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_SBHD: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, scale: float) -> torch.Tensor:
        groups = key_SBGD.size(2)
        query = _in_blocks(query_SBHD, groups).mul(scale)
        key, value = _by_group(key_SBGD), _by_group(value_SBGD)
        output = torch.empty_like(query)
        probabilities: list[torch.Tensor] = []
        for block in range(query.size(1)):
            end = (block + 1) * _BLOCK
            scores = torch.bmm(query[:, block], key[:, :end].transpose(1, 2))
            scores.view(scores.size(0), -1, _BLOCK, end)[..., -_BLOCK:] += _LATER
            probabilities.append(torch.softmax(scores, dim=-1, out=scores))
            output[:, block] = torch.bmm(probabilities[-1], value[:, :end])
        ctx.save_for_backward(query, key, value, output, *probabilities)
        ctx.scale = scale
        return _out_of_blocks(output, query_SBHD.shape).flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, output, *probabilities = ctx.saved_tensors
        length, size = key.size(1), key.size(2)
        batch = gradients[0].size(1)
        shape = torch.Size((length, batch, gradients[0].size(2) // size, size))
        of_output = _in_blocks(gradients[0].view(shape), key.size(0) // batch)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        through_softmax = (of_output * output).sum(dim=-1, keepdim=True)
        for block, kept in enumerate(probabilities):
            end = (block + 1) * _BLOCK
            of_value[:, :end].baddbmm_(kept.transpose(1, 2), of_output[:, block])
            of_scores = torch.bmm(of_output[:, block], value[:, :end].transpose(1, 2))
            of_scores.sub_(through_softmax[:, block]).mul_(kept)
            of_query[:, block] = torch.bmm(of_scores, key[:, :end])
            of_key[:, :end].baddbmm_(of_scores.transpose(1, 2), query[:, block])
        groups = (batch, -1, length, size)
        return (
            _out_of_blocks(of_query.mul_(ctx.scale), shape),
            of_key.view(groups).permute(2, 0, 1, 3),
            of_value.view(groups).permute(2, 0, 1, 3),
            None,
        )


def _in_blocks(tensor_SBHD: torch.Tensor, groups: int) -> torch.Tensor:
    """Return [B * G, N, R * T, D]: the queries of all heads of a group that stand in one block."""
    length, batch, heads, size = tensor_SBHD.shape
    blocks = tensor_SBHD.reshape(length // _BLOCK, _BLOCK, batch, groups, heads // groups, size)
    return blocks.permute(2, 3, 0, 4, 1, 5).reshape(batch * groups, length // _BLOCK, -1, size)


def _out_of_blocks(tensor: torch.Tensor, shape_SBHD: torch.Size) -> torch.Tensor:
    length, batch, heads, size = shape_SBHD
    blocks = tensor.view(batch, -1, length // _BLOCK, heads * batch // tensor.size(0), _BLOCK, size)
    return blocks.permute(2, 4, 0, 1, 3, 5).reshape(shape_SBHD)


def _by_group(tensor_SBGD: torch.Tensor) -> torch.Tensor:
    """Return [B * G, S, D]."""
    return tensor_SBGD.permute(1, 2, 0, 3).reshape(-1, tensor_SBGD.size(0), tensor_SBGD.size(3))
