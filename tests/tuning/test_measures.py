"""The measures of a synthesizer, on cases counted by hand."""

import pytest

from megatron_instruct.tuning.measures import WrittenFor, measure, token_f1


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("The bug is small.", "a bug is SMALL", 1.0),  # articles, case, punctuation
        ("small bug", "a small green bug", 0.8),  # 2 of 2 and 2 of 3
        ("bug bug bug", "bug", 0.5),  # 1 of 3 and 1 of 1
        ("in 1993", "in 1994", 0.5),
        ("", "bug", 0.0),
        ("the", "a", 1.0),  # neither has a word
        ("grün", "GRÜN!", 1.0),
    ],
)
def test_token_f1(text: str, gold: str, expected: float) -> None:
    assert token_f1(text, gold) == pytest.approx(expected)


def test_counts_and_shares_of_two_texts() -> None:
    first = WrittenFor(
        gold=[("What is it?", "A bug.")],
        pairs=[("What is it?", "A bug."), ("What is it", "An insect.")],
        ungrounded=[("Who?", "Nobody.")],
        unparsed=1,
    )
    second = WrittenFor(gold=[("Where is it?", "Here.")], unparsed=2)
    found = measure([first, second], [("a bug", "the bug"), ("", "here")])
    assert (found.texts, found.pieces, found.pairs, found.questions) == (2, 6, 3, 2)
    assert found.parseable == pytest.approx(3 / 6)
    assert found.grounded == pytest.approx(2 / 3)
    assert found.distinct == pytest.approx(2 / 3)  # the first two questions differ in punctuation alone
    assert found.distinct_per_text == pytest.approx(2 / 2)
    assert found.answer_f1 == pytest.approx((1 + 0) / 2)
    assert found.pair_f1 == pytest.approx((1 + 0) / 2)


def test_nothing_written_is_no_share_and_no_match() -> None:
    found = measure([WrittenFor(gold=[("Who?", "Ada.")], unparsed=1)], [])
    assert (found.parseable, found.grounded, found.distinct, found.answer_f1, found.pair_f1) == (0.0, None, None, None, 0.0)
