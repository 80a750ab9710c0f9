"""Sizes and layouts: presets against transformers' own count, and what is refused."""

import importlib.resources
from typing import Any

import pytest
import yaml

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.presets import make_architecture, preset

pytestmark = pytest.mark.filterwarnings("ignore")
PRESETS: dict[str, Any] = yaml.safe_load(importlib.resources.files("megatron_instruct.models").joinpath("presets.yaml").read_text())


def architecture(name: str = "tiny", *, vocab_size: int = 32000, **given: Any) -> Architecture:
    return make_architecture(given, preset_name=name, vocab_size=vocab_size, seq_length=128)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_the_model_that_transformers_builds(name: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = architecture(name)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_query_groups,
        head_dim=size.kv_channels,
        tie_word_embeddings=size.tie_embeddings,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "billions"), [("500M", 0.5), ("1.3B", 1.3), ("7B", 7.24), ("70B", 70.0)])
def test_a_preset_is_as_large_as_its_name_says(name: str, billions: float) -> None:
    assert architecture(name).num_parameters / 1e9 == pytest.approx(billions, rel=0.1)


def test_the_8b_preset_is_llama_3_8b() -> None:
    assert architecture("8B", vocab_size=128256).num_parameters == 8_030_261_248


def test_flops_count_six_a_weight_and_causal_attention() -> None:
    size = architecture("31M", vocab_size=100)
    untied = 6 * (size.num_parameters - 100 * size.hidden_size)
    assert size.flops_per_token(512) == untied + 6 * 8 * 384 * 512


def test_an_unknown_preset_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean '1\.3B'"):
        preset("1.3b")


def test_a_size_that_is_not_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="set preset, or hidden_size, ffn_hidden_size, num_attention_heads"):
        make_architecture({"num_layers": 2}, preset_name=None, vocab_size=10, seq_length=8)


def test_single_dimensions_override_a_preset() -> None:
    assert architecture("31M", num_layers=3).num_layers == 3


def test_an_architecture_survives_json() -> None:
    size = architecture("8B")
    assert Architecture.from_json(size.to_json()) == size


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(world_size=3, tensor=2), "world_size=3 is not a multiple"),
        (ParallelLayout(world_size=3, tensor=3), "num_attention_heads=8 is not a multiple of tensor_model_parallel_size=3.*allows 1, 2, 4"),
        (ParallelLayout(world_size=8, tensor=8), "num_query_groups=4 is not a multiple"),
        (ParallelLayout(world_size=3, pipeline=3), "num_layers=4 is not a multiple of the 3 pipeline stages"),
        (ParallelLayout(world_size=1, sequence_parallel=True), "sequence_parallel=True needs"),
        (ParallelLayout(world_size=2, pipeline=2, layers_in_last_stage=4), "at least one layer in each"),
        (ParallelLayout(world_size=3, pipeline=3, layers_in_last_stage=1), "leaves 3, not a multiple of the other 2 stages"),
        (ParallelLayout(world_size=1, virtual_pipeline=2), "interleaved pipeline needs"),
        (ParallelLayout(world_size=1, tensor=0), "must be at least 1"),
    ],
)
def test_a_layout_that_does_not_fit_says_what_would(layout: ParallelLayout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.check(architecture())
