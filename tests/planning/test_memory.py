"""Estimated memory beside megatron-core's own theoretical report, and beside what a real model, its gradients and AdamW take."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture
from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.memory import memory_of_stage, padded_vocab
from megatron_instruct.planning.shape import shape_of

HERE = Path(__file__).resolve().parent
# preset, TP, PP, chunks, DP, SP, recompute, sequence, micro batch, microbatches
THEIRS = [
    ("70B", 8, 4, None, 8, True, "selective", 8192, 1, 16),
    ("70B", 8, 4, 5, 8, True, "selective", 4096, 1, 16),
    ("70B", 4, 8, 2, 2, True, "selective", 4096, 1, 16),
    ("34B", 4, 2, None, 4, True, "selective", 4096, 1, 8),
    ("13B", 2, 1, None, 8, True, "selective", 4096, 2, 4),
    ("8B", 4, 1, None, 2, True, "selective", 8192, 1, 16),
    ("8B", 1, 1, None, 8, False, "none", 4096, 1, 16),
    ("8B", 2, 2, None, 4, False, "none", 4096, 1, 8),
    ("1.3B", 1, 1, None, 8, False, "none", 2048, 4, 2),
]


@pytest.fixture(scope="module")
def theory() -> types.ModuleType:
    """megatron-core's theoretical_memory_usage.py itself; the package around it takes 10 seconds to import, for two helpers."""
    core = importlib.util.find_spec("megatron.core")
    assert core is not None and core.origin is not None
    file = Path(core.origin).parents[1] / "training" / "theoretical_memory_usage.py"
    package = types.ModuleType("theory")
    package.__path__ = []
    around = types.ModuleType("theory.utils")
    around.is_hybrid_model = lambda args: False  # type: ignore[attr-defined]
    around.print_rank_0 = print  # type: ignore[attr-defined]
    sys.modules |= {"theory": package, "theory.utils": around}
    spec = importlib.util.spec_from_file_location("theory.theoretical_memory_usage", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("preset", "tensor", "pipeline", "chunks", "data", "sequence", "recompute", "seq_length", "micro", "number"), THEIRS
)
def test_memory_is_within_15_percent_of_megatron_cores_report(
    theory: types.ModuleType,
    preset: str,
    tensor: int,
    pipeline: int,
    chunks: int | None,
    data: int,
    sequence: bool,
    recompute: Any,
    seq_length: int,
    micro: int,
    number: int,
) -> None:
    architecture = make_architecture({}, preset_name=preset, vocab_size=128256, seq_length=seq_length)
    layout = ParallelLayout(
        world_size=tensor * pipeline * data,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=chunks,
        sequence_parallel=sequence,
    )
    execution = Execution(
        layout=layout, seq_length=seq_length, global_batch_size=micro * number * data, micro_batch_size=micro, recompute=recompute
    )
    shape = shape_of(architecture)
    args = types.SimpleNamespace(
        kv_channels=shape.head_size, num_attention_heads=shape.heads, hidden_size=shape.hidden, group_query_attention=True,
        num_query_groups=shape.groups, num_experts=None, swiglu=True, moe_shared_expert_intermediate_size=None, num_layers=shape.layers,
        mtp_num_layers=None, normalization="RMSNorm", multi_latent_attention=False, ffn_hidden_size=shape.ffn,
        padded_vocab_size=padded_vocab(shape, execution), untie_embeddings_and_output_weights=not shape.tied, moe_latent_size=None,
        add_bias_linear=False, expert_tensor_parallel_size=tensor, expert_model_parallel_size=1, pipeline_model_parallel_size=pipeline,
        tensor_model_parallel_size=tensor, world_size=layout.world_size, data_parallel_size=data, use_distributed_optimizer=True,
        seq_length=seq_length, micro_batch_size=micro, virtual_pipeline_model_parallel_size=chunks, sequence_parallel=sequence,
        recompute_granularity="selective" if recompute == "selective" else None,
    )  # fmt: skip
    _, _, theirs = theory.report_theoretical_memory(args, num_microbatches=number)
    # theirs is of the first stage, and so is ours here
    ours = memory_of_stage(shape, execution, 0).total / 2**20
    assert ours == pytest.approx(theirs, rel=0.15)


def _measure(*arguments: str, processes: int = 1) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(HERE / "measure_memory.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


@pytest.fixture(scope="module")
def on_one_process() -> dict[str, Any]:
    return _measure("tiny:fp32", "tiny:bf16", "31M:fp32", "tiny-experts:fp32")


def test_weights_gradients_and_optimizer_are_those_of_a_real_model(on_one_process: dict[str, Any]) -> None:
    for name, measured in on_one_process.items():
        _compare(name, measured, ParallelLayout(), distributed=False)


@pytest.mark.parametrize("name", ["tiny:fp32", "tiny:bf16", "31M:fp32"])
def test_all_memory_is_within_15_percent_of_what_a_real_model_on_a_cpu_keeps(on_one_process: dict[str, Any], name: str) -> None:
    preset, precision = name.split(":")
    shape = shape_of(make_architecture({}, preset_name=preset, vocab_size=500, seq_length=32))
    execution = Execution(
        layout=ParallelLayout(),
        seq_length=32,
        global_batch_size=2,
        micro_batch_size=2,
        precision=precision,  # type: ignore[arg-type]
        distributed_optimizer=False,
        cpu_modules=True,
    )
    memory, measured = memory_of_stage(shape, execution, 0), on_one_process[name]
    assert memory.activations + memory.logits == pytest.approx(measured["activations"], rel=0.15)
    assert memory.total == pytest.approx(sum(measured.values()), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data", "fully-sharded"])
def test_so_they_are_over_two_processes(layout: str) -> None:
    sizes = {layout: 2} if layout in ("tensor", "pipeline") else {}
    expected = ParallelLayout(world_size=2, sequence_parallel=layout == "tensor", **sizes)  # type: ignore[arg-type]
    for name, measured in _measure("tiny:fp32", "31M:bf16", "--layout", layout, processes=2).items():
        _compare(name, measured, expected, distributed=not sizes, shards=layout == "fully-sharded")


def _compare(name: str, measured: dict[str, int], layout: ParallelLayout, *, distributed: bool, shards: bool = False) -> None:
    """measured: the fullest rank's bytes."""
    preset, precision = name.split(":")
    shape = shape_of(make_architecture({}, preset_name=preset, vocab_size=500, seq_length=32))
    execution = Execution(
        layout=layout,
        seq_length=32,
        global_batch_size=2,
        micro_batch_size=1,
        precision=precision,  # type: ignore[arg-type]
        distributed_optimizer=distributed,
        shards_gradients=shards,
        shards_weights=shards,
    )
    # activations aside: the last stage has a norm more than the first
    stages = [memory_of_stage(shape, execution, stage) for stage in {0, layout.pipeline - 1}]
    memory = max(stages, key=lambda parts: parts.weights)
    for part in ("weights", "gradients", "optimizer"):
        if distributed:  # megatron-core pads the buffers that it divides, which counts in a model so small
            assert getattr(memory, part) == pytest.approx(measured[part], rel=0.15), (name, part)
        else:
            assert getattr(memory, part) == measured[part], (name, part)
