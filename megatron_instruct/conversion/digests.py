"""SHA-256 of files that are read or written meanwhile, by a thread beside that work.

Hashing a file apart costs as much again as the disk takes to read it. Here one thread follows the work: over a source it runs ahead,
so that what it reads is in the page cache when the work wants it; over a result it follows the part that is whole, which is
in the page cache still, and flushes that to the disk, so that little is left to flush in the end.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_instruct.conversion.page_cache import Behind
from megatron_instruct.manifest import FileRecord

_BLOCK = 1 << 22  # bytes read at once
_FLUSH_EVERY = 1 << 28  # bytes of a result that are flushed at once
_AHEAD = 1 << 28  # bytes of a source that are on their way from the disk


class Digests:
    """The SHA-256 of files, one after the other in the given order, in a with block, at whose end all is dropped.

    grows: whether the files are being written; then each is followed as far as `ready` was called for it.
    """

    def __init__(self, files: Iterable[Path], *, grows: bool) -> None:
        self._grows = grows
        self._ready: dict[Path, int | None] = dict.fromkeys(files, 0 if grows else None)
        """How far each file may be read; None: to its end."""
        self._found: dict[Path, FileRecord] = {}
        self._changed = threading.Condition()
        self._behind = Behind()
        self._stopped = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="digests", daemon=True)
        self._thread.start()

    def ready(self, file: Path, end: int | None) -> None:
        """Say that the first `end` bytes of a file have their last value, or, with None, that all have."""
        with self._changed:
            self._ready[file] = end
            self._changed.notify()

    def records(self) -> dict[Path, FileRecord]:
        """Wait for the last file and return what manifests say of the files, under their full names. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Give up what is not done yet."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            for file in self._ready:
                if not self._hash(file):
                    return
        except OSError as error:
            self._error = error

    def _hash(self, file: Path) -> bool:
        """Hash one file; return False where the work was given up."""
        digest, done, flushed = hashlib.sha256(), 0, 0
        block = memoryview(bytearray(_BLOCK))
        self._await(file, 0)
        if self._stopped:
            return False
        with open(file, "rb", buffering=0) as stream:
            asked = 0
            while True:
                if not self._grows and done + _AHEAD // 2 >= asked:
                    os.posix_fadvise(stream.fileno(), asked, _AHEAD, os.POSIX_FADV_WILLNEED)
                    asked += _AHEAD
                end = self._await(file, done)
                if self._stopped:
                    return False
                size = stream.readinto(block if end is None else block[: min(_BLOCK, end - done)])
                if not size:
                    break
                digest.update(block[:size])
                done += size
                if self._grows and done - flushed >= _FLUSH_EVERY:
                    os.fdatasync(stream.fileno())
                    self._behind.add(file, flushed, done - flushed)
                    flushed = done
            if self._grows:
                os.fsync(stream.fileno())
        self._found[file] = FileRecord(path=str(file), bytes=done, sha256=digest.hexdigest())
        return True

    def _await(self, file: Path, done: int) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ready[file] is None or self._ready[file] > done)  # type: ignore[operator]
            return self._ready[file]


@dataclass(frozen=True, kw_only=True)
class Written:
    """The weights of a result, on the disk."""

    different: list[str]
    """Names of the source's parts that were read back from the result with other bits."""
    records: Callable[[], Mapping[Path, FileRecord]]
    """Waits for what manifests say of the files."""
