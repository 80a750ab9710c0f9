"""Tensors that stay in their file: what they hold is the page cache's, so that reading them copies nothing and takes no new memory.

The page cache, too, is let go of what lies behind the work: so the same memory is used again and again, and what others keep there stays.
"""

import collections
import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

_KEPT = 1 << 31  # bytes of a source, and of a result, that stay in the page cache
_LIVE: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
_LOCK = threading.Lock()


def map_tensor(file: Path, position: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor whose first byte lies at `position`. Raises OSError, and ValueError where the file ends before it does.

    Writing to it does not change the file. One that lies at an address that its type does not allow is copied.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(*shape, dtype=dtype)
    start = position // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with open(file, "rb") as stream:
        memory = mmap.mmap(stream.fileno(), position - start + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=start)
    with _LOCK:
        _LIVE.add(memory)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=position - start)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(*shape)


def forget_pages() -> None:
    """Let all mapped tensors of this process go from its memory; where they are looked at again, they come from the page cache."""
    with _LOCK:
        live = list(_LIVE)
    for memory in live:
        memory.madvise(mmap.MADV_DONTNEED)


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
