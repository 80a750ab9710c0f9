"""The estimates beside published runs: near enough on rows that no constant was fitted to, and the constants are what the others give."""

import statistics

import pytest

from megatron_instruct.planning.constants import load_constants
from megatron_instruct.planning.validation import fit, mean_error, published_runs, relative_error, table

JUDGING = [run for run in published_runs() if not run.for_fitting]


def test_mean_error_of_mfu_is_at_most_10_percent_on_rows_that_were_not_fitted() -> None:
    assert len(JUDGING) >= 20
    assert mean_error(JUDGING, load_constants()) <= 0.10


@pytest.mark.parametrize("source", sorted({run.source for run in JUDGING}))
def test_so_it_is_for_each_source(source: str) -> None:
    assert mean_error([run for run in JUDGING if run.source == source], load_constants()) <= 0.12


def test_estimates_lean_to_neither_side() -> None:
    assert abs(statistics.fmean(relative_error(run, load_constants()) for run in JUDGING)) <= 0.05


def test_the_constants_are_what_the_rows_for_fitting_give() -> None:
    """A fit that starts from them stays; so none was moved by hand to please the rows that judge."""
    assert fit() == load_constants()


def test_every_second_row_of_a_source_is_for_fitting_and_names_where_it_is_from() -> None:
    by_source: dict[str, list[bool]] = {}
    for run in published_runs():
        assert "arXiv:" in run.cite or "github.com/" in run.cite
        by_source.setdefault(run.source, []).append(run.for_fitting)
    assert all(split == [number % 2 == 0 for number in range(len(split))] for split in by_source.values())


@pytest.mark.parametrize(
    ("source", "model", "given", "expected"),
    [
        # the sources' own statements of MFU, with their count of operations: whole squares of attention, of the bf16 peak
        ("Korthikanti 2022", "gpt-22B", "seconds", 0.314),
        ("Megatron-LM H100", "gpt-462B-h", "tflops", 0.457),
    ],
)
def test_published_figures_are_turned_into_mfu_as_this_project_counts(source: str, model: str, given: str, expected: float) -> None:
    run = next(run for run in published_runs() if run.source == source and run.model == model)
    assert given in run.given
    assert run.mfu == pytest.approx(expected, abs=0.002)


def test_korthikantis_seconds_and_his_mfu_agree() -> None:
    """22B in 1.10 s is an MFU of 41.5 % there: 72 B L s h^2 (1 + s/6h + V/12hL) operations on 8 GPUs of 312 TFLOP/s."""
    run = next(run for run in published_runs() if run.model == "gpt-22B" and run.given["seconds"] == 1.10)
    layers, hidden, sequence = 48, 6144, 2048
    operations = 72 * 4 * layers * sequence * hidden**2 * (1 + sequence / (6 * hidden) + 51200 / (12 * hidden * layers))
    assert operations / run.seconds / 8 / 312e12 == pytest.approx(0.415, abs=0.002), "seconds are rounded"


def test_the_table_ends_with_both_errors() -> None:
    lines = table().splitlines()
    assert len(lines) == 1 + len(published_runs()) + 2
    assert f"mean relative error of MFU over the {len(JUDGING)} rows for judging: " in lines[-1]
