"""The log: one line an interval, metrics.jsonl without duplicates after a resume, TensorBoard event files."""

import json
from pathlib import Path

import pytest

from megatron_instruct.training.metrics import Metrics, RunSize

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = RunSize(train_iters=10, tokens_per_iteration=100, flops_per_token=1e3, peak_flops=1e9)


def metrics(folder: Path, *, start: int = 0, tensorboard: Path | None = None, writes: bool = True) -> Metrics:
    return Metrics(folder, SIZE, start_iteration=start, tensorboard_dir=tensorboard, writes=writes)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fill(folder: Path, *, start: int, end: int) -> None:
    with metrics(folder, start=start) as log:
        if start == 0:
            log.validation(0, 9.0)
        for iteration in range(start + 1, end + 1):
            log.training(iteration, loss=1.0 / iteration, lr=0.1, grad_norm=2.0)
            if iteration % 2 == 0:
                log.validation(iteration, 3.0)


def test_a_line_says_loss_rate_share_of_peak_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(tmp_path) as log:
        log.restart_clock(2)
        log.training(4, loss=1.25, lr=0.1, grad_norm=2.0)
    out = capsys.readouterr().out
    for part in ("iteration  4/10", "loss 1.2500", "lr 1.000e-01", "grad norm 2.000", "tokens/s", "of peak", "left"):
        assert part in out
    (row,) = rows(tmp_path)
    assert row["tokens"] == 400
    assert row["tokens_per_second"] == pytest.approx(2 * 100 / row["seconds"])
    assert row["peak_fraction"] == pytest.approx(row["tokens_per_second"] * 1e3 / 1e9)


def test_a_resumed_run_repeats_no_row_and_loses_none(tmp_path: Path) -> None:
    fill(tmp_path, start=0, end=7)
    fill(tmp_path, start=4, end=10)
    assert [row["iteration"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 11))
    assert [row["iteration"] for row in rows(tmp_path) if "validation_loss" in row] == [0, 2, 4, 6, 8, 10]


def test_a_run_from_the_beginning_drops_what_an_interrupted_one_wrote(tmp_path: Path) -> None:
    fill(tmp_path, start=0, end=3)
    fill(tmp_path, start=0, end=2)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2, 2]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path, start=0, end=4)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"iteration": 5, "lo')
    fill(tmp_path, start=4, end=5)
    assert [row["iteration"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(tmp_path, writes=False) as log:
        log.training(1, loss=1.0, lr=0.1, grad_norm=1.0)
        log.validation(1, 2.0)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with metrics(tmp_path, tensorboard=tmp_path / "events") as log:
        log.training(1, loss=1.5, lr=0.1, grad_norm=2.0)
        log.validation(1, 3.5)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "validation_loss"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5)]
