"""What a checkpoint of a run holds, and a run going on from it: weights, optimizer state, random streams.

The optimizer's tensors are saved whole, or as rows of what is whole, under the names of their parameters, without what depends on the
layout or on the kind of optimizer (its groups, its shards): any layout reads them, with or without the distributed optimizer. What is
not saved is derived: the learning rate and the data from the iteration, the fp32 master weights of fp32 weights from these.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_instruct.models.checkpoint import fill, model_state
from megatron_instruct.models.random_streams import random_states, seed_random_streams, set_random_states
from megatron_instruct.platform.device import Machine
from megatron_instruct.training.fully_sharded import OPTIMIZER_STATE, allocate_moments, fully_sharded, shards_of, take
from megatron_instruct.training.optimizer import optimizer_parts, prepare_for_loading, restore_step, torch_optimizers

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_STREAMS, _SHARDS = "random_streams", "shards"


def layout_facts() -> dict[str, int]:
    """Return what must be equal for the same random streams on each rank: the sizes of megatron-core's groups."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def state_of(chunks: Sequence[GPTModel], optimizer: Any) -> dict[str, Any]:
    """Return the sharded state of this rank, to be saved. Collective: the distributed optimizer gathers its shards."""
    if sharded := fully_sharded(optimizer_parts(optimizer)):
        shards = shards_of(chunks, sharded, list(torch_optimizers(optimizer)))
        return {**shards.others, _SHARDS: shards.tensors, _STREAMS: _streams(random_states())}
    state = model_state(chunks)
    tree = optimizer.sharded_state_dict(state, metadata=_METADATA)
    for tensors, _ in _masters_of_fp32(optimizer, tree):
        del tensors["param"]
    state["optimizer"] = {_name(place): tensor for place, tensor in _sharded(tree)}
    state[_STREAMS] = _streams(random_states())
    return state


def load_state(
    path: Path,
    chunks: Sequence[GPTModel],
    optimizer: Any,
    *,
    machine: Machine,
    updates: int,
    seed: int,
    same_layout: bool,
) -> None:
    """Fill weights, optimizer and random streams from a checkpoint saved in any layout. Every rank calls it.

    updates: how often the optimizer has changed the weights. seed: of the random streams where the layout is another one.
    """
    if fully_sharded(optimizer_parts(optimizer)):
        loaded = _load_shards(path, chunks, optimizer, same_layout=same_layout)
    else:
        loaded = _load_whole(path, chunks, optimizer, machine=machine, updates=updates, same_layout=same_layout)
    restore_step(optimizer, updates, machine)
    if same_layout:
        set_random_states(loaded[_STREAMS])
    else:
        seed_random_streams(seed)


def _load_shards(path: Path, chunks: Sequence[GPTModel], optimizer: Any, *, same_layout: bool) -> dict[str, Any]:
    """Fill what Megatron-FSDP shards, and return all that was read."""
    parts = optimizer_parts(optimizer)
    sharded = fully_sharded(parts)
    allocate_moments(parts)
    shards = shards_of(chunks, sharded, list(torch_optimizers(optimizer)))
    _name_as_saved(path, shards.tensors.values())
    state = {**shards.others, _SHARDS: shards.tensors, **({_STREAMS: _streams(None)} if same_layout else {})}
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
    for chunk, part in zip(chunks, shards.others, strict=True):
        chunk.load_state_dict(loaded[part], strict=False)
    take(shards, loaded[_SHARDS], sharded)
    return loaded


def _load_whole(
    path: Path, chunks: Sequence[GPTModel], optimizer: Any, *, machine: Machine, updates: int, same_layout: bool
) -> dict[str, Any]:
    """Fill weights and optimizer, and return all that was read."""
    prepare_for_loading(optimizer, machine)
    state = model_state(chunks)
    tree = optimizer.sharded_state_dict(state, is_loading=True, metadata=_METADATA)
    masters = list(_masters_of_fp32(optimizer, tree))
    for tensors, _ in masters:
        del tensors["param"]
    wanted = {_name(place): (place, tensor) for place, tensor in _sharded(tree)}
    _name_as_saved(path, (tensor for _, tensor in wanted.values()))
    state["optimizer"] = {name: tensor for name, (_, tensor) in wanted.items()}
    if same_layout:
        state[_STREAMS] = _streams(None)
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
    fill(chunks, loaded)
    for name, (place, _) in wanted.items():
        _put(tree, place, loaded["optimizer"][name])
    for tensors, parameter in masters:
        tensors["param"] = parameter.detach()
    _count_updates(optimizer, tree, updates)
    optimizer.load_state_dict(dict_list_map_inplace(_own, tree))
    return loaded


def _name_as_saved(path: Path, tensors: Iterable[ShardedTensor | ShardedTensorFactory]) -> None:
    """Name fp32 master weights as the checkpoint does: the plain and the distributed optimizer call them differently (0.19.2)."""
    saved = {
        name.split(".")[2] for name in FileSystemReader(str(path)).read_metadata().state_dict_metadata if name.startswith(OPTIMIZER_STATE)
    }
    for tensor in tensors:
        for mine, other in (("param", "fp32_param"), ("fp32_param", "param")):
            if tensor.key.startswith(f"{OPTIMIZER_STATE}{mine}.") and mine not in saved and other in saved:
                tensor.key = tensor.key.replace(f"{OPTIMIZER_STATE}{mine}.", f"{OPTIMIZER_STATE}{other}.", 1)
                break


def uses_random_streams(chunks: Sequence[GPTModel]) -> bool:
    """Say whether training draws random numbers: where there is dropout."""
    return any(chunk.config.attention_dropout or chunk.config.hidden_dropout for chunk in chunks)


def _masters_of_fp32(optimizer: Any, tree: Any) -> Iterator[tuple[dict[str, Any], torch.nn.Parameter]]:
    """Yield the tensors of each fp32 parameter whose weights the distributed optimizer would save a second time."""
    for part, its_tree in _parts(optimizer, tree):
        if not isinstance(part, DistributedOptimizer):
            continue
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        for number, parameter in enumerate(parameters):
            tensors = its_tree["param_state"][number]
            if parameter.dtype == torch.float32 and "param" in tensors:
                yield tensors, parameter


def _parts(optimizer: Any, tree: Any) -> list[tuple[Any, Any]]:
    """Return megatron-core's optimizers inside the one, each with its state."""
    parts = optimizer_parts(optimizer)
    return list(zip(parts, [tree] if len(parts) == 1 else [tree[number] for number in range(len(parts))], strict=True))


def _count_updates(optimizer: Any, tree: Any, updates: int) -> None:
    """Tell the plain optimizers how often torch's Adam, which takes no state without it, has changed the weights."""
    for part, its_tree in _parts(optimizer, tree):
        if isinstance(part.optimizer, torch.optim.Adam) and not isinstance(part, DistributedOptimizer):
            state = its_tree["state"] if "state" in its_tree else its_tree["optimizer"]["state"]
            state["common_step"] = torch.tensor(float(updates))


def _sharded(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, ShardedTensor | ShardedTensorFactory):
        yield place, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _sharded(value, (*place, key))


def _own(value: Any) -> Any:
    """Unwrap what megatron-core marks as never saved."""
    return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value


def _name(place: tuple[Any, ...]) -> str:
    return "/".join(map(str, place))


def _put(tree: Any, place: tuple[Any, ...], tensor: torch.Tensor) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = tensor


def _streams(states: dict[str, Any] | None) -> ShardedObject:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject(_STREAMS, states, (size,), (rank,))
