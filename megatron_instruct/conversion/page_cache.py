"""The page cache is let go of what lies behind the work: the same memory is used again and again, and what others keep there stays.

Does not know: torch, what the files hold.
"""

import collections
import os
from pathlib import Path

_KEPT = 1 << 31  # bytes of a source, and of a result, that stay in the page cache


class Behind:
    """Parts of files that were worked through, the last 2 GB of which stay in the page cache."""

    def __init__(self) -> None:
        self._parts: collections.deque[tuple[Path, int, int]] = collections.deque()
        self._bytes = 0

    def add(self, file: Path, position: int, length: int) -> None:
        """Note a part, and let the page cache go of the oldest. (What is mapped still, or not on the disk yet, it keeps.)"""
        self._parts.append((file, position, length))
        self._bytes += length
        while self._bytes - self._parts[0][2] >= _KEPT:
            old, start, size = self._parts.popleft()
            self._bytes -= size
            descriptor = os.open(old, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
