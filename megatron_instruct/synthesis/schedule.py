"""Which request is asked when: as many in work as keep the engine busy, and what follows from an answer before anything new.

Comes in: columns, each a generator that yields requests and is sent their completions, so that a column asks for its next text as soon as
the one before it is parsed, while other columns are anywhere. What follows is asked first: its prompt begins with what the engine has just
had in its cache. Columns are taken up one by one as places come free, so a corpus of any size needs the memory of what is in work. Only
when the last columns would fit into the engine together does the order turn round: those that have most before them go first, since a
column that is taken up late would go through its rounds when the engine has hardly anything else to do.
Requests fail one by one. A failure is final once a later request succeeds, which shows that it was the text's fault; until then nothing of
it is written down, so that another run asks again. A dead engine is loaded again, a limited number of times. Does not know: prompts, texts,
files of results.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_instruct.errors import EngineError
from megatron_instruct.synthesis.engines.engine import Completion, Engine, Request
from megatron_instruct.synthesis.journal import Journal

type Steps[T] = Generator[Sequence[Request], Sequence[Completion], T]
"""Yields requests that may be asked at the same time, is sent their completions in the same order, and returns a result."""
_TELLING = 4
"""Requests that must all have failed, in a run where none succeeded, before the engine rather than the texts is taken to be at fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnWork:
    """One column of texts to be worked on."""

    steps: Steps[Any]
    journal: Journal
    done: Callable[[Any], None]
    """Called with what the steps return."""


type NextColumn = Callable[[bool], ColumnWork | None]
"""Gives a column, or None when there is none, or none before one in work is done. Called with whether nothing is in work, so that none will
be done: then it gives one if there is any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request, or several, cost."""

    generated: int = 0
    """Tokens."""
    prompt: int = 0
    """Tokens."""
    cached: int = 0
    """Tokens of the prompts that the engine had in its cache."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(generated=self.generated + other.generated, prompt=self.prompt + other.prompt, cached=self.cached + other.cached)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is borne."""

    retries: int
    """Times that a failed request is asked again before its text is set aside."""
    restarts: int
    """Times that a dead engine is loaded again."""
    failures_in_a_row: int
    """Requests set aside, one after the other, that stop the run."""


@dataclass(slots=True)
class _Waiting:
    """A column that waits for completions."""

    column: ColumnWork
    step: int
    """How often it has waited before."""
    completions: list[Completion | None]


@dataclass(frozen=True, slots=True)
class _Question:
    """A request, and where its completion goes."""

    request: Request
    column: _Waiting
    place: int


