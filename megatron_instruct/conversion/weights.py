"""The weight tables: which Hugging Face tensors make which parameter of megatron-core, one literal table a family.

A new family is one more table. Names hold `{layer}` where there is one for each layer, and `{expert}` where there is one for each
expert. Does not know: files, processes, models.
Legend of shapes: V vocabulary (unpadded), C hidden size, F feed-forward size, H query heads * head size, G key/value heads * head size,
D head size, E experts.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_instruct.errors import InputError
from megatron_instruct.models.architecture import Architecture, Family
from megatron_instruct.models.dtypes import TORCH_DTYPES

Kind = Literal["copy", "vocabulary", "qkv", "stack"]
"""copy: the same tensor. vocabulary: rows are padded by megatron-core. qkv: query, key, value, interleaved per key/value head.
stack: one above the other (gate, up)."""


@dataclass(frozen=True)
class Rule:
    """One row of a table."""

    kind: Kind
    megatron: str
    huggingface: tuple[str, ...]
    shapes: tuple[str, ...]
    """Of each Hugging Face tensor, in the legend's letters."""
    unless_tied: bool = False
    """Whether the row exists only where the output layer is not the word embedding."""


_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."
_EMBEDDING = Rule("vocabulary", "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("VC",))
_ATTENTION = (
    Rule("copy", _M + "input_layernorm.weight", (_H + "input_layernorm.weight",), ("C",)),
    Rule(
        "qkv",
        _M + "self_attention.linear_qkv.weight",
        (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
        ("HC", "GC", "GC"),
    ),
    Rule("copy", _M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), ("CH",)),
    Rule("copy", _M + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), ("C",)),
)
_QKV_BIAS = Rule(
    "qkv",
    _M + "self_attention.linear_qkv.bias",
    (_H + "self_attn.q_proj.bias", _H + "self_attn.k_proj.bias", _H + "self_attn.v_proj.bias"),
    ("H", "G", "G"),
)
_QK_NORM = (
    Rule("copy", _M + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), ("D",)),
    Rule("copy", _M + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), ("D",)),
)
_FEED_FORWARD = (
    Rule("stack", _M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), ("FC", "FC")),
    Rule("copy", _M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), ("CF",)),
)
_MM, _HM = _M + "mlp.experts.local_experts.{expert}.", _H + "block_sparse_moe.experts.{expert}."
_EXPERTS = (
    Rule("copy", _M + "mlp.router.weight", (_H + "block_sparse_moe.gate.weight",), ("EC",)),
    Rule("stack", _MM + "linear_fc1.weight", (_HM + "w1.weight", _HM + "w3.weight"), ("FC", "FC")),
    Rule("copy", _MM + "linear_fc2.weight", (_HM + "w2.weight",), ("CF",)),
)
_END = (
    Rule("copy", "decoder.final_layernorm.weight", ("model.norm.weight",), ("C",)),
    Rule("vocabulary", "output_layer.weight", ("lm_head.weight",), ("VC",), unless_tied=True),
)
TABLES: dict[Family, tuple[Rule, ...]] = {
    "llama": (_EMBEDDING, *_ATTENTION, *_FEED_FORWARD, *_END),
    "mistral": (_EMBEDDING, *_ATTENTION, *_FEED_FORWARD, *_END),
    "qwen2": (_EMBEDDING, *_ATTENTION, _QKV_BIAS, *_FEED_FORWARD, *_END),
    "qwen3": (_EMBEDDING, *_ATTENTION, *_QK_NORM, *_FEED_FORWARD, *_END),
    "mixtral": (_EMBEDDING, *_ATTENTION, *_EXPERTS, *_END),
}

