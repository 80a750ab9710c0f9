"""Every recipe of examples/pretrain describes a run that can be: `run.sh RECIPE ARM --dry-run` on a machine with neither GPU nor data."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "examples" / "pretrain").glob("*.yaml"))


def run_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "examples" / "pretrain" / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}, check=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_describes_a_run_of_its_size(recipe: str) -> None:
    result = run_sh(recipe, "instruct", "--dry-run")
    assert result.returncode == 0, result.stderr
    billions = float(re.search(r"Model: ([\d.]+) billion", result.stdout)[1])  # type: ignore[index]
    size, unit = re.match(r"([\d.]+|8x7)([MB])-", recipe).groups()  # type: ignore[union-attr]
    wanted = 46.7 if size == "8x7" else float(size) / (1000 if unit == "M" else 1)
    assert billions == pytest.approx(wanted, rel=0.15)
    memory = float(re.search(r"Memory of the fullest GPU, GiB: ([\d.]+) = ", result.stdout)[1])  # type: ignore[index]
    assert 1 < memory < 73, "a GPU has 80 GiB, and not all of it can be filled"
    assert "It does not fit" not in result.stdout
    tokens = float(re.search(r"steps = ([\d.]+) billion tokens", result.stdout)[1])  # type: ignore[index]
    assert tokens == pytest.approx(1.05 if "continual" in recipe else 100.0, abs=0.01)


def test_the_arms_differ_in_their_data_alone() -> None:
    settings = [run_sh("500M-scratch", arm, "--dry-run", "--print-config").stdout.splitlines() for arm in ("vanilla", "instruct")]
    different = {line.split(":")[0].strip("- ") for line in set(settings[0]) ^ set(settings[1])}
    assert different == {"save", "data/augmented_text_document", "'0.5'"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("500M", "vanilla"), "no recipe 500M; there are "),
        (("500M-scratch", "both"), "arm 'both' is unknown; use vanilla or instruct"),
        (("70B-scratch", "vanilla", "--dry-run", "--world-size", "100"), "world_size=100 is not a multiple of"),
        (("70B-scratch", "vanilla", "--dry-run", "--pipeline-model-parallel-size", "3"), "num_layers=80"),
        (("70B-scratch", "vanilla", "--dry-run", "--global-batch-size", "1023"), "use 1024"),
        (("500M-scratch", "vanilla", "--dry-run", "--world-size", "0"), "world_size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(arguments: tuple[str, ...], message: str) -> None:
    result = run_sh(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_dry_run_is_one_however_many_flags_follow() -> None:
    result = run_sh("70B-scratch", "vanilla", "--dry-run", *["--seed", "1"] * 10_000)  # more than a pipe holds
    assert result.returncode == 0, result.stderr
    assert "Model: " in result.stdout


def test_a_dry_run_asks_for_the_vocabulary_it_cannot_know(start: Callable[..., Any], tmp_path: Path) -> None:
    flags = (
        "--preset",
        "tiny",
        "--train-data-path",
        "no",
        "--train-iters",
        1,
        "--global-batch-size",
        1,
        "--lr",
        "1e-3",
        "--save",
        tmp_path,
    )
    process = start("pretrain.py", *flags, "--tokenizer-model", tmp_path / "no", "--dry-run")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the size of the vocabulary is not known" in errors
    assert "give vocab_size" in errors
