"""fp16: close to fp32, with a scale of the loss that follows the gradients, is saved and resumed, and steps that overflow counted."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.config import parse
from megatron_instruct.errors import ConfigError, TrainingError
from megatron_instruct.training.config import PretrainConfig

from .conftest import ITERATIONS, assert_same_end

pytestmark = pytest.mark.filterwarnings("ignore")
FP16 = ("--fp16", "--initial-loss-scale", 2.0**11, "--loss-scale-window", 5, "--hysteresis", 1)
OVERFLOWS = ("--fp16", "--hysteresis", 1, "--train-iters", 12)
"""2^32 is at 2^20 after twelve steps: still far too much."""
Runs = Callable[..., dict[str, Path]]


@pytest.fixture(scope="module")
def fp16(runs: Runs) -> dict[str, Path]:
    return runs(1, {"fp32": (), "fp16": FP16, "overflows": OVERFLOWS}, {"again": ("fp16", FP16), "goes on": ("overflows", OVERFLOWS)})


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


def test_fp16_stays_near_fp32(fp16: dict[str, Path]) -> None:
    found, wanted = rows(fp16["fp16"]), rows(fp16["fp32"])
    assert [row["loss"] for row in found] != [row["loss"] for row in wanted]
    assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], abs=2e-3), "the same weights and the same batch"
    assert found[-1]["overflows"] < ITERATIONS / 2
    assert found[-1]["loss"] == pytest.approx(wanted[-1]["loss"], abs=0.25), "the batches that overflowed are lost"
    assert [row["lr"] for row in found] == [row["lr"] for row in wanted]


def test_the_scale_is_halved_at_an_overflow_and_doubled_after_a_window_without(fp16: dict[str, Path]) -> None:
    found, good = rows(fp16["fp16"]), 0
    scale = 2.0**11
    for before, row in itertools.pairwise([{"overflows": 0}, *found]):
        good = 0 if row["overflows"] > before["overflows"] else good + 1
        scale *= 0.5 if good == 0 else 2.0 if good % 5 == 0 else 1.0
        assert row["loss_scale"] == scale


def test_a_stopped_fp16_run_goes_on_bit_for_bit_with_its_scale(fp16: dict[str, Path]) -> None:
    assert_same_end(fp16["again"], fp16["fp16"])
    kept = ("iteration", "loss_scale", "overflows", "lr")
    again, whole = ([[row[name] for name in kept] for row in rows(fp16[run])] for run in ("again", "fp16"))
    assert again == whole


def test_a_checkpoint_before_the_first_update_can_be_resumed(fp16: dict[str, Path]) -> None:
    for name in ("overflows", "goes on"):
        assert [row["overflows"] for row in rows(fp16[name])] == list(range(1, 13))
        assert rows(fp16[name])[-1]["loss_scale"] == 2.0**20


def test_a_run_whose_every_step_overflows_is_ended() -> None:
    from megatron_instruct.training.step import StepResult, check_overflows

    check_overflows(49, StepResult(loss=6.0, grad_norm=None))
    with pytest.raises(TrainingError, match="50 steps in a row overflowed in fp16, the last one at a loss of 6"):
        check_overflows(50, StepResult(loss=6.0, grad_norm=None))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bf16", "--fp16"), "bf16=True and fp16=True exclude each other"),
        (("--loss-scale", 1024), "loss_scale=1024.0 goes with fp16=True; set it, or drop loss_scale"),
        (("--hysteresis", 3), "hysteresis=3 goes with fp16=True"),
        (("--fp16", "--loss-scale", 8, "--hysteresis", 3), "hysteresis=3 goes with a loss_scale that is left out"),
        (("--lr-wsd-decay-style", "linear"), "lr_wsd_decay_style=linear goes with lr_decay_style=WSD"),
        (("--loss-spike-window", 50), "loss_spike_window=50 goes with loss_spike_factor"),
        (("--fp16", "--loss-scale", 0), "loss_scale=0.0 must be a positive number"),
        (("--fp16", "--initial-loss-scale", 2, "--min-loss-scale", 4), "min_loss_scale=4.0 is above initial_loss_scale=2.0"),
        (("--fp16", "--hysteresis", 0), "hysteresis=0 must be at least 1"),
        (("--fp16", "--loss-scale-window", 0), "loss_scale_window=0 must be at least 1"),
    ],
)
def test_impossible_scales_are_refused(words: tuple[object, ...], message: str, flags: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, flags(tmp_path, *words), prog="pretrain.py")
