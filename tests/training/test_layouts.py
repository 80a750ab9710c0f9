"""Every layout trains the same model: losses and gradient norms equal those of one process, and so does a run resumed elsewhere."""

import json
from pathlib import Path

import pytest

from megatron_instruct.models.architecture import Architecture

from .conftest import (
    CONTEXT,
    FIRST_STEP_IDLE,
    FULLY_SHARDED,
    INTERLEAVED,
    ITERATIONS,
    MORE,
    MORE_GROWING,
    MORE_RESUMED,
    MORE_WITHIN,
    OVERLAPPED,
    PIPELINE,
    SEQUENCE,
    SHARDED,
    TENSOR,
    TWO,
    TWO_KINDS,
    TWO_RESUMED,
    Runs,
    assert_same_end,
    read_metrics,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")

FOUR = {
    "tensor pipeline": (*TENSOR, *PIPELINE),
    "initial four": (*TENSOR, *PIPELINE, *FIRST_STEP_IDLE),
}
FOUR_MORE = {
    "pipeline distributed optimizer": (*PIPELINE, *SHARDED),
    "tensor overlapped": (*SEQUENCE, *OVERLAPPED),
    "interleaved distributed optimizer": (*INTERLEAVED, *SHARDED),
    "tensor distributed optimizer": (*TENSOR, *SHARDED),
    "fully sharded tensor": (*FULLY_SHARDED, *TENSOR),
    "tensor context": (*SEQUENCE, *CONTEXT),
    "pipeline context distributed optimizer": (*PIPELINE, *CONTEXT, *SHARDED),
}


@pytest.fixture(scope="module")
def four(runs: Runs) -> dict[str, Path]:
    return runs(4, FOUR, {})


def assert_equal_runs(folder: Path, reference: Path, *, tolerance: float) -> None:
    found, wanted = read_metrics(folder), read_metrics(reference)
    assert [row[0] for row in found.training] == list(range(1, ITERATIONS + 1))
    assert [row[0] for row in found.validation] == [0, 10, 20]
    for mine, theirs in zip(found.training, wanted.training, strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance, rel=0.0)
    for one, other in zip(found.validation, wanted.validation, strict=True):
        assert one == pytest.approx(other, abs=tolerance, rel=0.0)


def test_the_reference_learns(one: dict[str, Path]) -> None:
    losses = [row[1] for row in read_metrics(one["reference"]).training]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro batch 4", "recompute all", "recompute the first", "recompute attention"])
def test_one_process_cut_otherwise_equals_the_reference(name: str, one: dict[str, Path], one_more: dict[str, Path]) -> None:
    assert_equal_runs(one_more[name], one["reference"], tolerance=1e-5)


def test_weight_gradients_added_up_by_the_product_are_those_added_up_apart(one: dict[str, Path]) -> None:
    assert_equal_runs(one["weight gradients apart"], one["reference"], tolerance=1e-5)
    settings = [json.loads((one[name] / "manifest.json").read_text()) for name in ("reference", "weight gradients apart")]
    assert settings[0] != settings[1]


def test_a_loss_does_not_depend_on_the_rows_that_pad_the_vocabulary(one: dict[str, Path]) -> None:
    """As their number does on the tensor ranks."""
    assert_equal_runs(one["other padding"], one["reference"], tolerance=1e-5)


def test_validation_takes_whole_batches_while_the_batch_grows(one: dict[str, Path]) -> None:
    grown, reference = (read_metrics(one[name]).validation for name in ("growing batch", "reference"))
    assert grown[0] == pytest.approx(reference[0], abs=1e-6, rel=0.0), "the same samples before the first step, in other micro batches"
    assert [iteration for iteration, _ in grown] == [iteration for iteration, _ in reference]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_GROWING)
def test_a_batch_that_grows_is_the_same_in_two_processes(name: str, one: dict[str, Path], more: dict[str, Path]) -> None:
    assert_equal_runs(more[name], one["growing batch"], tolerance=1e-5)
    lines = [json.loads(line) for line in (more[name] / "metrics.jsonl").read_text().splitlines()]
    sizes = [(line["batch_size"], line["tokens"]) for line in lines if "loss" in line]
    assert [size for size, _ in sizes] == [4, 4, 4, 4, 6, 6, 6] + [8] * 13
    assert sizes[-1][1] == 64 * (4 * 4 + 3 * 6 + 13 * 8)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(name: str, one: dict[str, Path], two: dict[str, Path]) -> None:
    assert_equal_runs(two[name], one["reference"], tolerance=1e-5)


@pytest.mark.parametrize("name", TWO_KINDS)
def test_muon_over_tensor_ranks_and_a_window_over_context_ranks_equal_one_process(
    name: str, one: dict[str, Path], two: dict[str, Path]
) -> None:
    alone = one[name.split()[0]]
    assert_equal_runs(two[name], alone, tolerance=1e-5)
    assert abs(read_metrics(alone).training[-1][1] - read_metrics(one["reference"]).training[-1][1]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_two_processes_laid_out_in_rarer_ways_equal_one(name: str, one: dict[str, Path], more: dict[str, Path]) -> None:
    assert_equal_runs(more[name], one["reference"], tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in FOUR if not name.startswith("initial")])
