"""Processes beside a training one: they end with it, however it ends. Does not know: torch."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # man 2 prctl


def end_with_parent(*_: object) -> None:
    """Have this forked process killed when the thread that forked it ends.

    What it holds of its parent's, the lock of the run's folder too, is then free for the same command at once. Takes and ignores what a
    data loader tells its processes. Elsewhere than on Linux it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
