"""FP8: what megatron-core is told, and what is refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.config import parse
from megatron_instruct.errors import ConfigError
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.fp8 import check_fp8, fp8_fields
from megatron_instruct.training.settings.precision import Fp8Options

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = make_architecture({}, preset_name="8B", vocab_size=128256, seq_length=4096)


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_core_takes_the_fields_of_every_recipe(fp8_format: Any, recipe: Any) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    more: dict[str, Any] = {"fp8_amax_history_len": 7} if recipe == "delayed" else {"first_last_layers_bf16": True}
    options = Fp8Options(fp8_format=fp8_format, fp8_recipe=recipe, **more)
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fp8_fields(options))
    assert (config.fp8, str(config.fp8_recipe)) == (fp8_format, recipe)
    assert config.first_last_layers_bf16 == (recipe != "delayed")
    assert config.fp8_amax_history_len == (7 if recipe == "delayed" else 1)


def test_without_fp8_nothing_is_said_of_it() -> None:
    assert fp8_fields(Fp8Options()) == {}
    check_fp8(Fp8Options(), SIZE, ParallelLayout(), tokens=3, capability=None)


@pytest.mark.parametrize(
    ("recipe", "capability", "message"),
    [
        ("delayed", None, "needs a GPU of compute capability 8.9 .Ada or Hopper. or newer, and there is no GPU"),
        ("delayed", (8, 0), "and this GPU has 8.0"),
        ("blockwise", (8, 9), "needs a GPU of compute capability 9.0 .Hopper."),
        ("mxfp8", (9, 0), "needs a GPU of compute capability 10.0 .Blackwell."),
    ],
)
def test_a_machine_that_cannot_is_told_what_it_lacks(recipe: Any, capability: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fp8(Fp8Options(fp8_format="hybrid", fp8_recipe=recipe), SIZE, ParallelLayout(), tokens=4096, capability=capability)


def test_sizes_that_the_products_cannot_take_are_named() -> None:
    options = Fp8Options(fp8_format="hybrid")
    check_fp8(options, SIZE, ParallelLayout(world_size=8, tensor=8), tokens=4096, capability=(9, 0))
    with pytest.raises(ConfigError, match=r"micro_batch_size . seq_length of one rank = 1000 is not a multiple of 16"):
        check_fp8(options, SIZE, ParallelLayout(), tokens=1000, capability=(9, 0))
    odd = make_architecture({"ffn_hidden_size": 14344}, preset_name="8B", vocab_size=128256, seq_length=4096)
    with pytest.raises(ConfigError, match="ffn_hidden_size / tensor_model_parallel_size = 14344 is not a multiple of 16"):
        check_fp8(options, odd, ParallelLayout(), tokens=4096, capability=(9, 0))


def test_layers_kept_out_leave_some_in_8_bits() -> None:
    options = Fp8Options(fp8_format="hybrid", fp8_recipe="tensorwise", first_last_layers_bf16=True, num_layers_at_end_in_bf16=31)
    with pytest.raises(ConfigError, match="num_layers_at_start_in_bf16=1 and num_layers_at_end_in_bf16=31 leave none of num_layers=32"):
        check_fp8(options, SIZE, ParallelLayout(), tokens=4096, capability=(9, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp8_recipe": "mxfp8"}, "fp8_recipe=mxfp8 goes with fp8_format, without which nothing is in 8 bits; set it, or drop fp8_recipe"),
        ({"fp8_emulation": True}, "fp8_emulation=True goes with fp8_format"),
        ({"fp8_format": "e4m3", "fp8_recipe": "mxfp8", "fp8_margin": 1}, "fp8_margin=1 goes with fp8_recipe=delayed"),
        ({"fp8_format": "e4m3", "num_layers_at_end_in_bf16": 2}, "num_layers_at_end_in_bf16=2 goes with first_last_layers_bf16=True"),
        (
            {"fp8_format": "e4m3", "fp8_recipe": "mxfp8", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": -1},
            "num_layers_at_end_in_bf16=-1 must not be negative",
        ),
    ],
)
def test_a_setting_that_does_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fp8Options(**given)


def test_layers_cannot_be_kept_out_of_a_history_that_all_share() -> None:
    with pytest.raises(ConfigError, match="does not go with fp8_recipe=delayed"):
        Fp8Options(fp8_format="hybrid", first_last_layers_bf16=True)


def test_a_cpu_refuses_fp8_before_anything_is_trained(start: Callable[..., Any], flags: Callable[..., list[str]], tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count():
        pytest.skip("a GPU is here")
    process = start("pretrain.py", *flags(tmp_path / "run", "--bf16", "--fp8-format", "hybrid"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "fp8_format=hybrid with fp8_recipe=delayed needs a GPU of compute capability 8.9" in errors


def test_what_is_not_computed_in_8_bits_is_computed_in_bf16(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp8_format=hybrid needs bf16=True"):
        parse(PretrainConfig, flags(tmp_path / "run", "--fp8-format", "hybrid"), prog="pretrain.py")
