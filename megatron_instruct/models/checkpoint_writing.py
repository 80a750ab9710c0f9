"""Writing a sharded state: at once, or by a process beside the one that trains.

Comes in: the sharded state of all ranks and an empty folder. Goes out: megatron-core's torch_dist files, and what each of them
holds (size, SHA-256), found by the rank that wrote it. Does not know: what the state is of, and when it counts as committed.

Beside the training: megatron-core's AsyncRequest and AsyncCallsQueue. A forked process keeps the tensors as they were at the fork
(on CUDA a copy in the host's memory, made before), so that the next step may change them at once.
"""

import os
import pickle
import queue
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_instruct.manifest import FileRecord, record
from megatron_instruct.platform.processes import end_with_parent

_NICENESS = 10
"""Of the writing process: the training has the cores first."""


class StateWriting:
    """One sharded state on its way to the disk. Every rank makes it and asks it the same questions in the same order."""

    def __init__(self, folder: Path, state: dict[str, Any], *, beside: bool) -> None:
        """Plan the files and write them, or with `beside` start to. Raises torch's CheckpointException or OSError."""
        # megatron-core 0.19.2 passes results through a process that it starts for the purpose: 5 s, and 400 MB a rank
        filesystem_async._results_queue = _Mailbox()
        self._records = _Mailbox()
        self._queue = AsyncCallsQueue()
        stand_alone(state)
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
        if request.async_fn is not None:
            write = partial(_write, request.async_fn, self._records)
            request = request._replace(async_fn=partial(_write_beside, write) if beside else write)
        if beside:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def finished(self, *, wait: bool) -> bool:
        """Say whether every rank's files are written, or wait until they are. Raises CheckpointException where one failed."""
        self._queue.maybe_finalize_async_calls(blocking=wait)
        unfinished: int = self._queue.get_num_unfinalized_calls()
        return unfinished == 0

    def records(self) -> dict[Path, FileRecord]:
        """Return what all ranks wrote, by file; on the first rank only. To be called once, when the files are written."""
        mine = self._records.get_nowait() if self._records else {}
        first = torch.distributed.get_rank() == 0
        gathered: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
        torch.distributed.gather_object(mine, gathered)
        return {path: found for part in gathered or () for path, found in part.items()}

    def abandon(self) -> None:
        """End this rank's writing process, if there is one. Asks no other rank."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)
        self._queue.async_calls.clear()


def stand_alone(state: dict[str, Any]) -> None:
    """Give each tensor on the CPU a storage of its own, in place, over the same memory.

    megatron-core 0.19.2 copies parts of larger storages, which all weights and moments are, before it writes or forks.
    """
    apply_factories(state)
    for part in nested_values(state):
        tensor = part.data if isinstance(part, ShardedTensor) else None
        if tensor is not None and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            memory = tensor.detach().reshape(-1).view(torch.uint8).numpy()
            part.data = torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)


class _Mailbox:
    """Takes one value from this process or a forked one; as megatron-core asks of a queue. Values of any size, unlike a pipe's."""

    def __init__(self) -> None:
        self._file = os.memfd_create("checkpoint")

    def __del__(self) -> None:
        os.close(self._file)

    def __bool__(self) -> bool:
        return os.fstat(self._file).st_size > 0

    def put(self, value: Any) -> None:
        content = memoryview(pickle.dumps(value))
        while content:
            content = content[os.write(self._file, content) :]

    def get_nowait(self) -> Any:
        size = os.fstat(self._file).st_size
        if not size:
            raise queue.Empty
        try:
            return pickle.loads(os.pread(self._file, size, 0))
        except (EOFError, pickle.UnpicklingError) as error:  # its writer was killed meanwhile
            raise queue.Empty from error


def _write(write: Callable[..., None], records: _Mailbox, rank: int, buckets: Any, results: Any) -> None:
    """Write this rank's files, then fingerprint them; megatron-core puts what went wrong into `results`."""
    write(rank, buckets, results)
    paths = [Path(bucket[0]) for bucket in buckets]
    if all(path.is_file() for path in paths):
        records.put({path: record(path) for path in paths})


def _write_beside(write: Callable[..., None], rank: int, buckets: Any, results: Any) -> None:
    """In a forked process: ends with the process that trains, leaves signals to it, and takes one core that it leaves free."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a forked process
    write(rank, buckets, results)
