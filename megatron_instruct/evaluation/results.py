"""What an evaluation found, as values, and how they stand on disk.

results.json: the metrics. samples.jsonl: one line a question or document, with what each metric is computed from, so that two
models can be compared question by question.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json, read_lines
from megatron_instruct.manifest import Manifest, read_manifest

STAGE = "evaluate"
RESULTS, SAMPLES = "results.json", "samples.jsonl"
NOT_FINITE = "the model's weights are damaged, or too large for this precision: export it again, or give --dtype float32."
"""Remedy where a model computes no numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number."""

    task: str
    name: str
    value: float
    stderr: float | None
    """Standard error over the questions or documents; None where it cannot be estimated."""
    n: int
    """Questions, or documents."""
    higher_is_better: bool | None
    """None where the task does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question or document."""

    task: str
    id: str
    content: str
    """SHA-256 of what was asked: the same id with other content is another question."""
    values: Mapping[str, float]
    """By metric. Of a document: nll (natural logarithm, summed), tokens, bytes."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For a reader: gold, chosen, loglikelihoods, an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Everything that one evaluation found."""

    metrics: tuple[Metric, ...]
    samples: tuple[Sample, ...]

    def __add__(self, other: "Results") -> "Results":
        return Results(metrics=self.metrics + other.metrics, samples=self.samples + other.samples)

    def metrics_json(self) -> list[dict[str, Any]]:
        return [asdict(metric) for metric in self.metrics]

    def samples_json(self) -> list[dict[str, Any]]:
        return [asdict(sample) for sample in self.samples]


def results_from_json(metrics: list[dict[str, Any]], samples: list[dict[str, Any]], *, where: str) -> Results:
    """where: named in the InputError of values that are no results."""
    try:
        return Results(metrics=tuple(Metric(**item) for item in metrics), samples=tuple(Sample(**item) for item in samples))
    except TypeError as error:
        raise InputError(f"{where} is damaged ({error}); evaluate again.") from error


def read_results(folder: Path) -> Results:
    """Read the results of a finished evaluation."""
    read_manifest(folder / "manifest.json", stage=STAGE)
    try:
        samples = [json.loads(line) for line in read_lines(folder / SAMPLES)]
    except ValueError as error:
        raise InputError(f"{folder / SAMPLES} is not valid JSON ({error}); evaluate again.") from error
    return results_from_json(read_json(folder / RESULTS)["metrics"], samples, where=str(folder))


def table(results: Results, manifest: Manifest) -> str:
    """Return the metrics as lines of text."""
    width = max([len(metric.task) for metric in results.metrics] + [4])
    lines = [f"{'task':<{width}}  {'metric':<14} {'value':>10} {'± stderr':>10} {'n':>7}"]
    for metric in results.metrics:
        error = "-" if metric.stderr is None else f"{metric.stderr:.4f}"
        lines.append(f"{metric.task:<{width}}  {metric.name:<14} {metric.value:>10.4f} {error:>10} {metric.n:>7,}")
    facts = ", ".join(f"{name} {value}" for name, value in manifest.facts.items())
    return "\n".join([*lines, facts] if facts else lines)
