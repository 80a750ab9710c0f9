"""The same training on GPUs: NCCL, bf16, Transformer Engine's layers. Small enough for any one GPU; more are used where there are more."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import ITERATIONS, PRETRAIN, SHARDED, STOP, TENSOR, read_metrics, weights
from .several_runs import stop_at

GPUS = torch.cuda.device_count()
"""Counted through NVML: torch.cuda.is_available() would touch CUDA in this process, where tests of conversion must hide the GPUs."""
PROCESSES = next((count for count in (4, 2) if count <= GPUS), 1)
"""A number that divides the global batch of four microbatches."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = ("--hidden-size", 256, "--ffn-hidden-size", 512, "--num-attention-heads", 4, "--num-query-groups", 2)
"""Heads of 64 numbers, as the fused kernels want."""
LAYOUTS: dict[str, tuple[object, ...]] = {"plain": (), "distributed optimizer": SHARDED, "muon": ("--optimizer", "muon")}
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def launch(flags: Callable[..., list[str]]) -> Launch:
    """Run pretrain.py, or another script with its flags, in so many processes that torchrun starts."""

    def run(
        processes: int, save: Path, *more: object, script: tuple[object, ...] = (PRETRAIN,), dtype: str | None = "--bf16"
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        # attention's backward pass otherwise adds in an order of its own each time
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
        command = [*launcher, *map(str, script), *flags(save, *SIZES, *([dtype] if dtype else []), *more)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    return run


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request: pytest.FixtureRequest, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, tuple[object, ...]]:
    """An undisturbed run: its folder, what it printed, its layout."""
    save = tmp_path_factory.mktemp("gpu") / "whole"
    more = LAYOUTS[request.param]
    return save, launch(PROCESSES, save, *more).stdout, more


def test_a_model_learns_in_bf16(whole: tuple[Path, str, tuple[object, ...]]) -> None:
    save, printed, _ = whole
    assert printed.count(f"{PROCESSES} x cuda: tensor 1, context 1, pipeline 1, data {PROCESSES}") == 1
    found = read_metrics(save)
    assert [row[0] for row in found.training] == list(range(1, ITERATIONS + 1))
    assert all(math.isfinite(value) for row in found.training for value in row)
    assert found.training[-1][1] < found.training[0][1] - 0.1
    (_, before), *_, (_, after) = found.validation
    assert after < before - 0.1
    assert json.loads((save / f"iter_{ITERATIONS:07d}" / "manifest.json").read_text())["settings"]["dtype"] == "bf16"


def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole: tuple[Path, str, tuple[object, ...]], launch: Launch, tmp_path: Path) -> None:
    save, _, more = whole
    stop_at(save, STOP, tmp_path / "again")
    assert "resumes from" in launch(PROCESSES, tmp_path / "again", *more).stdout
    found, wanted = read_metrics(tmp_path / "again").training, read_metrics(save).training
    assert [row[0] for row in found] == [row[0] for row in wanted]
    assert found[STOP][1] == pytest.approx(wanted[STOP][1], rel=1e-6), "the same weights meet the same batch"
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=1e-3)
    mine_saved, theirs_saved = weights(tmp_path / "again", ITERATIONS), weights(save, ITERATIONS)
    moments = [name for name in theirs_saved if "exp_avg" in name]
    assert mine_saved.keys() == theirs_saved.keys()
    assert moments
    for name in moments:  # moments that began anew at the checkpoint would lack a third of the first and half of the second
        assert (mine_saved[name] - theirs_saved[name]).norm() <= 0.01 * theirs_saved[name].norm(), name


def test_fp16_learns_as_fp32_does_and_goes_on_with_its_scale(launch: Launch, tmp_path: Path) -> None:
    scaling = ("--initial-loss-scale", 2.0**15, "--loss-scale-window", 5, "--hysteresis", 1)
    launch(1, tmp_path / "fp16", *scaling, dtype="--fp16")
    launch(1, tmp_path / "fp32", dtype=None)
    found, wanted = read_metrics(tmp_path / "fp16").training, read_metrics(tmp_path / "fp32").training
    assert found[0][1] == pytest.approx(wanted[0][1], abs=0.01)
    assert found[-1][1] == pytest.approx(wanted[-1][1], abs=0.25)
    stop_at(tmp_path / "fp16", STOP, tmp_path / "again")
    launch(1, tmp_path / "again", *scaling, dtype="--fp16")
    again, whole = (
        [json.loads(line).get("loss_scale") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("again", "fp16")
    )
    assert again == whole


def _skip_without(recipe: str) -> None:
    least = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}[recipe]
    if torch.cuda.get_device_capability(0) < least:
        pytest.skip(f"{recipe} needs compute capability {least}")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_the_emulation_follows_the_hardware(recipe: str, launch: Launch, tmp_path: Path) -> None:
    _skip_without(recipe)
    fp8 = ("--fp8-format", "hybrid", "--fp8-recipe", recipe)
    launch(1, tmp_path / "hardware", *fp8)
    launch(1, tmp_path / "emulated", *fp8, "--fp8-emulation")
    found, wanted = read_metrics(tmp_path / "emulated").training, read_metrics(tmp_path / "hardware").training
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=0.05)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_learns_as_bf16_does(recipe: str, launch: Launch, tmp_path: Path) -> None:
    _skip_without(recipe)
    launch(1, tmp_path / "fp8", "--fp8-format", "hybrid", "--fp8-recipe", recipe)
    launch(1, tmp_path / "bf16")
    found, wanted = read_metrics(tmp_path / "fp8").training, read_metrics(tmp_path / "bf16").training
    assert [row[1] for row in found] != [row[1] for row in wanted], "FP8 was used"
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=0.1)


def test_attention_within_documents_on_a_gpu(launch: Launch, tmp_path: Path) -> None:
    launch(1, tmp_path / "within", "--reset-attention-mask", "--micro-batch-size", 2)
    launch(1, tmp_path / "one by one", "--reset-attention-mask", "--micro-batch-size", 1)
    launch(1, tmp_path / "across")
    within, single, across = (read_metrics(tmp_path / name).training for name in ("within", "one by one", "across"))
    assert within[0][1] == pytest.approx(single[0][1], abs=0.01)
    assert abs(within[0][1] - across[0][1]) > 1e-4


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_two_tensor_ranks_train_the_model_of_one_process(launch: Launch, tmp_path: Path) -> None:
    printed = launch(2, tmp_path / "tensor", *TENSOR, "--sequence-parallel").stdout
    assert "2 x cuda: tensor 2, context 1, pipeline 1, data 1" in printed
    launch(1, tmp_path / "one")
    found, wanted = read_metrics(tmp_path / "tensor"), read_metrics(tmp_path / "one")
    assert found.training[0][1] == pytest.approx(wanted.training[0][1], abs=0.01)
    for mine, theirs in zip(found.training, wanted.training, strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=0.05)
    for mine_row, theirs_row in zip(found.validation, wanted.validation, strict=True):
        assert mine_row == pytest.approx(theirs_row, abs=0.05)


def test_nothing_of_the_cpu_seam_is_installed(launch: Launch, tmp_path: Path) -> None:
    script = (Path(__file__).with_name("symbols_after_a_run.py"), tmp_path / "symbols.json")
    launch(PROCESSES, tmp_path / "save", "--train-iters", 2, "--lr-warmup-iters", 1, script=script)
    assert json.loads((tmp_path / "symbols.json").read_text()) == {"kind": "cuda", "installed": [], "changed": []}
