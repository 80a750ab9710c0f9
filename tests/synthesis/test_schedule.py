"""The schedule: no barrier between rounds, what follows goes first, bounded work; results that no batch, shard or order changes."""

import itertools
import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_instruct.errors import EngineError
from megatron_instruct.synthesis.engines.engine import Completion, Request
from megatron_instruct.synthesis.journal import Journal
from megatron_instruct.synthesis.schedule import ColumnWork, Limits, Schedule, Steps

LIMITS = Limits(retries=1, restarts=1, failures_in_a_row=5)


class Recorder:
    """An engine that finishes what is in work in a given order, and remembers what was submitted when."""

    def __init__(self, capacity: int, choose: Callable[[Sequence[Request]], int] = lambda _: 0, failing: Sequence[str] = ()) -> None:
        self.capacity, self._choose, self._failing = capacity, choose, failing
        self.in_work: list[Request] = []
        self.submitted: list[str] = []
        self.most = 0

    def submit(self, request: Request) -> None:
        self.submitted.append(request.id)
        self.in_work.append(request)
        self.most = max(self.most, len(self.in_work))

    def poll(self) -> Sequence[tuple[Request, Completion]]:
        request = self.in_work.pop(self._choose(self.in_work))
        return [(request, Completion(error="no") if request.id in self._failing else Completion(text=request.id, tokens=1, stopped=True))]

    def close(self) -> None:
        self.in_work.clear()


def request(name: str) -> Request:
    return Request(id=name, prompt=(1, 2), max_new_tokens=3)


def chain(name: str, length: int) -> Steps[list[str]]:
    """Ask `length` times, one after the other."""
    told = []
    for number in range(length):
        (completion,) = yield [request(f"{name}{number}")]
        told.append(completion.text)
    return told


def work(
    columns: Sequence[tuple[str, int]], engine: Recorder, journal: Journal, limits: Limits = LIMITS, *, end_is_known: bool = False
) -> dict[str, list[str]]:
    """Drive chains of the given lengths, and return what each gave."""
    results: dict[str, list[str]] = {}
    left = deque(columns)

    def next_column(_: bool) -> ColumnWork | None:
        if not left:
            return None
        name, length = left.popleft()
        return ColumnWork(steps=chain(name, length), journal=journal, done=lambda result: results.update({name: result}))

    Schedule(lambda: engine, limits, lambda _: None).run(next_column, (lambda: len(left)) if end_is_known else lambda: None)
    return results


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    opened = Journal(tmp_path / "journal")
    yield opened
    opened.close()


def test_a_text_is_asked_about_as_soon_as_its_predecessor_is_answered(journal: Journal) -> None:
    engine = Recorder(capacity=2)
    work([("a", 3), ("b", 1), ("c", 2), ("d", 1)], engine, journal)
    assert engine.submitted == ["a0", "b0", "a1", "c0", "a2", "c1", "d0"], "no round waits for another, and what follows goes first"


def test_at_the_end_the_columns_with_most_before_them_go_first_so_that_none_is_left_alone(journal: Journal) -> None:
    """Of five columns of three texts the last two fit into the engine together: d and e begin before b goes on."""
    engine = Recorder(capacity=2)
    columns = [(name, 3) for name in "abcde"]
    work(columns, engine, journal, end_is_known=True)
    assert " ".join(engine.submitted) == "a0 b0 a1 b1 a2 b2 c0 d0 e0 c1 d1 e1 c2 d2 e2"


