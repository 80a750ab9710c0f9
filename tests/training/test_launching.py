"""Examples of launching: what their shell does at each exit status, and that tools/launch.py hands the status on."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_instruct.errors import ConfigError, LostProcessError, TrainingError
from megatron_instruct.training import stopping
from megatron_instruct.training.settings.faults import FaultOptions
from megatron_instruct.training.stopping import EXIT_TO_GO_ON, ExitRequests, reason_of

from .conftest import PRETRAIN, ROOT, SHARDED, assert_same_end

pytestmark = pytest.mark.filterwarnings("ignore")
SBATCH = ROOT / "examples" / "slurm" / "pretrain.sbatch"
LAUNCH = ROOT / "tools" / "launch.py"


def command(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("status", "saves", "requeued"),
    [(0, True, False), (75, True, True), (75, False, False), (7, True, True), (137, True, True), (137, False, False), (6, True, False)],
)
def test_the_sbatch_script_requeues_what_goes_on_and_never_loops(tmp_path: Path, status: int, saves: bool, requeued: bool) -> None:
    """srun and scontrol are stand-ins on the PATH; the script is the real one."""
    (tmp_path / "checkpoints" / "tiny-vanilla").mkdir(parents=True)
    tracker = tmp_path / "checkpoints" / "tiny-vanilla" / "latest_checkpointed_iteration.txt"
    tracker.write_text("10\n")
    command(tmp_path / "srun", f'echo "$@" "$LAUNCH" >> calls; {f"echo 20 > {tracker};" if saves else ""} exit {status}')
    command(tmp_path / "scontrol", 'if [ "$1" = show ]; then echo node1; else echo "scontrol $*" >> calls; fi')
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        ["bash", str(SBATCH), "tiny", "vanilla"], cwd=tmp_path, env={**os.environ, **slurm}, capture_output=True, text=True, check=False
    )
    calls = (tmp_path / "calls").read_text()
    assert "examples/pretrain/run.sh tiny vanilla" in calls
    assert "--rdzv-endpoint node1:20017" in calls
    assert ("scontrol requeue 17" in calls) == requeued
    assert result.returncode == (0 if requeued else status)


@pytest.mark.parametrize("flags", [("--save", "else where"), ("--save=else where",)])
def test_the_sbatch_script_looks_at_the_checkpoints_of_another_folder(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "else where").mkdir()
    command(tmp_path / "srun", "echo 20 > 'else where/latest_checkpointed_iteration.txt'; exit 75")
    command(tmp_path / "scontrol", 'echo "scontrol $*" >> calls')
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(SBATCH), "tiny", "vanilla", *flags]
    result = subprocess.run(words, cwd=tmp_path, env={**os.environ, **slurm}, capture_output=True, text=True, check=False)
    assert (result.returncode, "scontrol requeue 17" in (tmp_path / "calls").read_text()) == (0, True), result.stderr


def test_the_kubernetes_job_fails_at_once_where_starting_again_does_not_help() -> None:
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes" / "pretrain.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert spec["completions"] == spec["parallelism"] == int(re.search(r"--nnodes (\d+)", pod["containers"][0]["env"][0]["value"])[1])  # type: ignore[index]
    fails = next(rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")["onExitCodes"]["values"]
    assert not {0, LostProcessError.exit_status, EXIT_TO_GO_ON} & set(fails)
    assert {2, 3, 4, 6} <= set(fails)
    assert pod["restartPolicy"] == "Never", "a pod failure policy needs it"
    script, recipe, arm = pod["containers"][0]["command"]
    assert (ROOT / script).is_file() and (ROOT / "examples" / "pretrain" / f"{recipe}.yaml").is_file() and arm in ("vanilla", "instruct")


def test_the_launcher_restarts_what_a_restart_can_mend_and_hands_on_the_status(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        "open(f'{sys.argv[2]}-{os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}', 'w').close()\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else sys.exit(int(sys.argv[1]))\n"
    )
    for how, status, tries in (("75", 75, 1), ("6", 6, 1), ("1", 1, 1), ("7", 7, 2), ("kill", 137, 2)):
        mark = tmp_path / f"try-{how}"
        flags = ["--standalone", "--nproc-per-node", "1", "--max-restarts", "1", "--monitor-interval", "0.1"]
        words = [sys.executable, str(LAUNCH), *flags, str(script), how, str(mark)]
        result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode == status, result.stderr
        assert len(list(tmp_path.glob(f"try-{how}-*"))) == tries
        assert "Traceback" not in result.stderr


def test_a_request_to_end_is_seen_at_the_next_step_and_signals_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ExitRequests(FaultOptions(exit_interval=5)) as requests:
        assert requests.code(1) == 0
        assert reason_of(requests.code(5)) == "exit_interval is reached"
        os.kill(os.getpid(), signal.SIGTERM)
        assert reason_of(requests.code(6)) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(stopping, "_STARTED", time.monotonic() - 60.0)
    with ExitRequests(FaultOptions(exit_duration_in_mins=0.9)) as requests:  # what came before the loop counts, too
        assert reason_of(requests.code(1)) == "exit_duration_in_mins is over"


def launched(flags: list[str], log: Path, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """more: of the environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
    with open(log, "ab") as stream:
        words = [sys.executable, str(LAUNCH), "--standalone", "--nproc-per-node", "2", str(PRETRAIN), *flags]
        return subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)


