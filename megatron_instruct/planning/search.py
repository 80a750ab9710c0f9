"""Every legal layout of a model on a cluster, estimated and ranked.

Legal is what training accepts: the rules are models/layout.py's, models/batches.py's and models/fp8_sizes.py's, which a run goes
through too. Enumerated are TP, CP, PP, chunks of a stage, sequence parallelism, micro batch, recomputation and the distributed
optimizer; of the uneven splits of the layers, per PP, the one whose last stage, which has the output layer too, has least fewer;
for a mixture of experts EP, with an expert's matrices over all tensor ranks or on one.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.batches import check_sequence, cut_batch
from megatron_instruct.models.fp8_sizes import check_fp8_sizes
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.planning.constants import Constants
from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.execution import Execution, Recompute
from megatron_instruct.planning.gpus import Gpu, Precision
from megatron_instruct.planning.shape import shape_of

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, and on what."""

    architecture: Architecture
    gpu: Gpu
    num_gpus: int
    seq_length: int
    global_batch_size: int
    precision: Precision
    fp8_recipe: str = "delayed"
    vocab_divisor: int = 128


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All legal layouts of a task."""

    fitting: tuple[Estimate, ...]
    """Those that fit the memory, the fastest first; of what is as fast to four digits, the one over fewer ranks, then in less memory."""
    closest: Estimate | None
    """The one that needs least memory; None where no layout is legal."""
    legal: int
    """Number of legal layouts, whether they fit or not."""

    def best_of_each_kind(self) -> list[Estimate]:
        """Return the fastest of each combination of TP and PP, the fastest first."""
        found: dict[tuple[int, int], Estimate] = {}
        for estimate in self.fitting:
            layout = estimate.execution.layout
            found.setdefault((layout.tensor, layout.pipeline), estimate)
        return list(found.values())


def rank(task: Task, constants: Constants) -> Ranking:
    """Estimate every legal layout. Raises nothing for what does not fit: Ranking says it."""
    shape = shape_of(task.architecture)
    fitting: list[Estimate] = []
    closest: Estimate | None = None
    legal = 0
    for execution in legal_executions(task):
        legal += 1
        estimate = Estimate(shape, execution, task.gpu, constants)
        if closest is None or estimate.memory.total < closest.memory.total:
            closest = estimate
        if estimate.fits:
            fitting.append(estimate)
    fitting.sort(key=_place)
    return Ranking(fitting=tuple(fitting), closest=closest, legal=legal)


def _place(estimate: Estimate) -> tuple[float, int, float]:
    layout = estimate.execution.layout
    ranks = layout.tensor * layout.context * layout.pipeline
    return float(f"{estimate.time.total:.4g}"), ranks, estimate.memory.total


def smallest_that_fits(task: Task, constants: Constants, *, most: int) -> int | None:
    """Return the least of twice, four times … as many GPUs on which some layout fits, up to `most`; None beyond."""
    shape, count = shape_of(task.architecture), task.num_gpus
    while (count := 2 * count) <= most:
        larger = dataclasses.replace(task, num_gpus=count)
        for layout in legal_layouts(larger):
            if _accepts_batch(larger, layout, 1) and Estimate(shape, _execution(larger, layout, 1, "full", True), task.gpu, constants).fits:
                return count
    return None


def usable_counts(task: Task) -> list[int]:
    """Return the nearest numbers of GPUs, below and above, that have a legal layout."""
    step = task.gpu.gpus_per_node if task.num_gpus > task.gpu.gpus_per_node else 1
    below = range(task.num_gpus - 1 - (task.num_gpus - 1) % step, 0, -step)
    above = range(task.num_gpus + step - task.num_gpus % step, 2 * task.num_gpus + step, step)
    found = (next((count for count in counts if _is_usable(task, count)), None) for counts in (below, above))
    return [count for count in found if count is not None]


def _is_usable(task: Task, count: int) -> bool:
    return next(legal_executions(dataclasses.replace(task, num_gpus=count)), None) is not None


def legal_executions(task: Task) -> Iterator[Execution]:
    """Yield every execution that training accepts."""
    for layout in legal_layouts(task):
        replica = task.global_batch_size // layout.data
        for micro in _divisors(replica):
            if not _accepts_batch(task, layout, micro):
                continue
            for recompute, distributed in itertools.product(_RECOMPUTE, (True, False)):
                yield _execution(task, layout, micro, recompute, distributed)


def legal_layouts(task: Task) -> Iterator[ParallelLayout]:
    """Yield every layout over the GPUs that the model allows and whose replicas can share the global batch."""
    sizes = _divisors(task.num_gpus)
    for tensor in sizes:
        for sequence in (True, False):
            if not _accepts(task, ParallelLayout(world_size=tensor, tensor=tensor, sequence_parallel=sequence)):
                continue
            for context, pipeline in itertools.product(sizes, sizes):
                if task.num_gpus % (tensor * context * pipeline) == 0:
                    yield from _splits(task, tensor=tensor, context=context, pipeline=pipeline, sequence=sequence)


def _execution(task: Task, layout: ParallelLayout, micro: int, recompute: Recompute, distributed: bool) -> Execution:
    return Execution(
        layout=layout,
        seq_length=task.seq_length,
        global_batch_size=task.global_batch_size,
        micro_batch_size=micro,
        precision=task.precision,
        recompute=recompute,
        distributed_optimizer=distributed,
        vocab_divisor=task.vocab_divisor,
    )


def _splits(task: Task, *, tensor: int, context: int, pipeline: int, sequence: bool) -> Iterator[ParallelLayout]:
    """Yield the ways to cut the layers over the stages."""
    layers = task.architecture.num_layers
    cuts: list[tuple[int | None, int | None]] = [(None, None)]
    if pipeline > 1:
        cuts += [(chunks, None) for chunks in _divisors(layers) if chunks > 1]
        last = layers - (layers // pipeline + 1) * (pipeline - 1)
        cuts += [(None, last)] if last >= 1 else []
    for (chunks, last_layers), (expert, expert_tensor) in itertools.product(cuts, _expert_splits(task, tensor)):
        layout = ParallelLayout(
            world_size=task.num_gpus,
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            virtual_pipeline=chunks,
            sequence_parallel=sequence,
            expert=expert,
            expert_tensor=expert_tensor,
            layers_in_last_stage=last_layers,
        )
        if task.global_batch_size % layout.data == 0 and _accepts(task, layout):
            yield layout


def _expert_splits(task: Task, tensor: int) -> list[tuple[int, int | None]]:
    """Return EP and ETP of the layouts to look at; ETP None for as many ranks as TP."""
    if task.architecture.num_experts is None:
        return [(1, None)]
    return list(itertools.product(_divisors(task.architecture.num_experts), (None, 1) if tensor > 1 else (None,)))


def _accepts(task: Task, layout: ParallelLayout) -> bool:
    try:
        layout.check(task.architecture)
        check_sequence(layout, task.seq_length)
    except ConfigError:
        return False
    return True


def _accepts_batch(task: Task, layout: ParallelLayout, micro: int) -> bool:
    try:
        cut_batch(layout, global_batch_size=task.global_batch_size, micro_batch_size=micro, train_iters=1)
        if task.precision == "fp8":
            check_fp8_sizes(task.fp8_recipe, task.architecture, layout, tokens=layout.tokens_of_rank(micro, task.seq_length))
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
