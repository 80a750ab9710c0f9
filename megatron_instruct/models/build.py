"""An Architecture and a ParallelLayout -> megatron-core's GPT model on this rank, laid out, initialised, on its device.

Does not know: data, optimizers, checkpoints. megatron-core 0.19.2 says that GPTModel will give way to HybridModel; this file is
the only one that builds it.
"""

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_submodules
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_instruct.errors import ConfigError, MissingPackageError, did_you_mean
from megatron_instruct.models.architecture import Architecture, Dtype, RopeScaling
from megatron_instruct.models.dtypes import TORCH_DTYPES
from megatron_instruct.models.initialize import initialize_parameters
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.random_streams import seed_random_streams
from megatron_instruct.platform.device import Machine
from megatron_instruct.platform.fp8_recipe import Fp8Recipe


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What of the build is neither architecture nor layout."""

    dtype: Dtype = "fp32"
    """Of parameters and activations."""
    seed: int = 1234
    """Of the initial weights."""
    weights: Literal["random", "empty", "shapes"] = "random"
    """What the parameters hold: initial values, whatever memory held, or nothing (torch's meta device: shapes that take no memory)."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activations that the backward pass computes again instead of keeping them."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full recomputation: all layers in groups, or the first ones of each stage or chunk."""
    recompute_num_layers: int = 1
    """Layers of a group, or how many are recomputed."""
    experts: Mapping[str, Any] | None = None
    """Fields of megatron-core's TransformerConfig about experts that differ from the family's."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times the tensor ranks."""
    fp8_emulation: Fp8Recipe | None = None
    """What 8-bit products are imitated by, in torch's layers on any machine."""
    fuse_weight_gradients: bool = False
    """Gradients of weights are added up where they are computed: on a GPU by apex's kernel, if that is installed."""
    transformer_config: Mapping[str, Any] | None = None
    """Any other field of megatron-core's TransformerConfig."""


def padded_vocab_size(architecture: Architecture, layout: ParallelLayout, divisor: int) -> int:
    """Return the rows of the embedding over all tensor ranks."""
    multiple = divisor * layout.tensor
    return math.ceil(architecture.vocab_size / multiple) * multiple


def join_model_parallel_groups(layout: ParallelLayout, *, seed: int, timeout_minutes: float = 10.0) -> None:
    """Make megatron-core's process groups and random streams; the process group must exist and match layout.world_size.

    timeout_minutes: of a collective in one of them, which the whole process group's own does not bound.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor_of_experts,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_random_streams(seed)


def build_model(architecture: Architecture, layout: ParallelLayout, machine: Machine, options: BuildOptions) -> list[GPTModel]:
    """Return this rank's model chunks: one, or `layout.virtual_pipeline` of them. Weights are the same whatever the layout."""
    if options.weights == "shapes" and machine.device.type != "meta":
        with torch.device("meta"):
            return build_model(architecture, layout, dataclasses.replace(machine, device=torch.device("meta")), options)
    layout.check(architecture)
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # its deprecation note, see above
    config = make_transformer_config(architecture, layout, machine, options)
    chunks = []
    for chunk in range(layout.virtual_pipeline or 1):
        vp_stage = chunk if layout.virtual_pipeline else None
        model = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, architecture, vp_stage, fused=_is_fused(machine, options)),
            vocab_size=padded_vocab_size(architecture, layout, options.make_vocab_size_divisible_by),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            vp_stage=vp_stage,
        )
        if architecture.rotary_linear_factor != 1.0:
            model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq / architecture.rotary_linear_factor
        if architecture.rope_scaling is not None:
            model.rotary_pos_emb.inv_freq = _scaled(model.rotary_pos_emb.inv_freq, architecture.rope_scaling)
        if options.fp8_emulation is not None:
            from megatron_instruct.platform.fp8_emulation import EmulatedDecoder

            EmulatedDecoder(model.decoder, options.fp8_emulation, num_layers=architecture.num_layers)
        if options.weights == "random":
            initialize_parameters(model, architecture, seed=options.seed)
        chunks.append(model.to(machine.device))
    return chunks


