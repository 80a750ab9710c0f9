"""The test after the last step: on which documents, with which figures, and once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import SHARDED, TENSOR, Runs

pytestmark = pytest.mark.filterwarnings("ignore")
SHARES = ("--split", "80,10,10")


def lines_of_test(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "test_loss" in row]


@pytest.fixture(scope="module")
def alone(runs: Runs, data: Path) -> dict[str, Path]:
    same = ("--data-path", "--train-data-path", data, "--valid-data-path", data, "--test-data-path")
    return runs(
        1,
        {
            "share": SHARES,
            "same": (*same, data),
            "blend": (*same, 0.3, data, 0.7, data),
            "only at the end": (*same, data, "--eval-interval", "None"),
            "strict": (*same, data, "--strict-epochs"),
        },
        {"again share": ("share", SHARES)},
    )


def test_the_figures_are_those_of_a_validation_on_the_same_data(alone: dict[str, Path]) -> None:
    rows = [json.loads(line) for line in (alone["same"] / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == {"iteration": 20, "test_loss": [row["validation_loss"] for row in rows if "validation_loss" in row][-1]}
    assert json.loads((alone["same"] / "manifest.json").read_text())["facts"] == rows[-1]
    assert lines_of_test(alone["only at the end"]) == rows[-1:] and lines_of_test(alone["strict"])


def test_the_data_sets_of_a_blend_are_told_apart(alone: dict[str, Path]) -> None:
    (row,) = lines_of_test(alone["blend"])
    assert len(row["test_loss_of"]) == 2
    assert min(row["test_loss_of"].values()) < row["test_loss"] < max(row["test_loss_of"].values())


def test_every_layout_and_a_resumed_run_get_the_same_figures(alone: dict[str, Path], runs: Runs) -> None:
    assert lines_of_test(alone["again share"]) == lines_of_test(alone["share"])
    for folder in runs(2, {"data": (*SHARES, *SHARDED), "tensor": (*SHARES, *TENSOR)}, {}).values():
        assert lines_of_test(folder)[0]["test_loss"] == pytest.approx(lines_of_test(alone["share"])[0]["test_loss"], rel=1e-5)


def test_a_run_killed_in_its_test_does_it_again_and_records_it_once(
    alone: dict[str, Path], flags: Callable[..., list[str]], start: Any
) -> None:
    manifest, before = alone["share"] / "manifest.json", lines_of_test(alone["share"])
    written = manifest.read_text()
    manifest.unlink()
    process = start("pretrain.py", *flags(alone["share"], *SHARES))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (lines_of_test(alone["share"]), json.loads(manifest.read_text())["facts"]) == (before, json.loads(written)["facts"])
    assert printed.count("test after iteration 20") == 1


def test_a_finished_run_is_refused_other_data_to_be_tested_on(
    alone: dict[str, Path], flags: Callable[..., list[str]], start: Any, data: Path
) -> None:
    same = ("--data-path", "--train-data-path", data, "--valid-data-path", data)
    process = start("pretrain.py", *flags(alone["same"], *same, "--test-data-path", data, data))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "test_data=" in errors
