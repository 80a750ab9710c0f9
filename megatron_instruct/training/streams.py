"""Microbatches that can be taken once more: what a step has taken is kept until the step is done with."""

from collections.abc import Iterator
from typing import Any


class Replayable:
    """One stream of microbatches."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._taken: list[Any] = []
        self._next = 0

    def __iter__(self) -> "Replayable":
        return self

    def __next__(self) -> Any:
        if self._next == len(self._taken):
            self._taken.append(next(self._source))
        self._next += 1
        return self._taken[self._next - 1]

    def peek(self, microbatches: int) -> list[Any]:
        """Return so many of the next ones, which are still to be taken."""
        while len(self._taken) < self._next + microbatches:
            self._taken.append(next(self._source))
        return self._taken[self._next : self._next + microbatches]

    def rewind(self) -> None:
        """Give the microbatches since `done` again."""
        self._next = 0

    def done(self) -> None:
        """Go on for good."""
        self._taken.clear()
        self._next = 0

    def leave_out(self, microbatches: int) -> None:
        """Pass over so many."""
        self.rewind()
        for _ in range(microbatches):
            next(self)
        self.done()
