"""Work on many files at once: in order, at the same time, and the first error is the one that is told."""

import os
import threading

import pytest

from megatron_instruct.threads import in_threads


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_results_come_in_order_however_many_cores_there_are(count: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert list(in_threads(lambda number: number * number, range(count))) == [number * number for number in range(count)]


def test_items_are_worked_on_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    both = threading.Barrier(2, timeout=30)
    assert sorted(in_threads(lambda _: both.wait(), "ab")) == [0, 1]


def test_an_error_is_raised_where_its_item_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    found = in_threads([10, 11, 12].index, [12, 7, 10])
    assert next(found) == 2
    with pytest.raises(ValueError, match="7 is not in list"):
        next(found)
