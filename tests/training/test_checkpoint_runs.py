"""Runs in real processes: checkpoints written while training goes on, damaged ones, dropout, other layouts, full disks, kills."""

import itertools
import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import ITERATIONS, PIPELINE, SHARDED, STOP, TENSOR, assert_same_end, read_metrics
from .test_checkpoint_choice import flip_a_bit
from .test_resume import LIMIT, latest, launch, steps, wait_until

pytestmark = pytest.mark.filterwarnings("ignore")
Flags = Callable[..., list[str]]
DROPOUT = ("--transformer-config", "hidden_dropout", "0.1", "attention_dropout", "0.1")
BESIDE = ("--async-save", "--save-interval", 5)
Several = Callable[[int, list[dict[str, Any]], Path], str]


@pytest.fixture(scope="module")
def several(torchrun_session: Callable[..., subprocess.CompletedProcess[str]]) -> Several:
    """Do runs one after another in one launch; return what they said."""

    def do(processes: int, runs: list[dict[str, Any]], plan: Path) -> str:
        plan.write_text(json.dumps(runs))
        result = torchrun_session(processes, Path(__file__).with_name("several_runs.py"), plan)
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads(plan.with_name(plan.name + ".ends").read_text()) == ["done"] * len(runs)
        return result.stdout

    return do


def test_one_process(several: Several, flags: Flags, one: dict[str, Path], tmp_path: Path) -> None:
    """In one launch: saved while training goes on, and pruned; resumed past a damaged checkpoint; dropout, undisturbed and resumed."""
    beside, damaged, dropout, again = (tmp_path / name for name in ("beside", "damaged", "dropout", "again"))
    shutil.copytree(one["reference"], damaged)
    (damaged / "manifest.json").unlink()
    flip_a_bit(damaged / "iter_0000020" / "__0_0.distcp")
    said = several(
        1,
        [
            {"flags": flags(beside, *BESIDE, "--keep-last", 1, "--save-retain-interval", 10), "of": None, "at": 0},
            {"flags": flags(damaged), "of": None, "at": 0},
            {"flags": flags(dropout, *DROPOUT), "of": None, "at": 0},
            {"flags": flags(again, *DROPOUT), "of": str(dropout), "at": STOP},
        ],
        tmp_path / "runs.json",
    )
    reference = one["reference"]
    assert_same_end(beside, reference)
    assert sorted(path.name for path in beside.glob("iter_*")) == ["iter_0000010", "iter_0000020"]
    assert said.count(f"passed over: {damaged / 'iter_0000020' / '__0_0.distcp'} is damaged") == 1
    assert f"resumes from {damaged / 'iter_0000010'}" in said
    assert_same_end(damaged, reference)
    assert_same_end(again, dropout)
    losses = [[row[1] for row in read_metrics(folder).training] for folder in (dropout, reference)]
    assert all(abs(one - other) > 1e-6 for one, other in zip(*losses, strict=True)), "dropout drops"
    assert len(set(losses[0])) == ITERATIONS


SIZES = {"tensor": TENSOR, "pipeline": PIPELINE, "data": ()}
LAYOUTS = {
    " ".join(names) or "one": (2 ** len(names), tuple(itertools.chain(*(SIZES[name] for name in names))))
    for count in range(4)
    for names in itertools.combinations(SIZES, count)
}
"""Every layout of tensor, pipeline and data sizes 1 and 2: the processes and the flags."""


PROCESSES = (1, 2, 4, 8)
KINDS = {name: SHARDED if number % 2 else () for number, name in enumerate(LAYOUTS)}
"""The optimizer that each layout saves with; it is read with the other kind."""