def make_transformer_config(
    architecture: Architecture, layout: ParallelLayout, machine: Machine, options: BuildOptions
) -> TransformerConfig:
    """Return megatron-core's configuration of the model on this machine."""
    dtype = TORCH_DTYPES[options.dtype]
    settings: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "init_method_std": architecture.init_method_std,
        "add_qkv_bias": architecture.parts.qkv_bias,
        "qk_layernorm": architecture.parts.qk_norm,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.tensor_of_experts,
        "num_layers_in_last_pipeline_stage": layout.layers_in_last_stage,
        "sequence_parallel": layout.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": options.dtype == "bf16",
        "fp16": options.dtype == "fp16",
        "perform_initialization": False,  # models.initialize does it, the same for every layout
        "use_cpu_initialization": not machine.is_cuda,
        "calculate_per_token_loss": True,  # the loss is a mean over the tokens of the global batch, however it is cut
        "deallocate_pipeline_outputs": True,
        **_NO_DROPOUT,
        **(_CUDA_SETTINGS if _is_fused(machine, options) else _CPU_SETTINGS),
    }
    if not machine.is_cuda:  # where the seam has a SwiGLU that keeps less
        settings["bias_activation_fusion"] = not _OTHER_THAN_SWIGLU & (options.transformer_config or {}).keys()
    if options.fuse_weight_gradients:
        settings["gradient_accumulation_fusion"] = _can_fuse_weight_gradients(machine, options)
    settings |= _window_settings(architecture) | _expert_settings(architecture, options.experts or {}, fused=_is_fused(machine, options))
    if machine.backend == "gloo" and layout.expert > 1 and layout.tensor_of_experts > 1:
        settings |= _without_unequal_parts(layout, options.experts or {})
    if layout.virtual_pipeline is not None:
        # On gloo, batched point-to-point calls of the interleaved schedule pair up wrongly without an error (megatron-core 0.19.2).
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if options.recompute == "full":
        how = {"recompute_method": options.recompute_method, "recompute_num_layers": options.recompute_num_layers}
        settings |= {"recompute_granularity": "full", **how}
    elif options.recompute == "selective":
        settings |= {"recompute_granularity": "selective"}
    settings |= _checked_extra(options.transformer_config or {}, settings)
    if machine.backend == "gloo" and layout.tensor_of_experts > 1 and settings.get("moe_expert_capacity_factor") is not None:
        _check_equal_parts(layout, settings)
    if not machine.is_cuda and settings.get("defer_embedding_wgrad_compute"):
        settings["gradient_accumulation_fusion"] = False  # it wants apex's kernels themselves: megatron-core refuses it then
    return TransformerConfig(**settings)


_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_OTHER_THAN_SWIGLU = {"activation_func_clamp_value", "glu_linear_offset"}
"""Fields of the activation that the seam's knows nothing of."""
_OF_FAMILIES = ("num_moe_experts", "window_size", "window_attn_skip_freq")
"""What a family has or lacks: decided by the model's settings also where it is left at megatron-core's default."""
_CPU_SETTINGS: dict[str, Any] = {
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "batch_p2p_sync": False,
    "attention_softmax_in_fp32": True,
}
_CUDA_SETTINGS: dict[str, Any] = {
    "apply_rope_fusion": True,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": True,
    "cross_entropy_loss_fusion": True,
}


def _window_settings(architecture: Architecture) -> dict[str, Any]:
    """megatron-core counts the tokens before the one that attends, and lists the layers that have the window."""
    if architecture.sliding_window is None:
        return {}
    has_window = [int(layer >= architecture.first_window_layer) for layer in range(architecture.num_layers)]
    return {"window_size": (architecture.sliding_window - 1, 0), "window_attn_skip_freq": has_window}


