"""SHA-256 of a stage's inputs, taken once however many runs ask for it: runs that go on, and shares on many machines.

Comes in: files, and a folder that these runs share. Goes out: a FileRecord of each file. What was read is kept in the folder beside the
size and the times that the file had, and holds for as long as it has them. Shares that begin together divide the files among them: each
takes what nobody has in hand, and waits for the rest. Does not know: stages.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_instruct.errors import InputError
from megatron_instruct.files import TEMPORARY_SUFFIX, read_json, write_json
from megatron_instruct.manifest import FileRecord, record, records
from megatron_instruct.progress import Progress
from megatron_instruct.shares import Share
from megatron_instruct.threads import in_threads

_BATCH_BYTES = 1 << 28
"""Files are taken in batches of at least so many bytes. What is smaller altogether is read every time, and nothing is kept."""
_SETTLED_NANOSECONDS = 2 * 10**9
"""What was changed so shortly before it was read may be changed once more without another time: that is not kept."""
_DIGITS = 16
"""Of the name of a batch."""

State = list[int]
"""Size, time of the last change of the content and of the file, in nanoseconds."""


def shared_records(files: Sequence[Path], folder: Path, share: Share | None) -> tuple[FileRecord, ...]:
    """Return the fingerprint of each file, or raise InputError that names a file that is not there.

    share: begins with a batch of its own.
    """
    batches = _batches(files)
    if not batches:
        return records(files)
    folder.mkdir(parents=True, exist_ok=True)
    first = len(batches) * share.index // share.count if share is not None else 0
    order = [*range(first, len(batches)), *range(first)]
    found: dict[int, tuple[FileRecord, ...]] = {}
    with Progress("fingerprint", total=len(files), unit="files") as progress:
        for wait in (False, True):
            left = [number for number in order if number not in found]
            work = partial(_records_of, folder=folder, wait=wait)
            for number, taken in zip(left, in_threads(work, [batches[number] for number in left]), strict=True):
                if taken is not None:
                    found[number] = taken
                    progress.add(len(taken))
    return tuple(one for number in range(len(batches)) for one in found[number])


def forget(folder: Path) -> None:
    """Remove what is kept, and the folder where nothing else is in it: the stage's manifest has it now."""
    for suffix in (".json", f".json{TEMPORARY_SUFFIX}", ".lock"):
        for file in folder.glob("[0-9a-f]" * _DIGITS + suffix):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()


def states_of(files: Sequence[Path]) -> list[State]:
    return list(map(_state, files))


@contextlib.contextmanager
def unchanged(files: Sequence[Path], before: Sequence[State], parts: Iterable[Path]) -> Iterator[None]:
    """Raise InputError that names a file which is not as it was when the block ends; what it was made into meanwhile is removed then.

    before: the states of the files. parts: folders that the block may have made of them.
    """
    try:
        yield
    finally:
        try:
            require_unchanged(files, before)
        except InputError:
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)
            raise


def require_unchanged(files: Sequence[Path], before: Sequence[State]) -> None:
    """Raise InputError that names the first file that is not as it was."""
    for file, then in zip(files, before, strict=True):
        if not file.is_file() or _state(file) != then:
            raise InputError(f"input {file} changed while it was read; run the same command again.")


def _batches(files: Sequence[Path]) -> list[list[Path]]:
    """Return the files in batches, the last of which may be small; none where they are small altogether."""
    batches: list[list[Path]] = [[]]
    size = 0
    for file in files:
        batches[-1].append(file)
        size += _state(file)[0]
        if size >= _BATCH_BYTES:
            batches.append([])
            size = 0
    return [batch for batch in batches if batch] if len(batches) > 1 else []


def _records_of(batch: Sequence[Path], *, folder: Path, wait: bool) -> tuple[FileRecord, ...] | None:
    """Return the records of a batch; None where another run is about to take them, unless this one is to wait."""
    place = folder / f"{hashlib.sha256('\0'.join(map(str, batch)).encode()).hexdigest()[:_DIGITS]}.json"
    if (kept := _kept(batch, place)) is not None:
        return kept
    with open(place.with_suffix(".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        return _kept(batch, place) or _read(batch, place)


def _kept(batch: Sequence[Path], place: Path) -> tuple[FileRecord, ...] | None:
    with contextlib.suppress(InputError, KeyError, TypeError):
        content: dict[str, Any] = read_json(place)
        if content["states"] == list(map(_state, batch)):
            return tuple(FileRecord(**one) for one in content["records"])
    return None


def _read(batch: Sequence[Path], place: Path) -> tuple[FileRecord, ...]:
    states, began = list(map(_state, batch)), time.time_ns()
    found = tuple(map(record, batch))
    if list(map(_state, batch)) == states and all(began - max(changed) > _SETTLED_NANOSECONDS for _, *changed in states):
        write_json(place, {"states": states, "records": list(map(dataclasses.asdict, found))})
    return found


def _state(file: Path) -> State:
    try:
        state = file.stat()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}.") from error
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
