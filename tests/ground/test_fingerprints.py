"""Fingerprints that several runs share: right, read once, divided among those that begin together."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from megatron_instruct import fingerprints
from megatron_instruct.errors import InputError
from megatron_instruct.fingerprints import forget, shared_records
from megatron_instruct.manifest import FileRecord, record, records
from megatron_instruct.shares import Share


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five files that make three batches, changed long ago."""
    monkeypatch.setattr(fingerprints, "_BATCH_BYTES", 20)
    monkeypatch.setattr(fingerprints, "_SETTLED_NANOSECONDS", -(10**18))
    made = [tmp_path / f"{number}.jsonl" for number in range(5)]
    for number, file in enumerate(made):
        file.write_text(f"line {number}\n" * 2)
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, as they are: several at a time."""
    names: list[str] = []

    def noted(path: Path) -> FileRecord:
        names.append(path.name)
        return record(path)

    monkeypatch.setattr(fingerprints, "record", noted)
    return names


def test_they_are_what_they_would_be_and_a_second_run_reads_nothing(files: list[Path], read: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    assert shared_records(files, folder, None) == records(files)
    assert sorted(read) == [file.name for file in files]
    for share in (None, Share(0, 2), Share(1, 2)):
        assert shared_records(files, folder, share) == records(files)
    assert len(read) == 5
    forget(folder)
    assert not folder.exists()


def test_what_others_keep_in_the_folder_stays(files: list[Path], tmp_path: Path) -> None:
    (folder := tmp_path / "kept").mkdir()
    for name in ("mine.json", "mine.lock", "notes.txt"):
        (folder / name).write_text("precious")
    shared_records(files, folder, None)
    assert len(list(folder.iterdir())) > 3
    forget(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["mine.json", "mine.lock", "notes.txt"]
    forget(tmp_path / "absent")


@pytest.mark.parametrize("change", ["content", "times", "kept file"])
def test_what_changed_is_read_again(files: list[Path], read: list[str], tmp_path: Path, change: str) -> None:
    folder = tmp_path / "kept"
    shared_records(files, folder, None)
    read.clear()
    before = files[2].stat()
    if change == "content":  # of the same size, and dated back
        files[2].write_text("LINE 2\n" * 2)
        os.utime(files[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "times":
        os.utime(files[2])
    else:
        for file in folder.glob("*.json"):
            file.write_text(file.read_text()[:-20])
    assert shared_records(files, folder, None) == records(files)
    assert sorted(read) == (["2.jsonl", "3.jsonl"] if change != "kept file" else [file.name for file in files])


def test_what_was_just_written_is_not_kept(files: list[Path], read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED_NANOSECONDS", 60 * 10**9)
    for _ in range(2):
        assert shared_records(files, tmp_path / "kept", None) == records(files)
    assert len(read) == 10


def test_small_inputs_leave_nothing_behind(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_BATCH_BYTES", 1000)
    assert shared_records(files, tmp_path / "kept", None) == records(files)
    assert shared_records([], tmp_path / "kept", None) == ()
    assert not (tmp_path / "kept").exists()


def test_what_another_run_has_in_hand_is_waited_for(files: list[Path], read: list[str], tmp_path: Path) -> None:
    """A run holds the first batch: this one takes the others, then waits, and goes on although that run ends without a result."""
    folder = tmp_path / "kept"
    shared_records(files[:2], folder, None)  # makes the folder and the first batch
    (kept,) = folder.glob("*.json")
    kept.unlink()
    read.clear()
    found: list[tuple[FileRecord, ...]] = []
    with open(kept.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(shared_records(files, folder, Share(0, 2))))
        other.start()
        deadline = time.monotonic() + 30
        while len(read) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(read) == ["2.jsonl", "3.jsonl", "4.jsonl"]
        assert other.is_alive()
    other.join(30)
    assert found == [records(files)]


def test_a_file_that_is_gone_is_named(files: list[Path], tmp_path: Path) -> None:
    files[1].unlink()
    with pytest.raises(InputError, match=r"1\.jsonl: No such file"):
        shared_records(files, tmp_path / "kept", None)
