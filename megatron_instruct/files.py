"""Writes that are whole or absent, and fingerprints of what was read.

A write goes to a temporary name in the same folder, is flushed to the disk and renamed; a reader never meets half a file.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.threads import in_threads

TEMPORARY_SUFFIX = ".partial"
LOCK = "lock"
"""Name of the empty file in a folder that a run holds while it writes there."""

_PIECE_BYTES = 1 << 26
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` (mode "w" for UTF-8 text, "wb" for bytes) that takes its name when the block succeeds.

    When the block fails, the temporary file is removed; a killed process leaves it, and the next write replaces it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_where_the_disk_is_full(error, path)
        raise
    synced(path.parent)


def append(path: Path, lines: Iterable[str], *, durable: bool = True) -> None:
    """Add whole lines to a file. durable: on the disk before this returns, for what the process acts upon next."""
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
    except OSError as error:
        _name_where_the_disk_is_full(error, path)
        raise


def synced(path: Path) -> None:
    """Return when what was written into a file, or the names of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the name `path` when the block succeeds; `path` must not exist yet.

    When the block fails, the temporary folder is removed; what a killed process left under its name is removed first.
    """
    if path.exists():
        raise InputError(f"{path} exists already; choose another folder or remove it.")
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in (*sorted(temporary.rglob("*")), temporary):
            synced(entry)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    synced(path.parent)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file with their ends. (str.splitlines cuts at U+2028, too, which JSON leaves in strings.)"""
    with open(path, encoding="utf-8", newline="\n") as stream:
        return list(stream)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold `folder` for this process; yield the lock's file descriptor, which a child process may inherit to hold it too.

    Raises ConfigError where another process holds it. The lock ends with its holders, however they end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is writing to {folder}; wait for it, or choose another output.") from None
        yield lock.fileno()


def concatenate(sources: Sequence[Path], target: Path, *, report: Callable[[int], object] = lambda size: None) -> None:
    """Write the content of files, one after another, to `target`, atomically. report: called with the bytes of each piece that is copied.

    Raises InputError where a file becomes shorter meanwhile.
    """
    pieces: list[tuple[Path, int, int, int]] = []
    end = 0
    for source in sources:
        size = source.stat().st_size
        pieces += [(source, start, min(_PIECE_BYTES, size - start), end + start) for start in range(0, size, _PIECE_BYTES)]
        end += size
    with atomic_write(target, "wb") as stream:
        for copied in in_threads(functools.partial(_copied, target=stream.name), pieces):
            report(copied)


def _copied(piece: tuple[Path, int, int, int], *, target: str) -> int:
    """Copy bytes [start, start + size) of a file to their place in another; return how many."""
    path, start, size, place = piece
    with open(path, "rb") as source, open(target, "r+b") as stream:
        stream.seek(place)
        done = 0
        while done < size:
            sent = os.sendfile(stream.fileno(), source.fileno(), start + done, size - done)
            if not sent:
                raise InputError(f"{path} became shorter while it was read; run the same command again.")
            done += sent
    return size


def encodable(text: str) -> str:
    """Return the text with U+FFFD for each half of a surrogate pair, which is no Unicode, so that no file could hold it."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise InputError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _name_where_the_disk_is_full(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.errno in _DISK_FULL and error.filename is None:
        error.filename = str(path)  # a write does not say where


def distinct_endings(paths: Sequence[Path]) -> list[str] | None:
    """Return the shortest ends of paths that tell them apart, all of as many parts; None where two are the same."""
    parts = [path.parts for path in paths]
    depths = range(1, max(map(len, parts)) + 1)
    depth = next((deep for deep in depths if len({part[-deep:] for part in parts}) == len(parts)), None)
    return None if depth is None else ["/".join(part[-depth:]) for part in parts]
