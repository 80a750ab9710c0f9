"""Shares: parts divided without overlap, each share once, all of one number, and a run of all alone; with real processes."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_instruct.errors import ConfigError
from megatron_instruct.shares import Share, at_work, parse_share

HOLDER = """
import sys
from pathlib import Path
from megatron_instruct.shares import at_work, parse_share
with at_work(Path(sys.argv[1]), parse_share(sys.argv[2] or None), lambda alone: alone):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, share: str) -> subprocess.Popen[str]:
    """Start a process that holds a share of `folder`, or all of it for "", until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), share], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@given(total=st.integers(0, 200), count=st.integers(1, 20))
def test_every_part_belongs_to_exactly_one_share(total: int, count: int) -> None:
    parts = [part for index in range(count) for part in Share(index, count).parts(total)]
    assert sorted(parts) == list(range(total))


def test_a_share_takes_every_nth_part() -> None:
    assert list(Share(1, 3).parts(8)) == [1, 4, 7]


def test_a_share_is_read_from_its_flag() -> None:
    assert parse_share(None) is None
    assert parse_share("2/8") == Share(2, 8)
    assert str(Share(2, 8)) == "2/8"


@pytest.mark.parametrize("text", ["", "3", "8/8", "-1/4", "1/0", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"share="):
        parse_share(text)


def test_shares_work_side_by_side_but_none_twice_and_none_of_another_number(tmp_path: Path) -> None:
    process = hold(tmp_path, "0/2")
    with at_work(tmp_path, Share(1, 2), lambda alone: alone) as place:
        assert place.prepared is False
    with pytest.raises(ConfigError, match=r"share 0/2 of .* at work already"), at_work(tmp_path, Share(0, 2), bool):
        pass
    with pytest.raises(ConfigError, match="are of 2; give --share I/2"), at_work(tmp_path, Share(1, 3), bool):
        pass
    with pytest.raises(ConfigError, match="another run is writing"), at_work(tmp_path, None, bool):
        pass
    end(process)
    with at_work(tmp_path, Share(1, 3), lambda alone: alone) as place:
        assert place.prepared is True, "a killed holder holds nothing"
        assert len(place.descriptors) == 2


def test_a_run_of_all_is_alone_and_leaves_one_lock(tmp_path: Path) -> None:
    end(hold(tmp_path, "0/2"))
    process = hold(tmp_path, "")
    for share in (None, Share(0, 2)):
        with pytest.raises(ConfigError, match="is writing to"), at_work(tmp_path, share, bool):
            pass
    end(process)
    with at_work(tmp_path, None, lambda alone: alone) as place:
        assert place.prepared is True
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_what_all_need_is_prepared_by_one_while_the_others_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three runs at a time prepare what is not there yet; flock is by open file, so threads do for processes."""
    entered: list[int] = []
    made: list[int] = []

    def run(index: int) -> None:
        def prepare(_: bool) -> None:
            entered.append(index)
            time.sleep(0.05)
            if not made:
                made.append(index)
            assert entered[-1] == index, "nobody came in meanwhile"

        with at_work(tmp_path, Share(index, 3), prepare):
            barrier.wait(timeout=10)

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(made)) == (3, 1)
    assert "waiting for it" in capsys.readouterr().out
