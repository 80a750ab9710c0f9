"""What leaves the page cache, and when."""

from pathlib import Path

import pytest

from megatron_instruct.conversion import page_cache


def test_what_lies_behind_the_work_leaves_the_page_cache_oldest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    monkeypatch.setattr(page_cache, "_KEPT", 10)
    monkeypatch.setattr(page_cache.os, "posix_fadvise", lambda _descriptor, *place: dropped.append(place[:2]))
    (tmp_path / "file").write_bytes(b"x")
    behind = page_cache.Behind()
    for number in range(5):
        behind.add(tmp_path / "file", 4 * number, 4)
    assert dropped == [(0, 4), (4, 4)], "of 20 bytes the last 12, since 8 would be fewer than 10"
