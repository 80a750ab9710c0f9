"""Shares, worker processes and Ray actors: the same bytes as one process, and nothing lost when one of them dies."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.cluster import ray_cluster
from megatron_instruct.errors import EngineError
from megatron_instruct.manifest import read_manifest
from megatron_instruct.synthesis.config import SynthesizeConfig
from megatron_instruct.synthesis.dispatch import Dispatch
from megatron_instruct.synthesis.executors import local, on_ray
from megatron_instruct.synthesis.worker import Assignment, NextShard

Start = Callable[..., subprocess.Popen[str]]
Synthesize = Callable[..., tuple[int, str]]
SETTINGS = {"rounds": 2, "shard_size": 4}
LIMIT = 180.0
"""Seconds before a test gives up waiting."""


def same(bench: Any, output: str, other: str = "alone") -> bool:
    one, two = bench.outputs(output), bench.outputs(other)
    manifests = [read_manifest(bench.folder / name / "manifest.json") for name in (output, other)]
    assert manifests[0].counts == manifests[1].counts
    assert set(one) == set(two), "nothing else is left behind"
    return bool(one["examples.jsonl"] == two["examples.jsonl"] and one["rejects.jsonl"] == two["rejects.jsonl"])


@pytest.fixture
def alone(bench: Any, synthesize: Synthesize) -> Any:
    """The corpus, of 22 texts in 6 shards, and the result of one process, in the folder `alone`."""
    bench.script(completions={"t003": "no pair"})
    corpus = bench.corpus(22)
    assert synthesize(corpus, "alone", **SETTINGS)[0] == 0
    return corpus


def test_shares_make_their_shards_and_a_last_run_merges(bench: Any, synthesize: Synthesize) -> None:
    corpus, log, shards = bench.corpus(22), bench.folder / "log", bench.folder / "out" / "shards"
    bench.script(log=str(log))
    assert synthesize(corpus, "alone", **SETTINGS)[0] == 0
    log.unlink()
    for index in (1, 0, 2):
        status, printed = synthesize(corpus, share=f"{index}/3", **SETTINGS)
        assert (status, f"Share {index}/3: all its shards are finished" in printed) == (0, True)
        assert (shards / f"{index:06d}" / "summary.json").is_file()
        assert (shards / f"{index + 3:06d}" / "summary.json").is_file()
        assert not (bench.folder / "out" / "manifest.json").exists()
    assert sorted(log.read_text().split()) == [f"t{n:03d}" for n in range(22)], "each text is asked about by one share"
    log.unlink()
    status, printed = synthesize(corpus, **SETTINGS)
    assert (status, "6 of 6 shards are finished already" in printed) == (0, True)
    assert not log.exists(), "the merge asks nothing"
    assert same(bench, "out")


def test_the_merge_asks_for_what_no_share_did(bench: Any, synthesize: Synthesize, alone: Any) -> None:
    assert synthesize(alone, share="0/2", **SETTINGS)[0] == 0
    status, printed = synthesize(alone, **SETTINGS)
    assert (status, "3 of 6 shards are finished already" in printed) == (0, True)
    assert same(bench, "out")
    status, printed = synthesize(alone, share="1/2", **SETTINGS)
    assert (status, "Finished already" in printed) == (0, True)


def test_shares_side_by_side_give_the_same_bytes(bench: Any, synthesize: Synthesize, start: Start, alone: Any) -> None:
    """Three processes at once, none of which finds the corpus read."""
    processes = [start("synthesize.py", *bench.arguments(alone, share=f"{index}/3", **SETTINGS)) for index in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
    status, printed = synthesize(alone, **SETTINGS)
    assert (status, "6 of 6 shards are finished already" in printed) == (0, True)
    assert same(bench, "out")


def test_shares_of_other_settings_are_refused_beside_one_at_work(bench: Any, synthesize: Synthesize, alone: Any) -> None:
    from megatron_instruct.shares import Share, at_work

    assert synthesize(alone, share="0/2", **SETTINGS)[0] == 0
    with at_work(bench.folder / "out", Share(0, 2), bool):
        status, printed = synthesize(alone, share="1/2", rounds=3)
        assert (status, "with other inputs or settings" in printed) == (2, True)
        assert synthesize(alone, share="0/2", **SETTINGS)[0] == 2
        assert synthesize(alone, share="1/2", **SETTINGS)[0] == 0


def test_worker_processes_give_the_same_bytes(bench: Any, synthesize: Synthesize, alone: Any) -> None:
    status, printed = synthesize(alone, replicas=2, **SETTINGS)
    assert status == 0, printed
    assert "22/22" in printed, "what workers report is shown"
    assert same(bench, "out")


def test_workers_that_are_killed_are_replaced_and_nothing_is_lost(bench: Any, synthesize: Synthesize) -> None:
    corpus, faults = bench.corpus(22), {"seed": 1, "memory": str(bench.folder / "memory")}
    bench.script(faults=faults)
    assert synthesize(corpus, "alone", **SETTINGS)[0] == 0
    bench.script(faults={**faults, "kill": 0.15})
    status, printed = synthesize(corpus, replicas=2, restarts=9, **SETTINGS)
    assert status == 0, printed
    assert "died with status -9; it is replaced (1 of 9)" in printed
    assert bench.outputs("out")["examples.jsonl"] == bench.outputs("alone")["examples.jsonl"]
    (bench.folder / "memory").unlink()
    status, printed = synthesize(corpus, "stopped", replicas=2, restarts=0, **SETTINGS)
    assert (status, "died with status -9, after 0 others were replaced" in printed) == (5, True)


def test_a_worker_that_is_killed_while_it_waits_for_a_shard_is_replaced(tmp_path: Path, synthesizer_folder: Path) -> None:
    config = SynthesizeConfig(input=("corpus",), output_dir=tmp_path, model=synthesizer_folder, replicas=2, restarts=0)
    dispatch = Dispatch([7])
    processes = local._Processes(Assignment(config=config, folder=tmp_path, synthesizer="x"), dispatch)
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=signal.pause)
    worker.start()
    processes._workers[ours] = (0, worker)
    theirs.send(None)
    theirs.close()
    worker.kill()
    with pytest.raises(EngineError, match="worker 0 died with status -9, after 0 others were replaced"):
        processes._listen(ours, [])
    assert dispatch.next_shard(1) == NextShard(number=7, last=True), "what it was to be given is another's"


def test_a_workers_error_is_the_runs(bench: Any, synthesize: Synthesize, alone: Any) -> None:
    bench.script(failures={f"t{n:03d}": 9 for n in range(22)})
    status, printed = synthesize(alone, replicas=2, **SETTINGS)
    assert (status, "requests in a row failed" in printed or "requests failed" in printed) == (5, True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed; pip install 'megatron-instruct[cluster]'")
def test_ray_actors_give_the_same_bytes_and_are_replaced_when_killed(bench: Any, start: Start, synthesize: Synthesize) -> None:
    corpus, faults = bench.corpus(22), {"seed": 1, "memory": str(bench.folder / "memory")}
    bench.script(faults=faults)
    assert synthesize(corpus, "alone", **SETTINGS)[0] == 0
    bench.script(faults={**faults, "kill": 0.15})
    more = {"executor": "ray", "replicas": 2, "restarts": 9}
    process = start("synthesize.py", *bench.arguments(corpus, **SETTINGS, **more))
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert "it is replaced (1 of 9)" in err
    assert "22 texts" in out
    assert bench.outputs("out")["examples.jsonl"] == bench.outputs("alone")["examples.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed; pip install 'megatron-instruct[cluster]'")
def test_the_death_of_the_actor_that_gives_out_shards_is_one_clear_error(bench: Any, synthesize: Synthesize, alone: Any) -> None:
    assert synthesize(alone, share="0/3", **SETTINGS)[0] == 0
    out, scripted = bench.folder / "out", {"engine": "scripted", "script": bench.folder / "script.yaml"}
    config = SynthesizeConfig(input=(str(alone),), output_dir=out, model=bench.model, **scripted, **SETTINGS)
    with ray_cluster("local") as ray:
        actors = on_ray._Actors(ray, Assignment(config=config, folder=out / "shards", synthesizer="x"), [1])
        ray.kill(actors._dispatch)
        with pytest.raises(EngineError, match="actor that gives out the shards died; what was finished is kept"):
            actors.run(lambda _: None)


def test_the_array_of_slurm_gives_the_same_bytes(bench: Any, alone: Any) -> None:
    """The script as Slurm would run it, with a command in srun's place that starts what it is given."""
    srun = bench.folder / "srun"
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    root = Path(__file__).resolve().parents[2]
    command = ["bash", "examples/slurm/synthesize.sbatch", *bench.arguments(alone, **SETTINGS)]
    environment = {**os.environ, "PATH": f"{bench.folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
    jobs = [{"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"} for number in (1, 2)]
    for job in [*jobs, {}]:
        run = subprocess.run(command, cwd=root, env={**environment, **job}, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert run.returncode == 0, run.stderr
    assert "6 of 6 shards are finished already" in run.stdout
    assert same(bench, "out")
