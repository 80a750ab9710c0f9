"""What the optimizer decays, and the optional parts of the loss."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPT = Path(__file__).with_name("optimizer_parts.py")
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def parts(torchrun_session: Launch) -> dict[str, Any]:
    """Of two tensor ranks."""
    done = torchrun_session(2, SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_norms_and_biases_are_not_decayed_and_all_matrices_are(parts: dict[str, Any]) -> None:
    decay = parts["default"]
    assert {name for name, factor in decay.items() if factor == 0.0} == {name for name in decay if "norm" in name or name.endswith("bias")}
    assert any(name.endswith("linear_qkv.bias") for name in decay)
    assert decay["embedding.word_embeddings.weight"] == 1.0


def test_embeddings_are_exempt_where_that_is_asked_for(parts: dict[str, Any]) -> None:
    changed = {name for name, factor in parts["exempt"].items() if factor != parts["default"][name]}
    assert changed == {"embedding.word_embeddings.weight", "output_layer.weight"}


def test_the_gradient_of_the_z_loss_is_that_of_the_plain_formula_and_the_loss_stays_the_cross_entropy(parts: dict[str, Any]) -> None:
    assert parts["loss"] < 1e-5
    assert parts["gradient"] < 1e-5


def test_rows_that_pad_the_vocabulary_have_no_part_in_the_loss_nor_in_the_z_loss(parts: dict[str, Any]) -> None:
    """Their number is a matter of the tensor ranks."""
    assert parts["loss without padding"] < 1e-5
    assert parts["gradient without padding"] < 1e-5
