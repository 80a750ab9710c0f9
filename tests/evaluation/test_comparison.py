"""Two models compared: chance is called chance, a difference a difference, and different questions are refused."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from megatron_instruct.errors import InputError
from megatron_instruct.evaluation.comparison import compare, comparison_table, mcnemar_exact
from megatron_instruct.evaluation.perplexity import perplexity_results
from megatron_instruct.evaluation.results import Metric, Results, Sample


def answers(right: list[int], *, higher_is_better: bool | None = True) -> Results:
    samples = tuple(Sample(task="t", id=str(n), content="c", values={"acc": float(value)}) for n, value in enumerate(right))
    mean = sum(right) / len(right)
    metric = Metric(task="t", name="acc", value=mean, stderr=None, n=len(right), higher_is_better=higher_is_better)
    return Results(metrics=(metric,), samples=samples)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (3, 9), (9, 3), (5, 5), (40, 70), (20_000, 20_300)])
def test_mcnemar_is_the_binomial_test_on_the_questions_that_differ(only_a: int, only_b: int) -> None:
    expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected)


def test_a_small_difference_is_no_difference_beyond_chance() -> None:
    (found,) = compare(answers([1, 0] * 20), answers([1, 0] * 18 + [1, 1] * 2))
    assert found.verdict == "no difference beyond chance" and found.test == "McNemar exact"
    assert found.difference == pytest.approx(0.05) and found.low is not None and found.low <= 0
    assert "no difference beyond chance (McNemar exact, n=40)" in comparison_table([found], name_a="base", name_b="trained")


def test_a_large_difference_is_better_or_worse_by_the_direction_of_the_metric() -> None:
    low, high = [1, 0, 0, 0] * 10, [1, 1, 1, 0] * 10
    assert compare(answers(low), answers(high))[0].verdict == "better"
    assert compare(answers(high), answers(low))[0].verdict == "worse"
    assert compare(answers(low), answers(high, higher_is_better=None))[0].verdict == "different"


def test_perplexity_is_compared_document_by_document() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(20, 200, 40).tolist()
    ids, texts = [str(n) for n in range(40)], ["x" * 4 * count for count in tokens]
    base = [count * value for count, value in zip(tokens, random.normal(3.5, 0.5, 40), strict=True)]
    slightly = [value - 0.05 * count for value, count in zip(base, tokens, strict=True)]
    noise = [value + count * step for value, count, step in zip(base, tokens, random.normal(0, 0.05, 40), strict=True)]
    a, b, c = (perplexity_results(ids, texts, tokens, nll) for nll in (base, slightly, noise))
    better = {one.name: one for one in compare(a, b)}
    assert {one.verdict for one in better.values()} == {"better"}, "a constant gain far below the spread over documents"
    per_token = better["nll_per_token"]
    assert per_token.low == pytest.approx(-0.05) and per_token.high == pytest.approx(-0.05)
    assert better["bits_per_byte"].difference == pytest.approx(-0.05 / math.log(2) / 4)
    assert {one.verdict for one in compare(a, c)} == {"no difference beyond chance"}
    assert {one.verdict for one in compare(a, a)} == {"no difference beyond chance"}


def test_a_value_that_is_no_number_is_neither_better_nor_worse() -> None:
    nan = Metric(task="perplexity", name="nll_per_token", value=math.nan, stderr=None, n=2, higher_is_better=False)
    samples = tuple(Sample(task="perplexity", id=id, content="c", values={"nll": math.nan, "tokens": 5, "bytes": 9}) for id in "ab")
    sound = perplexity_results(["a", "b"], ["x", "y"], [5, 5], [9.0, 8.0])
    damaged = Results(metrics=(nan,), samples=samples)
    sound = Results(metrics=sound.metrics, samples=tuple(dataclasses.replace(sample, content="c") for sample in sound.samples))
    (found,) = compare(sound, damaged)
    assert (found.verdict, found.p_value, found.low) == ("not tested", None, None)


def test_a_metric_that_is_no_mean_of_its_questions_is_not_tested() -> None:
    strange = Results(metrics=(Metric(task="t", name="acc", value=9.0, stderr=None, n=2, higher_is_better=True),), samples=())
    (found,) = compare(strange, strange)
    assert (found.verdict, found.test, found.p_value) == ("not tested", "none", None)


def test_other_questions_and_nothing_in_common_are_refused() -> None:
    with pytest.raises(InputError, match="task t: the two models were asked different questions"):
        compare(answers([1, 0]), answers([1, 0, 1]))
    with pytest.raises(InputError, match="no metric in common: t against nothing"):
        compare(answers([1]), Results(metrics=(), samples=()))
