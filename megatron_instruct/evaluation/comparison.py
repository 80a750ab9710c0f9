"""Two evaluations of the same questions, compared question by question.

Comes in: two results. Goes out: for each metric both values, their difference, and whether it is more than chance would make of
two equally good models. Right-or-wrong metrics: McNemar's exact test on the questions that only one of the two got right.
Other means, and perplexity: a paired bootstrap over questions or documents (10,000 draws, fixed seed), two-sided.
No correction for the number of metrics is made: of twenty equal ones, one differs "beyond chance".
Does not know: files, models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_instruct.errors import InputError
from megatron_instruct.evaluation.config import PERPLEXITY
from megatron_instruct.evaluation.results import Metric, Results, Sample

Verdict = Literal["better", "worse", "different", "no difference beyond chance", "not tested"]
SIGNIFICANCE = 0.05
"""Below this p-value a difference counts as more than chance."""
_DRAWS, _SEED = 10_000, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One metric of two models: a, the one to compare with, and b."""

    task: str
    name: str
    value_a: float
    value_b: float
    n: int
    """Questions or documents, the same for both."""
    test: str
    """Name of the test; "none" where the questions do not add up to the metric."""
    p_value: float | None
    low: float | None
    """Lower end of the 95 % interval of the difference; None where it was not tested."""
    high: float | None
    verdict: Verdict
    """Of b, seen from a."""

    @property
    def difference(self) -> float:
        """value_b - value_a."""
        return self.value_b - self.value_a


def compare(results_a: Results, results_b: Results) -> tuple[Comparison, ...]:
    """Compare the metrics that both have, in the order of `results_b`.

    Raises InputError where they have none in common, or where a task was asked with other questions.
    """
    metrics_a = {(metric.task, metric.name): metric for metric in results_a.metrics}
    shared = [metric for metric in results_b.metrics if (metric.task, metric.name) in metrics_a]
    if not shared:
        raise InputError(f"the results have no metric in common: {_tasks(results_a)} against {_tasks(results_b)}.")
    found = []
    for metric in shared:
        pairs = _pairs(metric.task, results_a, results_b)
        found.append(_compare(metrics_a[metric.task, metric.name], metric, pairs))
    return tuple(found)


