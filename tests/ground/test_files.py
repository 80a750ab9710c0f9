"""Writes are whole or absent, whatever happens to the writer, and reach the disk before they get their name."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct import files
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import TEMPORARY_SUFFIX, atomic_folder, atomic_write, concatenate, locked, read_json, sha256_of, write_json

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import sys, time
from pathlib import Path
from megatron_instruct.files import atomic_folder, atomic_write, locked
path = Path(sys.argv[2])
with {writer}:
    {write}
    print("written", flush=True)
    time.sleep(600)
"""


def start_and_kill(writer: str, write: str, path: Path) -> None:
    """Kill a process in the middle of a write, without notice."""
    command = [sys.executable, "-c", KILLED.format(writer=writer, write=write), "", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as stream:
        stream.write("ü 漢\n")
        stream.flush()
        assert names(path.parent) == [f"a.txt{TEMPORARY_SUFFIX}"]
    assert path.read_bytes() == "ü 漢\n".encode()
    with atomic_write(path, "wb") as stream:
        stream.write(b"\x00")
    assert path.read_bytes() == b"\x00"
    assert names(path.parent) == ["a.txt"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as stream:
        stream.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    start_and_kill("atomic_write(path) as stream", 'stream.write("half of a long text" * 1000); stream.flush()', path)
    assert names(tmp_path) == [f"a.txt{TEMPORARY_SUFFIX}"]
    with atomic_write(path) as stream:
        stream.write("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["a.txt"]


def test_a_killed_writer_of_a_folder_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "result"
    start_and_kill("atomic_folder(path) as folder", '(folder / "stale.txt").write_text("half")', path)
    assert names(tmp_path) == [f"result{TEMPORARY_SUFFIX}"]
    with atomic_folder(path) as folder:
        assert names(folder) == []
        (folder / "fresh.txt").write_text("whole")
    assert names(tmp_path) == ["result"]
    assert names(path) == ["fresh.txt"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), atomic_folder(tmp_path / "result") as folder:
        (folder / "a.txt").write_text("half")
        raise ValueError("mine")
    assert names(tmp_path) == []


def test_a_folder_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"result exists already; choose another folder or remove it"), atomic_folder(tmp_path / "result"):
        pytest.fail("the folder was opened")
    assert (tmp_path / "result" / "mine.txt").read_text() == "mine"


def test_content_is_on_the_disk_before_the_rename_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(tmp_path)}")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        steps.append(f"rename to {Path(target).relative_to(tmp_path)}")
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    with atomic_write(tmp_path / "a.txt") as stream:
        stream.write("a")
    assert steps == ["sync a.txt.partial", "rename to a.txt", "sync ."]
    steps.clear()
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("a")
    assert steps == ["sync f.partial/inner", "sync f.partial/inner/a.txt", "sync f.partial", "rename to f", "sync ."]


def test_json_is_written_readable_and_read_back(tmp_path: Path) -> None:
    value: dict[str, Any] = {"ä": [1, None, {"b": 0.5}]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert '"ä": [\n' in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_value_that_is_no_json_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")


def test_the_fingerprint_is_sha256(tmp_path: Path) -> None:
    content = json.dumps(list(range(100_000))).encode()
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_folder_is_held_by_one_run_at_a_time_and_free_after_a_kill(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match=r"another run is writing to .*out"), locked(tmp_path / "out"):
        pytest.fail("held twice")
    start_and_kill("locked(path)", "pass", tmp_path / "out")
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize("cores", [1, 3])
def test_files_are_put_together_in_order_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(files, "_PIECE_BYTES", 7)
    contents = [bytes(range(size)) for size in (20, 0, 7, 1, 200)]
    sources = [tmp_path / str(number) for number in range(len(contents))]
    for source, content in zip(sources, contents, strict=True):
        source.write_bytes(content)
    copied: list[int] = []
    concatenate(sources, tmp_path / "whole", report=copied.append)
    assert (tmp_path / "whole").read_bytes() == b"".join(contents)
    assert sum(copied) == 228
    concatenate([], tmp_path / "nothing")
    assert (tmp_path / "nothing").read_bytes() == b""


def test_a_file_that_becomes_shorter_while_files_are_put_together_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    with pytest.raises(InputError, match="second became shorter while it was read"):
        concatenate([first, second], tmp_path / "whole", report=lambda _: os.truncate(second, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
