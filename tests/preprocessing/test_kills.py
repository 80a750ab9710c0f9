"""Killed at any moment and run again, preprocessing ends with the same bytes; a dead worker is noticed and named."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.files import locked, write_json
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.run import run

Start = Callable[..., subprocess.Popen[str]]
LIMIT = 180.0
"""Seconds before a test gives up waiting."""


@pytest.fixture
def large_corpus(corpus: Path) -> Path:
    """About 12 MB: some seconds of work for the tokenizer's library, so that there is something to interrupt."""
    corpus.write_bytes(corpus.read_bytes() * 60)
    return corpus


def arguments(corpus: Path, prefix: Path, tokenizer: Path) -> list[object]:
    return [
        *("--input", corpus, "--output-prefix", prefix, "--tokenizer-model", tokenizer),
        *("--append-eod", "--workers", 2, "--partitions", 40, "--fast-tokenizer", "none"),
    ]


def wait_until(what: Callable[[], bool], *, pause: float = 0.005) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(pause)


def hold(process: subprocess.Popen[str], prefix: Path, *, parts: int) -> list[psutil.Process]:
    """Halt a run once so many parts are finished, and return its workers. They get no more parts: a busy machine cannot end the run."""
    wait_until(lambda: prefix.with_name(f"{prefix.name}.parts").is_dir() and finished_parts(prefix) >= parts)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None, "the run ended before it could be interrupted"
    return psutil.Process(process.pid).children()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run to end well, and return what it printed."""
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def finished_parts(prefix: Path) -> int:
    return len(list(prefix.parent.glob(f"{prefix.name}.parts/*/summary.json")))


def outputs(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def outputs_of_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("a_*")}


def test_kill_9_at_several_moments_then_the_same_bytes(tmp_path: Path, large_corpus: Path, tokenizer_folder: Path, start: Start) -> None:
    finish(start("preprocess_data.py", *arguments(large_corpus, tmp_path / "calm" / "a", tokenizer_folder)))
    prefix = tmp_path / "killed" / "a"
    for moment in (0, 1, 12, 25):
        process = start("preprocess_data.py", *arguments(large_corpus, prefix, tokenizer_folder))
        workers = hold(process, prefix, parts=moment)
        process.kill()
        process.communicate()
        wait_until(lambda orphans=workers: not any(map(lives, orphans)))
        assert not (prefix.parent / "a_text_document.manifest.json").exists()
    out = finish(start("preprocess_data.py", *arguments(large_corpus, prefix, tokenizer_folder)))
    assert "parts are finished already; going on with the rest" in out
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "calm")


def test_kill_9_while_documents_are_shuffled_packed_and_written_then_the_same_bytes(
    tmp_path: Path, corpus: Path, examples: Path, tokenizer_folder: Path, start: Start
) -> None:
    both = tmp_path / "both.jsonl"
    both.write_bytes(corpus.read_bytes() * 12 + examples.read_bytes())
    order = ("--shuffle-seed", 5, "--pack-sequence-length", 300)
    finish(start("preprocess_data.py", *arguments(both, tmp_path / "calm" / "a", tokenizer_folder), *order))
    prefix = tmp_path / "killed" / "a"
    met = set()
    for suffix in ("bin", "roles", "idx", "bin"):
        process = start("preprocess_data.py", *arguments(both, prefix, tokenizer_folder), *order)
        unfinished = prefix.with_name(f"a_text_document.{suffix}.partial")
        wait_until(lambda file=unfinished, running=process: file.exists() or running.poll() is not None, pause=0.0005)
        met |= {suffix} if process.poll() is None else set()
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it was too quick
            break
        assert not (prefix.parent / "a_text_document.manifest.json").exists()
    assert met, "at least one run was killed while it wrote"
    finish(start("preprocess_data.py", *arguments(both, prefix, tokenizer_folder), *order))
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "calm")
    assert "a_text_document.roles" in outputs(tmp_path / "calm")


def test_a_run_killed_after_its_manifest_leaves_nothing_behind(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    config = PreprocessConfig(input=(str(corpus),), output_prefix=tmp_path / "a", tokenizer_model=tokenizer_folder, workers=1)
    run(config)
    (tmp_path / "a.parts" / "000000").mkdir(parents=True)
    write_json(tmp_path / "a.parts" / "plan.json", {"stage": "preprocess", "settings": {}})
    before = outputs_of_files(tmp_path)
    run(config)
    assert not (tmp_path / "a.parts").exists()
    assert outputs_of_files(tmp_path) == before


def test_a_killed_worker_is_noticed_and_named_and_nothing_hangs(
    tmp_path: Path, large_corpus: Path, tokenizer_folder: Path, start: Start
) -> None:
    prefix = tmp_path / "a"
    process = start("preprocess_data.py", *arguments(large_corpus, prefix, tokenizer_folder))
    workers = hold(process, prefix, parts=2)
    os.kill(workers[0].pid, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert f"(process {workers[0].pid}) was killed by SIGKILL at work on {large_corpus} lines" in err
    assert "fewer --workers" in err
    wait_until(lambda: not any(map(lives, workers)))
    finish(start("preprocess_data.py", *arguments(large_corpus, prefix, tokenizer_folder)))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let processes started here be interrupted: a shell that runs pytest in the background has it and all its children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_all_workers_with_one_line(tmp_path: Path, large_corpus: Path, tokenizer_folder: Path, start: Start) -> None:
    prefix = tmp_path / "a"
    process = start("preprocess_data.py", *arguments(large_corpus, prefix, tokenizer_folder))
    workers = hold(process, prefix, parts=2)
    for target in (process, *workers):  # a terminal sends it to all of them
        target.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "interrupted; finished work is kept" in err
    assert "Traceback" not in err
    wait_until(lambda: not any(map(lives, workers)))


def test_leftovers_of_a_run_with_other_settings_are_not_taken(
    tmp_path: Path, large_corpus: Path, tokenizer_folder: Path, start: Start
) -> None:
    prefix = tmp_path / "killed" / "a"
    process = start("preprocess_data.py", *arguments(large_corpus, prefix, tokenizer_folder))
    hold(process, prefix, parts=3)
    process.kill()
    process.communicate()
    large_corpus.write_bytes(large_corpus.read_bytes().replace(b"bug", b"gub"))
    for folder in (prefix, tmp_path / "calm" / "a"):
        out = finish(start("preprocess_data.py", *arguments(large_corpus, folder, tokenizer_folder)))
        assert ("Leftovers of an unfinished run" in out) == (folder == prefix)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "calm")


def test_two_runs_at_one_prefix_are_refused(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    config = PreprocessConfig(input=(str(corpus),), output_prefix=tmp_path / "a", tokenizer_model=tokenizer_folder, workers=1)
    with locked(tmp_path / "a.parts"), pytest.raises(ConfigError, match="another run is writing"):
        run(config)
    run(config)


def test_a_run_that_stopped_at_a_bad_line_goes_on_once_it_is_mended(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    good = corpus.read_bytes()
    corpus.write_bytes(good + b"{broken\n")
    config = PreprocessConfig(input=(str(corpus),), output_prefix=tmp_path / "a", tokenizer_model=tokenizer_folder, workers=1)
    with pytest.raises(Exception, match=r"corpus.jsonl:401: broken JSON"):
        run(config)
    corpus.write_bytes(good)
    assert run(config)["text"].counts["documents"] == 400
    manifest = json.loads((tmp_path / "a_text_document.manifest.json").read_text())
    assert manifest["counts"]["documents_in"] == 400
