"""A stage's work divided over runs that know nothing of each other: `--share I/N`, as an array of Slurm jobs starts them.

Comes in: the parts that a stage divides its work into, in an order that all runs agree on. Share I of N works on parts I, I + N,
I + 2 N, …; a run without a share works on every part that is left and then merges. All of them write into one folder on a file system that
they share and that knows flock (local disks, NFS, Lustre mounted with -o flock). Does not know: what a part is.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_instruct.errors import ConfigError
from megatron_instruct.files import LOCK
from megatron_instruct.workspace import remove

_DOOR = f"{LOCK}.door"
"""Held while a run comes in and prepares; says how many shares those at work are divided into."""


@dataclass(frozen=True, slots=True)
class Share:
    """Share `index` of `count`."""

    index: int
    """From 0."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def parts(self, total: int) -> range:
        """Return the numbers of the parts, of `total`, that belong to this share."""
        return range(self.index, total, self.count)


@dataclass(frozen=True, slots=True)
class Place[T]:
    """A folder that this run may write to."""

    prepared: T
    """What `prepare` returned."""
    descriptors: tuple[int, ...]
    """Of the locks; child processes that inherit them hold the folder, too."""


def parse_share(text: str | None) -> Share | None:
    """Read I/N; raises ConfigError for anything else, and for an I that is not from 0 to N - 1."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None:
        raise ConfigError(f"share={text!r} is not of the form I/N, such as 0/8 for the first of eight shares.")
    share = Share(int(match[1]), int(match[2]))
    if share.index >= share.count:
        raise ConfigError(f"share={text}: shares of {share.count} are numbered from 0 to {share.count - 1}.")
    return share


@contextlib.contextmanager
def at_work[T](folder: Path, share: Share | None, prepare: Callable[[bool], T]) -> Iterator[Place[T]]:
    """Hold `folder` for a run of one share (beside the other shares), or of all (alone), for as long as the block lasts.

    prepare: makes what all shares need, one run at a time, while the others wait; it is told whether this run is alone, so that it may
    remove what others left. Raises ConfigError when another run holds the folder, the same share is at work already, or the shares at
    work are of another number.
    """
    with contextlib.ExitStack() as held:
        with _door(folder) as door:
            whole = held.enter_context(open(folder / LOCK, "a"))
            alone = _lock(whole, fcntl.LOCK_EX)
            descriptors = [whole.fileno()]
            if share is None:
                if not alone:
                    raise ConfigError(f"another run is writing to {folder}; wait for it, or choose another output.")
                _forget_shares(folder, door)
                held.callback(_remove_door, folder)
            else:
                _enter(folder, share, whole, door, alone=alone)
                own = held.enter_context(open(folder / f"{LOCK}.{share.index}", "a"))
                if not _lock(own, fcntl.LOCK_EX):
                    raise ConfigError(f"share {share} of {folder} is at work already, in another run; each share is to be started once.")
                descriptors.append(own.fileno())
            prepared = prepare(alone)
            if share is not None:
                fcntl.flock(whole, fcntl.LOCK_SH)
        yield Place(prepared, tuple(descriptors))


def _enter(folder: Path, share: Share, whole: IO[str], door: IO[str], *, alone: bool) -> None:
    """Take a place beside the other shares, and write down, or check, how many there are."""
    if alone:
        door.seek(0)
        door.truncate()
        door.write(str(share.count))
        door.flush()
        return
    if not _lock(whole, fcntl.LOCK_SH):
        raise ConfigError(f"a run of all shares is writing to {folder}; wait for it, or choose another output.")
    door.seek(0)
    if (count := door.read()) != str(share.count):
        raise ConfigError(
            f"share {share} of {folder}: the shares at work there are of {count or 'an unknown number'}; give --share I/{count}."
        )


def _forget_shares(folder: Path, door: IO[str]) -> None:
    """Remove the locks of shares; nobody holds one while this run is alone and at the door."""
    door.seek(0)
    door.truncate()
    for file in folder.glob(f"{LOCK}.[0-9]*"):
        file.unlink()


def remove_folder(folder: Path, stage: str | None = None) -> None:
    """Remove a folder of work that this run holds for all shares; who waits for it finds a new one."""
    with _door(folder):
        remove(folder, stage)


def _remove_door(folder: Path) -> None:
    if not folder.is_dir():
        return
    with _door(folder):
        (folder / _DOOR).unlink()


@contextlib.contextmanager
def _door(folder: Path) -> Iterator[IO[str]]:
    """Hold the door. A run that ends removes its file, so a lock counts only on the file that bears the name."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _DOOR, "a+") as door:
            if not _lock(door, fcntl.LOCK_EX):
                print(f"Another run is preparing {folder}; waiting for it.", flush=True)
                fcntl.flock(door, fcntl.LOCK_EX)
            if _bears_its_name(door, folder / _DOOR):
                yield door
                return


def _bears_its_name(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(stream: IO[str], kind: int) -> bool:
    """Take a lock if it is free; return whether it was."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
