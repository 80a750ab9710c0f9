"""Workers on this machine: one in this process, or several, each in a process of its own with its share of the GPUs or cores.

A worker process that dies gives its shards back and is replaced, a limited number of times. When this process dies, its workers end with
the next thing that they report.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_instruct.errors import ConfigError, EngineError, Failure, MegatronInstructError
from megatron_instruct.synthesis.dispatch import Dispatch
from megatron_instruct.synthesis.worker import Assignment, NextShard, Report, Worker

_SECONDS = 1.0
"""Between two looks at what was reported."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """A worker's last message: why it gave up, or None when there was nothing left to do."""

    failure: Failure | None = None


def run_local(assignment: Assignment, shards: Sequence[int], report: Callable[[Report], None]) -> None:
    """Make the shards. report: called with what was done since the last call.

    Raises EngineError, ConfigError and what else stops a worker; what was finished is kept.
    """
    dispatch = Dispatch(shards)
    if assignment.config.replicas > 1:
        _Processes(assignment, dispatch).run(report)
    else:
        Worker(assignment, lambda: dispatch.next_shard(0), report).run()


class _Processes:
    """Worker processes, and their ends of pipes."""

    def __init__(self, assignment: Assignment, dispatch: Dispatch) -> None:
        self._assignment, self._dispatch = assignment, dispatch
        self._workers: dict[Connection, tuple[int, BaseProcess]] = {}
        self._deaths = 0

    def run(self, report: Callable[[Report], None]) -> None:
        places = _places(self._assignment)
        try:
            for worker, place in enumerate(places):
                self._start(worker, place)
            while self._workers:
                for connection in wait(list(self._workers), timeout=_SECONDS):
                    assert isinstance(connection, Connection), "pipes are all that is waited for"
                    self._listen(connection, places)
                report(self._dispatch.reported())
        finally:
            for connection, (_, process) in self._workers.items():
                process.terminate()
                process.join()
                connection.close()

    def _start(self, worker: int, place: "_Place") -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._assignment, place), name=f"worker {worker}", daemon=True)
        process.start()
        theirs.close()
        self._workers[ours] = (worker, process)

    def _listen(self, connection: Connection, places: list["_Place"]) -> None:
        worker, process = self._workers[connection]
        try:
            message = connection.recv()
            if message is None:  # killed while it waits, it does not hear the answer
                connection.send(self._dispatch.next_shard(worker))
        except (EOFError, OSError):
            process.join()
            self._forget(connection)
            self._replace(worker, f"worker {worker} died with status {process.exitcode}", places)
            return
        if isinstance(message, Report):
            self._dispatch.report(worker, message)
        elif message is not None:
            if message.failure is not None:
                raise message.failure.error(of=f"worker {worker}: ")
            process.join()
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        del self._workers[connection]
        connection.close()

    def _replace(self, worker: int, what: str, places: list["_Place"]) -> None:
        self._deaths += 1
        restarts = self._assignment.config.restarts
        shards = self._dispatch.take_back(worker)
        if self._deaths > restarts:
            raise EngineError(f"{what}, after {restarts} others were replaced; what was finished is kept: run the same command again.")
        print(
            f"{what}; it is replaced ({self._deaths} of {restarts}), its {shards} shards are taken up again.", file=sys.stderr, flush=True
        )
        self._start(worker, places[worker])


@dataclass(frozen=True, slots=True)
class _Place:
    """What of the machine a worker has."""

    environment: Mapping[str, str]
    cores: frozenset[int]


def _places(assignment: Assignment) -> list[_Place]:
    """Divide the GPUs, or else the cores, among the workers."""
    config = assignment.config
    cores = sorted(os.sched_getaffinity(0))
    everything = [_Place({}, frozenset(cores))] * config.replicas
    if config.engine != "vllm":
        return everything
    each, gpus = config.vllm.tensor_parallel_size, _gpus()
    if gpus:
        if config.replicas * each > len(gpus):
            raise ConfigError(
                f"replicas * tensor_parallel_size = {config.replicas} * {each} needs {config.replicas * each} GPUs, "
                f"and there are {len(gpus)}; lower one of them."
            )
        devices = [gpus[worker * each : (worker + 1) * each] for worker in range(config.replicas)]
        return [_Place({"CUDA_VISIBLE_DEVICES": ",".join(own)}, frozenset(cores)) for own in devices]
    slices = [frozenset(cores[worker :: config.replicas] or cores) for worker in range(config.replicas)]
    return [_Place({"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(own))}, own) for own in slices]


def _gpus() -> list[str]:
    """Return the names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _work(connection: Connection, assignment: Assignment, place: _Place) -> None:
    """Be a worker process. Ctrl-C is for the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(place.environment)
    os.sched_setaffinity(0, place.cores)

    def next_shard() -> NextShard | None:
        connection.send(None)
        shard: NextShard | None = connection.recv()
        return shard

    try:
        Worker(assignment, next_shard, connection.send).run()
        connection.send(_Ended())
    except MegatronInstructError as error:
        connection.send(_Ended(Failure(type(error), str(error))))
    except (BrokenPipeError, EOFError):
        sys.exit("the run that started this worker is gone")
    except OSError as error:  # a full disk, say: no worker that took its place would fare better
        connection.send(_Ended(Failure(MegatronInstructError, str(error))))
