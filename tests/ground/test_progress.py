"""A log gets a line now and then, a terminal a bar; both show what is done, the rate and the time left."""

import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from megatron_instruct import progress
from megatron_instruct.progress import LOG_INTERVAL, Progress

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import time
from megatron_instruct.progress import Progress
with Progress("encode", total=8, unit="texts") as work:
    for _ in range(4):
        work.add(2, note="loss 1.5")
        time.sleep(0.15)
"""


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_log_line_has_the_share_done_the_rate_and_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", total=400, unit="texts") as work:
        clock.now += 20
        work.add(100, note="loss 1.5")
        assert capsys.readouterr().err == "encode:  25% 100/400 [00:20<01:00,  5.00 texts/s, loss 1.5]\n"
        clock.now += 60
        work.add(300)
    assert capsys.readouterr().err.splitlines()[-1] == "encode: 100% 400/400 [01:20<00:00,  5.00 texts/s, loss 1.5]"


def test_a_log_gets_no_more_than_a_line_an_interval_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", total=1000, unit="texts") as work:
        for _ in range(1000):
            clock.now += LOG_INTERVAL / 100
            work.add()
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 11
    assert "1000/1000" in lines[-1]
    assert len(set(lines)) == len(lines)


def test_an_unknown_total_shows_the_count_and_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("read", total=None, unit="rows") as work:
        clock.now += 20
        work.add(50)
    assert re.match(r"read: 50 rows \[00:20, +2\.50 rows/s\]\n", capsys.readouterr().err)


def test_work_that_fails_shows_how_far_it_got(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mine"), Progress("read", total=10, unit="rows") as work:
        clock.now += 1
        work.add(3)
        raise ValueError("mine")
    assert "3/10" in capsys.readouterr().err


def test_no_work_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("read", total=0, unit="rows"):
        pass
    assert capsys.readouterr().err == ""


def shown_on_a_terminal(*, rows: int, columns: int) -> str:
    """Run WORK with standard error on a terminal of this size, and return what appeared there."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (rows, columns))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", WORK], stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            part = os.read(controller, 4096)
        except OSError:  # Linux reports the terminal's end so
            break
        if not part:
            break
        shown += part
    os.close(controller)
    assert process.wait(timeout=60) == 0
    return shown.decode()


def test_a_terminal_shows_a_bar_that_moves() -> None:
    frames = shown_on_a_terminal(rows=24, columns=100).split("\r")
    assert len(frames) > 3
    assert any("50%" in frame or "75%" in frame for frame in frames)
    assert re.search(r"encode: 100%\|█+\| 8/8 \[00:0\d<00:00, .*texts/s, loss 1\.5\]", frames[-2] + frames[-1])


def test_a_terminal_without_a_size_gets_lines() -> None:
    assert "encode: 100% 8/8 [" in shown_on_a_terminal(rows=0, columns=0)
