"""Chains and rounds (arXiv:2406.14491, section on few-shot synthesis): which text is written after which, and which examples come out.

N texts in M rounds are divided into M blocks, as even as can be. Column i is the i-th text of every block, in order; in round r the
synthesizer is shown what column i gave in earlier rounds. Columns do not touch each other: whoever works on them, in whatever groups, gets
the same result. Pure functions; knows neither engine nor prompt.
"""

from dataclasses import dataclass

from megatron_instruct.records import MShotExample, OneShotExample


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """The columns as indices of texts, in the order of their first texts; worked out when asked for, so a plan of any size takes no memory.

    Every index from 0 to texts - 1 stands in exactly one column. With fewer texts than rounds there is one column of them all.
    """

    texts: int
    rounds: int

    def __len__(self) -> int:
        """Count the columns: the texts of the largest block."""
        return -(-self.texts // min(self.rounds, self.texts)) if self.texts else 0

    def __getitem__(self, column: int) -> list[int]:
        if not 0 <= column < len(self):
            raise IndexError(f"column {column} of {len(self)}")
        blocks = min(self.rounds, self.texts)
        size, larger = divmod(self.texts, blocks)
        members = blocks if column < size else larger
        return [block * size + min(block, larger) + column for block in range(members)]


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