@pytest.fixture(scope="module")
def saved_in_every_layout(several: Several, flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    saved = {name: folder / f"from {name}".replace(" ", "-") for name in LAYOUTS}
    for processes in PROCESSES:
        fresh = [name for name, (count, _) in LAYOUTS.items() if count == processes]
        runs = [{"flags": flags(saved[name], *LAYOUTS[name][1], *KINDS[name]), "of": None, "at": 0} for name in fresh]
        several(processes, runs, folder / f"fresh-{processes}.json")
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("processes", PROCESSES)
def test_every_layout_reads_what_every_layout_saved(
    several: Several, flags: Flags, one: dict[str, Path], saved_in_every_layout: dict[str, Path], tmp_path: Path, processes: int
) -> None:
    """Losses equal the undisturbed run's within 1e-5; saved with the distributed optimizer and read without it, and the reverse."""
    readers = [name for name, (count, _) in LAYOUTS.items() if count == processes]
    folders = {(reader, writer): tmp_path / f"{writer} to {reader}".replace(" ", "-") for reader in readers for writer in LAYOUTS}
    runs = [
        {
            "flags": flags(folder, *LAYOUTS[reader][1], *(() if KINDS[writer] else SHARDED)),
            "of": str(saved_in_every_layout[writer]),
            "at": STOP,
        }
        for (reader, writer), folder in folders.items()
    ]
    several(processes, runs, tmp_path / "resumed.json")
    for pair, folder in folders.items():
        found, wanted = (read_metrics(run).training for run in (folder, one["reference"]))
        assert [row[1] for row in found] == pytest.approx([row[1] for row in wanted], abs=1e-5, rel=0.0), pair
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_ranks_save_beside_the_training_with_dropout_and_resume_exactly(several: Several, flags: Flags, tmp_path: Path) -> None:
    runs, pairs = [], []
    for name, layout in (("tensor", TENSOR), ("data", SHARDED), ("pipeline", PIPELINE)):
        fresh, again = tmp_path / name, tmp_path / f"{name}-again"
        runs.append({"flags": flags(fresh, *layout, *DROPOUT, *BESIDE), "of": None, "at": 0})
        runs.append({"flags": flags(again, *layout, *DROPOUT, *BESIDE), "of": str(fresh), "at": STOP})
        pairs.append((again, fresh))
    several(2, runs, tmp_path / "runs.json")
    for again, fresh in pairs:
        assert_same_end(again, fresh)


def writers_of(process: subprocess.Popen[bytes], partial: Path, log: Path) -> list[psutil.Process]:
    """Wait until a process beside a run of one process writes this checkpoint, and return it."""

    def beside() -> list[psutil.Process]:
        run = psutil.Process(process.pid)
        return [child for child in run.children() if child.cmdline() == run.cmdline()]

    wait_until(lambda: partial.exists() and bool(beside()), process, log)
    return beside()


@pytest.mark.slow
def test_killed_while_a_process_beside_it_writes_a_run_goes_on_from_the_checkpoint_before(
    flags: Flags, one: dict[str, Path], tmp_path: Path
) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    for target in ("iter_0000005", "iter_0000010", "iter_0000020"):
        process = launch(1, flags(save, *BESIDE), log)
        beside = writers_of(process, save / f"{target}.partial", log)
        process.kill()
        process.wait()
        psutil.wait_procs(beside, timeout=10)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in beside)
        assert latest(save) in {"iter_0000005": ("",), "iter_0000010": ("5",), "iter_0000020": ("15",)}[target]
    process = launch(1, flags(save, *BESIDE), log)
    assert process.wait(timeout=LIMIT) == 0, log.read_text()
    assert_same_end(save, one["reference"])
    assert not list(save.glob("*.partial"))


@pytest.mark.slow
def test_a_writing_process_that_is_killed_ends_the_run_with_one_message(flags: Flags, one: dict[str, Path], tmp_path: Path) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    process = launch(1, flags(save, *BESIDE), log)
    for child in writers_of(process, save / "iter_0000010.partial", log):
        child.send_signal(signal.SIGKILL)
    assert process.wait(timeout=LIMIT) == 6, log.read_text()
    assert "iter_0000010 could not be written" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert latest(save) == "5"
    process = launch(1, flags(save, *BESIDE), log)
    assert process.wait(timeout=LIMIT) == 0, log.read_text()
    assert_same_end(save, one["reference"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--async-save",)])
def test_a_disk_that_fills_up_during_a_save_loses_no_checkpoint(
    more: tuple[object, ...], flags: Flags, one: dict[str, Path], tmp_path: Path
) -> None:
    """From the first checkpoint on the process may write files of 100 kB only, as on a full disk."""
    save, log = tmp_path / "save", tmp_path / "log"
    process = launch(1, flags(save, *more), log)
    wait_until(lambda: latest(save) == "10" and steps(save) >= 11, process, log)
    psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert process.wait(timeout=LIMIT) == 6, log.read_text()
    assert "iter_0000020 could not be written" in log.read_text()
    assert "it goes on from the last checkpoint" in log.read_text()
    assert "Traceback" not in log.read_text() and "ERROR" not in log.read_text(), "one message"
    assert latest(save) == "10"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000010"]
    process = launch(1, flags(save), log)
    assert process.wait(timeout=LIMIT) == 0, log.read_text()
    assert_same_end(save, one["reference"])
