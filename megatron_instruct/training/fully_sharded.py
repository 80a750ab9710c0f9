"""Megatron-FSDP: parameters, gradients and optimizer state in shards over the data-parallel ranks, and their checkpoints.

A rank holds whole rows of each parameter that its tensor rank has: its shard. They are saved as such, without gathering, under the names
and in the global shapes of every other layout's checkpoints, so that any layout goes on from them, and this from any (Megatron-LM's own
format, fsdp_dtensor, is read by Megatron-FSDP alone). Source: megatron-core 0.19.2, distributed/fsdp.
Does not know: data, steps, files.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.models.checkpoint import model_state
from megatron_instruct.models.random_streams import random_states, set_random_states
from megatron_instruct.training.settings.parallel import ParallelOptions

OPTIMIZER_STATE = "optimizer.state."
"""Begin of the names of the optimizer's tensors in a checkpoint; the kind follows, then the parameter."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def wrap_fully_sharded(modules: Sequence[torch.nn.Module], options: ParallelOptions) -> list[FullyShardedDataParallel]:
    """Shard a rank's model chunks over its data-parallel ranks, context parallel ones among them."""
    device = next(modules[0].parameters()).device
    ddp_config = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=options.sharding_strategy,
        use_distributed_optimizer=True,
        overlap_grad_reduce=options.overlap_grad_reduce or options.shards_gradients,
        overlap_param_gather=options.overlap_param_gather or options.shards_weights,
        grad_reduce_in_fp32=True,
        fsdp_all_gather_in_start_param_sync=device.type == "cuda",  # gloo warns of what the last step begins to gather
        megatron_fsdp_main_params_dtype=torch.float32,
        megatron_fsdp_main_grads_dtype=torch.float32,
        check_for_nan_in_grad=False,  # the step looks at the loss, the optimizer at the norm
    )
    streams = random_states()
    wrapped = [FullyShardedDataParallel(config=module.config, ddp_config=ddp_config, module=module, device=device) for module in modules]
    set_random_states(streams)  # tensor ranks were given those of the first, and draw from their own
    return wrapped


def fully_sharded(optimizer_parts: Sequence[Any]) -> list[FullyShardedDataParallel]:
    """Return the model chunks of megatron-core's optimizers that Megatron-FSDP shards."""
    chunks = [chunk for part in optimizer_parts for chunk in getattr(part, "model_chunks", ())]
    return [chunk for chunk in chunks if isinstance(chunk, FullyShardedDataParallel)]


def gradients(chunk: FullyShardedDataParallel) -> Iterator[torch.Tensor]:
    """Yield this rank's shards of the gradients. What pads the buffers that they lie in is of no gradient, and may be any number."""
    for _, shard in chunk.param_and_grad_buffer.optimizer_named_parameters:
        if shard.grad is not None:
            yield _local(shard.grad)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What a rank holds of a model and its optimizer."""

    tensors: dict[str, ShardedTensor]
    """Rows of weights, moments and fp32 master weights, which share their memory with these; weights that have masters are copies."""
    others: dict[str, dict[str, Any]]
    """The rest of the sharded state of each model chunk, such as buffers."""


def shards_of(
    models: Sequence[GPTModel], chunks: Sequence[FullyShardedDataParallel], optimizers: Sequence[torch.optim.Optimizer]
) -> Shards:
    """Return the sharded state of a rank: weights, fp32 master weights under 16 bits, moments.

    models: the chunks as they were before they were wrapped. optimizers: torch's, each with a state for every shard that is not empty.
    """
    with _whole_parameters(chunks):
        states = model_state(models)
    shard_of = {id(shard.orig_param): shard for chunk in chunks for _, shard in chunk.param_and_grad_buffer.optimizer_named_parameters}
    divided = chunks[0].ddp_config.data_parallel_sharding_strategy != "no_shard"
    tensors: dict[str, ShardedTensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for part, entries in states.items():
        others[part] = {}
        for name, entry in entries.items():
            shard = shard_of.get(id(getattr(entry, "data", None)))
            if shard is None:
                others[part][name] = entry
                continue
            for kind, rows in _kinds(shard, optimizers):
                for number, tensor in enumerate(_rows_of(entry, shard, rows, divided=divided)):
                    key = tensor.key if kind is None else f"{OPTIMIZER_STATE}{kind}.{tensor.key}"
                    tensors[f"{part}/{name}/{kind}/{number}"] = dataclasses.replace(tensor, key=key)
    return Shards(tensors=tensors, others=others)


def take(shards: Shards, loaded: dict[str, torch.Tensor], chunks: Sequence[FullyShardedDataParallel]) -> None:
    """Copy loaded shards into this rank's, and let the weights that the model computes with follow."""
    for name, shard in shards.tensors.items():
        shard.data.copy_(loaded[name])
    for chunk in chunks:
        chunk.synchronize_param_gather()
        chunk.param_and_grad_buffer.copy_main_weights_to_model_weights()
        chunk.start_param_sync()