def comparison_table(comparisons: Sequence[Comparison], *, name_a: str, name_b: str) -> str:
    """Return the comparison as lines of text."""
    width = max(len(one.task) for one in comparisons)
    lines = [f"{name_b} (b) compared with {name_a} (a):"]
    lines.append(f"{'task':<{width}}  {'metric':<14} {'a':>9} {'b':>9} {'b - a':>9}  {'95 % interval':<20} {'p':>7}  verdict (test)")
    for one in comparisons:
        interval = "-" if one.low is None or one.high is None else f"{one.low:+.4f} … {one.high:+.4f}"
        p_value = "-" if one.p_value is None else f"{one.p_value:.4f}"
        lines.append(
            f"{one.task:<{width}}  {one.name:<14} {one.value_a:>9.4f} {one.value_b:>9.4f} {one.difference:>+9.4f}  "
            f"{interval:<20} {p_value:>7}  {one.verdict} ({one.test}, n={one.n:,})"
        )
    return "\n".join(lines)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: questions that only a, and that only b, got right."""
    discordant = only_a + only_b
    tail = ways = 1
    for wins in range(min(only_a, only_b)):  # each coefficient from the one before it: of 40,000 questions, in seconds, not hours
        ways = ways * (discordant - wins) // (wins + 1)
        tail += ways
    chance: float = 2 * tail / 2**discordant
    return min(1.0, chance)


def _tasks(results: Results) -> str:
    return ", ".join(dict.fromkeys(metric.task for metric in results.metrics)) or "nothing"


def _pairs(task: str, results_a: Results, results_b: Results) -> list[tuple[Sample, Sample]]:
    """Match the samples of a task; none where the task keeps none, as a group does."""
    samples_a = {sample.id: sample for sample in results_a.samples if sample.task == task}
    samples_b = [sample for sample in results_b.samples if sample.task == task]
    same = {sample.id: sample.content for sample in samples_b} == {id: sample.content for id, sample in samples_a.items()}
    if not same:
        raise InputError(f"task {task}: the two models were asked different questions; evaluate both with the same files and --limit.")
    return [(samples_a[sample.id], sample) for sample in samples_b]


def _compare(metric_a: Metric, metric_b: Metric, pairs: Sequence[tuple[Sample, Sample]]) -> Comparison:
    test, p_value, interval = "none", None, None
    if metric_a.task == PERPLEXITY:
        test = "paired bootstrap"
        p_value, interval = _bootstrap(*_document_arrays(metric_a.name, pairs), exponentiate=metric_a.name == "perplexity")
    elif pairs and all(metric_a.name in sample.values for pair in pairs for sample in pair):
        a, b = (np.array([pair[side].values[metric_a.name] for pair in pairs]) for side in (0, 1))
        if np.isclose(a.mean(), metric_a.value) and np.isclose(b.mean(), metric_b.value):
            ones = np.ones(len(pairs))
            p_value, interval = _bootstrap(a, b, ones, ones, exponentiate=False)
            test = "paired bootstrap"
            if set(a) | set(b) <= {0.0, 1.0}:
                test, p_value = "McNemar exact", mcnemar_exact(int((a > b).sum()), int((b > a).sum()))
    return Comparison(
        task=metric_b.task,
        name=metric_b.name,
        value_a=metric_a.value,
        value_b=metric_b.value,
        n=metric_b.n,
        test=test,
        p_value=p_value,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        verdict=_verdict(p_value, metric_b.value - metric_a.value, metric_b.higher_is_better),
    )


def _document_arrays(name: str, pairs: Sequence[tuple[Sample, Sample]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the summands of both models and what they are divided by."""
    unit = "bytes" if name == "bits_per_byte" else "tokens"
    scale = math.log(2) if name == "bits_per_byte" else 1.0
    nll_a, nll_b = (np.array([pair[side].values["nll"] / scale for pair in pairs]) for side in (0, 1))
    size_a, size_b = (np.array([pair[side].values[unit] for pair in pairs], dtype=float) for side in (0, 1))
    return nll_a, nll_b, size_a, size_b


def _bootstrap(
    top_a: np.ndarray, top_b: np.ndarray, bottom_a: np.ndarray, bottom_b: np.ndarray, *, exponentiate: bool
) -> tuple[float | None, tuple[float, float] | None]:
    """Return the two-sided p-value and the 95 % interval of ratio b - ratio a; None for fewer than two units, or where one is no number."""
    count = len(top_a)
    if count < 2 or not np.isfinite([top_a, top_b]).all():
        return None, None
    random = np.random.default_rng(_SEED)
    differences = np.empty(_DRAWS)
    for start in range(0, _DRAWS, 500):  # in slices, so that memory stays small for large tasks
        drawn = random.integers(0, count, size=(500, count))
        ratio_a = top_a[drawn].sum(axis=1) / bottom_a[drawn].sum(axis=1)
        ratio_b = top_b[drawn].sum(axis=1) / bottom_b[drawn].sum(axis=1)
        differences[start : start + 500] = np.exp(ratio_b) - np.exp(ratio_a) if exponentiate else ratio_b - ratio_a
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    p_value = min(1.0, 2 * (min(below, above) + 1) / (_DRAWS + 1))
    low, high = np.percentile(differences, [2.5, 97.5])
    return p_value, (float(low), float(high))


def _verdict(p_value: float | None, difference: float, higher_is_better: bool | None) -> Verdict:
    if p_value is None:
        return "not tested"
    if p_value >= SIGNIFICANCE or difference == 0:
        return "no difference beyond chance"
    if higher_is_better is None:
        return "different"
    return "better" if (difference > 0) == higher_is_better else "worse"


def summary(comparisons: Sequence[Comparison]) -> Mapping[Verdict, int]:
    """Count the verdicts."""
    counts: dict[Verdict, int] = {}
    for one in comparisons:
        counts[one.verdict] = counts.get(one.verdict, 0) + 1
    return counts
