"""Saving and resuming a run: weights, optimizer state and position, in megatron-core's torch_dist format.

A checkpoint is written under a temporary name, described by its manifest and committed by a rename; then the tracker file names
it. The optimizer's state is saved fully reshardable: another layout can read it. What is not saved is derived: the learning rate
and the data from the iteration.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_instruct.errors import ConfigError, TrainingError
from megatron_instruct.files import TEMPORARY_SUFFIX, atomic_folder
from megatron_instruct.manifest import Manifest, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint import fill, model_state, write_state
from megatron_instruct.models.checkpoint_folder import iteration_folder, write_latest
from megatron_instruct.platform.device import Machine
from megatron_instruct.training.optimizer import prepare_for_loading, restore_step

_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_BYTES_PER_PARAMETER = 12  # fp32 weights and two moments


def save(
    folder: Path, chunks: Sequence[GPTModel], optimizer: Any, *, iteration: int, architecture: Architecture, identity: dict[str, Any]
) -> None:
    """Commit a checkpoint of this iteration. Every rank calls it.

    identity: the settings that a later resume must share. Raises TrainingError before anything is written where the disk is too full.
    """
    final = iteration_folder(folder, iteration)
    first = torch.distributed.get_rank() == 0
    if first:
        _check_disk(folder, architecture)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier run that was stopped before it named this checkpoint
    with atomic_folder(final) if first else nullcontext():
        torch.distributed.barrier()
        state = model_state(chunks)
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=_OPTIMIZER_METADATA)
        _write(final.with_name(final.name + TEMPORARY_SUFFIX), state)
        torch.distributed.barrier()
        if first:
            partial = final.with_name(final.name + TEMPORARY_SUFFIX)
            facts = {"architecture": architecture.to_json(), "iteration": iteration, "tokenizer": identity["tokenizer"]}
            manifest = Manifest(stage="pretrain", settings=identity, outputs=records([partial], relative_to=partial), facts=facts)
            write_manifest(partial / "manifest.json", manifest)
    if first:
        write_latest(folder, iteration)
    torch.distributed.barrier()


def _write(partial: Path, state: dict[str, Any]) -> None:
    try:
        write_state(partial, state)
    except (CheckpointException, OSError) as error:
        reason = str(error).splitlines()[-1]
        raise TrainingError(
            f"the checkpoint {partial} could not be written ({reason}); mend this (is the disk full?) and run the same command again: "
            "it goes on from the last checkpoint."
        ) from error


def resume(path: Path, chunks: Sequence[GPTModel], optimizer: Any, *, iteration: int, machine: Machine) -> None:
    """Fill weights and optimizer from a checkpoint of this run, saved in any layout. Every rank calls it."""
    prepare_for_loading(optimizer, machine)
    state = model_state(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=_OPTIMIZER_METADATA)
    loaded = dist_checkpointing.load(state, str(path))
    fill(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    restore_step(optimizer, iteration, machine)


def check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint belongs to a run with other settings than this one."""
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise ConfigError(
                f"{path} belongs to a run with {name}={saved.get(name)!r}, and this one has {name}={value!r}; "
                "use another --save (and --load this one for its weights), or restore the setting."
            )


def _check_disk(folder: Path, architecture: Architecture) -> None:
    needed = architecture.num_parameters * _BYTES_PER_PARAMETER
    free = shutil.disk_usage(folder).free
    if free < 1.05 * needed:
        raise TrainingError(
            f"{folder} has {free / 1e9:.1f} GB free, and a checkpoint of this model takes about {needed / 1e9:.1f} GB; "
            "free room or give another --save, and run the same command again: it goes on from the last checkpoint."
        )
