"""Sizes and layouts: presets against transformers' own count, and what is refused."""

import importlib.resources
import json
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
    """On the meta device, where nothing is allocated."""
    assert architecture(name).num_parameters == parameters_of_transformers(architecture(name))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads_are_counted(family: Any) -> None:
    size = architecture("tiny", family=family)
    assert size.num_parameters == parameters_of_transformers(size)


def parameters_of_transformers(size: Architecture) -> int:
    import torch
    import transformers

    experts = {"num_local_experts": size.num_experts} if size.num_experts else {}
    config = getattr(transformers, f"{size.family.capitalize()}Config")(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_query_groups,
        head_dim=size.kv_channels,
        tie_word_embeddings=size.tie_embeddings,
        **experts,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("135M", 49152, 134_515_008),  # SmolLM2-135M
        ("3B", 128256, 3_212_749_824),  # Llama-3.2-3B
        ("7B", 32000, 7_241_732_096),  # Mistral-7B-v0.1
        ("8B", 128256, 8_030_261_248),  # Meta-Llama-3-8B
        ("13B", 32000, 13_015_864_320),  # Llama-2-13b
        ("34B", 32000, 33_743_970_304),  # CodeLlama-34b
        ("70B", 128256, 70_553_706_496),  # Meta-Llama-3-70B
        ("8x7B", 32000, 46_702_792_704),  # Mixtral-8x7B-v0.1
    ],
)
def test_a_preset_is_exactly_the_published_model(name: str, vocab_size: int, parameters: int) -> None:
    """The numbers of parameters that the model cards state (their safetensors' own count)."""
    assert architecture(name, vocab_size=vocab_size).num_parameters == parameters


@pytest.mark.parametrize(("name", "billions"), [("500M", 0.5), ("1.3B", 1.3)])
def test_a_preset_is_as_large_as_its_name_says(name: str, billions: float) -> None:
    assert architecture(name).num_parameters / 1e9 == pytest.approx(billions, rel=0.1)


def test_of_a_mixture_of_experts_the_chosen_ones_compute_a_token() -> None:
    size = architecture("8x7B")
    assert size.num_active_parameters / 1e9 == pytest.approx(12.9, abs=0.1)  # arXiv:2401.04088: 13B active
    assert size.num_parameters - size.num_active_parameters == 32 * 6 * 3 * 4096 * 14336
    assert size.flops_per_token(1) < architecture("8x7B", experts_per_token=3).flops_per_token(1)


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


@pytest.mark.parametrize("name", ["8B", "3B", "8x7B"])
def test_an_architecture_survives_json(name: str) -> None:
    size = architecture(name)
    assert Architecture.from_json(json.loads(json.dumps(size.to_json()))) == size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "qwen"}, "family='qwen' is unknown; did you mean 'qwen"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_query_groups": 3}, "num_attention_heads=8 is not a multiple of num_query_groups=3"),
        ({"kv_channels": 7}, "kv_channels=7 must be even"),
        ({"family": "qwen2", "kv_channels": 16}, "kv_channels=16 must be hidden_size / num_attention_heads"),
        ({"sliding_window": 8}, "sliding_window=8 is not possible in the family llama"),
        ({"family": "mistral", "first_window_layer": 1}, "first_window_layer=1 needs a sliding_window"),
        ({"family": "qwen3", "sliding_window": 8, "first_window_layer": 4}, "must be a layer, 0 to 3"),
        ({"num_experts": 4}, "num_experts=4 goes with the family mixtral"),
        ({"family": "mixtral"}, "needs num_experts and experts_per_token"),
        ({"family": "mixtral", "num_experts": 4, "experts_per_token": 5}, "experts_per_token=5 must be 2 to num_experts=4"),
        ({"rotary_linear_factor": 0.0}, "rotary_linear_factor=0.0 must be positive"),
    ],
)
def test_an_architecture_that_cannot_be_says_why(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture("tiny", **given)


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


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            ParallelLayout(world_size=3, expert=3),
            "num_experts=4 is not a multiple of expert_model_parallel_size=3; this model allows 1, 2, 4",
        ),
        (ParallelLayout(world_size=2, expert=4), r"world_size=2 is not a multiple of .* = 4 \* 1 \* 1 = 4"),
        (ParallelLayout(world_size=4, pipeline=2, expert=4), r"= 4 \* 1 \* 2 = 8; lower them, or start torchrun with a multiple of 8"),
        (ParallelLayout(world_size=5, expert_tensor=5), "ffn_hidden_size=96 is not a multiple of expert_tensor_parallel_size=5"),
        (ParallelLayout(world_size=1, expert=0), "must be at least 1"),
        (ParallelLayout(world_size=2, tensor=2), "needs sequence_parallel=True"),
    ],
)
def test_experts_that_cannot_be_laid_out_so_say_how_they_could(layout: ParallelLayout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.check(architecture("tiny-experts"))


def test_a_model_without_experts_takes_no_expert_parallelism() -> None:
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size=2.*the family llama has no experts"):
        ParallelLayout(world_size=2, expert=2).check(architecture())


def test_ranks_hold_all_parameters_together() -> None:
    size = architecture("8x7B")
    assert ParallelLayout().parameters_of_rank(size, 0) == size.num_parameters
    spread = ParallelLayout(world_size=16, tensor=2, sequence_parallel=True, pipeline=2, expert=4, expert_tensor=1)
    spread.check(size)
    experts = 32 * 8 * 3 * 4096 * 14336
    held = sum(spread.parameters_of_rank(size, stage) for stage in (0, 1))
    assert held == pytest.approx((size.num_parameters - experts) / 2 + experts / 4, abs=4096)