def test_four_processes_equal_one(name: str, one: dict[str, Path], four: dict[str, Path]) -> None:
    assert_equal_runs(four[name], one["reference"], tolerance=1e-5)


@pytest.mark.slow
def test_four_processes_laid_out_in_rarer_ways_equal_one_and_a_run_of_two_goes_on_in_four(
    runs: Runs, one: dict[str, Path], two: dict[str, Path]
) -> None:
    resumed: dict[str, tuple[Path | str, tuple[object, ...]]] = {
        "two to four": (two["distributed optimizer"], (*TENSOR, *PIPELINE, *SHARDED)),
        "fully sharded two to four": (two["fully sharded"], FULLY_SHARDED),
    }
    for folder in runs(4, FOUR_MORE, resumed).values():
        assert_equal_runs(folder, one["reference"], tolerance=1e-5)


def test_resumed_in_one_process_equals_the_undisturbed_run_exactly(one: dict[str, Path]) -> None:
    assert_same_end(one["again reference"], one["reference"])


@pytest.mark.slow
def test_means_over_a_log_interval_survive_a_resume_between_two_lines(one_more: dict[str, Path]) -> None:
    assert [row[0] for row in read_metrics(one_more["logged every 4"]).training] == [4, 8, 10, 12, 16, 20]
    assert_same_end(one_more["again logged every 4"], one_more["logged every 4"])


@pytest.mark.slow
def test_a_blend_is_the_same_in_two_processes_and_differs_from_its_parts(one: dict[str, Path], more: dict[str, Path]) -> None:
    assert_equal_runs(more["blend"], one["blend"], tolerance=1e-5)
    assert read_metrics(one["blend"]).training[0][1] != read_metrics(one["reference"]).training[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_WITHIN)
def test_attention_within_documents_is_the_same_in_two_processes_and_another_than_without(
    name: str, one: dict[str, Path], one_more: dict[str, Path], more: dict[str, Path]
) -> None:
    assert_equal_runs(more[name], one_more["within documents"], tolerance=1e-5)
    assert read_metrics(one_more["within documents"]).training[0][1] != read_metrics(one["reference"]).training[0][1]


@pytest.mark.slow
def test_bf16_stays_near_fp32(one: dict[str, Path], one_more: dict[str, Path]) -> None:
    found, wanted = read_metrics(one_more["bf16"]).training, read_metrics(one["reference"]).training
    assert len(found) == 3
    for mine, theirs in zip(found, wanted, strict=False):
        assert mine[1] == pytest.approx(theirs[1], abs=0.02)
        assert mine[1] != theirs[1]


@pytest.mark.parametrize("name", TWO_RESUMED)
def test_resumed_in_two_processes(name: str, two: dict[str, Path]) -> None:
    source = two[TWO_RESUMED[name][0]]
    if name.startswith("again"):
        assert_same_end(two[name], source)
    else:
        assert_equal_runs(two[name], source, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RESUMED)
def test_resumed_in_two_processes_laid_out_in_rarer_ways(name: str, more: dict[str, Path]) -> None:
    assert_same_end(more[name], more[MORE_RESUMED[name][0]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["one to tensor", "one to interleaved", "interleaved to data", "one to fully sharded", "sharded optimizer to fully sharded"],
)
def test_a_run_goes_on_in_another_layout(name: str, one: dict[str, Path], more: dict[str, Path]) -> None:
    assert_equal_runs(more[name], one["reference"], tolerance=1e-5)


@pytest.mark.slow
def test_bf16_goes_on_from_the_master_weights_of_every_kind_of_optimizer(runs: Runs) -> None:
    kinds = {"plain": ("--bf16",), "distributed": ("--bf16", *SHARDED), "fully sharded": ("--bf16", *FULLY_SHARDED)}
    pairs = [(source, other) for source in kinds for other in kinds if source != other]
    folders = runs(2, kinds, {f"{source} to {other}": (source, kinds[other]) for source, other in pairs})
    for source, other in pairs:
        found, wanted = read_metrics(folders[f"{source} to {other}"]).training, read_metrics(folders[source]).training
        assert [row[0] for row in found] == list(range(1, ITERATIONS + 1))
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine[1] == pytest.approx(theirs[1], abs=1e-3), f"{source} to {other}"


def test_initial_weights_are_the_same_in_every_layout(one: dict[str, Path], four: dict[str, Path]) -> None:
    import torch

    alone, spread = weights(one["initial"], 1), weights(four["initial four"], 1)
    model = [name for name in alone if not name.startswith("optimizer") and "chained" not in name]
    assert len(model) > 8
    for name in model:
        assert torch.equal(alone[name], spread[name]), name
    described = json.loads((one["initial"] / "iter_0000001" / "manifest.json").read_text())["facts"]["architecture"]
    size = Architecture.from_json(described)
    padding = 2 * (512 - size.vocab_size) * size.hidden_size
    assert sum(alone[name].numel() for name in model) == size.num_parameters + padding
