"""A mixture of experts over processes trains as in one: losses, gradient norms and the router's own losses, also when it goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import ITERATIONS, PIPELINE, SEQUENCE, SHARDED, Runs, assert_same_end, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = ("--preset", "tiny-experts", "--moe-z-loss-coeff", "1e-3")
OVER_TWO = (*EXPERTS, "--expert-model-parallel-size", 2)
BY_SEQUENCE = (*EXPERTS, "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", 0.1)
LAYOUTS: dict[str, tuple[object, ...]] = {"experts over two": OVER_TWO, "distributed optimizer": (*OVER_TWO, *SHARDED)}
MORE: dict[str, tuple[object, ...]] = {
    "all tokens to all": (*OVER_TWO, "--moe-token-dispatcher-type", "allgather"),
    "experts cut instead": (*EXPERTS, *SEQUENCE),
    "recompute": (*OVER_TWO, "--recompute-granularity", "full"),
    "overlapped": (*OVER_TWO, *SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"),
}
FOUR: dict[str, tuple[object, ...]] = {
    "experts x tensor": (*OVER_TWO, *SEQUENCE, *SHARDED),
    "experts whole x tensor": (*OVER_TWO, *SEQUENCE, "--expert-tensor-parallel-size", 1, *SHARDED),
    "experts x pipeline": (*OVER_TWO, *PIPELINE, *SHARDED),
    "experts over four": (*EXPERTS, "--expert-model-parallel-size", 4),
}


def rows(folder: Path) -> list[list[float]]:
    names = ("loss", "grad_norm", "load_balancing_loss", "router_z_loss")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in names] for row in found if "loss" in row]


def assert_equal_experts(folder: Path, reference: Path) -> None:
    found, wanted = rows(folder), rows(reference)
    assert len(found) == ITERATIONS
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-6)  # the router's z-loss is about 2
    for mine_row, theirs_row in zip(read_metrics(folder).validation, read_metrics(reference).validation, strict=True):
        assert mine_row == pytest.approx(theirs_row, abs=1e-5)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> dict[str, Path]:
    return runs(1, {"reference": EXPERTS, "by sequence": BY_SEQUENCE}, {})


@pytest.fixture(scope="module")
def over_two(runs: Runs) -> dict[str, Path]:
    return runs(2, LAYOUTS, {"again": ("distributed optimizer", LAYOUTS["distributed optimizer"])})


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_over_two_processes_equal_one(name: str, alone: dict[str, Path], over_two: dict[str, Path]) -> None:
    assert_equal_experts(over_two[name], alone["reference"])


@pytest.mark.slow
def test_a_run_with_experts_goes_on_as_if_it_had_not_stopped(over_two: dict[str, Path]) -> None:
    assert_same_end(over_two["again"], over_two["distributed optimizer"])


def test_the_loss_that_balances_experts_is_the_one_that_was_asked_for(alone: dict[str, Path]) -> None:
    of_microbatch, of_sequence = rows(alone["reference"]), alone["by sequence"]
    assert all(1.0 <= row[2] < 2.0 for row in of_microbatch), "1 is perfect balance"
    lines = [json.loads(line) for line in (of_sequence / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seq_load_balancing_loss"] >= 1.0 for line in lines if "loss" in line)


def test_the_router_s_losses_weigh_the_same_where_few_tokens_count_in_the_loss(torchrun_session: Any) -> None:
    done = torchrun_session(1, Path(__file__).with_name("expert_losses_beside_weights.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["added"] > 0.01
    assert found["difference"] < 1e-5 * found["added"]


@pytest.mark.slow
def test_experts_over_two_processes_laid_out_in_rarer_ways_equal_one(runs: Runs, alone: dict[str, Path]) -> None:
    for folder in runs(2, MORE, {}).values():
        assert_equal_experts(folder, alone["reference"])


@pytest.mark.slow
def test_experts_over_four_processes_equal_one_and_a_run_goes_on_over_other_experts(
    runs: Runs, alone: dict[str, Path], over_two: dict[str, Path]
) -> None:
    resumed = {"from two": (over_two["distributed optimizer"], FOUR["experts x tensor"])}
    for folder in runs(4, FOUR, resumed).values():
        assert_equal_experts(folder, alone["reference"])
