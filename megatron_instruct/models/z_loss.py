"""z-loss: coefficient · log(Z)², where Z is the sum of exp(logit) over the vocabulary (PaLM, arXiv:2204.02311, section 5).

It keeps the logits from drifting. Only its gradient is added: what the model returns, and the log shows, stays the cross entropy.
Shapes: S sequence, B batch, V vocabulary of this tensor rank.
"""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region


def add_z_loss(model: GPTModel, coefficient: float) -> None:
    """Make the loss of each token carry the z-loss's gradient, on the rank that computes it."""
    if model.post_process:
        model.compute_language_model_loss = partial(_loss, model.compute_language_model_loss, coefficient)


def _loss(cross_entropy: "partial[torch.Tensor]", coefficient: float, labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> torch.Tensor:
    # first of all: cross entropy changes the logits in place (megatron-core 0.19.2)
    z_loss_BS = coefficient * _log_z(logits_SBV).square().transpose(0, 1) if torch.is_grad_enabled() else None
    losses_BS = cross_entropy(labels_BS, logits_SBV)
    return losses_BS if z_loss_BS is None else losses_BS + (z_loss_BS - z_loss_BS.detach())


def _log_z(logits_SBV: torch.Tensor) -> torch.Tensor:
    """Return [S, B], over the vocabulary of all tensor ranks."""
    logits = logits_SBV.float()
    group = parallel_state.get_tensor_model_parallel_group()
    largest = logits.detach().amax(-1)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    total: torch.Tensor = reduce_from_tensor_model_parallel_region((logits - largest[..., None]).exp().sum(-1), group=group)
    return total.log() + largest
