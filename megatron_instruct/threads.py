"""Many files read at once: threads for work that lets go of the interpreter, such as reading and hashing. Does not know: what is read."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

_MOST = 16
"""Threads; a disk or a network gives no more to a larger number."""


def in_threads[T, R](work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield what `work` returns for each item, in order; raises what it raises. Nothing waits for the threads of an interrupted run."""
    threads = min(len(items), len(os.sched_getaffinity(0)), _MOST)
    if threads < 2:
        yield from map(work, items)
        return
    from multiprocessing.pool import ThreadPool  # which workers of a single file do without

    with closing(ThreadPool(threads)) as pool:
        yield from pool.imap(work, items, chunksize=1 + len(items) // 1024)
