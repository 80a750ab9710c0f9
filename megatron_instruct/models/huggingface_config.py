"""config.json of a Hugging Face folder <-> Architecture. What an Architecture cannot say is refused by name, never dropped.

Comes in: the parsed config.json, in the form of transformers 5 (rope_parameters) or older (rope_theta, rope_scaling).
Does not know: weights, megatron-core, transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.models.architecture import FAMILIES, Architecture, Family, RopeScaling


@dataclass(frozen=True, kw_only=True)
class Form:
    """How transformers writes a family."""

    model_class: str
    """The class that config.json must name."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers 5.19 takes where config.json is silent, other than _DEFAULTS."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What an export says besides."""


FORMS: dict[Family, Form] = {
    "llama": Form(
        model_class="LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048},
        constants={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Form(
        model_class="MistralForCausalLM",
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": Form(model_class="Qwen2ForCausalLM", defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32}),
    "qwen3": Form(
        model_class="Qwen3ForCausalLM",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        constants={"attention_bias": False},
    ),
    "mixtral": Form(
        model_class="MixtralForCausalLM",
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        constants={"output_router_logits": False, "router_jitter_noise": 0.0},
    ),
}
"""model_type, which is the family's name, -> its form."""
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10000.0}
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "router_jitter_noise": (0, None),
    "is_decoder": (True, None, False),
}
"""Settings that change what the model computes, and the values that are the same model here; an absent one has the first value."""
_QWEN_WINDOW, _QWEN_WINDOW_LAYERS = 4096, 28  # where a Qwen's config.json uses a sliding window and is silent about it
_OF_SCALING = {"linear": ("factor",), "llama3": tuple(RopeScaling.__dataclass_fields__)}
"""What a kind of rotary scaling calls for."""
_GROUPS = "num_key_value_heads"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def read_architecture(config: Mapping[str, Any], *, source: str, max_position_embeddings: int | None) -> Architecture:
    """Return the architecture that config.json describes; InputError names what is missing or not supported.

    source: what to call the file in messages. max_position_embeddings: takes the place of the file's, when given.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FORMS:
        raise InputError(f"{source}: model_type={model_type!r} is not supported; supported: {', '.join(FORMS)}.")
    family: Family = model_type
    form = FORMS[family]
    classes = config.get("architectures") or [form.model_class]
    if not isinstance(classes, list) or form.model_class not in classes:
        raise InputError(f"{source}: architectures={classes} is not supported for model_type={model_type!r}; only {form.model_class} is.")
    for name, allowed in _REQUIRED_VALUES.items():
        if config.get(name, allowed[0]) not in allowed:
            raise InputError(f"{source}: {name}={config[name]!r} is not supported; only {name}={allowed[0]!r} is.")
    values = {**_DEFAULTS, **form.defaults, **{name: value for name, value in config.items() if value is not None}}
    heads, hidden = _integer(values, "num_attention_heads", source), _integer(values, "hidden_size", source)
    if "head_dim" not in values and hidden % max(heads, 1):
        raise InputError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and head_dim is not given.")
    layers = _integer(values, "num_hidden_layers", source)
    groups = heads if config.get("num_key_value_heads", 0) is None else _integer({"num_key_value_heads": heads, **values}, _GROUPS, source)
    window, first_window_layer = _read_window(config, family, layers, source)
    try:
        return Architecture(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_integer(values, "intermediate_size", source),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=_integer({"head_dim": hidden // max(heads, 1), **values}, "head_dim", source),
            vocab_size=_integer(values, "vocab_size", source),
            max_position_embeddings=max_position_embeddings or _integer(values, "max_position_embeddings", source),
            layernorm_epsilon=_number(values, "rms_norm_eps", source),
            tie_embeddings=_flag(values, "tie_word_embeddings", source),
            init_method_std=_number(values, "initializer_range", source),
            sliding_window=window,
            first_window_layer=first_window_layer,
            **_read_rope(config, values, source),
            **(_read_experts(values, source) if FAMILIES[family].experts else {}),
        )
    except ConfigError as error:
        raise InputError(f"{source}: {error}") from error


def write_config(architecture: Architecture, *, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the architecture, as transformers 5.19 and vLLM 0.32 read it.

    dtype: torch's name of it, such as bfloat16. token_ids: bos_token_id and the like.
    The base and the scaling of rotary positions are written in the older form too, so that older readers do not take another base.
    """
    form = FORMS[architecture.family]
    if architecture.family == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        raise ConfigError(
            f"hidden_size={architecture.hidden_size} is not a multiple of num_attention_heads={architecture.num_attention_heads}, which "
            "transformers refuses of a Llama; train such a model as family mistral."
        )
    rope = _write_rope(architecture)
    config: dict[str, Any] = {
        "architectures": [form.model_class],
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": architecture.kv_channels,
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "initializer_range": architecture.init_method_std,
        "intermediate_size": architecture.ffn_hidden_size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "model_type": architecture.family,
        "num_attention_heads": architecture.num_attention_heads,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.num_query_groups,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "rope_parameters": rope,
        "rope_theta": architecture.rotary_base,
        "tie_word_embeddings": architecture.tie_embeddings,
        "use_cache": True,
        "vocab_size": architecture.vocab_size,
        **form.constants,
        **_write_window(architecture),
        **token_ids,
    }
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope  # with rope_theta: transformers 5 takes this key before rope_parameters
    if architecture.parts.experts:
        config["num_local_experts"] = architecture.num_experts
        config["num_experts_per_tok"] = architecture.experts_per_token
        config["router_aux_loss_coef"] = architecture.router_aux_loss_coef or 0.0
    return dict(sorted(config.items()))


