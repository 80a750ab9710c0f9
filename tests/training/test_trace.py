"""tools/trace_data.py: which documents were in a step of a run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Start = Callable[..., Any]


def trace(start: Start, *arguments: object) -> tuple[int, str, str]:
    process = start("trace_data.py", *arguments)
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def test_a_step_names_its_documents_and_their_text(one: dict[str, Path], start: Start, data: Path) -> None:
    status, printed, errors = trace(start, "--save", one["blend"], "--iterations", 1, 20, "--text")
    assert status == 0, errors
    assert re.findall(r"^step (\d+), sample 0:$", printed, re.M) == ["1", "20"]
    assert len(re.findall(r"^step ", printed, re.M)) == 2 * 8
    cut = re.findall(rf"^  {re.escape(str(data))} document [\d,]+ tokens ([\d,]+) to ([\d,]+)$", printed, re.M)
    assert sum(int(last.replace(",", "")) - int(first.replace(",", "")) + 1 for first, last in cut) == 2 * 8 * 65
    assert len(re.findall(r"^    ['\"]", printed, re.M)) == len(cut)


def test_a_run_started_with_relative_paths_is_traced_from_anywhere_and_wherever_its_folder_is(
    flags: Callable[..., list[str]], start: Start, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    words = flags(
        Path("run"), "--data-path", data.name, "--train-iters", 1, "--lr-warmup-iters", 0, "--eval-interval", 1, "--eval-iters", 1
    )
    process = start("pretrain.py", *words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    monkeypatch.chdir(tmp_path)
    Path(data.parent, "run").rename(tmp_path / "moved")
    status, printed, errors = trace(start, "--save", "moved", "--iterations", 1)
    assert status == 0, errors
    assert f"  {data.name} document" in printed


@pytest.mark.parametrize(
    ("iterations", "message"),
    [((21,), "step 21 is beyond train_iters=20 of the run"), ((0,), "give one or more steps; they count from 1")],
)
def test_a_step_that_is_not_there_is_refused(one: dict[str, Path], start: Start, iterations: tuple[int, ...], message: str) -> None:
    status, _, errors = trace(start, "--save", one["blend"], "--iterations", *iterations)
    assert status == 2
    assert message in errors


def test_a_folder_without_a_run_is_refused(start: Start, tmp_path: Path) -> None:
    status, _, errors = trace(start, "--save", tmp_path, "--iterations", 1)
    assert status == 3
    assert "settings.yaml is missing: no run of pretrain.py has started there" in errors
