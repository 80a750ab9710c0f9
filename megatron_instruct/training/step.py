"""One optimizer step and one validation, over megatron-core's schedules.

Shapes: B micro_batch_size, S seq_length. Losses are sums over tokens with the number of tokens beside them, so that means do
not depend on how the global batch was cut.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, FullyShardedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_instruct.errors import TrainingError
from megatron_instruct.training.documents import COMPONENT, Batch, as_one_sequence, forbidden_attention
from megatron_instruct.training.fully_sharded import gradients
from megatron_instruct.training.optimizer import optimizer_parts

_MOST_OVERFLOWS_IN_A_ROW = 50
"""A scale of the loss of 2^32 is at 1 after 33 of them."""
REMEDY = "lower lr or raise lr_warmup_iters. The last checkpoint is untouched."


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What the schedules need to know of a step."""

    num_microbatches: int
    micro_batch_size: int
    seq_length: int
    document_end: int | None = None
    """Id of the end-of-document token where attention stops at it; None where it runs on."""
    packs: bool = False
    """Documents go to the model as Transformer Engine takes them: the microbatch as one sequence, with its bounds."""
    leaves_tokens_out: bool = False
    """Not every token counts in the loss."""
    components: int = 0
    """Data sets of a blend whose losses are told apart; 0 where they are not."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What one validation gives back, the same on every rank."""

    loss: float
    """Mean over the tokens, in nats."""
    by_component: dict[int, float]
    """The same over the samples of each data set of the blend that had any."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step gives back, the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch, in nats."""
    grad_norm: float | None
    """Norm of the whole gradient before clipping; None where it overflowed in fp16, and the weights stayed as they were."""

    @property
    def overflowed(self) -> bool:
        return self.grad_norm is None


def share_that_counts(batches: Sequence[Batch]) -> torch.Tensor:
    """Return [1]: the share of a step's tokens that count in the loss, over all ranks. Collective.

    batches: this rank's of the step, which it has in every stage of a pipeline.
    """
    masks = torch.stack([batch["loss_mask"] for batch in batches])
    counted = torch.stack([(masks > 0).sum(), torch.tensor(masks.numel(), device=masks.device)])
    torch.distributed.all_reduce(counted, group=parallel_state.get_data_parallel_group())
    return counted[:1] / counted[1]


def compute_gradients(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, data: Sequence[Iterator[Batch]], shape: StepShape
) -> float:
    """Run forward and backward over the global batch and return its mean loss. Weights and optimizer stay as they are."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    return _mean(_run(chunks, data, shape, forward_only=False)[0])


def gradient_is_finite(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> bool:
    """Say whether this rank's gradients have a finite norm. Where the loss is scaled (fp16) the optimizer looks itself, and goes on."""
    if any(getattr(part, "grad_scaler", None) is not None for part in optimizer_parts(optimizer)):
        return True
    return all(bool(torch.linalg.vector_norm(gradient).isfinite()) for chunk in chunks for gradient in _gradients(chunk))


def _gradients(chunk: Any) -> Iterator[torch.Tensor]:
    if isinstance(chunk, FullyShardedDataParallel):
        yield from gradients(chunk)
    else:
        yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))


def update(optimizer: MegatronOptimizer, loss: float) -> StepResult:
    """Update the weights by the gradients of a step with this loss. Raises TrainingError where their norm is not finite."""
    updated, norm, _ = optimizer.step()
    if not updated and optimizer.config.fp16:
        return StepResult(loss=loss, grad_norm=None)
    grad_norm = float(norm or 0.0)
    if not updated or not math.isfinite(grad_norm):
        raise TrainingError(f"the norm of the gradient is {grad_norm} at a loss of {loss:.4f}; {REMEDY}")
    return StepResult(loss=loss, grad_norm=grad_norm)


def check_overflows(in_a_row: int, result: StepResult) -> None:
    """Raise TrainingError where so many steps in a row overflowed that no scale of the loss helps."""
    if in_a_row >= _MOST_OVERFLOWS_IN_A_ROW:
        raise TrainingError(
            f"the gradients of {in_a_row} steps in a row overflowed in fp16, the last one at a loss of {result.loss:.4f}; "
            "lower loss_scale or min_loss_scale, or use bf16. The last checkpoint is untouched."
        )


def validate(chunks: Sequence[DistributedDataParallel], data: Sequence[Iterator[Batch]], shape: StepShape) -> Validation:
    """Return the mean loss over the tokens of `shape.num_microbatches` microbatches a rank."""
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            whole, *parts = _run(chunks, data, shape, forward_only=True)
    finally:
        for chunk in chunks:
            chunk.train()
    return Validation(loss=_mean(whole), by_component={number: _mean(part) for number, part in enumerate(parts) if part[1]})


def _run(chunks: Sequence[Any], data: Sequence[Iterator[Batch]], shape: StepShape, *, forward_only: bool) -> torch.Tensor:
    """Return [1 + components, 2]: sum of losses and number of tokens, of all and of each component."""
    interleaved = len(chunks) > 1
    packs = shape.packs and shape.document_end is not None
    losses = get_forward_backward_func()(
        forward_step_func=partial(_forward, shape=shape),
        data_iterator=list(data) if interleaved else data[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=shape.num_microbatches,
        seq_length=shape.seq_length * (shape.micro_batch_size if packs else 1),
        micro_batch_size=1 if packs else shape.micro_batch_size,
        forward_only=forward_only,
    )
    device = next(chunks[0].parameters()).device
    total = torch.zeros(1 + shape.components, 2, dtype=torch.float64, device=device)
    for entry in losses or ():
        total += entry["loss and tokens"].to(torch.float64)
    # only the last pipeline stage has losses; the others add nothing
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if not total[0, 1]:
        raise TrainingError("no token counts in the loss; raise eval_iters or global_batch_size, or give another role a weight.")
    return total.cpu()


def _mean(loss_and_tokens: torch.Tensor) -> float:
    return float(loss_and_tokens[0] / loss_and_tokens[1])


def _forward(data: Iterator[Batch], model: Any, *, shape: StepShape) -> tuple[torch.Tensor, Any]:
    batch = dict(next(data))
    component_B = batch.pop(COMPONENT, None)
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    forbidden = packed = None
    if shape.document_end is not None and shape.packs:
        batch, packed = as_one_sequence(batch, shape.document_end)
    elif shape.document_end is not None:
        forbidden = forbidden_attention(batch["tokens"], shape.document_end)
    output = model(batch["tokens"], batch["position_ids"], forbidden, labels=batch["labels"], packed_seq_params=packed)
    return output, partial(_loss, batch["loss_mask"], component_B if shape.components else None, shape.components)


def _loss(
    loss_mask_BS: torch.Tensor, component_B: torch.Tensor | None, components: int, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighed sum over tokens, the number of those that weigh anything (int), and both for the log."""
    weighed_BS = losses_BS.float() * loss_mask_BS
    total = torch.sum(weighed_BS)
    tokens = (loss_mask_BS > 0).sum()
    rows = torch.stack([total.detach(), tokens.to(total.dtype)])[None]
    if component_B is not None:
        samples = component_B.numel()  # a microbatch that is packed into one sequence still has its samples one after another
        of_samples = torch.stack([weighed_BS.detach().reshape(samples, -1).sum(1), (loss_mask_BS > 0).reshape(samples, -1).sum(1)], dim=1)
        rows = torch.cat([rows, rows.new_zeros(components, 2).index_add(0, component_B.long(), of_samples.to(rows.dtype))])
    return total, tokens.to(torch.int), {"loss and tokens": rows}
