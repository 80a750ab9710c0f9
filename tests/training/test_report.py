"""The page of runs: its numbers are those of the files, it works while a run is under way, and no text becomes part of it."""

import json
import re
from pathlib import Path

import pytest

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.pages import Series, label, line_chart, ticks
from megatron_instruct.training.report import ReportConfig, read_run, run

EVIL = "<script>alert(1)</script>{{ 7 * 7 }}"


def make_run(folder: Path, *, steps: int, finished: bool = False, cut: bool = False) -> Path:
    folder.mkdir()
    lines = [
        {
            "iteration": step,
            "tokens": step * 100,
            "loss": 5 - step / 10,
            "lr": 0.1,
            "grad_norm": 1.0,
            "tokens_per_second": 50.0,
            "memory": 1 << 30,
            "skipped": int(step >= 4),
            "reruns": 0,
        }
        for step in range(1, steps + 1)
    ]
    validation = {"iteration": steps, "validation_loss": 4.5, "validation_loss_of": {"web": 4.25, "books": 4.75}}
    test = {"iteration": steps, "test_loss": 4.125, "test_loss_of": {"web": 4.0625}}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, validation, test])
    (folder / "metrics.jsonl").write_text(text + ('{"iteration": 99, "lo' if cut else ""))
    (folder / "samples.jsonl").write_text(json.dumps({"iteration": 3, "prompt": "A hacker is", "text": EVIL}) + "\n")
    fault = {"kind": "skip", "iteration": 4, "text": f"step 4: the loss is nan; the batch is skipped. {EVIL}", "run": "1"}
    (folder / "faults.jsonl").write_text(json.dumps(fault) + "\n" + ('{"ki' if cut else ""))
    (folder / "settings.yaml").write_text(f"train_iters: 20\nlr: 0.1\nsave: {folder.name}\n")
    if finished:
        (folder / "manifest.json").write_text("{}")
    return folder


def test_a_page_compares_runs_one_of_them_under_way(tmp_path: Path) -> None:
    folders = make_run(tmp_path / "vanilla", steps=20, finished=True), make_run(tmp_path / "instruct", steps=10, cut=True)
    run(ReportConfig(runs=folders))
    page = (tmp_path / "vanilla" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"vanilla</span> <span class=\"soft\">finished", page)
    assert "under way or stopped, 0:00:20 of training left" in page  # 10 steps of 100 tokens at 50 a second
    for value in ("20 of 20", "10 of 20", "4.5000", "1.0 GiB"):
        assert f"<b>{value}</b>" in page
    assert page.count("<polyline") == 2 * (5 + 2)
    assert "Validation loss on books" in page
    assert page.count("<td>skipped</td><td>step 4: the loss is nan;") == 2
    assert page.count("<b>1</b><span>steps left out</span>") == 2 and "steps run again" not in page
    assert EVIL not in page and "&lt;script&gt;" in page
    assert re.search(r"<td>save</td><td>vanilla</td><td>instruct</td>", page), "the settings that differ"
    assert "<td>lr</td>" not in page
    assert not re.search(r"(?:src|href)=", page), "nothing from elsewhere"


def test_a_run_without_a_step_yet_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    (folder / "metrics.jsonl").write_text("")
    run(ReportConfig(runs=(folder,), output=tmp_path / "page.html"))
    assert "has made no step yet" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing: no run of pretrain\.py"):
        read_run(tmp_path, "x")
    with pytest.raises(ConfigError, match="names the same folder twice"):
        run(ReportConfig(runs=(tmp_path, tmp_path)))
    with pytest.raises(ConfigError, match="names has 1 words for 2 runs"):
        ReportConfig(runs=(tmp_path, tmp_path / "b"), names=("a",))
    with pytest.raises(ConfigError, match=r"output=.*metrics.jsonl is written as a page; give it a name that ends in .html"):
        ReportConfig(runs=(tmp_path,), output=tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.61, 2.62), (0.0, 3e-4), (5.0, 5.0), (0.0, 0.0), (-3.0, 40_000.0), (1e9, 3e9)])
def test_ticks_are_round_and_surround_what_is_drawn(low: float, high: float) -> None:
    steps = ticks(low, high)
    assert steps[0] <= low and steps[-1] >= high
    assert 2 <= len(steps) <= 8
    assert len({label(step, steps) for step in steps}) == len(steps), "labels differ"


def test_a_long_series_is_thinned_and_what_is_not_finite_is_left_out() -> None:
    points = [(float(x), float("nan") if x == 7 else 1.0 + x % 2) for x in range(100_000)]
    chart = line_chart("x", [Series(name="a", points=points), Series(name="empty", points=[])])
    assert chart is not None
    (line,) = chart.lines
    heights = [float(pair.split(",")[1]) for pair in line.points.split()]
    assert len(heights) == 400
    assert sorted(heights)[50:-50] == pytest.approx([110.0] * 300, abs=1.0), "means of equal stretches"
    assert line_chart("x", []) is None
