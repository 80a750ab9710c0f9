"""A loss over the vocabulary alone: rows that pad the embedding to a multiple of the tensor ranks have no probability.

How many there are depends on the layout. megatron-core counts them in the cross entropy, so that a loss would depend on it, too.
Shapes: S sequence, B batch, V vocabulary of this tensor rank, padding included.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

_NEVER = -1e4
"""A logit whose exponential is 0 beside any other's; fp16 holds it, and -inf would be NaN less itself where a rank has padding alone."""


def leave_out_padding(model: GPTModel, vocab_size: int) -> None:
    """Make the loss of each token one over `vocab_size` ids. To be called after what else changes the loss: it must come first."""
    if not model.post_process:
        return
    rows = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    kept = min(max(vocab_size - rows * parallel_state.get_tensor_model_parallel_rank(), 0), rows)
    if kept < rows:
        model.compute_language_model_loss = partial(_loss, model.compute_language_model_loss, kept)


def _loss(cross_entropy: "partial[torch.Tensor]", kept: int, labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> torch.Tensor:
    return cross_entropy(labels_BS, _LeaveOut.apply(logits_SBV, kept))  # type: ignore[no-untyped-call]


class _LeaveOut(torch.autograd.Function):
    """In place; the gradient there is the probability, hence 0 already."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: torch.Tensor, kept: int) -> torch.Tensor:
        ctx.mark_dirty(logits_SBV)
        logits_SBV[..., kept:] = _NEVER
        return logits_SBV

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
