"""Every family trains, alone and over two tensor ranks, and both are the same training."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import FAMILIES
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture

SCRIPT = Path(__file__).with_name("train_families.py")
Torchrun = Callable[..., subprocess.CompletedProcess[str]]


def test_every_family_trains_and_two_tensor_ranks_train_it_the_same(torchrun: Torchrun) -> None:
    alone, over_two = trained(torchrun, 1), trained(torchrun, 2)
    assert alone.keys() == set(FAMILIES)
    for family, run in alone.items():
        assert run["losses"][2] < run["losses"][1] < run["losses"][0], family
        assert run["unchanged"] == [], "every parameter has a gradient"
        assert over_two[family]["losses"] == pytest.approx(run["losses"], abs=1e-5), family
        assert over_two[family]["norms"] == pytest.approx(run["norms"], abs=1e-5), family


def trained(torchrun: Torchrun, tensor: int) -> dict[str, Any]:
    done = torchrun(tensor, SCRIPT, tensor)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_experts_over_tensor_ranks_need_sequence_parallelism() -> None:
    size = make_architecture({}, preset_name="tiny-experts", vocab_size=100, seq_length=8)
    with pytest.raises(ConfigError, match="a mixture of experts over tensor_model_parallel_size=2 needs sequence_parallel"):
        ParallelLayout(world_size=2, tensor=2).check(size)
    ParallelLayout(world_size=2, tensor=2, sequence_parallel=True).check(size)
