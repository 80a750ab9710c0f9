"""Chains and rounds (arXiv:2406.14491, section on few-shot synthesis): which text is written after which, and which examples come out.

N texts in M rounds are divided into M blocks, as even as can be. Column i is the i-th text of every block, in order; in round r the
synthesizer is shown what column i gave in earlier rounds. Columns do not touch each other: whoever works on them, in whatever groups, gets
the same result. Pure functions; knows neither engine nor prompt.
"""

from dataclasses import dataclass

from megatron_instruct.records import MShotExample, OneShotExample


def plan_columns(texts: int, rounds: int) -> list[list[int]]:
    """Return the columns as indices of texts, in the order of their first texts.

    Every index from 0 to texts - 1 stands in exactly one column. With fewer texts than rounds there is one column of them all.
    """
    if texts == 0:
        return []
    rounds = min(rounds, texts)
    size, larger = divmod(texts, rounds)
    starts = [block * size + min(block, larger) for block in range(rounds)]
    sizes = [size + (block < larger) for block in range(rounds)]
    return [[start + i for start, length in zip(starts, sizes, strict=True) if i < length] for i in range(sizes[0])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """What a column has given so far."""

    examples: tuple[tuple[OneShotExample, ...], ...] = ()
    """Each an M-shot example, in the order of their first texts."""
    open: int | None = None
    """Which of them the next text may join; None when it starts a chain of its own."""

    @property
    def history(self) -> tuple[OneShotExample, ...]:
        """The examples to show before the next text, oldest first; each has pairs."""
        return () if self.open is None else self.examples[self.open]


def advance(column: Column, shot: OneShotExample, *, shown: int) -> Column:
    """Add the next text of a column with the pairs it was given.

    shown: how many examples of the history the synthesizer was shown, counted from the newest.
    A text joins the chain when its predecessor was shown to it and it has pairs itself. With pairs but nothing shown, it starts a chain.
    Without pairs it stands alone, stays raw text, and the chain waits for the next.
    """
    if not shot.pairs:
        return Column(examples=(*column.examples, (shot,)), open=column.open)
    if column.open is None or not shown:
        return Column(examples=(*column.examples, (shot,)), open=len(column.examples))
    examples = list(column.examples)
    examples[column.open] = (*examples[column.open], shot)
    return Column(examples=tuple(examples), open=column.open)


def m_shot_examples(column: Column) -> list[MShotExample]:
    """Return the finished examples of a column; each takes the id of its first text."""
    return [MShotExample(id=shots[0].id, shots=shots) for shots in column.examples]
