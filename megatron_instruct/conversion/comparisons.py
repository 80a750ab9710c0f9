"""Reading back what was written and comparing it with what it was made from, in a thread, one parameter behind the writing."""

import concurrent.futures
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Comparisons:
    """Runs one comparison beside the work that writes the next parameter, in a with block: memory holds two parameters at a time."""

    def __init__(self) -> None:
        self.different: list[str] = []
        """Names of what was read back with other bits; complete when the block is left."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read back")
        self._running: concurrent.futures.Future[list[str]] | None = None

    def start(self, compare: Callable[[], list[str]]) -> None:
        """Wait for the comparison before, and start the next. It returns the names of what differs. Raises what the one before raised."""
        self._finish()
        self._running = self._thread.submit(compare)

    def _finish(self) -> None:
        if self._running is not None:
            self.different += self._running.result()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._thread:
            if kind is None:
                self._finish()
