"""Where the indices of the data lie, and who builds them.

Comes in: a folder and a function that makes a data set from the indices below it, building those that are missing. Goes out: that data set,
on every process. A folder has a temporary name until it is whole, so a killed build counts for nothing. Machines need not share the
folder: those that see the same files have one process that builds, each machine on its own disk its own. Does not know: what is built.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder

_PATIENCE = 20.0
"""Seconds that a process waits for a folder which another machine has just written to show up."""


class IndexCache:
    """The folder of a run's indices, as the processes of one run use it together. Every process makes one at the same moment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._builds = _builds_here(root) if torch.distributed.is_initialized() else False

    def load(self, name: str, make: Callable[[Path], Any]) -> Any:
        """Return make(folder), with all that it writes there built once. Every process of a run calls it.

        Raises InputError where there is no run, which would build, and no indices.
        """
        folder = self.root / name
        if self._builds and not folder.is_dir():
            with atomic_folder(folder) as partial, _alone():
                make(partial)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        _wait_for(folder)
        with _alone():
            return make(folder)


def _builds_here(root: Path) -> bool:
    """Return whether this process builds: of those first on a machine, and seeing the same folder, the one of the lowest rank."""
    rank, on_one_machine = torch.distributed.get_rank(), os.environ.get("LOCAL_WORLD_SIZE") in (None, os.environ.get("WORLD_SIZE"))
    if on_one_machine:
        return rank == 0
    words: list[Any] = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(words, src=0)
    first_of_machine = os.environ.get("LOCAL_RANK") == "0"
    mine = root / f".seen-{words[0]}-{rank}"  # a name that no file system has looked for yet, hence none remembers as missing
    if first_of_machine:
        root.mkdir(parents=True, exist_ok=True)
        mine.touch()
    firsts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(firsts, rank if first_of_machine else None)
    seen = [other for other in firsts if other is not None and mine.with_name(f".seen-{words[0]}-{other}").exists()]
    torch.distributed.barrier()
    if first_of_machine:
        mine.unlink()
    return first_of_machine and rank == min(seen)


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + (_PATIENCE if torch.distributed.is_initialized() else 0.0)
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise InputError(
                f"{folder}: no indices of this run; its data or settings changed since, or its cache was removed or is not seen here."
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let megatron-core build as in a process of its own.

    megatron-core 0.19.2 lets nobody but rank 0 of the whole run write indices, and the others wait and read: without a file system that
    all machines share, they find nothing.
    """
    asked = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = asked
