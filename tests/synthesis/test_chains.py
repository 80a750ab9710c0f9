"""Columns and chains: each text once, order kept, no column touches another."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_instruct.records import InstructionPair, OneShotExample
from megatron_instruct.synthesis.chains import Column, ColumnPlan, advance, m_shot_examples

PAIR = InstructionPair(question="Q?", answer="A")


def shot(number: int, *, pairs: bool) -> OneShotExample:
    return OneShotExample(id=str(number), text=f"text {number}", pairs=(PAIR,) if pairs else ())


@given(texts=st.integers(0, 300), rounds=st.integers(1, 12))
def test_every_text_stands_in_exactly_one_column_of_at_most_m(texts: int, rounds: int) -> None:
    columns = list(ColumnPlan(texts, rounds))
    assert sorted(itertools.chain(*columns)) == list(range(texts))
    assert all(0 < len(column) <= rounds and list(column) == sorted(column) for column in columns)
    assert [column[0] for column in columns] == sorted(column[0] for column in columns)
    assert len({len(column) for column in columns}) <= 2, "blocks are as even as can be"


def test_blocks_of_an_uneven_corpus() -> None:
    assert list(ColumnPlan(7, 3)) == [[0, 3, 5], [1, 4, 6], [2]]
    assert list(ColumnPlan(2, 5)) == [[0, 1]]
    assert list(ColumnPlan(0, 2)) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=12))
def test_each_text_comes_out_once_and_in_order_and_only_chains_with_pairs(steps: list[tuple[bool, int]]) -> None:
    """steps: whether the text is given pairs, and how many examples the prompt has room for."""
    column = Column()
    for number, (pairs, room) in enumerate(steps):
        shown = min(len(column.history), room)
        assert all(example.pairs for example in column.history)
        column = advance(column, shot(number, pairs=pairs), shown=shown)
    examples = m_shot_examples(column)
    ids = [int(one.id) for example in examples for one in example.shots]
    assert sorted(ids) == list(range(len(steps)))
    assert [int(example.id) for example in examples] == sorted(int(example.id) for example in examples)
    for example in examples:
        inside = [int(one.id) for one in example.shots]
        assert inside == sorted(inside)
        assert len(inside) == 1 or all(one.pairs for one in example.shots)


def test_a_text_joins_only_what_it_was_shown() -> None:
    column = advance(Column(), shot(0, pairs=True), shown=0)
    column = advance(column, shot(1, pairs=True), shown=1)
    column = advance(column, shot(2, pairs=True), shown=0)
    column = advance(column, shot(3, pairs=False), shown=1)
    column = advance(column, shot(4, pairs=True), shown=1)
    assert [[one.id for one in example.shots] for example in m_shot_examples(column)] == [["0", "1"], ["2", "4"], ["3"]]
