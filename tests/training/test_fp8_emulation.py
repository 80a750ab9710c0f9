"""Emulated FP8 learns as fp32 does, remembers its scales bit for bit, and does not depend on how the model is laid out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import (
    CONTEXT,
    FIRST_STEP_IDLE,
    GROWING,
    INTERLEAVED,
    MUON,
    PIPELINE,
    SEQUENCE,
    STOP,
    TENSOR,
    assert_same_end,
    read_metrics,
)

pytestmark = pytest.mark.filterwarnings("ignore")
Runs = Callable[..., dict[str, Path]]
FP8 = ("--fp8-emulation", "--fp8-format", "hybrid", "--ffn-hidden-size", 192)
DELAYED = (*FP8, "--fp8-amax-history-len", 4)
RECIPES: dict[str, tuple[object, ...]] = {
    "tensorwise": (*FP8, "--fp8-recipe", "tensorwise"),
    "blockwise": (*FP8, "--fp8-recipe", "blockwise", "--fp8-format", "e4m3"),
    "mxfp8": (*FP8, "--fp8-recipe", "mxfp8", "--fp8-format", "e4m3"),
    "most recent": (*DELAYED, "--fp8-amax-compute-algo", "most_recent"),
    "margin": (*DELAYED, "--fp8-margin", 1),
    "first and last": (*FP8, "--fp8-recipe", "tensorwise", "--first-last-layers-bf16"),
    "recomputed": (*DELAYED, "--recompute-granularity", "full"),
    "bf16": (*DELAYED, "--bf16"),
}
DROPOUT = ("--transformer-config", "hidden_dropout", 0.1, "attention_dropout", 0.1)
TOGETHER: dict[str, tuple[object, ...]] = {
    "tensorwise growing": (*RECIPES["tensorwise"], *GROWING),
    "blockwise muon": (*RECIPES["blockwise"], *MUON),
    "mxfp8 recomputed": (*RECIPES["mxfp8"], "--recompute-granularity", "full", *DROPOUT),
    "delayed with all": (*DELAYED, *GROWING, *MUON, *DROPOUT, "--bf16", "--async-save"),
}
ONE_MICROBATCH = (*DELAYED, *FIRST_STEP_IDLE, "--global-batch-size", 4, "--micro-batch-size", 4, "--save-interval", 1)
LAYOUTS: dict[str, tuple[object, ...]] = {"tensor": TENSOR, "sequence": SEQUENCE, "pipeline": PIPELINE, "context": CONTEXT, "data": ()}


@pytest.fixture(scope="module")
def delayed(runs: Runs) -> dict[str, Path]:
    kinds = {"fp32": ("--ffn-hidden-size", 192), "delayed": DELAYED, "one microbatch": ONE_MICROBATCH}
    return runs(1, kinds, {"again": ("delayed", DELAYED)})


@pytest.fixture(scope="module")
def recipes(runs: Runs, delayed: dict[str, Path]) -> dict[str, Path]:
    return runs(1, RECIPES, {})


def scales(folder: Path, iteration: int) -> dict[str, Any]:
    """Return what the layers remember of each tensor, by name, as a checkpoint holds it."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    state: dict[str, Any] = {name: None for name in reader.read_metadata().state_dict_metadata if ".fp8._extra_state" in name}
    load(state, storage_reader=reader, no_dist=True)
    return {name: of_layer for name, (of_layer,) in state.items()}


def assert_near(found: Path, wanted: Path) -> None:
    mine, theirs = read_metrics(found), read_metrics(wanted)
    assert [row[1] for row in mine.training] != [row[1] for row in theirs.training], "8 bits leave a trace"
    for row, other in zip(mine.training, theirs.training, strict=True):
        assert row[1] == pytest.approx(other[1], abs=0.02)
    assert mine.validation[-1][1] == pytest.approx(theirs.validation[-1][1], abs=0.02)


def test_delayed_scaling_learns_as_fp32_does(delayed: dict[str, Path]) -> None:
    assert_near(delayed["delayed"], delayed["fp32"])


def test_a_stopped_run_goes_on_bit_for_bit_with_its_scales(delayed: dict[str, Path]) -> None:
    import torch

    assert_same_end(delayed["again"], delayed["delayed"])
    mine, theirs = scales(delayed["again"], 20), scales(delayed["delayed"], 20)
    assert mine.keys() == theirs.keys()
    assert len(mine) == 4 * 4, "four linear layers in each of four layers"
    for name in mine:
        assert torch.equal(mine[name]["scale"], theirs[name]["scale"]), name
        assert torch.equal(mine[name]["amax_history"], theirs[name]["amax_history"]), name
        assert (mine[name]["scale"] > 1).all() and (mine[name]["amax_history"][1:] > 0).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "bf16"])