DERIVED = (_H + "self_attn.rotary_emb.inv_freq",)
"""Tensors that old folders hold and that follow from the configuration; they are set aside, by name."""
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Tensors that may be stored twice where the embeddings are tied, and what they must equal then."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of megatron-core in a model of known size, and the Hugging Face tensors that make it."""

    kind: Kind
    megatron: str
    huggingface: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def weights_of(architecture: Architecture) -> list[Weight]:
    """Return the family's table with sizes, layer after layer."""
    size = {
        "V": architecture.vocab_size,
        "C": architecture.hidden_size,
        "F": architecture.ffn_hidden_size,
        "H": architecture.num_attention_heads * architecture.kv_channels,
        "G": architecture.num_query_groups * architecture.kv_channels,
        "D": architecture.kv_channels,
        "E": architecture.num_experts or 0,
    }
    weights: list[Weight] = []
    for in_layers, rules in itertools.groupby(TABLES[architecture.family], lambda rule: "{layer}" in rule.megatron):
        existing = [rule for rule in rules if not (rule.unless_tied and architecture.tie_embeddings)]
        for layer, rule in itertools.product(range(architecture.num_layers if in_layers else 1), existing):
            shapes = tuple(tuple(size[letter] for letter in shape) for shape in rule.shapes)
            for expert in range((architecture.num_experts or 0) if "{expert}" in rule.megatron else 1):
                names = tuple(name.format(layer=layer, expert=expert) for name in rule.huggingface)
                megatron = rule.megatron.format(layer=layer, expert=expert)
                weights.append(Weight(kind=rule.kind, megatron=megatron, huggingface=names, shapes=shapes))
    return weights


def derived_names(architecture: Architecture) -> set[str]:
    """Return the names of tensors that follow from the configuration."""
    return {name.format(layer=layer) for name in DERIVED for layer in range(architecture.num_layers)}


def join(weight: Weight, parts: Sequence[torch.Tensor], architecture: Architecture, *, rows: int) -> torch.Tensor:
    """Return megatron-core's parameter of `rows` rows; those that pad the vocabulary are zero."""
    if weight.kind == "qkv":
        groups, head = architecture.num_query_groups, architecture.kv_channels
        rest = parts[0].shape[1:]  # of a matrix, its columns; of a bias, nothing
        return torch.cat([part.reshape(groups, -1, head, *rest) for part in parts], dim=1).reshape(-1, *rest)
    if weight.kind == "stack":
        return torch.cat(list(parts))
    (whole,) = parts
    if weight.kind == "vocabulary" and rows > whole.size(0):
        return torch.cat([whole, whole.new_zeros(rows - whole.size(0), whole.size(1))])
    return whole


def split(weight: Weight, parameter: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    """Return the Hugging Face tensors of a parameter: the inverse of `join`, without the rows that pad the vocabulary."""
    if weight.kind == "qkv":
        groups, head, rest = architecture.num_query_groups, architecture.kv_channels, parameter.shape[1:]
        queries = architecture.num_attention_heads // groups
        grouped = torch.split(parameter.view(groups, queries + 2, head, *rest), [queries, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in grouped]
    if weight.kind == "stack":
        return list(parameter.chunk(2))
    if weight.kind == "vocabulary":
        return [parameter[: architecture.vocab_size]]
    return [parameter]


def largest_tensor(weights: Sequence[Weight]) -> int:
    """Return the number of elements of the largest Hugging Face tensor."""
    return max(math.prod(shape) for weight in weights for shape in weight.shapes)


def rounded(tensor: torch.Tensor, name: str, dtype: str, *, remedy: str) -> torch.Tensor:
    """Return the tensor as fp32, bf16 or fp16. Raises InputError where it holds values that do not fit, or that are not finite."""
    result = tensor.to(TORCH_DTYPES[dtype])
    if not _is_finite(result):
        if _is_finite(tensor):
            raise InputError(f"{name} has values up to {float(tensor.abs().max()):.3g}, too large for {dtype}; use --dtype bf16 or fp32.")
        raise InputError(f"{name} holds values that are not finite (NaN or infinite); {remedy}.")
    return result


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are: the least and the largest are, since NaN makes both NaN. (Ten times as fast as isfinite.)"""
    least, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(largest))
