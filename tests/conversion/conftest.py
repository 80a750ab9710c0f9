"""Random models in Hugging Face's form, written by hand so that no table of the project decides what they hold."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MISTRAL: dict[str, Any] = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors that transformers saves for a Llama or Mistral of this configuration."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (heads * head, hidden),
                "self_attn.k_proj": (groups * head, hidden),
                "self_attn.v_proj": (groups * head, hidden),
                "self_attn.o_proj": (hidden, heads * head),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }.items()
        }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (1.0 + tensor if "norm" in name else tensor).to(dtype) for name, tensor in tensors.items()}


WriteModel = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path, tokenizer_folder: Path) -> WriteModel:
    """Write a random model; `tensors` and `config` may be changed by the caller's functions."""

    def write(
        config: dict[str, Any] = LLAMA,
        *,
        dtype: torch.dtype = torch.float32,
        change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object] | None = None,
        name: str = "source",
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(tokenizer_folder, folder)
        config = json.loads(json.dumps(config))
        tensors = random_tensors(config, dtype)
        if change is not None:
            change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A test that another one follows leaves no process group behind."""
    yield
    assert not torch.distributed.is_initialized(), "conversion leaves its process group"
