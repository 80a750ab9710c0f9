"""What a run says while it runs: one line per log interval, metrics.jsonl always, TensorBoard and W&B where asked, samples."""

import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from megatron_instruct.errors import MissingPackageError
from megatron_instruct.files import append, atomic_write, read_lines, synced
from megatron_instruct.progress import clock
from megatron_instruct.training.settings.watching import WatchOptions

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
_WANDB_ID = "wandb_id"
"""File in the run's folder with its id in W&B: a run that goes on is the same one there."""


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """Constants of a run that turn seconds into rates."""

    train_iters: int
    tokens_per_iteration: int
    """Of a step of the whole global batch."""
    tokens_before: Callable[[int], int] | None = None
    """Tokens of so many first steps, where the batch grows at the start."""
    flops_per_token: float
    peak_flops: float | None
    """Of all processes together; None where it is not known."""
    devices: int = 1
    """Processes, each with a device."""
    peak_memory: Callable[[], int] | None = None
    """Returns the most bytes that this process has held so far."""

    def tokens(self, iterations: int) -> int:
        """Return the tokens of so many first steps."""
        return iterations * self.tokens_per_iteration if self.tokens_before is None else self.tokens_before(iterations)


def check_packages(tensorboard_dir: Path | None, watch: WatchOptions | None) -> None:
    """Raise MissingPackageError where what is to get the log is not installed."""
    if tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise MissingPackageError("tensorboard", extra="train", purpose="--tensorboard-dir")
    if watch is not None and watch.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise MissingPackageError("wandb", extra="wandb", purpose="--wandb-project")


class Metrics:
    """Writes the log of one run, on one rank; on the others it is silent. To be used in a `with` block."""

    def __init__(
        self,
        folder: Path,
        size: RunSize,
        *,
        start_iteration: int,
        tensorboard_dir: Path | None,
        writes: bool,
        watch: WatchOptions | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._size, self._writes = size, writes
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._since, self._last_iteration = time.perf_counter(), start_iteration
        if not writes:
            return
        check_packages(tensorboard_dir, watch)
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._samples = folder / METRICS_FILE, folder / SAMPLES_FILE
        _keep_until(self._path, start_iteration)
        _keep_until(self._samples, start_iteration)
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=start_iteration + 1)
        if watch is not None and watch.wandb_project is not None:
            self._wandb = _start_wandb(folder, watch, settings or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def training(
        self,
        iteration: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        faults: Mapping[str, int] | None = None,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Record the iterations since the last call; `loss` is their mean.

        faults: what went wrong in the run so far, by name. more: what only some runs have, by name.
        """
        seconds, count = time.perf_counter() - self._since, iteration - self._last_iteration
        rate = (self._size.tokens(iteration) - self._size.tokens(self._last_iteration)) / seconds
        record: dict[str, Any] = {
            "iteration": iteration,
            "tokens": self._size.tokens(iteration),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "tokens_per_second": rate,
            "tflops": rate * self._size.flops_per_token / self._size.devices / 1e12,
            **(more or {}),
            **(faults or {}),
        }
        peak = self._size.peak_flops
        if peak is not None:
            record["peak_fraction"] = rate * self._size.flops_per_token / peak
        if self._size.peak_memory is not None:
            record["memory"] = self._size.peak_memory()
        self._write(record)
        if self._writes:
            left = (self._size.train_iters - iteration) * seconds / count
            share = f" ({record['peak_fraction']:.0%} of peak)" if peak is not None else ""
            memory = f" | {record['memory'] / (1 << 30):.1f} GiB" if "memory" in record else ""
            print(
                f"iteration {iteration:>{len(str(self._size.train_iters))}}/{self._size.train_iters} | loss {loss:.4f} | lr {lr:.3e} "
                f"| grad norm {grad_norm:.3f} | {rate:,.0f} tokens/s | {_short(record['tflops'])} TFLOP/s{share}{memory} "
                f"{''.join(f'| {name} {value:.6g} ' for name, value in (more or {}).items())}"
                f"| {clock(left)} left{''.join(f' | {name} {count}' for name, count in (faults or {}).items() if count)}",
                flush=True,
            )
        self.restart_clock(iteration)

    def evaluation(
        self, kind: Literal["validation", "test"], iteration: int, loss: float, by_component: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Record an evaluation after `iteration` steps, and return its figures; by_component: the loss on each data set of a blend.

        Its time is not training's.
        """
        parts = dict(by_component or {})
        figures = {f"{kind}_loss": loss, **({f"{kind}_loss_of": parts} if parts else {})}
        self._write({"iteration": iteration, **figures})
        if self._writes:
            each = "".join(f" | {name} {value:.4f}" for name, value in parts.items())
            print(f"{kind} after iteration {iteration} | loss {loss:.4f}{each}", flush=True)
        return figures

    def samples(self, iteration: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Record what the model wrote after `iteration` steps."""
        if not self._writes:
            return
        rows = [{"iteration": iteration, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        append(self._samples, [json.dumps(row, ensure_ascii=False) for row in rows], durable=False)
        print(f"sample after iteration {iteration} | {prompts[0]} → {texts[0]!r}", flush=True)
        if self._tensorboard is not None:
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                self._tensorboard.add_text(f"sample {number}", f"{prompt} → {text}", iteration)

    def go_back(self, iteration: int) -> None:
        """Drop what was recorded after an iteration that the weights went back to."""
        if self._writes:
            _keep_until(self._path, iteration)
            _keep_until(self._samples, iteration)

    def keep(self) -> None:
        """Return when all that was recorded is on the disk; to be called before a checkpoint that a later run goes on from.

        A row alone waits for no disk: a machine that loses it has lost the steps since the checkpoint, too.
        """
        for path in (self._path, self._samples) if self._writes else ():
            if path.is_file():
                synced(path)

    def restart_clock(self, iteration: int) -> None:
        """Leave out of the next rate what was not training: a validation, a checkpoint."""
        self._since, self._last_iteration = time.perf_counter(), iteration

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        append(self._path, [json.dumps(record)], durable=False)
        if self._tensorboard is None and self._wandb is None:
            return
        values = _scalars(record)
        if self._wandb is not None:
            self._wandb.log({"iteration": record["iteration"], **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, record["iteration"])


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by flat names."""
    flat = {name: value for name, value in record.items() if name != "iteration" and not isinstance(value, Mapping)}
    parts = {f"{name}/{part}": number for name, value in record.items() if isinstance(value, Mapping) for part, number in value.items()}
    return {**flat, **parts}


def _start_wandb(folder: Path, watch: WatchOptions, settings: Mapping[str, Any]) -> Any:
    import wandb

    mark = folder / _WANDB_ID
    if not mark.is_file():
        with atomic_write(mark) as stream:
            stream.write(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=watch.wandb_project,
        name=watch.wandb_name or folder.name,
        id=mark.read_text(encoding="utf-8"),
        resume="allow",
        mode=watch.wandb_mode,
        dir=str(folder),
        config=dict(settings),
    )
    run.define_metric("*", step_metric="iteration")  # W&B's own step only goes up, and a resumed run repeats some
    return run


def _keep_until(path: Path, iteration: int) -> None:
    """Drop what an interrupted run wrote after the checkpoint that this one resumes from, and a line cut short.

    The test comes after the last checkpoint.
    """
    if not path.is_file():
        return
    kept = []
    for line in read_lines(path):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["iteration"] <= iteration and iteration > 0 and "test_loss" not in record:
            kept.append(line.rstrip("\n"))
    with atomic_write(path) as stream:
        stream.writelines(line + "\n" for line in kept)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
