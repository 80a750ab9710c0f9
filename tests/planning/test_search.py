"""The layouts that a plan looks at are those that training accepts, no more and no fewer."""

import itertools
from pathlib import Path

import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.presets import make_architecture
from megatron_instruct.planning.constants import load_constants
from megatron_instruct.planning.gpus import find_gpu
from megatron_instruct.planning.search import Task, legal_executions, rank
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.plan import plan_batches, plan_layout
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.checkpoint import CheckpointOptions
from megatron_instruct.training.settings.data import DataOptions
from megatron_instruct.training.settings.parallel import ParallelOptions


def make_task(preset: str, gpus: int, batch: int, seq_length: int = 2048) -> Task:
    architecture = make_architecture({}, preset_name=preset, vocab_size=32000, seq_length=seq_length)
    return Task(
        architecture=architecture, gpu=find_gpu("h100"), num_gpus=gpus, seq_length=seq_length, global_batch_size=batch, precision="bf16"
    )


def accepted_by_training(task: Task) -> set[tuple[object, ...]]:
    """Try every combination of the settings of pretrain.py over even splits."""
    found: set[tuple[object, ...]] = set()
    layers, gpus, sizes = task.architecture.num_layers, task.num_gpus, range(1, task.num_gpus + 1)
    per_chunk = [None, *range(1, layers + 1)]
    experts = range(1, (task.architecture.num_experts or 1) + 1)
    for tensor, context, pipeline, chunk, sequence, micro, expert, inner in itertools.product(
        sizes, sizes, sizes, per_chunk, (False, True), range(1, task.global_batch_size + 1), experts, (None, 1)
    ):
        if gpus % (tensor * context * pipeline) or (inner == 1 and (tensor == 1 or task.architecture.num_experts is None)):
            continue
        options = ParallelOptions(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            pipeline_model_parallel_size=pipeline,
            num_layers_per_virtual_pipeline_stage=chunk,
            sequence_parallel=sequence,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=inner,
        )
        batch = BatchOptions(
            train_iters=1, global_batch_size=task.global_batch_size, micro_batch_size=micro, lr=1.0, seq_length=task.seq_length
        )
        config = PretrainConfig(
            parallel=options, batch=batch, data=DataOptions(data_path=("x",)), checkpoint=CheckpointOptions(save=Path("x"))
        )
        try:
            layout = plan_layout(options, task.architecture, processes=gpus)
            plan_batches(config, layout)
        except ConfigError:
            continue
        found.add((tensor, context, pipeline, layout.virtual_pipeline, sequence, micro, expert, inner))
    return found


@pytest.mark.parametrize(("preset", "gpus", "batch"), [("tiny", 8, 8), ("tiny", 6, 6), ("tiny-experts", 4, 4), ("135M", 4, 4)])
def test_a_plan_looks_at_exactly_what_training_accepts(preset: str, gpus: int, batch: int) -> None:
    task = make_task(preset, gpus, batch)
    looked_at = {
        (
            execution.layout.tensor,
            execution.layout.context,
            execution.layout.pipeline,
            execution.layout.virtual_pipeline,
            execution.layout.sequence_parallel,
            execution.micro_batch_size,
            execution.layout.expert,
            execution.layout.expert_tensor,
        )
        for execution in legal_executions(task)
        if execution.layout.layers_in_last_stage is None
    }
    assert looked_at == accepted_by_training(task)


def test_what_is_ranked_fits_and_goes_from_fast_to_slow() -> None:
    ranking = rank(make_task("7B", 16, 64), load_constants())
    times = [float(f"{estimate.time.total:.4g}") for estimate in ranking.fitting]
    assert times == sorted(times)
    assert all(estimate.fits for estimate in ranking.fitting)
    assert 0 < len(ranking.fitting) < ranking.legal
    assert ranking.closest is not None
    assert ranking.closest.memory.total <= min(estimate.memory.total for estimate in ranking.fitting)


def test_a_large_model_needs_the_ways_to_divide_it() -> None:
    """70B on 64 GPUs: what experience says, some of TP and PP, and TP inside a machine."""
    best = rank(make_task("70B", 64, 128, seq_length=4096), load_constants()).fitting[0].execution.layout
    assert 1 < best.tensor <= 8
    assert best.tensor * best.pipeline >= 8
