"""The estimates beside published figures (published.yaml), and the fit of the constants to one half of them.

What a source does not say is taken as the estimates find it fastest among what fits the memory. Of each source every second row,
from the first on, is for fitting; the others only judge.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.planning.constants import Constants, load_constants
from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.gpus import Gpu, find_gpu
from megatron_instruct.planning.shape import Shape

_FITTED: tuple[tuple[str, ...], ...] = (
    ("products", "ampere", "bf16"),
    ("products", "hopper", "bf16"),
    ("products", "hopper", "fp8"),
    ("products", "blackwell", "fp8"),
    ("attention",),
    ("tensor_overlap",),
)
"""Constants that are fitted, by their place in constants.yaml."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One published figure."""

    source: str
    cite: str
    model: str
    shape: Shape
    gpu: Gpu
    given: Mapping[str, Any]
    for_fitting: bool

    @property
    def seconds(self) -> float:
        """Measured seconds of a step."""
        given, tokens = self.given, self.given["batch"] * self.given["seq_length"]
        if "seconds" in given:
            return float(given["seconds"])
        if "tokens" in given:
            return float(tokens / given["tokens"] / given["gpus"])
        reached = given["tflops"] * 1e12 if "tflops" in given else given["mfu"] * self.gpu.peak_flops["bf16"]
        passes = 4 if given["counted"] == "hardware" else 3
        shape, seq_length = self.shape, given["seq_length"]
        layers = shape.layers * (shape.attention_weights + shape.expert_weights + 2 * shape.query * seq_length)
        # arXiv:2104.04473, equation 3: attention over the whole square, the output layer never computed again
        return float(tokens * (2.0 * passes * layers + 6.0 * shape.vocab * shape.hidden) / reached / given["gpus"])

    @property
    def mfu(self) -> float:
        """Measured fraction of the peak, operations counted as this project counts them."""
        flops = self.given["batch"] * self.given["seq_length"] * self.shape.flops_per_token(self.given["seq_length"])
        return float(flops / self.seconds / self.given["gpus"] / self.gpu.peak_flops[self.given["precision"]])


@functools.cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Return the rows of published.yaml."""
    text = importlib.resources.files("megatron_instruct.planning").joinpath("published.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    shapes = {name: _shape(sizes) for name, sizes in content["models"].items()}
    runs = []
    for source in content["sources"]:
        for number, row in enumerate(source["rows"]):
            given = {**source["common"], **row}
            runs.append(
                PublishedRun(
                    source=source["name"],
                    cite=source["cite"],
                    model=given["model"],
                    shape=shapes[given["model"]],
                    gpu=find_gpu(given["gpu"]),
                    given=given,
                    for_fitting=number % 2 == 0,
                )
            )
    return tuple(runs)


def _shape(sizes: Mapping[str, int]) -> Shape:
    """A model with `ffn` is a Llama; one without is of GPT-3's kind: four times the hidden size, no gate, dropout."""
    gated, heads = "ffn" in sizes, sizes["heads"]
    return Shape(
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        ffn=sizes.get("ffn", 4 * sizes["hidden"]),
        heads=heads,
        groups=sizes.get("groups", heads),
        head_size=sizes["hidden"] // heads,
        vocab=sizes["vocab"],
        gated=gated,
        dropout=not gated,
    )


