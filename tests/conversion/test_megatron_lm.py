"""What Megatron-LM's own tools look for in a checkpoint, read by megatron-core and by the parts of Megatron-LM that its wheel ships."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.models.architecture import Architecture, RopeScaling
from megatron_instruct.models.megatron_lm import arguments
from tests.conversion.conftest import FAMILIES, WriteModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}


def test_megatron_core_reads_the_arguments_of_a_converted_checkpoint(write_model: WriteModel, tmp_path: Path) -> None:
    run(ConvertConfig(load=write_model(FAMILIES["mixtral"]), save=tmp_path / "megatron", prove=False))
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(tmp_path / "megatron" / "iter_0000000"))
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    found = common["args"]
    assert isinstance(found, Namespace)
    assert (found.num_layers, found.hidden_size, found.num_query_groups, found.num_experts, found.moe_router_topk) == (2, 64, 4, 4, 2)


@pytest.mark.parametrize(
    ("family", "more", "wanted"),
    [
        ("llama", {"rotary_linear_factor": 2.0}, {"rotary_seq_len_interpolation_factor": 2.0, "use_rope_scaling": False}),
        (
            "llama",
            {"rope_scaling": RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)},
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        ),
        (  # which Megatron-LM has no arguments for
            "llama",
            {"rope_scaling": RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)},
            {"use_rope_scaling": False},
        ),
        ("qwen2", {"sliding_window": 40, "first_window_layer": 1}, {"window_size": (39, 0), "window_attn_skip_freq": [0, 1, 1]}),
        ("qwen3", {"tie_embeddings": True}, {"qk_layernorm": True, "untie_embeddings_and_output_weights": False}),
    ],
)
def test_arguments_say_what_the_architecture_says(family: Any, more: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = arguments(Architecture(family=family, **SIZES, **more), "bf16")
    assert wanted.items() <= vars(found).items()
    assert found.add_qkv_bias is (family == "qwen2")