def _expert_settings(architecture: Architecture, given: Mapping[str, Any], *, fused: bool) -> dict[str, Any]:
    """Softmax over the chosen experts' scores, no token dropped, the load-balancing loss of each microbatch added in training."""
    if not architecture.parts.experts:
        if given:
            raise ConfigError(f"{', '.join(given)}: the family {architecture.family} has no experts; drop what is about them.")
        return {}
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": architecture.router_aux_loss_coef or 0.0,
        "moe_grouped_gemm": fused,
        "moe_token_dispatcher_type": "alltoall",
        **given,
    }


def _without_unequal_parts(layout: ParallelLayout, given: Mapping[str, Any]) -> dict[str, Any]:
    """Under expert and expert tensor parallelism alltoall gathers parts of unequal sizes, which gloo refuses; the result is the same."""
    if given.get("moe_token_dispatcher_type") == "alltoall":
        raise ConfigError(
            f"moe_token_dispatcher_type=alltoall with expert_model_parallel_size={layout.expert} and expert_tensor_parallel_size="
            f"{layout.tensor_of_experts} does not run on CPUs: gloo gathers no parts of unequal sizes; take allgather, or leave it out."
        )
    return {"moe_token_dispatcher_type": "allgather"}


def _check_equal_parts(layout: ParallelLayout, settings: Mapping[str, Any]) -> None:
    """Tensor ranks drop tokens of their own, and what is left they gather."""
    if not settings.get("moe_pad_expert_input_to_capacity"):
        raise ConfigError(
            f"transformer_config: moe_expert_capacity_factor={settings['moe_expert_capacity_factor']} with expert_tensor_parallel_size="
            f"{layout.tensor_of_experts} does not run on CPUs: gloo gathers no parts of unequal sizes; set expert_tensor_parallel_size=1, "
            "or moe_pad_expert_input_to_capacity true."
        )


def _check_fields(extra: Mapping[str, Any]) -> None:
    """Raise ConfigError for what is no field of megatron-core's TransformerConfig, or no value of that field's kind."""
    fields = TransformerConfig.__dataclass_fields__
    for name, value in extra.items():
        if name not in fields:
            raise ConfigError(f"transformer_config: megatron-core has no field {name!r}{did_you_mean(name, fields)}")
        default = fields[name].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"transformer_config: {name}={value!r} must be true or false.")
        if type(default) in (int, float) and type(value) not in (int, float):
            raise ConfigError(f"transformer_config: {name}={value!r} must be a number, such as 0.1 or 1.0e-3.")


def _checked_extra(extra: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields(extra)
    defaults = {*_CPU_SETTINGS, *_CUDA_SETTINGS, *_NO_DROPOUT}
    for name in extra:
        if name in _OF_FAMILIES or name in settings.keys() - defaults:
            raise ConfigError(f"transformer_config: {name!r} is decided by the model and layout settings; set it there.")
    return dict(extra)


def _is_fused(machine: Machine, options: BuildOptions) -> bool:
    """Whether layers are Transformer Engine's; torch's otherwise."""
    return machine.is_cuda and options.fp8_emulation is None


def _can_fuse_weight_gradients(machine: Machine, options: BuildOptions) -> bool:
    """Whether a kernel adds them up: apex's for Transformer Engine's layers, or what the seam has in its place."""
    return not machine.is_cuda or (_is_fused(machine, options) and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None)


def _layer_spec(config: TransformerConfig, architecture: Architecture, vp_stage: int | None, *, fused: bool) -> Any:
    """Transformer Engine's layers, or torch's."""
    parts = architecture.parts
    if fused:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("transformer-engine[pytorch]", extra="gpu", purpose="training on a GPU") from error
        submodules = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=architecture.num_experts, moe_grouped_gemm=parts.experts, qk_layernorm=parts.qk_norm
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    from megatron_instruct.platform.cpu_modules import RMSNorm, ScaledDotProductAttention

    layer = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=architecture.num_experts, qk_layernorm=parts.qk_norm)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if parts.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _scaled(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Return rotary frequencies scaled as Llama 3.1 does: long wavelengths by the factor, short ones not, smoothly between."""
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1.0 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
