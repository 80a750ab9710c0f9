"""Killed at any moment and run again, synthesis ends with the same bytes and asks for no finished shard again."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_instruct.files import locked

Start = Callable[..., subprocess.Popen[str]]
LIMIT = 180.0
"""Seconds before a test gives up waiting."""
SETTINGS = {"rounds": 3, "shard_size": 6}


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.005)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out


def shards(folder: Path) -> list[Path]:
    """The finished shards; one that is being written has a longer name."""
    return list((folder / "shards").glob("[0-9][0-9][0-9][0-9][0-9][0-9]"))


def finished_shards(folder: Path) -> int:
    return len(shards(folder))


def test_kill_9_at_several_moments_then_the_same_bytes(bench: Any, start: Start) -> None:
    """36 texts in 6 shards, 0.03 s a request, two of which fail at first: kills meet the intake, the first shard, the middle, the last."""
    corpus = bench.corpus(36)
    bench.script(seconds=0.03, failures={"t004": 1, "t030": 3})
    finish(start("synthesize.py", *bench.arguments(corpus, "calm", **SETTINGS)))
    killed = bench.folder / "killed"
    for moment in (0, 1, 3, 5):
        process = start("synthesize.py", *bench.arguments(corpus, "killed", **SETTINGS))
        wait_until(lambda wanted=moment: (killed / "shards").is_dir() and finished_shards(killed) >= wanted)
        process.kill()
        process.communicate()
        assert not (killed / "manifest.json").exists()
    before = {shard / "examples.jsonl": (shard / "examples.jsonl").stat().st_mtime_ns for shard in shards(killed)}
    times: dict[Path, int] = {}
    process = start("synthesize.py", *bench.arguments(corpus, "killed", **SETTINGS))
    while process.poll() is None:
        times |= {shard: shard.stat().st_mtime_ns for shard in before if shard.exists()}
        time.sleep(0.005)
    assert f"{len(before)} of 6 shards are finished already; going on with the rest" in finish(process)
    assert times == before, "a finished shard is not made again"
    assert bench.outputs("killed") == bench.outputs("calm")


def test_leftovers_of_other_settings_are_not_taken(bench: Any, start: Start) -> None:
    corpus = bench.corpus(18)
    bench.script(seconds=0.03)
    process = start("synthesize.py", *bench.arguments(corpus, "killed", **SETTINGS))
    wait_until(lambda: finished_shards(bench.folder / "killed") >= 1)
    process.kill()
    process.communicate()
    for output in ("killed", "calm"):
        out = finish(start("synthesize.py", *bench.arguments(corpus, output, rounds=2)))
        assert ("Leftovers of an unfinished run" in out) == (output == "killed")
    assert bench.outputs("killed") == bench.outputs("calm")


def test_two_runs_in_one_folder_are_refused(bench: Any, synthesize: Callable[..., tuple[int, str]]) -> None:
    with locked(bench.folder / "out"):
        status, printed = synthesize(bench.corpus(2))
    assert (status, "another run is writing" in printed) == (2, True)
