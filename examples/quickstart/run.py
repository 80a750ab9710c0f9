#!/usr/bin/env python
"""The quick start: domain-adaptive continual pre-training in small, from a raw corpus to a report.

Each stage is one command that a user could type; the tools skip what is finished, so that running this again does only what is
missing. What is measured here (seconds, peak memory) goes to stages.json for the report.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
from report import write_report
from stages import QuickstartConfig, Stage, plan

from megatron_instruct.config import run_tool
from megatron_instruct.errors import InputError, MegatronInstructError
from megatron_instruct.files import locked, read_json, write_json


class StageFailed(MegatronInstructError):
    """A stage ended with another status than 0."""

    def __init__(self, stage: "Stage", status: int) -> None:
        super().__init__(
            f"the stage {stage.name!r} ended with status {status}; its message is above. Mend it and run the same command again."
        )
        self.exit_status = status if 0 < status < 128 else 1


def run(config: QuickstartConfig) -> None:
    """Run every stage, then write the report. Refuses to run beside another run, or beside a stage that outlived one."""
    if not config.corpus.is_file():
        raise InputError(f'--corpus {config.corpus}: no such file; give a file of texts, such as my.jsonl with one {{"text": ...}} a line.')
    with locked(config.folder) as lock:
        _run(config, lock)


def _run(config: QuickstartConfig, lock: int) -> None:
    stages, times_path = plan(config), config.folder / "stages.json"
    times: dict[str, Any] = read_json(times_path) if times_path.is_file() else {}
    for number, stage in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages) + 1}] {stage.name}: {stage.what}\n$ {stage.shown}", flush=True)
        was_finished = stage.result.is_file()
        seconds, peak_bytes = _execute(stage, lock)
        if not was_finished or stage.name not in times:
            times[stage.name] = {"seconds": round(seconds, 1), "peak_bytes": peak_bytes}
            write_json(times_path, times)
    print(f"\n[{len(stages) + 1}/{len(stages) + 1}] report", flush=True)
    write_report(config, stages, times)
    total = sum(entry["seconds"] for entry in times.values())
    print(f"\nThe stages took {total / 60:.1f} minutes. Open {config.folder / 'report.html'} in a browser.")


def _execute(stage: Stage, lock: int) -> tuple[float, int]:
    """Run the command to its end; return seconds and the peak of its processes' resident memory together, in bytes."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(stage.command, env=environment, pass_fds=[lock])
    with _peak_memory(process.pid) as peak, _ended_on_interrupt(process):
        status = process.wait()
    if status != 0:
        raise StageFailed(stage, status)
    return time.monotonic() - start, peak[0]


@contextlib.contextmanager
def _ended_on_interrupt(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """On Ctrl-C, which the terminal sends to the stage too, wait for the stage to end by itself before going on to stop."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        if process.poll() is None:
            process.terminate()
            process.wait()
        raise


@contextlib.contextmanager
def _peak_memory(pid: int, interval: float = 0.5) -> Iterator[list[int]]:
    """Watch a process and its descendants; the list's one element is the highest sum of their resident bytes seen."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(interval):
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                total = 0
                for process in (parent, *parent.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        total += process.memory_info().rss
                peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(run_tool(QuickstartConfig, run, prog="quickstart"))
