"""Saving and resuming a run, in megatron-core's torch_dist format.

A checkpoint is written under a temporary name, described by its manifest and committed by a rename, when the files of every rank
are on the disk; then the tracker file names it and older ones go. With async_save a process of each rank writes them while the
next steps run: killed meanwhile, the run goes on from the checkpoint before.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_instruct.errors import InputError, MegatronInstructError, TrainingError
from megatron_instruct.files import TEMPORARY_SUFFIX, atomic_folder
from megatron_instruct.manifest import Manifest, read_manifest, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import CHECKPOINT_FORMAT, iteration_folder, sealed, write_latest
from megatron_instruct.models.checkpoint_writing import StateWriting
from megatron_instruct.models.megatron_lm import common_state
from megatron_instruct.platform.device import Machine
from megatron_instruct.training.checkpoint_retention import clear_deleted, delete, delete_expendable
from megatron_instruct.training.checkpoint_state import layout_facts, load_state, state_of, uses_random_streams
from megatron_instruct.training.optimizer import loss_scaling_state, restore_loss_scaling, updates_done
from megatron_instruct.training.settings.checkpoint import CheckpointOptions

_BYTES_PER_PARAMETER = {torch.float32: 12, torch.bfloat16: 14, torch.float16: 14}
"""Weights, fp32 master weights where the weights are not fp32, two moments."""


@dataclass
class _Pending:
    """A checkpoint whose files are being written."""

    iteration: int
    writing: StateWriting
    folder: contextlib.ExitStack
    """Gives the folder its name when it is closed."""
    facts: dict[str, Any]
    since: float


class Checkpoints:
    """Saves the checkpoints of one run. Every rank makes it and calls it at the same iterations; to be used in a `with` block."""

    def __init__(
        self,
        options: CheckpointOptions,
        chunks: Sequence[GPTModel],
        optimizer: Any,
        *,
        architecture: Architecture,
        identity: dict[str, Any],
    ) -> None:
        """identity: the settings that a later resume must share."""
        self._options, self._chunks, self._optimizer = options, chunks, optimizer
        self._architecture, self._identity = architecture, identity
        self._first = torch.distributed.get_rank() == 0
        self._pending: _Pending | None = None
        self._removing: threading.Thread | None = None
        if self._first:
            clear_deleted(options.save)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Commit the last checkpoint; after an error, which other ranks need not share, leave it uncommitted."""
        if error is None:
            self.finish()
        elif self._pending is not None:
            self._give_up(self._pending)
        self._wait_for_removal()

    def save(self, iteration: int) -> None:
        """Save a checkpoint of this iteration, or with async_save begin to. Raises TrainingError where the disk is too full for it."""
        self.finish()
        self._wait_for_removal()  # before the disk is looked at, and before a process is forked
        since = time.perf_counter()
        folder = contextlib.ExitStack()
        _on_first_rank(lambda: self._make_room(iteration, folder))
        facts = {
            "architecture": self._architecture.to_json(),
            "iteration": iteration,
            "tokenizer": self._identity["tokenizer"],
            "checkpoint_format": CHECKPOINT_FORMAT,
            "layout": layout_facts(),
            "optimizer_updates": updates_done(self._optimizer),
            "loss_scaling": loss_scaling_state(self._optimizer),
        }
        partial = self._final(iteration).with_name(self._final(iteration).name + TEMPORARY_SUFFIX)
        try:
            state = {
                **state_of(self._chunks, self._optimizer),
                **common_state(self._architecture, dtype=self._identity["dtype"], iteration=iteration),
            }
            writing = StateWriting(partial, state, beside=self._options.async_save)
        except (CheckpointException, OSError) as error:
            with folder:
                raise _not_written(self._final(iteration), error) from error
        self._pending = _Pending(iteration=iteration, writing=writing, folder=folder, facts=facts, since=since)
        if not self._options.async_save:
            self.finish()

    def poll(self) -> None:
        """Commit the checkpoint under way if all its files are written. Cheap where there is none; to be called after every step."""
        self._commit(wait=False)

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one, and commit it."""
        self._commit(wait=True)

    def _commit(self, *, wait: bool) -> None:
        pending = self._pending
        if pending is None:
            return
        try:
            if not pending.writing.finished(wait=wait):
                return
            written = pending.writing.records()
            _on_first_rank(lambda: self._name(pending, written))
        except (CheckpointException, OSError) as error:
            self._give_up(pending)
            raise _not_written(self._final(pending.iteration), error) from error
        self._pending = None

    def _name(self, pending: _Pending, written: Any) -> None:
        """Describe the checkpoint, give it its name, and delete what it makes expendable."""
        final = self._final(pending.iteration)
        partial = final.with_name(final.name + TEMPORARY_SUFFIX)
        outputs = records([partial], relative_to=partial, known=written)
        manifest = Manifest(stage="pretrain", settings=self._identity, outputs=outputs, facts=pending.facts)
        write_manifest(partial / "manifest.json", sealed(manifest))
        pending.folder.close()
        write_latest(self._options.save, pending.iteration)
        options = self._options
        self._removing = delete_expendable(options.save, keep_last=options.keep_last, retain_interval=options.save_retain_interval)
        size, seconds = sum(output.bytes for output in outputs) / 1e9, time.perf_counter() - pending.since
        print(f"checkpoint of iteration {pending.iteration} saved in {seconds:.1f} s ({size:,.2f} GB)", flush=True)

    def _wait_for_removal(self) -> None:
        if self._removing is not None:
            self._removing.join()
            self._removing = None

    def _give_up(self, pending: _Pending) -> None:
        self._pending = None
        pending.writing.abandon()
        with contextlib.suppress(_Abandoned), pending.folder:
            raise _Abandoned

    def _make_room(self, iteration: int, folder: contextlib.ExitStack) -> None:
        _check_disk(self._options.save, self._architecture, next(self._chunks[0].parameters()).dtype)
        delete(self._final(iteration))  # damaged, or of an earlier run that was stopped before it named this checkpoint
        folder.enter_context(atomic_folder(self._final(iteration)))

    def _final(self, iteration: int) -> Path:
        return iteration_folder(self._options.save, iteration)


class _Abandoned(Exception):
    """Ends the block of a temporary folder whose checkpoint will not be."""


def resume(path: Path, chunks: Sequence[GPTModel], optimizer: Any, *, iteration: int, machine: Machine) -> None:
    """Fill weights, optimizer and random streams from a checkpoint of this run, saved in any layout. Every rank calls it."""
    manifest = read_manifest(path / "manifest.json")
    updates = manifest.facts.get("optimizer_updates")
    same_layout = manifest.facts.get("layout") == layout_facts()
    if not same_layout and uses_random_streams(chunks) and torch.distributed.get_rank() == 0:
        print(f"{path} was saved in another layout: dropout draws from new random streams.", flush=True)
    try:
        load_state(
            path,
            chunks,
            optimizer,
            machine=machine,
            updates=iteration if updates is None else updates,
            seed=manifest.settings["seed"] + iteration,
            same_layout=same_layout,
        )
        restore_loss_scaling(optimizer, manifest.facts.get("loss_scaling"), machine)
    except (CheckpointException, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({str(error).splitlines()[-1]}); start again with --verify-integrity, which finds what is damaged."
        ) from error


def _on_first_rank(action: Callable[[], None]) -> None:
    """Do something on the first rank; where it fails, every rank raises its error."""
    failed: list[BaseException | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except (OSError, MegatronInstructError) as error:
            failed = [error]
    torch.distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]


def _not_written(path: Path, error: BaseException) -> TrainingError:
    free = shutil.disk_usage(path.parent).free / 1e9
    return TrainingError(
        f"the checkpoint {path} could not be written ({str(error).splitlines()[-1]}; its disk has {free:.2f} GB free); mend this (is the "
        "disk full?) and run the same command again: it goes on from the last checkpoint."
    )


def _check_disk(folder: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    """The new checkpoint must fit beside the old ones: they go when it is whole."""
    needed = architecture.num_parameters * _BYTES_PER_PARAMETER[dtype]
    free = shutil.disk_usage(folder).free
    if free < 1.05 * needed:
        raise TrainingError(
            f"{folder} has {free / 1e9:.1f} GB free, and a checkpoint of this model takes about {needed / 1e9:.1f} GB; "
            "free room or give another --save, and run the same command again: it goes on from the last checkpoint."
        )