def token_ids_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens that config.json names."""
    return {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}


def _read_experts(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {
        "num_experts": _integer(values, "num_local_experts", source),
        "experts_per_token": _integer(values, "num_experts_per_tok", source),
        "router_aux_loss_coef": _number(values, "router_aux_loss_coef", source),
    }


def _read_window(config: Mapping[str, Any], family: Family, layers: int, source: str) -> tuple[int | None, int]:
    """Return the sliding window and the first layer that has it, as transformers takes them from the file."""
    parts, kinds = FAMILIES[family], config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise InputError(f"{source}: layer_types={kinds!r} must be a list with an entry for each layer.")
    window = config.get("sliding_window", FORMS[family].defaults.get("sliding_window")) if parts.window else None
    first = 0
    if parts.window_from_a_layer_on:
        used = config.get("use_sliding_window") is not None and _flag(config, "use_sliding_window", source)
        window = config.get("sliding_window", _QWEN_WINDOW) if used else None
        first = layers
        if window is not None:
            first = _integer({"max_window_layers": _QWEN_WINDOW_LAYERS, **config}, "max_window_layers", source)
        if kinds is not None:
            first = next((number for number, kind in enumerate(kinds) if kind != "full_attention"), layers)
    if kinds is not None:
        wanted = ["full_attention" if window is None or layer < first else "sliding_attention" for layer in range(layers)]
        if list(kinds) != wanted:
            raise InputError(
                f"{source}: layer_types={kinds} with sliding_window={window} is not supported; only full attention in the first layers "
                f"and a sliding window in all others is, of which a {family} has {'some' if parts.window_from_a_layer_on else 'no'} first."
            )
    if window is None or first >= layers:
        return None, 0
    return _integer({"sliding_window": window}, "sliding_window", source), first


def _write_window(architecture: Architecture) -> dict[str, Any]:
    window, parts = architecture.sliding_window, architecture.parts
    if not parts.window:
        return {}
    if not parts.window_from_a_layer_on:
        return {"sliding_window": window}
    first = architecture.num_layers if window is None else architecture.first_window_layer
    kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(architecture.num_layers)]
    return {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": first, "layer_types": kinds}


def _read_rope(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the base of rotary frequencies, the factor of a linear scaling, and Llama 3.1's scaling."""
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        found = config.get(name) or {}
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise InputError(f"{source}: {name}={found!r} is not supported; only one mapping for all layers is.")
        rope |= found
    theta = {"rope_theta": values["rope_theta"]} if rope.get("rope_theta") is None else rope
    base = _number(theta, "rope_theta", source)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (1, None):
        raise InputError(f"{source}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; only 1 is.")
    lacking = [name for name in _OF_SCALING.get(kind, ()) if rope.get(name) is None] if isinstance(kind, str) else []
    if lacking:
        raise InputError(f"{source}: the rotary scaling {kind!r} lacks {lacking[0]!r}; complete rope_parameters.")
    if kind == "default":
        return {"rotary_base": base}
    if kind == "linear":
        return {"rotary_base": base, "rotary_linear_factor": _number(rope, "factor", source)}
    if kind == "llama3":
        factors = {name: _number(rope, name, source) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        length = _integer(rope, "original_max_position_embeddings", source)
        return {"rotary_base": base, "rope_scaling": RopeScaling(**factors, original_max_position_embeddings=length)}
    raise InputError(f"{source}: rope_type={kind!r} is not supported; supported: default, linear, llama3.")


def _write_rope(architecture: Architecture) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rotary_base}
    scaling = architecture.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": "llama3", **{name: getattr(scaling, name) for name in RopeScaling.__dataclass_fields__}}
    elif architecture.rotary_linear_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": architecture.rotary_linear_factor}
    return rope


def _integer(values: Mapping[str, Any], name: str, source: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{source}: {name}={value!r} must be a whole number; complete the file from the model's own folder.")
    return value


def _number(values: Mapping[str, Any], name: str, source: str) -> float:
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{source}: {name}={value!r} must be a finite number; complete the file from the model's own folder.")
    return float(value)


def _flag(values: Mapping[str, Any], name: str, source: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):
        raise InputError(f"{source}: {name}={value!r} must be true or false; complete the file from the model's own folder.")
    return value
