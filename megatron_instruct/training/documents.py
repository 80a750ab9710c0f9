"""Attention that stops where a document ends.

Shapes: B micro batch, S sequence length. A document ends with the end-of-document token, which belongs to it. A token attends to
itself and to earlier tokens of its own document.
"""

from typing import Any

import torch

Batch = dict[str, torch.Tensor]
COMPONENT = "dataset_id"
"""In a batch of a blend [B]: for each sample the number of its data set."""


def document_numbers(tokens_BS: torch.Tensor, eod: int) -> torch.Tensor:
    """Return [B, S]: how many documents of its sequence end before each token."""
    ends = (tokens_BS == eod).long()
    return ends.cumsum(dim=1) - ends


def forbidden_attention(tokens_BS: torch.Tensor, eod: int) -> torch.Tensor:
    """Return [B, 1, S, S], True where the token of the row must not see the token of the column."""
    numbers = document_numbers(tokens_BS, eod)
    length = tokens_BS.size(1)
    later = torch.ones(length, length, dtype=torch.bool, device=tokens_BS.device).triu(1)
    return ((numbers[:, :, None] != numbers[:, None, :]) | later)[:, None]


def as_one_sequence(batch: Batch, eod: int) -> tuple[Batch, Any]:
    """Return the batch as one sequence [1, B * S], and megatron-core's description of the documents in it.

    Transformer Engine takes documents this way (its layout "thd"), and its kernels skip what is forbidden.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = batch["tokens"]
    numbers = document_numbers(tokens, eod)
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([tokens.numel()], device=tokens.device)]).to(torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    return {name: values.reshape(1, -1) for name, values in batch.items()}, packed