def allocate_moments(optimizer_parts: Sequence[Any]) -> None:
    """Give every shard the moments that a checkpoint is read into, by a step whose result the checkpoint replaces."""
    for part in optimizer_parts:
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


@contextlib.contextmanager
def _whole_parameters(chunks: Sequence[FullyShardedDataParallel]) -> Iterator[None]:
    """Show the model chunks with their parameters' names and shapes over all shards, though not with their content."""
    for chunk in chunks:
        chunk.module._replace_param_with_raw_if_needed()
        chunk.module.is_param_fsdp_distributed = True  # or megatron-core puts the shards in when it is asked for the state (0.19.2)
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.module.is_param_fsdp_distributed = False


def _kinds(shard: torch.nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str | None, torch.Tensor]]:
    """Yield a shard's rows of the weight (None), of its fp32 master and of the moments."""
    own, dtype = _local(shard), shard.orig_param.dtype  # type: ignore[attr-defined]
    yield None, own.to(dtype)  # where it is fp32, these rows themselves
    if dtype != torch.float32:
        yield "param", own
    if not own.numel():
        return
    state = next(optimizer.state[shard] for optimizer in optimizers if shard in optimizer.state)
    for kind in _MOMENTS:
        yield kind, _local(state[kind])


def _rows_of(
    entry: ShardedTensor | ShardedTensorFactory, shard: torch.nn.Parameter, rows: torch.Tensor, *, divided: bool
) -> Iterator[ShardedTensor]:
    """Cut a shard's rows as megatron-core names them: a gated layer's matrix is saved as two.

    divided: whether each rank has rows of its own; otherwise every rank has all, and the first saves them.
    """
    whole = shard.orig_param  # type: ignore[attr-defined]
    first, last = _range_of(shard, rows)
    shapes_only = dataclasses.replace(entry, data=torch.empty(whole.shape, dtype=rows.dtype, device="meta"), **_dtype_of(entry, rows))
    pieces = shapes_only.build() if isinstance(shapes_only, ShardedTensorFactory) else [shapes_only]
    begin = 0
    for piece in pieces:
        end = begin + piece.local_shape[0]
        start, stop = max(first, begin), min(last, end)
        if start < stop:
            yield _placed(piece, rows[start - first : stop - first], skipped=start - begin, divided=divided)
        begin = end
    assert begin == whole.size(0), "the parts of a parameter are its rows, in their order"


def _dtype_of(entry: ShardedTensor | ShardedTensorFactory, rows: torch.Tensor) -> dict[str, Any]:
    return {"dtype": rows.dtype} if isinstance(entry, ShardedTensor) else {}


def _range_of(shard: torch.nn.Parameter, rows: torch.Tensor) -> tuple[int, int]:
    """Return the first row of a shard in its tensor rank's parameter, and the one after its last."""
    whole = shard.orig_param  # type: ignore[attr-defined]
    if rows.size(0) == whole.size(0):
        return 0, whole.size(0)
    width = math.prod(whole.shape[1:])
    elements = shard.megatron_fsdp_slice  # type: ignore[attr-defined]
    assert elements.start % width == 0 and rows.numel() == elements.stop - elements.start, "a shard has whole rows"
    return elements.start // width, elements.start // width + rows.size(0)


def _placed(piece: ShardedTensor, rows: torch.Tensor, *, skipped: int, divided: bool) -> ShardedTensor:
    """Return rows of a piece, with their place in the whole tensor over all ranks."""
    ahead = piece.prepend_axis_num
    offset = list(piece.global_offset)
    offset[ahead] += skipped
    data = rows.reshape(*[1] * ahead, *rows.shape)
    *others, replica = piece.replica_id if isinstance(piece.replica_id, tuple) else (piece.replica_id,)
    return dataclasses.replace(
        piece,
        data=data,
        dtype=rows.dtype,
        local_shape=tuple(data.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # ranks have unequal numbers of rows
        prepend_axis_num=0,
        replica_id=(*others, 0 if divided else replica),
    )


def _local(tensor: Any) -> torch.Tensor:
    """Return this rank's part of a distributed tensor, sharing its memory."""
    local: torch.Tensor = tensor.detach()._local_tensor
    return local
