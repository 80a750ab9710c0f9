"""Tensors that stay in their file: what they hold is the page cache's, so that reading them copies nothing and takes no new memory."""

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

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
    """Let all mapped tensors of this process go from its memory; where they are looked at again, they come from the page cache.

    What was written to them is lost: it was in that memory alone.
    """
    with _LOCK:
        live = list(_LIVE)
    for memory in live:
        memory.madvise(mmap.MADV_DONTNEED)
