"""The benchmark of conversion runs to its end and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "conversion.py"


@pytest.mark.slow
def test_the_benchmark_ends_with_one_line_of_figures() -> None:
    """Slow: it starts the tool three times."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--turns", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["parameters"] == 4_280_896
    assert 0.1 < figures["to_megatron_peak_gb"] < 2.0
    assert figures["cp_seconds"] > 0
