"""What a run says while it runs: one line per log interval, metrics.jsonl always, TensorBoard where asked."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_instruct.errors import MissingPackageError
from megatron_instruct.files import atomic_write

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """Constants of a run that turn seconds into rates."""

    train_iters: int
    tokens_per_iteration: int
    flops_per_token: float
    peak_flops: float | None
    """Of all processes together; None where it is not known."""


class Metrics:
    """Writes the log of one run, on one rank; on the others it is silent. To be used in a `with` block."""

    def __init__(self, folder: Path, size: RunSize, *, start_iteration: int, tensorboard_dir: Path | None, writes: bool) -> None:
        self._size, self._writes = size, writes
        self._tensorboard: Any = None
        self._since, self._last_iteration = time.perf_counter(), start_iteration
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        _keep_until(self._path, start_iteration)
        if tensorboard_dir is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError("tensorboard", extra="train", purpose="--tensorboard-dir") from error
            self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=start_iteration + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def training(self, iteration: int, *, loss: float, lr: float, grad_norm: float) -> None:
        """Record the iterations since the last call; `loss` is their mean."""
        seconds, count = time.perf_counter() - self._since, iteration - self._last_iteration
        rate = count * self._size.tokens_per_iteration / seconds
        record: dict[str, Any] = {
            "iteration": iteration,
            "tokens": iteration * self._size.tokens_per_iteration,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "tokens_per_second": rate,
        }
        peak = self._size.peak_flops
        if peak is not None:
            record["peak_fraction"] = rate * self._size.flops_per_token / peak
        self._write(record)
        if self._writes:
            left = (self._size.train_iters - iteration) * seconds / count
            share = f" | {record['peak_fraction']:4.0%} of peak" if peak is not None else ""
            print(
                f"iteration {iteration:>{len(str(self._size.train_iters))}}/{self._size.train_iters} | loss {loss:.4f} | lr {lr:.3e} "
                f"| grad norm {grad_norm:.3f} | {rate:,.0f} tokens/s{share} | {_clock(left)} left",
                flush=True,
            )
        self.restart_clock(iteration)

    def validation(self, iteration: int, loss: float) -> None:
        """Record a validation after `iteration` steps. Its time does not count as training."""
        self._write({"iteration": iteration, "validation_loss": loss})
        if self._writes:
            print(f"validation after iteration {iteration} | loss {loss:.4f}", flush=True)

    def restart_clock(self, iteration: int) -> None:
        """Leave out of the next rate what was not training: a validation, a checkpoint."""
        self._since, self._last_iteration = time.perf_counter(), iteration

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "iteration":
                    self._tensorboard.add_scalar(name, value, record["iteration"])


def _keep_until(path: Path, iteration: int) -> None:
    """Drop what an interrupted run wrote after the checkpoint that this one resumes from, and a line cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["iteration"] <= iteration and iteration > 0:
            kept.append(line)
    with atomic_write(path) as stream:
        stream.writelines(line + "\n" for line in kept)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
