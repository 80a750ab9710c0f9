"""Which process is slower than the others, though all wait for each other and end their steps together.

Comes in: the model chunks of a rank. Measured is core attention in one step now and then: computation of the process's own, in which it
waits for nobody, in whatever layout. Goes out: the ranks whose time is above a multiple of the median's. On CUDA the GPU's own clock
counts. Does not know: why a process is slow.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class OwnTime:
    """Seconds of core attention on this rank, a call."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def measuring(self, models: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Measure every call in this block."""
        self._spans.clear()
        starts: list[Any] = []
        with contextlib.ExitStack() as hooks:
            for model in models:
                for name, module in model.named_modules():
                    if name.endswith("core_attention"):
                        # last in, first out: pre-hooks of others, which are part of the call, come after this one
                        hooks.callback(module.register_forward_pre_hook(lambda *_: starts.append(self._now()), prepend=True).remove)
                        hooks.callback(module.register_forward_hook(lambda *_: self._spans.append((starts.pop(), self._now()))).remove)
            yield

    def seconds(self) -> float:
        """Return the median of the calls, which another program's short turn does not move; 0 where there were none."""
        if self._cuda and self._spans:
            torch.cuda.synchronize()
            return float(statistics.median(start.elapsed_time(end) for start, end in self._spans)) / 1000.0
        return float(statistics.median(end - start for start, end in self._spans)) if self._spans else 0.0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def slow_ranks(seconds: Sequence[float], factor: float) -> dict[int, float]:
    """Return the ranks whose time is above `factor` times the lower median of those that have one, and how many times it is."""
    measured = [one for one in seconds if one > 0.0]
    if len(measured) < 2:
        return {}
    median = statistics.median_low(measured)
    return {rank: one / median for rank, one in enumerate(seconds) if one > factor * median}


def gathered(own: float, device: torch.device) -> list[float]:
    """Return the seconds of every rank. Collective."""
    mine = torch.tensor([own], dtype=torch.float64, device=device)
    all_ranks = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(all_ranks, mine)
    return [float(one) for one in all_ranks]
