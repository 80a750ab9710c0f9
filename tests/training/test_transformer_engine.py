"""Against Transformer Engine itself, where it is installed; no GPU is needed: scales, recipes and layers, not products."""

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from megatron_instruct.models.presets import make_architecture
from megatron_instruct.platform.fp8_numbers import E4M3, E5M2, LARGEST, update_scales
from megatron_instruct.training.fp8 import fp8_fields
from megatron_instruct.training.settings.precision import Fp8Options

from .conftest import FULLY_SHARDED, SHARDED, Runs, read_metrics


def _why_not() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine[pytorch] is not installed"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError, AssertionError) as error:  # its shared libraries
        return f"Transformer Engine cannot be imported: {error}"
    return None


WHY_NOT = _why_not()
pytestmark = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize(("dtype", "margin"), [(E4M3, 0), (E5M2, 0), (E4M3, 3)])
def test_the_sequence_of_delayed_scales_is_transformer_engines(algorithm: Any, dtype: torch.dtype, margin: int) -> None:
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    length = 5
    recipe = DelayedScaling(margin=margin, amax_history_len=length, amax_compute_algo=algorithm)
    mine_LN, theirs_LN, mine_N, theirs_N = torch.zeros(length, 3), torch.zeros(length, 3), torch.ones(3), torch.ones(3)
    torch.manual_seed(1)
    odd = {3: 0.0, 7: float("inf"), 11: 1e-40, 13: float("nan"), 17: 3e38}
    for step in range(40):
        amax_N = torch.rand(3) * 10.0 ** torch.randint(-6, 6, (3,))
        amax_N[step % 3] = odd.get(step, float(amax_N[step % 3]))
        mine_LN[0], theirs_LN[0] = amax_N, amax_N
        update_scales(mine_LN, mine_N, (dtype,) * 3, algorithm=algorithm, margin=margin)
        _amax_and_scale_update(theirs_LN, theirs_N, LARGEST[dtype], recipe)
        assert torch.equal(mine_N, theirs_N), step
        assert torch.equal(mine_LN, theirs_LN) or torch.isnan(mine_LN).any(), step


def _config(recipe: Any, fp8_format: Any, **more: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = Fp8Options(fp8_format=fp8_format, fp8_recipe=recipe, **more)
    return TransformerConfig(  # initialised on the CPU, as otherwise the recipe asks for a GPU
        num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, use_cpu_initialization=True, **fp8_fields(options)
    )


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("delayed", "DelayedScaling"),
        ("tensorwise", "Float8CurrentScaling"),
        ("blockwise", "Float8BlockScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
    ],
)
def test_flags_become_the_recipe_that_they_name(recipe: str, kind: str, fp8_format: str) -> None:
    import transformer_engine.common.recipe as recipes
    from megatron.core.fp8_utils import get_fp8_recipe

    found = get_fp8_recipe(_config(recipe, fp8_format))
    assert isinstance(found, getattr(recipes, kind))
    assert found.fp8_format.name == fp8_format.upper()
    assert (found.fp8_format.value.max_fwd, found.fp8_format.value.max_bwd) == (
        LARGEST[E4M3],
        LARGEST[E5M2 if fp8_format == "hybrid" else E4M3],
    )
    if recipe == "blockwise":
        assert (found.x_block_scaling_dim, found.w_block_scaling_dim, found.grad_block_scaling_dim) == (1, 2, 1)
        assert found.fp8_quant_fwd_inp.power_2_scale, "as the emulation takes it"


def test_the_flags_of_delayed_scaling_arrive() -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    given = {"fp8_amax_history_len": 7, "fp8_amax_compute_algo": "most_recent", "fp8_margin": 2}
    found = get_fp8_recipe(_config("delayed", "hybrid", **given))
    assert (found.amax_history_len, found.amax_compute_algo, found.margin, found.reduce_amax) == (7, "most_recent", 2, True)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_gpu_gets_transformer_engines_layers(family: Any) -> None:
    import transformer_engine.pytorch as te
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TELayerNormColumnParallelLinear, TERowParallelLinear

    from megatron_instruct.models.build import _layer_spec

    architecture = make_architecture({"family": family}, preset_name="8B", vocab_size=1024, seq_length=64)
    spec = _layer_spec(_config("tensorwise", "hybrid"), architecture, None, fused=True)
    attention = spec.submodules.self_attention.submodules
    assert attention.linear_qkv is TELayerNormColumnParallelLinear
    assert attention.linear_proj is TERowParallelLinear
    assert attention.core_attention is TEDotProductAttention
    assert issubclass(TELayerNormColumnParallelLinear, te.LayerNormLinear)


def test_a_cpu_trains_as_it_does_without_transformer_engine(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    short = ("--train-iters", 3)
    layouts = {"plain": short, "sharded": (*short, *SHARDED), "fully sharded": (*short, *FULLY_SHARDED)}
    layouts |= {"bf16": (*short, "--bf16"), "fp16": (*short, "--fp16"), "experts": (*short, "--preset", "tiny-experts")}
    folders = runs(1, layouts, {})
    found = {name: read_metrics(folder).training for name, folder in folders.items()}
    assert np.allclose(found["plain"], found["sharded"], rtol=1e-5)
    assert np.allclose(found["plain"], found["fully sharded"], rtol=1e-5)
    assert found["bf16"][0][1] == pytest.approx(found["plain"][0][1], abs=0.05)
    assert all(len(rows) == 3 for rows in found.values())