@given(
    columns=st.lists(st.integers(1, 4), max_size=8),
    capacity=st.integers(1, 5),
    order=st.lists(st.integers(0, 99), min_size=40, max_size=40),
    end_is_known=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_whatever_order_an_engine_answers_each_column_gets_its_own(
    tmp_path: Path, columns: list[int], capacity: int, order: list[int], end_is_known: bool
) -> None:
    (tmp_path / "journal").unlink(missing_ok=True)
    journal, draws = Journal(tmp_path / "journal"), iter(order)
    engine = Recorder(capacity, lambda in_work: next(draws) % len(in_work))
    names = [(f"c{number}-", length) for number, length in enumerate(columns)]
    assert work(names, engine, journal, end_is_known=end_is_known) == {
        name: [f"{name}{number}" for number in range(length)] for name, length in names
    }
    assert engine.most <= capacity
    journal.close()


def test_an_answer_in_the_journal_is_not_asked_for_and_needs_no_engine(tmp_path: Path) -> None:
    for columns in ([("a", 2)], [("a", 2), ("b", 1)]):
        journal, engine = Journal(tmp_path / "journal"), Recorder(4)
        assert work(columns, engine, journal)["a"] == ["a0", "a1"]
        journal.close()
    assert engine.submitted == ["b0"]
    journal = Journal(tmp_path / "journal")

    def no_engine() -> Any:
        raise AssertionError("nothing is left to ask")

    done: list[Any] = []
    columns_left = iter([ColumnWork(steps=chain("a", 2), journal=journal, done=done.append)])
    Schedule(no_engine, LIMITS, lambda _: None).run(lambda _: next(columns_left, None))
    assert done == [["a0", "a1"]]
    journal.close()


def test_an_answer_to_another_prompt_is_not_taken(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write(request("a"), Completion(text="yes"))
    journal.close()
    journal = Journal(tmp_path / "journal")
    assert journal.take(Request(id="a", prompt=(1, 2, 4), max_new_tokens=3)) is None
    journal.close()
    journal = Journal(tmp_path / "journal")
    assert journal.take(request("a")) == Completion(text="yes")
    journal.close()


def test_failures_in_a_row_stop_the_run_and_are_not_written_down(tmp_path: Path) -> None:
    """The next run asks again: the engine may have been at fault."""
    journal = Journal(tmp_path / "journal")
    names = [(f"{number}-", 1) for number in range(9)]
    with pytest.raises(EngineError, match="5 requests in a row failed"):
        work(names, Recorder(2, failing=[f"{number}-0" for number in range(1, 9)]), journal)
    journal.close()
    written = [json.loads(line)["id"] for line in (tmp_path / "journal").read_text().splitlines()]
    assert written == ["0-0"]
    journal = Journal(tmp_path / "journal")
    assert len(work(names, engine := Recorder(2), journal)) == 9
    assert len(engine.submitted) == 8
    journal.close()


def test_an_engine_that_fails_from_some_time_on_is_told_by_one_column_too(tmp_path: Path) -> None:
    """Each of its texts is asked after the one before it, so that never more than one has failed at a time."""
    journal = Journal(tmp_path / "journal")
    with pytest.raises(EngineError, match="5 requests in a row failed"):
        work([("a", 20)], Recorder(2, failing=[f"a{number}" for number in range(3, 20)]), journal)
    journal.close()
    assert [json.loads(line)["id"] for line in (tmp_path / "journal").read_text().splitlines()] == ["a0", "a1", "a2"]
    journal = Journal(tmp_path / "journal")
    assert work([("a", 20)], Recorder(2), journal) == {"a": [f"a{number}" for number in range(20)]}
    journal.close()


@pytest.mark.parametrize(("columns", "capacity"), [([("a", 4)], 1), ([("a", 2), ("b", 2)], 9), ([("a", 1), ("b", 3)], 2)])
def test_an_engine_that_fails_everything_is_told_however_few_fail_at_a_time(
    tmp_path: Path, columns: list[tuple[str, int]], capacity: int
) -> None:
    names = [f"{name}{number}" for name, length in columns for number in range(length)]
    for _ in range(2):
        journal = Journal(tmp_path / "journal")
        with pytest.raises(EngineError, match="every one of 4 requests failed"):
            work(columns, Recorder(capacity, failing=names), journal)
        journal.close()
        assert not (tmp_path / "journal").read_bytes(), "the next run asks again"
    journal = Journal(tmp_path / "journal")
    results = work(columns, Recorder(capacity, failing=names[:-1]), journal)
    assert [answer for name, _ in columns for answer in results[name]] == ["", "", "", names[-1]], "the last shows that the engine works"
    journal.close()


def test_a_run_whose_rest_fails_ends_as_an_undisturbed_one(bench: Any, synthesize: Callable[..., tuple[int, str]]) -> None:
    """Every second text fails: the first share has all that succeeds, and the run that goes on meets nothing but failures."""
    corpus = bench.corpus(8)
    bench.script(failures={f"t{number:03d}": 9 for number in range(1, 8, 2)})
    settings = {"rounds": 1, "shard_size": 1, "failures_in_a_row": 9}
    assert synthesize(corpus, "whole", **settings)[0] == 0
    assert synthesize(corpus, "shares", share="0/2", **settings)[0] == 0
    assert synthesize(corpus, "shares", **settings)[0] == 0
    assert bench.outputs("shares")["rejects.jsonl"] == bench.outputs("whole")["rejects.jsonl"]


def test_single_failures_do_not_stop_the_run(journal: Journal) -> None:
    names = [(f"{number}-", 1) for number in range(40)]
    failing = [f"{number}-0" for number in range(40) if number % 4]
    results = work(names, Recorder(3, failing=failing), journal)
    assert len(results) == 40
    assert sum(result == [""] for result in results.values()) == 30


TEXTS = st.lists(st.sampled_from(["pairs", "none", "fails", "recovers"]), min_size=1, max_size=14)


@example(kinds=["fails"] * 4, rounds=2, first=(1, 1), second=1)
@example(kinds=["fails"] * 9 + ["none"], rounds=1, first=(1, 1), second=1)
@given(kinds=TEXTS, rounds=st.integers(1, 5), first=st.tuples(st.integers(1, 9), st.integers(1, 9)), second=st.integers(1, 30))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_result_depends_on_neither_batch_nor_shard_nor_order(
    bench: Any, synthesize: Callable[..., tuple[int, str]], kinds: list[str], rounds: int, first: tuple[int, int], second: int
) -> None:
    number = len(list(bench.folder.glob("one*")))
    corpus, names = bench.corpus(len(kinds)), [f"t{n:03d}" for n in range(len(kinds))]
    script = {
        "completions": {name: "no pair at all" for name, kind in zip(names, kinds, strict=True) if kind == "none"},
        "failures": {name: 9 if kind == "fails" else 1 for name, kind in zip(names, kinds, strict=True) if kind in ("fails", "recovers")},
    }
    bench.script(**script)
    lenient = {"rounds": rounds, "failures_in_a_row": 99}
    outcomes = [synthesize(corpus, f"one{number}", shard_size=first[0], in_flight=first[1], **lenient)[0]]
    bench.script(**script, shuffle=True)
    outcomes.append(synthesize(corpus, f"two{number}", shard_size=second, in_flight=64, **lenient)[0])
    if set(kinds) == {"fails"} and len(kinds) >= 4:
        assert outcomes == [5, 5], "an engine that answers nothing is at fault"
        return
    assert outcomes == [0, 0]
    one, two = bench.outputs(f"one{number}"), bench.outputs(f"two{number}")
    assert one["examples.jsonl"] == two["examples.jsonl"]
    assert one["rejects.jsonl"] == two["rejects.jsonl"]
    chains = [[shot["id"] for shot in example["shots"]] for example in bench.lines(f"one{number}/examples.jsonl")]
    assert sorted(itertools.chain(*chains)) == names
    assert all(ids == sorted(ids) for ids in chains)