def ranks_of(launcher: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    children = [child for child in psutil.Process(launcher.pid).children() if str(PRETRAIN) in child.cmdline()]
    return {int(child.environ()["RANK"]): child for child in children}


def wait_for_step(folder: Path, iteration: int, launcher: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300.0
    path = folder / "metrics.jsonl"
    while not path.exists() or f'"iteration": {iteration},' not in path.read_text():
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def test_a_killed_rank_is_named_in_one_message_and_ends_the_run(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    launcher = launched(flags(save, "--train-iters", 2000, *SHARDED), log)
    wait_for_step(save, 2, launcher, log)
    ranks = ranks_of(launcher)
    ranks[1].kill()
    assert launcher.wait(timeout=60) == 128 + signal.SIGKILL
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
    said = log.read_text()
    assert said.count("pretrain.py: error:") == 1
    assert "no answer from rank 1 " in said
    assert "launch.py: rank 1 was ended by SIGKILL; the same command goes on." in said
    assert "Traceback" not in said and "WARNING" not in said


@pytest.mark.slow
def test_a_rank_that_answers_no_longer_ends_the_run_after_the_timeout(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    launcher = launched(flags(save, "--train-iters", 2000, "--distributed-timeout-minutes", 0.2, *SHARDED), log)
    wait_for_step(save, 2, launcher, log)
    ranks = ranks_of(launcher)
    ranks[1].suspend()
    since = time.monotonic()
    ranks[0].wait(timeout=60)
    assert time.monotonic() - since > 10.0
    assert launcher.wait(timeout=90) == LostProcessError.exit_status
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
    said = log.read_text()
    assert said.count("pretrain.py: error:") == 1 and "no answer from rank 1 " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_told_once_and_disturbs_nothing(
    tmp_path: Path, flags: Callable[..., list[str]], two: dict[str, Path]
) -> None:
    save, logs = tmp_path / "save", [tmp_path / "first", tmp_path / "second"]
    slow = {"MEGATRON_INSTRUCT_REHEARSE": "slow seconds=0.15 step=1"}  # so that it is there for the whole of the second one
    first = launched(flags(save, *SHARDED), logs[0], slow)
    wait_for_step(save, 1, first, logs[0])
    assert launched(flags(save, *SHARDED), logs[1]).wait(timeout=120) == ConfigError.exit_status
    assert first.poll() is None
    assert logs[1].read_text().count("another run is writing to") == 1
    assert first.wait(timeout=300) == 0, logs[0].read_text()
    assert_same_end(save, two["distributed optimizer"])


def test_a_gpu_that_fails_or_is_full_is_told_with_its_rank_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from megatron_instruct.training.run import _lost_processes

    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)  # which capsys looks at
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        pytest.raises(TrainingError, match=r"the GPU of rank 5 on .* has too little .*CUDA out of.*lower micro_batch_size"),
        _lost_processes(),
    ):
        raise full
    assert not capsys.readouterr().err, "told by who waits for the first process of the machine"
    broken = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nSearch for it")
    with pytest.raises(LostProcessError, match=r"the GPU of rank 5 on .* failed \(CUDA error: uncorrectable ECC"), _lost_processes():
        raise broken
    assert "start the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_run_goes_on(tmp_path: Path, flags: Callable[..., list[str]], two: dict[str, Path]) -> None:
    save, log = tmp_path / "save", tmp_path / "log"
    launcher = launched(flags(save, *SHARDED), log)
    wait_for_step(save, 3, launcher, log)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == EXIT_TO_GO_ON
    assert "pretrain.py: SIGTERM: saved after step" in log.read_text()
    assert launched(flags(save, *SHARDED), log).wait(timeout=300) == 0
    assert_same_end(save, two["distributed optimizer"])


def killed_at_random(kills: int, seed: int, folder: Path, flags: list[str]) -> None:
    """Run to the end, killed with SIGKILL, launcher and all, so many times at random moments."""
    import random

    moments = random.Random(seed)
    log, save = folder / "log", folder / "save"
    done = 0
    while done < kills:
        launcher = launched(flags, log)
        wait = time.monotonic() + moments.uniform(0.0, 12.0)
        while time.monotonic() < wait and launcher.poll() is None:
            time.sleep(0.01)
        if launcher.poll() is not None:  # it came to its end first: that kill did not happen
            assert launcher.returncode == 0, log.read_text()
            (save / "manifest.json").unlink()
            for checkpoint in sorted(save.glob("iter_*"))[1:]:
                for path in checkpoint.iterdir():
                    path.unlink()
                checkpoint.rmdir()
            (save / "latest_checkpointed_iteration.txt").write_text(f"{int(sorted(save.glob('iter_*'))[0].name[5:])}\n")
            continue
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        launcher.wait()
        done += 1
    assert launched(flags, log).wait(timeout=300) == 0, log.read_text()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_bits(tmp_path: Path, flags: Callable[..., list[str]], two: dict[str, Path]) -> None:
    more: tuple[Any, ...] = (*SHARDED, "--save-interval", 2)
    killed_at_random(20, 7, tmp_path, flags(tmp_path / "save", *more))
    assert_same_end(tmp_path / "save", two["distributed optimizer"])
