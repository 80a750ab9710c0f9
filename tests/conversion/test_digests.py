"""SHA-256 found beside the work that reads or writes the files."""

import hashlib
import threading
from pathlib import Path

import pytest

from megatron_instruct.conversion import digests
from megatron_instruct.conversion.digests import Digests
from megatron_instruct.manifest import FileRecord


def record_of(file: Path) -> FileRecord:
    content = file.read_bytes()
    return FileRecord(path=str(file), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_files_that_are_there_are_hashed_in_the_given_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("b", "a", "empty")]
    for number, file in enumerate(files[:2]):
        file.write_bytes(bytes([number]) * (digests._BLOCK + 7 * number))
    files[2].write_bytes(b"")
    with Digests(files, grows=False) as found:
        assert found.records() == {file: record_of(file) for file in files}
    assert list(found.records()) == files


def test_a_file_that_is_written_is_hashed_as_far_as_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is written first, which must not be read before what comes before it has its last value."""
    monkeypatch.setattr(digests, "_BLOCK", 1000)
    monkeypatch.setattr(digests, "_FLUSH_EVERY", 2000)
    first, second = tmp_path / "first", tmp_path / "second"
    second.write_bytes(b"2" * 10)
    with Digests([first, second], grows=True) as found:
        found.ready(second, None)  # whole before the first one is begun
        with open(first, "wb", buffering=0) as stream:
            stream.truncate(5000)
            stream.seek(4000)
            stream.write(b"x" * 1000)
            for start in range(0, 4000, 1000):
                stream.seek(start)
                stream.write(bytes([start // 1000]) * 1000)
                found.ready(first, start + 1000)
            found.ready(first, None)
        assert found.records() == {first: record_of(first), second: record_of(second)}


def test_what_is_given_up_ends_its_thread(tmp_path: Path) -> None:
    with Digests([tmp_path / "never"], grows=True):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "digests"]


def test_a_file_that_cannot_be_read_is_told_of_when_it_is_asked_for(tmp_path: Path) -> None:
    with Digests([tmp_path / "absent"], grows=False) as found, pytest.raises(FileNotFoundError, match="absent"):
        found.records()