class Schedule:
    """Drives columns through an engine that is loaded when it is first needed."""

    def __init__(self, load: Callable[[], Engine], limits: Limits, report: Callable[[Usage], None], *, worked_before: bool = False) -> None:
        """worked_before: an earlier part of this very work had answers, so that a few failures at its end are the texts' own."""
        self._load, self._limits, self._report = load, limits, report
        self._engine: Engine | None = None
        self._deaths = 0
        self._ready: deque[_Question] = deque()
        self._in_work: dict[str, _Question] = {}
        self._failed_attempts: Counter[str] = Counter()
        self._suspects: list[tuple[_Question, Completion]] = []
        """Failed for good, unless it turns out that the engine is at fault."""
        self._told = 0
        """Suspects that their columns know of already, since nothing else was left to do: so many of the first."""
        self._results: list[Callable[[], None]] = []
        """Of columns that were done since then; to be taken once it is known who is at fault."""
        self._any_success = worked_before
        self._columns_left: Callable[[], int | None] = lambda: None

    def run(self, next_column: NextColumn, columns_left: Callable[[], int | None] = lambda: None) -> None:
        """Work until there is nothing left.

        columns_left: how many columns next_column can still give; None while nobody knows. Raises EngineError when the engine is dead or
        nothing that it is asked succeeds; what was finished is in the journals.
        """
        self._columns_left = columns_left
        try:
            while True:
                self._fill(next_column)
                if self._in_work:
                    self._take_answers()
                elif self._told < len(self._suspects):
                    self._tell()
                elif self._suspects:
                    self._settle_last()
                else:
                    return
        finally:
            if self._engine is not None:
                self._engine.close()

    def _fill(self, next_column: NextColumn) -> None:
        """Submit what is ready, and take up columns, until the engine has what it can hold."""
        while self._engine is None or len(self._in_work) < self._engine.capacity:
            left = self._columns_left()
            ending = self._engine is not None and left is not None and left <= self._engine.capacity
            if self._ready and not (ending and left):
                self._submit(self._take_ready(earliest=ending))
            elif (column := next_column(not self._in_work)) is not None:
                self._advance(column, None)
            else:
                return

    def _take_ready(self, *, earliest: bool) -> _Question:
        """Take the question that was ready first, or the one of the column that has most before it."""
        place = min(range(len(self._ready)), key=lambda place: self._ready[place].column.step) if earliest else 0
        question = self._ready[place]
        del self._ready[place]
        return question

    def _advance(self, column: ColumnWork, completions: Sequence[Completion] | None, step: int = 0) -> None:
        """Send a column its completions; go on while the journal knows the answers to what it asks next."""
        while True:
            try:
                requests = next(column.steps) if completions is None else column.steps.send(completions)
            except StopIteration as end:
                if self._told:
                    self._results.append(partial(column.done, end.value))
                else:
                    column.done(end.value)
                return
            waiting = _Waiting(column, step, [column.journal.take(request) for request in requests])
            self._any_success |= any(known is not None and known.error is None for known in waiting.completions)
            asked = [place for place, known in enumerate(waiting.completions) if known is None]
            if asked:
                self._ready.extend(_Question(requests[place], waiting, place) for place in asked)
                return
            completions, step = [known for known in waiting.completions if known is not None], step + 1

    def _submit(self, question: _Question) -> None:
        if self._engine is None and not self._deaths:
            self._engine = self._load()
        self._in_work[question.request.id] = question
        try:
            if self._engine is None:
                self._engine = self._load()
            self._engine.submit(question.request)
        except EngineError as error:
            self._bury(error)

    def _take_answers(self) -> None:
        assert self._engine is not None, "something is in work"
        try:
            answers = self._engine.poll()
        except EngineError as error:
            self._bury(error)
            return
        for request, completion in answers:
            question = self._in_work.pop(request.id)
            if completion.error is None:
                self._any_success = True
                self._settle()
                final = replace(completion, attempts=self._failed_attempts.pop(request.id, 0) + 1)
                self._write(question, final)
                self._answer(question, final)
            else:
                self._fail(question, completion)

    def _fail(self, question: _Question, completion: Completion) -> None:
        """Ask again, or suspect that the text is at fault."""
        self._failed_attempts[question.request.id] += 1
        if (attempts := self._failed_attempts[question.request.id]) <= self._limits.retries:
            self._ready.append(question)
            return
        del self._failed_attempts[question.request.id]
        self._suspects.append((question, replace(completion, attempts=attempts)))
        if len(self._suspects) >= self._limits.failures_in_a_row:
            raise EngineError(
                f"{len(self._suspects)} requests in a row failed, the last with: {completion.error}; what was finished is kept. "
                "Mend the cause and run the same command again, or raise --failures-in-a-row."
            )

    def _tell(self) -> None:
        """Let columns go on with their failures as if these were final: they may ask what succeeds."""
        untold, self._told = self._suspects[self._told :], len(self._suspects)
        for question, completion in untold:
            self._answer(question, completion)

    def _settle(self) -> None:
        """The engine works, so what failed did so for its own reasons."""
        suspects, told = self._suspects, self._told
        self._suspects, self._told = [], 0
        for question, completion in suspects:
            self._write(question, completion)
        results, self._results = self._results, []
        for done in results:
            done()
        for question, completion in suspects[told:]:
            self._answer(question, completion)

    def _settle_last(self) -> None:
        if not self._any_success and len(self._suspects) >= _TELLING:
            raise EngineError(f"every one of {len(self._suspects)} requests failed, the last with: {self._suspects[-1][1].error}")
        self._settle()

    def _write(self, question: _Question, completion: Completion) -> None:
        """Write a final answer down."""
        question.column.column.journal.write(question.request, completion)
        self._report(Usage(generated=completion.tokens, prompt=len(question.request.prompt), cached=completion.cached))

    def _answer(self, question: _Question, completion: Completion) -> None:
        """Let a column go on once it has all it asked for."""
        column = question.column
        column.completions[question.place] = completion
        known = [one for one in column.completions if one is not None]
        if len(known) == len(column.completions):
            self._advance(column.column, known, column.step + 1)

    def _bury(self, error: EngineError) -> None:
        """Load a dead engine again and ask it all that the old one had in work, or give up."""
        self._deaths += 1
        if self._deaths > self._limits.restarts:
            raise error
        print(f"The engine died and is started again ({self._deaths} of {self._limits.restarts}): {error}", file=sys.stderr, flush=True)
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._failed_attempts.clear()
        self._ready.extendleft(reversed(self._in_work.values()))
        self._in_work.clear()