def executions(run: PublishedRun) -> Iterator[Execution]:
    """Yield the ways to run it that agree with what its source says."""
    given = run.given
    tensor, pipeline, context = given["tensor"], given["pipeline"], given.get("context", 1)
    per_replica = given["batch"] * tensor * pipeline * context // given["gpus"]
    micro = [given["micro"]] if "micro" in given else [size for size in (1, 2, 4, 8, 16) if per_replica % size == 0]
    layers = run.shape.layers // pipeline
    chunks = [given["chunks"]] if "chunks" in given else [count for count in range(1, layers + 1) if layers % count == 0 or pipeline == 1]
    kept = [given["recompute"]] if "recompute" in given else ["none", "full"]
    for size, count, recompute in itertools.product(micro, chunks if pipeline > 1 else [1], kept):
        if count > 1 and per_replica // size % pipeline:
            continue
        yield Execution(
            layout=ParallelLayout(
                world_size=given["gpus"],
                tensor=tensor,
                context=context,
                pipeline=pipeline,
                virtual_pipeline=count if count > 1 else None,
                sequence_parallel=given.get("sequence_parallel", tensor > 1),
            ),
            seq_length=given["seq_length"],
            global_batch_size=given["batch"],
            micro_batch_size=size,
            precision=given["precision"],
            recompute=recompute,
            distributed_optimizer=given.get("distributed_optimizer", True),
            overlap=given.get("overlap", True),
            fused_attention=given.get("fused_attention", True),
            tensor_overlap=given.get("tensor_overlap", False),
            ends_as_layers=given.get("ends_as_layers", False),
        )


@functools.cache
def _possible(run_number: int) -> tuple[Execution, ...]:
    """Those that fit the memory, or the smallest where none does; the fitted constants do not change them."""
    run = published_runs()[run_number]
    made = [Estimate(run.shape, execution, run.gpu, load_constants()) for execution in executions(run)]
    smallest = min(made, key=lambda estimate: estimate.memory.total)
    return tuple(estimate.execution for estimate in made if estimate.fits or estimate is smallest)


def predict(run: PublishedRun, constants: Constants) -> Estimate:
    """Return the estimate of a published run."""
    number = published_runs().index(run)
    made = (Estimate(run.shape, execution, run.gpu, constants) for execution in _possible(number))
    return min(made, key=lambda estimate: estimate.time.total)


def relative_error(run: PublishedRun, constants: Constants) -> float:
    """Return by which part the estimated MFU is above (or, negative, below) the measured one."""
    return predict(run, constants).mfu / run.mfu - 1.0


def mean_error(runs: Iterable[PublishedRun], constants: Constants) -> float:
    """Return the mean of the relative errors' sizes."""
    return statistics.fmean(abs(relative_error(run, constants)) for run in runs)


def fit(*, rounds: int = 3) -> Constants:
    """Return the constants with the fitted ones chosen anew: the least mean error over the rows for fitting, by halving steps."""
    runs = [run for run in published_runs() if run.for_fitting]
    best = load_constants()
    step = 0.08
    lowest = mean_error(runs, best)
    for _ in range(rounds):
        moved = True
        while moved:
            moved = False
            for name, sign in itertools.product(_FITTED, (1.0, -1.0)):
                tried = _moved(best, name, sign * step)
                error = mean_error(runs, tried)
                if error < lowest - 1e-6:
                    best, lowest, moved = tried, error, True
        step /= 2.0
    return best


def _moved(constants: Constants, name: Sequence[str], by: float) -> Constants:
    moved = dataclasses.asdict(constants)
    place = moved
    for part in name[:-1]:
        place = place[part]
    place[name[-1]] = _within(place[name[-1]] + by)
    return Constants(**moved)


def _within(fraction: float) -> float:
    return round(min(0.95, max(0.0, fraction)), 4)


def table() -> str:
    """Return all rows beside their estimates, for a person to read."""
    constants = load_constants()
    lines = [f"{'source':<20} {'model':<15} {'GPUs':>12}  {'TP PP CP':<9} {'published':>9} {'estimated':>9} {'error':>7}  for"]
    for run in published_runs():
        given = run.given
        layout = f"{given['tensor']} {given['pipeline']} {given.get('context', 1)}"
        lines.append(
            f"{run.source:<20} {run.model:<15} {given['gpus']:>5,} {run.gpu.kind:<7} {layout:<9} {run.mfu:>9.1%} "
            f"{predict(run, constants).mfu:>9.1%} {relative_error(run, constants):>+7.1%}  {'fitting' if run.for_fitting else 'judging'}"
        )
    for purpose, wanted in (("fitting", True), ("judging", False)):
        runs = [run for run in published_runs() if run.for_fitting == wanted]
        lines.append(f"mean relative error of MFU over the {len(runs)} rows for {purpose}: {mean_error(runs, constants):.1%}")
    return "\n".join(lines)
