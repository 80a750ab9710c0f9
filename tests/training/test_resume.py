"""Killed with SIGKILL at any moment and started again with the same command, a run ends as an undisturbed one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import PRETRAIN, SHARDED, assert_same_end

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 300.0
"""Seconds before a test gives up waiting."""
Flags = Callable[..., list[str]]


def launch(processes: int, flags: list[str], log: Path) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    with open(log, "wb") as stream:
        command = [sys.executable, *launcher, str(PRETRAIN), *flags]
        return subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.001)


def steps(folder: Path) -> int:
    """Return how many steps metrics.jsonl tells of."""
    path = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def latest(folder: Path) -> str:
    path = folder / "latest_checkpointed_iteration.txt"
    return path.read_text().strip() if path.exists() else ""


def test_one_process_killed_between_saves_and_while_saving(tmp_path: Path, flags: Flags, one: dict[str, Path]) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    process = launch(1, flags(save, "--num-workers", 1), log)
    wait_until(lambda: steps(save) >= 5, process, log)
    readers = psutil.Process(process.pid).children()
    assert readers
    process.kill()
    process.wait()
    psutil.wait_procs(readers, timeout=1)
    assert not any(reader.is_running() and reader.status() != psutil.STATUS_ZOMBIE for reader in readers), "they would hold the lock"
    assert not (save / "manifest.json").exists()

    process = launch(1, flags(save), log)
    wait_until((save / "iter_0000010.partial").exists, process, log)
    process.kill()
    process.wait()
    assert latest(save) in ("", "10")

    process = launch(1, flags(save), log)
    wait_until(lambda: latest(save) == "10" and steps(save) >= 13, process, log)
    process.kill()
    process.wait()
    (save / "latest_checkpointed_iteration.txt").unlink()  # as a copy that was broken off leaves it

    process = launch(1, flags(save), log)
    assert process.wait(timeout=LIMIT) == 0, log.read_text()
    assert "resumes from" in log.read_text()
    assert_same_end(save, one["reference"])
    assert not list(save.glob("*.partial"))


@pytest.mark.slow  # by default tests/training/test_launching.py kills one
def test_one_rank_killed_ends_the_others_and_the_run_goes_on_later(tmp_path: Path, flags: Flags, two: dict[str, Path]) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    process = launch(2, flags(save, *SHARDED), log)
    wait_until(lambda: latest(save) == "10" and steps(save) >= 12, process, log)
    ranks = [child for child in psutil.Process(process.pid).children() if str(PRETRAIN) in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)

    process = launch(2, flags(save, *SHARDED), log)
    assert process.wait(timeout=LIMIT) == 0, log.read_text()
    assert_same_end(save, two["distributed optimizer"])


def test_a_finished_run_is_not_done_again_and_not_mixed_with_another(tmp_path: Path, flags: Flags, one: dict[str, Path]) -> None:
    from megatron_instruct.config import parse
    from megatron_instruct.errors import ConfigError
    from megatron_instruct.training.config import PretrainConfig
    from megatron_instruct.training.run import run

    folder = one["reference"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = parse(PretrainConfig, flags(folder), prog="pretrain.py")
    assert again is not None
    run(again)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    other = parse(PretrainConfig, flags(folder, "--lr", "2e-3"), prog="pretrain.py")
    assert other is not None
    with pytest.raises(ConfigError, match=r"lr=0\.001.*lr=0\.002"):
        run(other)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == "pretrain"
