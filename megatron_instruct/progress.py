"""Progress of long work: a bar on a terminal, a line now and then in a log, both with rate and time left."""

import os
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LOG_INTERVAL = 15.0
"""Seconds between two lines where standard error is no terminal."""


def clock(seconds: float) -> str:
    """Return a time as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _shows_a_bar() -> bool:
    """Whether standard error is a terminal, and one that has a size: without rows the bar would be hidden."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0


class Progress:
    """Count units of work; to be used in a `with` block.

    total: number of units when known. unit: what is counted, such as "texts".
    """

    def __init__(self, description: str, *, total: int | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._note = 0, ""
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=description, unit=f" {unit}", dynamic_ncols=True) if _shows_a_bar() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done:
            self._line()

    def add(self, count: int = 1, note: str = "") -> None:
        """Report `count` more units done; `note` is shown after the rate."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last >= LOG_INTERVAL:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        meter = tqdm.format_meter(
            self._done,
            self._total,  # type: ignore[arg-type]  # None means unknown; the library's stub forgets it
            self._last - self._start,
            prefix=self._description,
            unit=f" {self._unit}",
            postfix=self._note,
            ncols=0,
        )
        print(meter, file=sys.stderr, flush=True)
