"""What the router of a mixture of experts adds to the gradient: its weight beside the loss, and what the log says of it.

megatron-core collects it in every forward pass.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker


def mean_expert_losses(*, layers: int, microbatches: int) -> dict[str, float]:
    """Return each loss, without its weight, as a mean over layers and microbatches since the last call. Every rank calls it.

    layers: of the model. microbatches: that one replica has computed since then.
    """
    tracker = get_moe_metrics_tracker()
    found = {}
    for name, entry in tracker.metrics.items():
        total = entry.values.sum()
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        for group in (entry.reduce_group, entry.avg_group):
            if group is not None:
                torch.distributed.all_reduce(total, group=group)
        if entry.avg_group is not None:
            total /= entry.avg_group.size()
        if entry.needs_dp_avg:
            group = parallel_state.get_data_parallel_group()
            torch.distributed.all_reduce(total, group=group)
            total /= group.size()
        found["router_z_loss" if name == "z_loss" else name] = float(total) / layers / microbatches
    tracker.clear()
    return found


def expert_losses() -> dict[str, torch.Tensor]:
    """Return what was collected since the last call of mean_expert_losses."""
    return {name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()}


def restore_expert_losses(kept: dict[str, torch.Tensor]) -> None:
    """Forget what was collected since expert_losses returned `kept`."""
    for name, entry in get_moe_metrics_tracker().metrics.items():
        entry.values.copy_(kept[name]) if name in kept else entry.values.zero_()


def scale_expert_losses(config: Any, share_that_counts: torch.Tensor) -> None:
    """Let the router's losses weigh what they would if every token of the step counted.

    megatron-core 0.19.2 multiplies them by all tokens, and in the end divides by those that count.
    """
    config.moe_grad_scale_func = lambda: config.grad_scale_func(share_that_counts)
