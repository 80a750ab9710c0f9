"""A ranking -> what a person or a program reads: a sentence, a table, the parts of one layout, JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.search import Ranking, Task

GIB = 2**30
TIMES = (
    "compute",
    "recompute",
    "tensor_communication",
    "context_communication",
    "expert_communication",
    "pipeline_communication",
    "bubble",
    "data_communication",
    "optimizer",
)
"""Parts of a step, as StepTime names them."""
MEMORY = ("weights", "gradients", "optimizer", "activations", "fp8_copies", "logits", "gathered")
"""Parts of the memory, as Memory names them."""


def layout_in_words(estimate: Estimate) -> str:
    """Return "TP 8 x PP 4 (5 chunks) x DP 8, …"."""
    execution, layout = estimate.execution, estimate.execution.layout
    sizes = [f"TP {layout.tensor}"] if layout.tensor > 1 else []
    sizes += [f"CP {layout.context}"] if layout.context > 1 else []
    if layout.pipeline > 1:
        cut = f" ({layout.virtual_pipeline} chunks a stage)" if layout.virtual_pipeline else ""
        cut = f" ({layout.layers_in_last_stage} layers in the last stage)" if layout.layers_in_last_stage else cut
        sizes.append(f"PP {layout.pipeline}{cut}")
    split = f" (ETP {layout.tensor_of_experts})" if layout.tensor_of_experts != layout.tensor else ""
    extras = [f"EP {layout.expert}{split}"] if estimate.shape.experts > 1 else []
    extras.append(f"micro batch {execution.micro_batch_size}")
    extras += ["sequence parallelism"] if layout.sequence_parallel else []
    extras.append({"none": "no recomputation"}.get(execution.recompute, f"{execution.recompute} recomputation"))
    extras += ["distributed optimizer"] if execution.distributed_optimizer else []
    return f"{' x '.join([*sizes, f'DP {layout.data}'])}, {', '.join(extras)}"


def sentence(estimate: Estimate, train_tokens: float) -> str:
    """Return the estimate in one sentence."""
    return (
        f"{estimate.time.total:,.2f} s a step, {estimate.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {estimate.mfu:.0%}, "
        f"{estimate.memory.total / GIB:,.0f} of {estimate.gpu.memory_bytes / GIB:,.0f} GiB; {train_tokens / 1e9:,.1f} billion tokens in "
        f"{estimate.days(train_tokens):,.1f} days, {estimate.gpu_hours(train_tokens):,.0f} GPU-hours"
    )


def subject(task: Task) -> str:
    """Return the model, the cluster and the batch in words."""
    return (
        f"{task.architecture.num_parameters / 1e9:,.1f} billion parameters on {task.num_gpus:,} x {task.gpu.kind}, {task.precision}, "
        f"{task.global_batch_size:,} x {task.seq_length:,} tokens a step"
    )


def describe_ranking(task: Task, ranking: Ranking, shown: Sequence[Estimate], train_tokens: float) -> str:
    """Return the sentence about the best layout, the table of the best, and the parts of the best."""
    best = shown[0]
    lines = [
        f"Best for {subject(task)}:",
        f"{layout_in_words(best)}: {sentence(best, train_tokens)}.",
        "",
        *_table(shown, train_tokens),
        f"The fastest of each TP and PP; of {ranking.legal:,} legal layouts {len(ranking.fitting):,} fit.",
        "",
        *parts(best),
        "Estimates, not measurements: docs/planning.md says how far they were from published runs, and what they leave out.",
    ]
    return "\n".join(lines)


def parts(estimate: Estimate) -> list[str]:
    """Return lines with the parts of memory, time and communication."""
    memory, time = estimate.memory, estimate.time
    of_memory = [f"{name.replace('_', ' ')} {getattr(memory, name) / GIB:,.1f}" for name in MEMORY if getattr(memory, name)]
    of_time = [
        f"{name.replace('_', ' ')} {getattr(time, name) / time.total:.1%}" for name in TIMES if getattr(time, name) / time.total >= 0.0005
    ]
    sent = [f"{name} {volume.bytes / 1e9:,.1f} over {volume.link}" for name, volume in time.volumes.items()]
    return [
        f"Memory of the fullest GPU, GiB: {memory.total / GIB:,.1f} = {' + '.join(of_memory)} (usable: "
        f"{estimate.constants.usable_bytes(estimate.gpu) / GIB:,.1f})",
        f"Time of a step, {time.total:,.2f} s: {', '.join(of_time)}",
        f"Each GPU sends in a step, GB: {', '.join(sent) or 'nothing'}",
    ]


def _table(shown: Sequence[Estimate], train_tokens: float) -> list[str]:
    lines = [
        f"{'':>2} {'TP':>3} {'CP':>3} {'EP':>3} {'PP':>3} {'chunks':>6} {'DP':>5} {'micro':>5} {'recompute':>9} | {'GiB':>6} {'bubble':>6} "
        f"{'comm.':>6} {'step s':>8} {'tok/s/GPU':>9} {'MFU':>5} {'days':>8} {'GPU-hours':>11}"
    ]
    for number, estimate in enumerate(shown, start=1):
        execution, layout, time = estimate.execution, estimate.execution.layout, estimate.time
        chunks = f"last {layout.layers_in_last_stage}" if layout.layers_in_last_stage else str(execution.chunks)
        communication = sum(getattr(time, name) for name in TIMES if name.endswith("communication")) / time.total
        lines.append(
            f"{number:>2} {layout.tensor:>3} {layout.context:>3} {execution.expert:>3} {layout.pipeline:>3} {chunks:>6} {layout.data:>5} "
            f"{execution.micro_batch_size:>5} {execution.recompute:>9} | {estimate.memory.total / GIB:>6.1f} "
            f"{estimate.bubble_fraction:>6.1%} {communication:>6.1%} {time.total:>8.3f} "
            f"{estimate.tokens_per_second_per_gpu:>9,.0f} {estimate.mfu:>5.1%} {estimate.days(train_tokens):>8,.1f} "
            f"{estimate.gpu_hours(train_tokens):>11,.0f}"
        )
    return lines


def as_json(task: Task, ranking: Ranking, shown: Sequence[Estimate], train_tokens: float) -> dict[str, Any]:
    """Return the plan as JSON types; bytes, seconds, fractions."""
    return {
        "parameters": task.architecture.num_parameters,
        "gpu": task.gpu.kind,
        "num_gpus": task.num_gpus,
        "seq_length": task.seq_length,
        "global_batch_size": task.global_batch_size,
        "precision": task.precision,
        "train_tokens": train_tokens,
        "legal_layouts": ranking.legal,
        "fitting_layouts": len(ranking.fitting),
        "layouts": [_layout_json(estimate, train_tokens) for estimate in shown],
    }


def _layout_json(estimate: Estimate, train_tokens: float) -> dict[str, Any]:
    execution, layout = estimate.execution, estimate.execution.layout
    return {
        "tensor": layout.tensor,
        "context": layout.context,
        "pipeline": layout.pipeline,
        "chunks": execution.chunks,
        "layers_in_last_stage": layout.layers_in_last_stage,
        "data": layout.data,
        "expert": execution.expert,
        "expert_tensor": execution.expert_tensor,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batch_size": execution.micro_batch_size,
        "recompute": execution.recompute,
        "distributed_optimizer": execution.distributed_optimizer,
        "memory_bytes": {**{name: round(getattr(estimate.memory, name)) for name in MEMORY}, "total": round(estimate.memory.total)},
        "usable_bytes": round(estimate.constants.usable_bytes(estimate.gpu)),
        "seconds": {**{name: getattr(estimate.time, name) for name in TIMES}, "total": estimate.time.total},
        "sent_bytes": {name: dataclasses.asdict(volume) for name, volume in estimate.time.volumes.items()},
        "bubble_fraction": estimate.bubble_fraction,
        "tokens_per_second_per_gpu": estimate.tokens_per_second_per_gpu,
        "mfu": estimate.mfu,
        "days": estimate.days(train_tokens),
        "gpu_hours": estimate.gpu_hours(train_tokens),
    }
