"""Parts of a corpus worked on by several processes.

Comes in: a job, and parts with the folder that each is to become. Goes out: those folders, finished. A worker that dies is noticed at once
and named; workers whose parent dies end at once, so that they never meet those of the next run. Does not know: what the job is.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import megatron_instruct
from megatron_instruct.corpora.parts import Part
from megatron_instruct.errors import Failure, MegatronInstructError

type DoPart = Callable[[Part, Path, Callable[[int], None]], object]
"""Make a folder, which must not exist, of a part; call the function with the number of records done since its last call."""


class Job(Protocol):
    """What workers do with parts. It is sent to them, so that it must be small."""

    @property
    def log_interval(self) -> int:
        """Records between two reports."""

    def ready(self) -> DoPart:
        """Load what the work takes; called in the worker."""


@dataclass(frozen=True)
class _Work:
    part: Part
    folder: Path


@dataclass(frozen=True)
class _Report:
    """From a worker: records done since the last report; finished with the part or not."""

    records: int
    finished: bool


@dataclass
class _Worker:
    number: int
    process: "subprocess.Popen[bytes]"
    connection: "Connection[Any, Any]"
    lifeline: int
    """File descriptor that the worker sees closed when this process ends, however that happens."""
    part: Part | None = None


class Team:
    """Worker processes that wait for work."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers
        self._job: Job | None = None
        self._sending = ThreadPoolExecutor(max_workers=1)
        self._sent: Future[None] | None = None

    def set_up(self, job: Job) -> None:
        """Let workers load what they need while this process goes on; another job may follow, which takes the place of this one."""
        if job != self._job:
            self._sent = self._sending.submit(self._send_to_all, job)  # not done before a worker reads, which it does once it is loaded
        self._job = job

    def _send_to_all(self, job: Job) -> None:
        for worker in self._workers:
            _send(worker, job)

    def do_parts(self, work: Mapping[Path, Part], job: Job, *, report: Callable[[int], None]) -> None:
        """Make the folder of each part. report: called with the number of records done since the last call. To be called once.

        Raises the first error of a worker, and MegatronInstructError for a worker that died.
        """
        waiting = [_Work(part, folder) for folder, part in reversed(list(work.items()))]
        self.set_up(job)
        assert self._sent is not None, "a set-up was sent"
        self._sent.result()
        for worker in self._workers:
            _hand_out(worker, waiting)
        while any(worker.part for worker in self._workers):
            for worker in _with_news(self._workers):
                message = _receive(worker)
                if isinstance(message, Failure):
                    raise message.error()
                report(message.records)
                if message.finished:
                    _hand_out(worker, waiting)
        for worker in self._workers:
            worker.process.wait()

    def stop(self) -> None:
        """Stop the workers that are still at work."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
        self._sending.shutdown()
        for worker in self._workers:
            worker.connection.close()
            os.close(worker.lifeline)


def _hand_out(worker: _Worker, waiting: list[_Work]) -> None:
    work = waiting.pop() if waiting else None
    worker.part = work.part if work else None
    _send(worker, work)


def _send(worker: _Worker, message: Job | _Work | None) -> None:
    try:
        worker.connection.send(message)
    except BrokenPipeError:
        raise _death_of(worker) from None


def _with_news(team: Iterable[_Worker]) -> list[_Worker]:
    """Wait for workers that sent something, or whose end of the connection is closed."""
    busy = [worker for worker in team if worker.part]
    ready = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in ready]


def _receive(worker: _Worker) -> _Report | Failure:
    try:
        message: _Report | Failure = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        raise _death_of(worker) from None
    return message


def _death_of(worker: _Worker) -> MegatronInstructError:
    code = worker.process.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    why = "the machine may have run out of memory: try fewer --workers" if code == -signal.SIGKILL else "its messages are above"
    when = f"at work on {worker.part}" if worker.part else "before it was given work"
    return MegatronInstructError(
        f"worker {worker.number} (process {worker.process.pid}) {how} {when}; {why}. "
        "Finished parts are kept: run the same command again to go on."
    )


@contextmanager
def started_team(count: int, job: type[Job]) -> Iterator[Team]:
    """Start workers as processes of their own, which load what such jobs need and no more: not the tool that started them.

    They load while this process goes on; those still at work when the block ends are stopped.
    """
    workers: list[_Worker] = []
    team = Team(workers)
    try:
        for number in range(count):
            workers.append(_start(number, job.__module__))
        yield team
    finally:
        team.stop()


def _start(number: int, module: str) -> _Worker:
    ours, theirs = Pipe()
    watched, lifeline = os.pipe()
    root = str(Path(megatron_instruct.__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); import {module}; from {__name__} import work; work({theirs.fileno()}, {watched})"
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}  # one process, one core
    with _interrupts_held():
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), watched), env=environment
        )
    theirs.close()
    os.close(watched)
    return _Worker(number, process, ours, lifeline)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back meanwhile. A process started here inherits that, so that it cannot be interrupted before it ignores Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(connection_descriptor: int, lifeline: int) -> None:
    """A worker's life: it is given a job, once or again, and does one part after another until it is handed None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    connection: Connection[Any, Any] = Connection(connection_descriptor)
    task: _Work | None = None
    try:
        while (message := connection.recv()) is not None:
            if not isinstance(message, _Work):
                job, do_part = message, _ready_or_error(message)
                gc.freeze()  # what is loaded stays, and need not be looked through for garbage
                continue
            task = message
            if isinstance(do_part, MegatronInstructError):
                raise do_part
            _do(do_part, task, connection, job.log_interval)
    except MegatronInstructError as error:
        connection.send(Failure(type(error), str(error)))
    except OSError as error:
        where = f" at work on {task.part} in {task.folder.parent}" if task is not None else ""
        connection.send(Failure(OSError, f"{error}{where}"))


def _do(do_part: DoPart, task: _Work, connection: "Connection[Any, Any]", log_interval: int) -> None:
    pending = 0

    def report(records: int) -> None:
        nonlocal pending
        pending += records
        if pending >= log_interval:
            connection.send(_Report(pending, finished=False))
            pending = 0

    do_part(task.part, task.folder, report)
    connection.send(_Report(pending, finished=True))


def _ready_or_error(job: Job) -> DoPart | MegatronInstructError:
    """Return what does parts, or what is wrong with a job that may never be done."""
    try:
        return job.ready()
    except MegatronInstructError as error:
        return error


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: it returns when the parent is gone
    os._exit(1)