def test_every_recipe_learns_as_fp32_does(name: str, recipes: dict[str, Path], delayed: dict[str, Path]) -> None:
    assert_near(recipes[name], delayed["fp32"])


@pytest.mark.slow
def test_every_recipe_goes_on_bit_for_bit_beside_whatever_else_is_kept(runs: Runs) -> None:
    found = runs(1, TOGETHER, {f"again {name}": (name, more) for name, more in TOGETHER.items()})
    for name in TOGETHER:
        assert_same_end(found[f"again {name}"], found[name])


@pytest.mark.slow
def test_recipes_differ_from_one_another(recipes: dict[str, Path], delayed: dict[str, Path]) -> None:
    folders = {**recipes, "delayed": delayed["delayed"]}
    folders.pop("recomputed")
    assert len({read_metrics(folder).training[-1][1] for folder in folders.values()}) == len(folders)


@pytest.mark.slow
def test_recomputation_changes_nothing(recipes: dict[str, Path], delayed: dict[str, Path]) -> None:
    assert read_metrics(recipes["recomputed"]) == read_metrics(delayed["delayed"])


@pytest.mark.slow
def test_with_bf16_what_is_left_is_in_bf16(recipes: dict[str, Path], delayed: dict[str, Path]) -> None:
    mine, theirs = read_metrics(recipes["bf16"]), read_metrics(delayed["delayed"])
    for row, other in zip(mine.training, theirs.training, strict=True):
        assert row[1] == pytest.approx(other[1], abs=0.05)


@pytest.mark.slow
def test_the_largest_values_of_a_tensor_are_those_over_all_ranks_that_hold_parts_of_it(runs: Runs, delayed: dict[str, Path]) -> None:
    """One microbatch, before any scale but 1 is used: a rank that kept to its own part would be off by more than rounding."""
    import torch

    micro = {"data": ("--micro-batch-size", 2)}
    found = runs(2, {name: (*ONE_MICROBATCH, *layout, *micro.get(name, ())) for name, layout in LAYOUTS.items()}, {})
    theirs = scales(delayed["one microbatch"], 1)
    for name, folder in found.items():
        assert read_metrics(folder).training[0][1] == pytest.approx(read_metrics(delayed["one microbatch"]).training[0][1], abs=1e-4)
        mine = scales(folder, 1)
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            latest = mine[key]["amax_history"].amax(0)
            assert (latest > 0).all()
            torch.testing.assert_close(latest, theirs[key]["amax_history"].amax(0), rtol=0.02, atol=0.0, msg=f"{name} {key}")


@pytest.mark.slow
def test_with_bf16_layouts_stay_near_one_process(runs: Runs, recipes: dict[str, Path]) -> None:
    layouts = {"tensor": SEQUENCE, "pipeline": PIPELINE, "context": CONTEXT, "data": ("--use-distributed-optimizer",)}
    found = runs(2, {name: (*DELAYED, "--bf16", *layout) for name, layout in layouts.items()}, {})
    wanted = read_metrics(recipes["bf16"]).training
    for name, folder in found.items():
        for row, other in zip(read_metrics(folder).training, wanted, strict=True):
            assert row[1] == pytest.approx(other[1], abs=0.02), name


@pytest.mark.slow
def test_recipes_without_a_memory_stay_near_one_process_over_tensor_ranks(runs: Runs, recipes: dict[str, Path]) -> None:
    """A rank scales its own part, as Transformer Engine does: finer than one process does, hence near it and not equal."""
    found = runs(2, {name: (*RECIPES[name], *SEQUENCE) for name in ("tensorwise", "blockwise", "mxfp8")}, {})
    for name, folder in found.items():
        for row, other in zip(read_metrics(folder).training, read_metrics(recipes[name]).training, strict=True):
            assert row[1] == pytest.approx(other[1], abs=0.01), name


@pytest.mark.slow
def test_layouts_share_their_scales(runs: Runs, delayed: dict[str, Path]) -> None:
    """Rounding may put a number on the other side of a step of 8 bits, so that layouts are near each other, not equal to 1e-5."""
    import torch

    layouts = {**LAYOUTS, "interleaved": INTERLEAVED}
    found = runs(
        2, {name: (*DELAYED, *layout) for name, layout in layouts.items()}, {"resharded": (delayed["delayed"], (*DELAYED, *PIPELINE))}
    )
    wanted = read_metrics(delayed["delayed"])
    for name, folder in found.items():
        for row, other in zip(read_metrics(folder).training, wanted.training, strict=True):
            assert row[1] == pytest.approx(other[1], abs=0.005), name
    theirs = scales(delayed["delayed"], STOP)
    for name in ("tensor", "sequence", "pipeline", "context", "interleaved"):
        mine = scales(found[name], STOP)
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            assert torch.allclose(mine[key]["scale"], theirs[key]["scale"], rtol=0.25), (name, key)
