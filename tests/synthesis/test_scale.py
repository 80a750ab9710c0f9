"""Corpora of any size in the memory of a small one, by the benchmark's own measurement."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "synthesis_scale.py"


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARK.parent))  # processes that are spawned import it, too
        yield importlib.import_module(BENCHMARK.stem)


@pytest.mark.slow  # three minutes
def test_memory_is_flat_from_1_000_to_100_000_texts(scale: ModuleType) -> None:
    small, large = (scale.measured(texts, plan_only=False) for texts in (1_000, 100_000))
    assert large.peak_mib < 1.15 * small.peak_mib, (small, large)


@pytest.mark.slow
def test_a_million_texts_are_planned_in_less_than_a_minute(scale: ModuleType) -> None:
    planned = scale.measured(1_000_000, plan_only=True)
    assert planned.processor_seconds < scale.BOUND_SECONDS, planned
    assert planned.peak_mib < 100, planned
