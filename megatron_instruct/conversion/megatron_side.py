"""megatron-core's model in this one process, on the CPU: built, filled, read from a checkpoint of any layout.

Conversion needs no GPU, and takes none where there is one: its result does not depend on the machine.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.conversion.config import Dtype
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
from megatron_instruct.models.checkpoint import load_weights, save_weights
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.platform import device
from megatron_instruct.platform.device import Machine

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NO_WEIGHT = ("optimizer.", "chained_")
"""Beginnings of names in a trained checkpoint that are no weights."""


@contextmanager
def one_process() -> Iterator[Machine]:
    """Join a process group of one on the CPU, and leave it again."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1:
        raise ConfigError(f"WORLD_SIZE={processes}: conversion is the work of one process; start it without torchrun.")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # heeded as long as this process has not touched CUDA
    if torch.cuda.is_available():
        raise ConfigError("this process uses CUDA already, and conversion runs on the CPU; run it in a process of its own.")
    machine = device.initialize()
    join_model_parallel_groups(ParallelLayout(), seed=1234)
    try:
        yield machine
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(architecture: Architecture, machine: Machine, dtype: Dtype) -> GPTModel:
    """Return the whole model with every parameter in `dtype`."""
    (model,) = build_model(architecture, ParallelLayout(), machine, BuildOptions(dtype=dtype))
    return model.to(TORCH_DTYPES[dtype]).eval()


def parameters_of(model: GPTModel) -> dict[str, torch.Tensor]:
    """Return the model's weights by name, sharing memory with it."""
    return {name: value for name, value in model.state_dict().items() if torch.is_tensor(value) and not name.endswith("_extra_state")}


def save(path: Path, model: GPTModel) -> None:
    """Write the model's weights below the empty folder `path`, the same bytes whenever it is done.

    torch 2.13 notes the path and a random number of the write in .metadata, of which nothing is read; they are taken out.
    """
    save_weights(path, [model])
    metadata = pickle.loads((path / ".metadata").read_bytes())  # written by this very process
    metadata.storage_meta = None
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def stored_dtypes(path: Path, model: GPTModel) -> set[torch.dtype]:
    """Compare the names and sizes in a checkpoint with the model's, and return the types that its weights are stored in.

    Raises InputError that names what is missing, left over or of another size.
    """
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(path))
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is no readable checkpoint of megatron-core ({error}); give another iteration or write it again."
        ) from error
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(_NO_WEIGHT) and not name.endswith("_extra_state")}
    wanted: dict[str, tuple[int, ...] | None] = {}
    for part in model.sharded_state_dict().values():
        if isinstance(part, ShardedTensor):
            wanted[part.key] = None if part.allow_shape_mismatch else tuple(part.global_shape)
        elif isinstance(part, ShardedTensorFactory):
            wanted[part.key] = None  # stored in an order of its own, checked when it is loaded
    if missing := sorted(wanted.keys() - stored.keys()):
        raise InputError(f"{path} lacks the weights {', '.join(missing)} of the architecture in its manifest; write the checkpoint again.")
    if left_over := sorted(stored.keys() - wanted.keys()):
        raise InputError(f"{path} holds {', '.join(left_over)}, which the architecture in its manifest does not have; it is not supported.")
    for name, shape in wanted.items():
        if shape is not None and tuple(stored[name].global_shape) != shape:
            raise InputError(f"{path}: {name} has the shape {tuple(stored[name].global_shape)}, and its manifest says {shape}.")
    return {tensor.dtype for tensor in stored.values()}


def load(path: Path, model: GPTModel) -> None:
    """Fill the model from a checkpoint, converting to the model's type. Raises InputError where it cannot be read."""
    try:
        load_weights(path, [model])
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); give another iteration or write it again.") from error


def logits_of(model: GPTModel, ids: list[int], architecture: Architecture) -> torch.Tensor:
    """Return fp32 logits [S, V] of a sequence, without the rows that pad the vocabulary."""
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    with torch.no_grad():
        logits_BSV: torch.Tensor = model(tokens, positions, None)
    return logits_BSV[0, :, : architecture.vocab_size].float()
