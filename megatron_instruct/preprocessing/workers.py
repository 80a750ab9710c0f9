"""Parts encoded by several processes.

Comes in: numbered parts. Goes out: one finished folder for each. A worker that dies is noticed at once and named; workers whose
parent dies end at once, so that they never meet those of the next run. Does not know: what a part becomes afterwards.
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
from typing import Any

import megatron_instruct
from megatron_instruct.corpora.parts import Part
from megatron_instruct.errors import Failure, InputError, MegatronInstructError
from megatron_instruct.preprocessing.encode import EncodeOptions, PartEncoder
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer
from megatron_instruct.tokenizer.fast import FastForm, FastTokenizer


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What every worker needs to start."""

    tokenizer_path: Path
    fingerprint: str
    """That of the tokenizer as the parent process loaded it."""
    fast_form: FastForm | None
    """What the parent process has proved to give the same ids; None: the library encodes."""
    options: EncodeOptions
    log_interval: int
    """Documents between two reports."""


@dataclass(frozen=True)
class _Work:
    part: Part
    folder: Path


@dataclass(frozen=True)
class _Report:
    """From a worker: documents done since the last report; finished with the part or not."""

    documents: int
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
        self._setup: WorkerSetup | None = None
        self._sending = ThreadPoolExecutor(max_workers=1)
        self._sent: Future[None] | None = None

    def set_up(self, setup: WorkerSetup) -> None:
        """Let workers load what they need while this process goes on; another set-up may follow, which takes the place of this one."""
        if setup != self._setup:
            self._sent = self._sending.submit(self._send_to_all, setup)  # not done before a worker reads, which it does once it is loaded
        self._setup = setup

    def _send_to_all(self, setup: WorkerSetup) -> None:
        for worker in self._workers:
            _send(worker, setup)

    def encode_parts(self, work: Mapping[Path, Part], setup: WorkerSetup, *, report: Callable[[int], None]) -> None:
        """Encode each part into its folder. report: called with the number of documents done since the last call. To be called once.

        Raises the first error of a worker, and MegatronInstructError for a worker that died.
        """
        waiting = [_Work(part, folder) for folder, part in reversed(list(work.items()))]
        self.set_up(setup)
        assert self._sent is not None, "a set-up was sent"
        self._sent.result()
        for worker in self._workers:
            _hand_out(worker, waiting)
        while any(worker.part for worker in self._workers):
            for worker in _with_news(self._workers):
                message = _receive(worker)
                if isinstance(message, Failure):
                    raise message.error()
                report(message.documents)
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


def _send(worker: _Worker, message: WorkerSetup | _Work | None) -> None:
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
    when = f"while encoding {worker.part}" if worker.part else "before it was given work"
    return MegatronInstructError(
        f"worker {worker.number} (process {worker.process.pid}) {how} {when}; {why}. "
        "Finished parts are kept: run the same command again to go on."
    )


@contextmanager
def started_team(count: int) -> Iterator[Team]:
    """Start workers as processes of their own, which load what they need and no more: not the tool that started them.

    They load while this process goes on; those still at work when the block ends are stopped.
    """
    workers: list[_Worker] = []
    team = Team(workers)
    try:
        for number in range(count):
            workers.append(_start(number))
        yield team
    finally:
        team.stop()


def _start(number: int) -> _Worker:
    ours, theirs = Pipe()
    watched, lifeline = os.pipe()
    root = str(Path(megatron_instruct.__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); from {__name__} import work; work({theirs.fileno()}, {watched})"
    with _interrupts_held():
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), watched))
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
    """A worker's life: it is set up, once or again, and encodes one part after another until it is handed None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    connection: Connection[Any, Any] = Connection(connection_descriptor)
    task: _Work | None = None
    try:
        while (message := connection.recv()) is not None:
            if isinstance(message, WorkerSetup):
                setup, encoder = message, _encoder_or_error(message)
                gc.freeze()  # what is loaded stays, and need not be looked through for garbage
                continue
            task = message
            if isinstance(encoder, MegatronInstructError):
                raise encoder
            _encode(encoder, task, connection, setup.log_interval)
    except MegatronInstructError as error:
        connection.send(Failure(type(error), str(error)))
    except OSError as error:
        where = f" while encoding {task.part} into {task.folder.parent}" if task is not None else ""
        connection.send(Failure(OSError, f"{error}{where}"))


def _encode(encoder: PartEncoder, task: _Work, connection: "Connection[Any, Any]", log_interval: int) -> None:
    pending = 0

    def report(documents: int) -> None:
        nonlocal pending
        pending += documents
        if pending >= log_interval:
            connection.send(_Report(pending, finished=False))
            pending = 0

    encoder.encode(task.part, task.folder, report)
    connection.send(_Report(pending, finished=True))


def _encoder_or_error(setup: WorkerSetup) -> PartEncoder | MegatronInstructError:
    """Return the encoder, or what is wrong with a set-up that may never be used."""
    try:
        return make_encoder(setup)
    except MegatronInstructError as error:
        return error


def make_encoder(setup: WorkerSetup) -> PartEncoder:
    """Return what encodes parts. The tokenizer's library, where it is needed, must be as the parent process loaded it, or InputError."""

    def library() -> Tokenizer:
        tokenizer = load_tokenizer(setup.tokenizer_path)
        if tokenizer.fingerprint != setup.fingerprint:
            raise InputError(f"tokenizer {setup.tokenizer_path} changed while it was in use; run the same command again.")
        return tokenizer

    form = setup.fast_form
    return PartEncoder(library() if form is None else FastTokenizer(form, library), setup.options)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: it returns when the parent is gone
    os._exit(1)
