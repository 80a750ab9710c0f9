"""What Megatron-LM's own tools look for in a checkpoint besides the weights: the arguments that describe the model.

Megatron-LM reads them with --use-checkpoint-args, and its converters, inspectors and Megatron-Bridge read them, too. This project does
not: its manifest describes a checkpoint. Source of the names: Megatron-LM, megatron/training/arguments.py (core 0.19 and 0.20).
Does not know: weights, files.
"""

from argparse import Namespace
from typing import Any

from megatron_instruct.models.architecture import Architecture, Dtype, RopeScaling
from megatron_instruct.models.dtypes import TORCH_DTYPES

_VERSION = 3.0  # of the order of query, key and value, which is megatron-core's since then
_LLAMA_31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The rope scaling that Megatron-LM has, with any factor; it knows no other."""


def common_state(architecture: Architecture, *, dtype: Dtype, iteration: int) -> dict[str, Any]:
    """Return the part of a checkpoint's state that is not of tensors, as Megatron-LM saves it.

    What Megatron-LM has no argument for, such as another rope scaling than Llama 3.1's, is left out: it must be given to it by hand.
    """
    return {"args": arguments(architecture, dtype), "checkpoint_version": _VERSION, "iteration": iteration}


def arguments(architecture: Architecture, dtype: Dtype) -> Namespace:
    """Return Megatron-LM's arguments of a model, laid out over one process."""
    values: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "seq_length": architecture.max_position_embeddings,
        "max_position_embeddings": architecture.max_position_embeddings,
        "vocab_size": architecture.vocab_size,
        "init_method_std": architecture.init_method_std,
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "norm_epsilon": architecture.layernorm_epsilon,
        "untie_embeddings_and_output_weights": not architecture.tie_embeddings,
        "add_qkv_bias": architecture.parts.qkv_bias,
        "qk_layernorm": architecture.parts.qk_norm,
        "params_dtype": TORCH_DTYPES[dtype],
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        **_ALL_FAMILIES,
        **_rotary(architecture),
        **_window(architecture),
        **_experts(architecture),
    }
    return Namespace(**values)


_ALL_FAMILIES: dict[str, Any] = {
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "no_persist_layer_norm": False,
    "swiglu": True,
    "squared_relu": False,
    "bias_swiglu_fusion": True,
    "bias_gelu_fusion": False,
    "add_bias_linear": False,
    "add_position_embedding": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "qk_l2_norm": False,
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "init_method_xavier_uniform": False,
    "is_hybrid_model": False,
    "mtp_num_layers": None,
    "make_vocab_size_divisible_by": 128,
    "fp16_lm_cross_entropy": False,
    "fp8_param_gather": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "overlap_p2p_comm": False,
    "cp_comm_type": ["p2p"],
    "config_logger_dir": "",
    "ckpt_format": "torch_dist",
    "transformer_impl": "transformer_engine",
    "init_model_with_meta_device": False,
}


def _rotary(architecture: Architecture) -> dict[str, Any]:
    values: dict[str, Any] = {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": int(architecture.rotary_base) if architecture.rotary_base.is_integer() else architecture.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
    }
    if architecture.rotary_linear_factor != 1.0:
        values["rotary_seq_len_interpolation_factor"] = architecture.rotary_linear_factor
    scaling = architecture.rope_scaling
    if scaling is not None and scaling == RopeScaling(factor=scaling.factor, **_LLAMA_31):  # type: ignore[arg-type]
        values |= {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}
    return values


def _window(architecture: Architecture) -> dict[str, Any]:
    if architecture.sliding_window is None:
        return {"window_size": None, "window_attn_skip_freq": None}
    has_window = [int(layer >= architecture.first_window_layer) for layer in range(architecture.num_layers)]
    return {"window_size": (architecture.sliding_window - 1, 0), "window_attn_skip_freq": has_window}


def _experts(architecture: Architecture) -> dict[str, Any]:
    if not architecture.parts.experts:
        return {"num_experts": None, "moe_grouped_gemm": False}
    return {
        "num_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_layer_freq": 1,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": architecture.router_aux_loss_coef or 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "moe_shared_expert_intermediate_size": None,
        "moe_router_enable_expert_bias": False,
    }
