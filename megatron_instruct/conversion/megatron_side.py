"""megatron-core's view of a model, in this one process, on the CPU: where each parameter lies in a checkpoint, and what it computes.

Conversion needs no GPU, and takes none where there is one: its result does not depend on the machine. Where a parameter lies is asked
of megatron-core itself, of a model without memory; no table of the project repeats it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.conversion.torch_dist import Checkpoint, Piece
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
from megatron_instruct.models.dtypes import TORCH_DTYPES
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.platform import device
from megatron_instruct.platform.device import Machine

_NO_WEIGHT = ("optimizer.", "chained_")
"""Beginnings of names in a trained checkpoint that are no weights."""
_BLOCK = 1 << 24  # bytes of a parameter that is put together: what is read of its file at once counts as memory as long as it is looked at
COMMON = "common_state/shard_0_1"
"""Where megatron-core 0.19.2 keeps what is not of tensors."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """Where the state of a model lies in a checkpoint."""

    pieces: Mapping[str, tuple[Piece, ...]]
    """By parameter: the boxes that it is stored in, which lie one below the other in it."""
    sizes: Mapping[str, tuple[tuple[int, ...], ...]]
    """By parameter: the sizes of those boxes in the parameter, without the axes of layers and experts."""
    objects: Mapping[str, Any]
    """What is stored besides, by key."""

    def read(self, checkpoint: Checkpoint, parameter: str, *, rows: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a parameter from a checkpoint of any layout.

        rows: of one that is a vocabulary, how many to read. dtype: of what is returned (default: as it is stored).
        """
        pieces, sizes = self.pieces[parameter], self.sizes[parameter]
        if rows is not None:
            sizes = ((rows, *sizes[0][1:]),)
            pieces = (dataclasses.replace(pieces[0], sizes=sizes[0]),)
        stored = checkpoint.tensors[pieces[0].key].dtype
        if len(pieces) == 1 and dtype in (None, stored):
            return checkpoint.read(pieces[0]).reshape(sizes[0])
        result = torch.empty(sum(size[0] for size in sizes), *sizes[0][1:], dtype=dtype or stored)
        for target, piece, size in zip(torch.split(result, [size[0] for size in sizes]), pieces, sizes, strict=True):
            few = max(1, _BLOCK * size[0] // target.nbytes)
            for block, part in zip(torch.split(target, few), _rows(piece, len(size), few), strict=True):
                block.copy_(checkpoint.read(part).reshape(block.shape))
        return result


def _rows(piece: Piece, axes: int, few: int) -> Iterator[Piece]:
    """Yield a few rows of a box at a time; axes: of the parameter, which are the box's last ones."""
    axis = len(piece.sizes) - axes
    for start in range(0, piece.sizes[axis], few):
        offsets, sizes = list(piece.offsets), list(piece.sizes)
        offsets[axis] += start
        sizes[axis] = min(few, piece.sizes[axis] - start)
        yield dataclasses.replace(piece, offsets=tuple(offsets), sizes=tuple(sizes))


@contextmanager
def one_process() -> Iterator[Machine]:
    """Join a process group of one on the CPU, and leave it again."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1:
        raise ConfigError(f"WORLD_SIZE={processes}: conversion is the work of one process; start it without torchrun.")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # heeded as long as this process has not touched CUDA
    if torch.cuda.is_available():
        raise ConfigError("this process uses CUDA already, and conversion runs on the CPU; run it in a process of its own.")
    machine = device.initialize(keep_freed_memory=False)
    join_model_parallel_groups(ParallelLayout(), seed=1234)
    try:
        yield machine
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def plan_checkpoint(architecture: Architecture, machine: Machine) -> CheckpointPlan:
    """Ask megatron-core where the state of such a model lies in a checkpoint."""
    (model,) = build_model(architecture, ParallelLayout(), machine, BuildOptions(weights="shapes"))
    pieces: dict[str, tuple[Piece, ...]] = {}
    sizes: dict[str, tuple[tuple[int, ...], ...]] = {}
    objects: dict[str, Any] = {COMMON: [{}]}
    for name, part in model.sharded_state_dict().items():
        if isinstance(part, ShardedObject):
            objects[part.unique_key] = [None]
            continue
        if isinstance(part, ShardedTensorFactory):
            boxes = list(nested_values(part.build_fn(part.key, part.data, part.replica_id, part.flattened_range)))
        else:
            assert isinstance(part, ShardedTensor), f"{name} is a {type(part).__name__}"
            boxes = [part]
        sizes[name] = tuple(tuple(box.local_shape) for box in boxes)
        pieces[name] = tuple(
            Piece(
                key=box.key,
                shape=tuple(box.global_shape),
                offsets=tuple(box.global_offset),
                sizes=(*[1] * box.prepend_axis_num, *box.local_shape),
            )
            for box in boxes
        )
    return CheckpointPlan(pieces=pieces, sizes=sizes, objects=objects)


def stored_dtypes(checkpoint: Checkpoint, plan: CheckpointPlan, architecture: Architecture, path: object) -> set[torch.dtype]:
    """Compare the names and sizes in a checkpoint with the model's, and return the types that its weights are stored in.

    Raises InputError that names what is missing, left over or of another size.
    """
    stored = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(_NO_WEIGHT) and not name.split("/")[0].endswith("_extra_state")
    }
    wanted = {piece.key: piece.shape for pieces in plan.pieces.values() for piece in pieces}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise InputError(f"{path} lacks the weights {', '.join(missing)} of the architecture in its manifest; write the checkpoint again.")
    if left_over := sorted(stored.keys() - wanted.keys()):
        raise InputError(f"{path} holds {', '.join(left_over)}, which the architecture in its manifest does not have; it is not supported.")
    for name, shape in wanted.items():
        found = stored[name].shape
        is_vocabulary = shape[0] >= architecture.vocab_size and "layers" not in name and len(shape) == 2
        fits = found[1:] == shape[1:] and found[0] >= architecture.vocab_size if is_vocabulary else found == shape
        if not fits:
            raise InputError(f"{path}: {name} has the shape {found}, and its manifest says {shape}; write the checkpoint again.")
        if stored[name].dtype not in TORCH_DTYPES.values():
            raise InputError(
                f"{path}: {name} is stored as {str(stored[name].dtype).removeprefix('torch.')}; supported: {', '.join(TORCH_DTYPES)}. "
                "Weights that are computed with in FP8 are to be saved in bf16."
            )
    return {tensor.dtype for tensor in stored.values()}


def build(architecture: Architecture, machine: Machine, parameter: Callable[[str], torch.Tensor]) -> GPTModel:
    """Return the model in fp32, whose layers take their parameters module by module when they compute, and then give them back.

    parameter: returns one in fp32 by name; rows that are missing in it are zero. What lies outside the layers is filled at once.
    """
    (model,) = build_model(architecture, ParallelLayout(), machine, BuildOptions(weights="empty"))
    for path, module in model.named_modules():
        own = {f"{path}.{name}": value for name, value in module.named_parameters(recurse=False)}
        if path.startswith("decoder.layers.") and own:
            module.register_forward_pre_hook(lambda _module, _given, own=own: _take(own, parameter))
            module.register_forward_hook(lambda _module, _given, _made, own=own: _give_back(own))
            _give_back(own)
            continue
        for name, target in own.items():
            value = parameter(name)
            target.data[: value.size(0)] = value
            target.data[value.size(0) :] = 0.0
    return model.eval()


def _take(own: Mapping[str, torch.Tensor], parameter: Callable[[str], torch.Tensor]) -> None:
    for name, value in own.items():
        value.data = parameter(name)


def _give_back(own: Mapping[str, torch.Tensor]) -> None:
    for value in own.values():
        value.data = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model makes of a sequence, in fp32."""

    layers: list[torch.Tensor]
    """After each layer: [S, C]."""
    logits: torch.Tensor
    """[S, V], without the rows that pad the vocabulary."""
    layers_moved: list[float]
    """The largest change after each layer where the input of every layer is rounded at random."""
    logits_moved: float
    """The largest change of the logits then."""


def outputs_of(
    model: GPTModel, architecture: Architecture, ids: list[int], *, epsilon: float, hidden_SC: torch.Tensor | None = None
) -> Outputs:
    """Run the model over a sequence, or over hidden states that stand for its embedding, and over a second one beside it.

    In the second one each value that goes into a layer is off by a random part of about epsilon: what rounding does to this model.
    """
    generator = torch.Generator().manual_seed(1)
    layers: list[torch.Tensor] = []
    moved: list[float] = []

    def round_second(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        second_SC = named["hidden_states"][:, 1]
        second_SC *= 1.0 + epsilon * torch.randn(second_SC.shape, generator=generator)

    def keep(_module: Any, _given: Any, output: Any) -> None:
        first_SC, second_SC = output[0].unbind(1)
        layers.append(first_SC.clone())
        moved.append(float((second_SC - first_SC).abs().max()))

    hooks = [layer.register_forward_pre_hook(round_second, with_kwargs=True) for layer in model.decoder.layers]
    hooks += [layer.register_forward_hook(keep) for layer in model.decoder.layers]
    with torch.no_grad():
        given = None if hidden_SC is None else hidden_SC[:, None].repeat(1, 2, 1)
        logits = model(torch.tensor([ids, ids]), torch.arange(len(ids)).repeat(2, 1), None, decoder_input=given)
    for hook in hooks:
        hook.remove()
    first_SV, second_SV = logits[:, :, : architecture.vocab_size].float().unbind()
    return Outputs(layers=layers, logits=first_SV, layers_moved=moved, logits_moved=float((second_SV - first_SV).abs().max()))
