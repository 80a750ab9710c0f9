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
QWEN2: dict[str, Any] = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
QWEN3: dict[str, Any] = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24, "attention_bias": False}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "sliding_window": None,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "mixtral": MIXTRAL}


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors that transformers saves for a model of this configuration."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = config["hidden_size"], config["head_dim"]
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
            }.items()
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_the_family(config).items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (1.0 + tensor if "norm" in name else tensor).to(dtype) for name, tensor in tensors.items()}


def of_the_family(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what a layer holds that not every family's does: the feed-forward layer or experts, biases, norms of heads."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if config["model_type"] == "mixtral":
        number = config["num_local_experts"]
        shapes: dict[str, tuple[int, ...]] = {"block_sparse_moe.gate.weight": (number, hidden)}
        for expert in range(number):
            shapes |= {f"block_sparse_moe.experts.{expert}.{name}.weight": (ffn, hidden) for name in ("w1", "w3")}
            shapes[f"block_sparse_moe.experts.{expert}.w2.weight"] = (hidden, ffn)
        return shapes
    shapes = {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden), "mlp.down_proj.weight": (hidden, ffn)}
    if config["model_type"] == "qwen2":
        shapes |= {"self_attn.q_proj.bias": (heads * head,), "self_attn.k_proj.bias": (groups * head,)}
        shapes["self_attn.v_proj.bias"] = (groups * head,)
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    return shapes


QWEN2_SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
"""How Qwen's tokenizers split a text; transformers 5 splits so for every model of the type qwen2, whatever tokenizer.json says."""


def split_as_qwen2(folder: Path) -> None:
    """Make a tokenizer one that transformers loads for a qwen2."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]}}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


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
        if config["model_type"] == "qwen2":
            split_as_qwen2(folder)
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
