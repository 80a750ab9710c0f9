"""A checkpoint exports to the same bits, whichever processes wrote it."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.conversion.weights import split, weights_of
from megatron_instruct.models.architecture import Architecture
from tests.conversion.conftest import split_as_qwen2

SCRIPT = Path(__file__).with_name("save_checkpoint.py")


SPLIT_BOTH_WAYS = {"tensor": 2, "pipeline": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("family", "processes", "layout"),
    [
        ("qwen2", 4, SPLIT_BOTH_WAYS),
        pytest.param("mixtral", 4, SPLIT_BOTH_WAYS, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, SPLIT_BOTH_WAYS, marks=pytest.mark.slow),
        pytest.param("mixtral", 2, {"expert": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of megatron-core 0.19.2, built here itself
def test_what_several_ranks_save_is_exported_as_one_process_exports_it(
    family: Any,
    processes: int,
    layout: dict[str, Any],
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    """600 rows of vocabulary are padded to 640, or to 768 by two tensor ranks, which the export does not show."""
    architecture = Architecture(
        family=family,
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=600,
        max_position_embeddings=512,
        init_method_std=0.1,
        **({"num_experts": 4, "experts_per_token": 2} if family == "mixtral" else {}),
    )
    saved, tokenizer = tmp_path / "saved", shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    if family == "qwen2":
        split_as_qwen2(tokenizer)
    done = torchrun(processes, SCRIPT, saved, tokenizer, json.dumps(layout), json.dumps(architecture.to_json()))
    assert done.returncode == 0, done.stderr
    manifest = run(ConvertConfig(load=saved, save=tmp_path / "export"))
    assert manifest.facts["proof"]["proved"]
    assert manifest.facts["iteration"] == 12
    exported = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")
    whole = one_process_weights(architecture)
    assert exported.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(exported[name], tensor), name
    assert exported["lm_head.weight"].shape == (600, 64)


def one_process_weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the initial weights of the whole model, which do not depend on the layout, in Hugging Face's names."""
    from megatron_instruct.conversion import megatron_side
    from megatron_instruct.models.build import BuildOptions, build_model
    from megatron_instruct.models.layout import ParallelLayout

    with megatron_side.one_process() as machine:
        (model,) = build_model(architecture, ParallelLayout(), machine, BuildOptions())
        parameters = model.state_dict()
        return {
            name: part.clone()
            for weight in weights_of(architecture)
            for name, part in zip(weight.huggingface, split(weight, parameters[weight.megatron], architecture), strict=True)
        }
