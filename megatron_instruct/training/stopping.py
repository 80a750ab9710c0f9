"""Ending a run early, whole: a signal, the time or the step that was asked for.

Comes in: signals of this process and the clock. Goes out: a request, which the ranks agree on at the boundary of a step
(training.bad_steps), so that all save the same step. Does not know: checkpoints, other ranks.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from megatron_instruct.training.settings.faults import FaultOptions

EXIT_TO_GO_ON = 75
"""Exit status of a run that saved and ended early; the same command goes on (sysexits.h: EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_REASONS = ("", *(signal.Signals(number).name for number in _SIGNALS), "exit_duration_in_mins is over", "exit_interval is reached")


_STARTED = time.monotonic()
"""When this process began, but for what it imports first."""


class StoppedEarly(Exception):
    """The run saved and ended before its last step, as it was asked to."""


class ExitRequests:
    """What this process was asked; to be used in a `with` block, outside of which signals do what they did before."""

    def __init__(self, options: FaultOptions) -> None:
        self._options = options
        self._caught = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "ExitRequests":
        if self._options.exit_signal_handler:
            for number in _SIGNALS:
                self._restore.enter_context(_handled(number, self._catch))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error signals stay caught: a launcher that ends all processes must not cut its message short."""
        if kind is None or issubclass(kind, StoppedEarly):
            self._restore.close()

    def code(self, iteration: int) -> int:
        """Return the request of this process after a step, 0 for none; to be agreed on by taking the highest of all ranks."""
        options = self._options
        if options.exit_interval is not None and iteration % options.exit_interval == 0:
            return len(_REASONS) - 1
        minutes = options.exit_duration_in_mins
        if minutes is not None and time.monotonic() - _STARTED >= 60.0 * minutes:
            return len(_REASONS) - 2
        return self._caught

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self._caught = 1 + _SIGNALS.index(signal.Signals(number))


def reason_of(code: int) -> str:
    """Return an agreed request in words."""
    return _REASONS[code]


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: object) -> Iterator[None]:
    before = signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(number, before)
