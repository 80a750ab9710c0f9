"""Muon: which weights it takes, that it learns, that layouts agree, that a run goes on where it stopped."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.training.settings.optimizer import OptimizerOptions

from .conftest import ITERATIONS, MUON, PIPELINE, SEQUENCE, STOP, TENSOR, Runs, assert_same_end, read_metrics, weights

pytestmark = pytest.mark.filterwarnings("ignore")
MATRICES = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
MORE: dict[str, tuple[object, ...]] = {
    "data": MUON,
    "pipeline": (*PIPELINE, *MUON),
    "sequence parallel": (*SEQUENCE, *MUON),
    "tensor ranks together": (*TENSOR, *MUON, "--muon-tp-mode", "distributed"),
}


def assert_agree(folder: Path, reference: Path, *, tolerance: float) -> None:
    found, wanted = read_metrics(folder), read_metrics(reference)
    assert [row[0] for row in found.training] == list(range(1, ITERATIONS + 1))
    for mine, theirs in zip(found.training, wanted.training, strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=tolerance, rel=0.0)
        assert mine[2] == theirs[2]
    assert found.validation[-1][1] == pytest.approx(wanted.validation[-1][1], abs=tolerance, rel=0.0)


def test_muon_learns_and_otherwise_than_adamw(one: dict[str, Path]) -> None:
    losses, of_adamw = ([row[1] for row in read_metrics(one[name]).training] for name in ("muon", "reference"))
    assert losses[-1] < losses[0] - 0.1
    assert losses[0] == of_adamw[0], "the same weights meet the same batch"
    assert abs(losses[-1] - of_adamw[-1]) > 1e-3


def test_matrices_inside_layers_have_a_momentum_and_everything_else_the_moments_of_adamw(one: dict[str, Path]) -> None:
    names = weights(one["muon"], STOP)
    momentum = {name.removeprefix("optimizer.state.momentum_buffer.") for name in names if "momentum_buffer" in name}
    moments = {name.removeprefix("optimizer.state.exp_avg.") for name in names if ".exp_avg." in name}
    assert {name.removeprefix("decoder.layers.").removesuffix(".weight") for name in momentum} == MATRICES
    assert {"embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"} <= moments
    assert not momentum & moments


def test_a_stopped_run_goes_on_bit_for_bit(one: dict[str, Path]) -> None:
    assert_same_end(one["again muon"], one["muon"])


@pytest.mark.slow
def test_other_layouts_equal_one_process(runs: Runs, one: dict[str, Path]) -> None:
    folders = runs(2, MORE, {"again sequence parallel": ("sequence parallel", MORE["sequence parallel"])})
    for name in MORE:
        assert_agree(folders[name], one["muon"], tolerance=1e-5)
    assert_same_end(folders["again sequence parallel"], folders["sequence parallel"])


@pytest.mark.slow
def test_muon_learns_in_bf16_with_experts_and_by_blocks_of_a_tensor_rank(runs: Runs, one: dict[str, Path]) -> None:
    kinds: dict[str, tuple[object, ...]] = {
        "bf16": (*MUON, "--bf16"),
        "experts": (*MUON, "--preset", "tiny-experts"),
        "bf16 iterations": (*MUON, "--muon-fp32-matmul-prec", "medium"),
        "one matrix of query, key and value": (*MUON, "--muon-no-split-qkv"),
        "another scale": (*MUON, "--muon-scale-mode", "unit_rms_norm", "--muon-coefficient-type", "polar_express"),
    }
    alone = runs(1, kinds, {"again bf16": ("bf16", kinds["bf16"]), "again experts": ("experts", kinds["experts"])})
    for name in ("bf16", "experts"):
        assert_same_end(alone[f"again {name}"], alone[name])
    blocks = runs(2, {"blocks": (*TENSOR, *MUON, "--muon-tp-mode", "blockwise")}, {})
    ends = {name: read_metrics(folder).training for name, folder in {**alone, **blocks, "usual": one["muon"]}.items()}
    for rows in ends.values():
        assert rows[-1][1] < rows[0][1] - 0.05
    assert len({rows[-1][1] for name, rows in ends.items() if not name.startswith("again")}) == len(kinds) + 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"muon_nesterov": True}, "muon_nesterov=True goes with optimizer=muon; set it, or drop muon_nesterov"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "muon_momentum=1.0 must be at least 0 and below 1"),
        ({"optimizer": "muon", "muon_num_ns_steps": 0}, "muon_num_ns_steps=0 must be at least 1"),
        ({"optimizer": "muon", "muon_extra_scale_factor": 0.0}, "muon_extra_scale_factor=0.0 must be a positive number"),
    ],
)
def test_a_setting_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerOptions(**given)  # type: ignore[arg-type]


def test_the_missing_package_is_named_before_anything_starts(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_instruct.config import parse
    from megatron_instruct.training.config import PretrainConfig
    from megatron_instruct.training.run import run

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = parse(PretrainConfig, flags(tmp_path / "save", *MUON), prog="pretrain.py")
    assert config is not None
    with pytest.raises(MissingPackageError, match=r"optimizer=muon needs the package emerging-optimizers.*megatron-instruct\[muon\]"):
        run(config)
    assert not (tmp_path / "save").exists()
