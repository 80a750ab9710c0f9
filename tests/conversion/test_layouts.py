"""A checkpoint exports to the same bits, whichever processes wrote it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.models.architecture import Architecture

SCRIPT = Path(__file__).with_name("save_checkpoint.py")


def test_two_tensor_and_two_pipeline_ranks_export_as_one_process_does(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """600 rows of vocabulary are padded to 640 by one process and to 768 by two tensor ranks; neither shows in the export."""
    architecture = Architecture(
        family="mistral",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=600,
        max_position_embeddings=512,
        init_method_std=0.1,
    )
    exports = []
    for tensor, pipeline in ((1, 1), (2, 2)):
        folder = tmp_path / f"{tensor}x{pipeline}"
        done = torchrun(tensor * pipeline, SCRIPT, folder, tokenizer_folder, tensor, pipeline, json.dumps(architecture.to_json()))
        assert done.returncode == 0, done.stderr
        manifest = run(ConvertConfig(load=folder, save=tmp_path / f"{folder.name}-export"))
        assert manifest.facts["proof"]["proved"]
        assert manifest.facts["iteration"] == 12
        exports.append(tmp_path / f"{folder.name}-export")
    one, four = exports
    assert (one / "model.safetensors").read_bytes() == (four / "model.safetensors").read_bytes()
    assert safetensors.torch.load_file(four / "model.safetensors")["lm_head.weight"].shape == (600, 64)
    assert (one / "config.json").read_bytes() == (four / "config.json").read_bytes()
    assert json.loads((four / "config.json").read_text())["sliding_window"] is None
