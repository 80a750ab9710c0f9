"""config.json of a Hugging Face folder <-> Architecture. What an Architecture cannot say is refused by name, never dropped.

Comes in: the parsed config.json, in the form of transformers 5 (rope_parameters) or older (rope_theta, rope_scaling).
Does not know: weights, megatron-core, transformers.
"""

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
    "mistral": Form(model_class="MistralForCausalLM", defaults={"max_position_embeddings": 131072, "sliding_window": 4096}),
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
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def read_architecture(config: Mapping[str, Any], *, source: str, max_position_embeddings: int | None) -> Architecture:
    """Return the architecture that config.json describes; InputError names what is missing or not supported.

    source: what to call the file in messages. max_position_embeddings: takes the place of the file's, when given.
    """
    model_type = config.get("model_type")
    if model_type not in FORMS:
        raise InputError(f"{source}: model_type={model_type!r} is not supported; supported: {', '.join(FORMS)}.")
    family: Family = model_type
    form = FORMS[family]
    classes = config.get("architectures") or [form.model_class]
    if form.model_class not in classes:
        raise InputError(f"{source}: architectures={classes} is not supported for model_type={model_type!r}; only {form.model_class} is.")
    for name, allowed in _REQUIRED_VALUES.items():
        if config.get(name, allowed[0]) not in allowed:
            raise InputError(f"{source}: {name}={config[name]!r} is not supported; only {name}={allowed[0]!r} is.")
    values = {**_DEFAULTS, **form.defaults, **{name: value for name, value in config.items() if value is not None}}
    heads, hidden = _integer(values, "num_attention_heads", source), _integer(values, "hidden_size", source)
    if "head_dim" not in values and hidden % heads:
        raise InputError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and head_dim is not given.")
    layers = _integer(values, "num_hidden_layers", source)
    window, first_window_layer = _read_window(config, family, layers, source)
    try:
        return Architecture(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_integer(values, "intermediate_size", source),
            num_attention_heads=heads,
            num_query_groups=_integer({"num_key_value_heads": heads, **values}, "num_key_value_heads", source),
            kv_channels=_integer({"head_dim": hidden // heads, **values}, "head_dim", source),
            vocab_size=_integer(values, "vocab_size", source),
            max_position_embeddings=max_position_embeddings or _integer(values, "max_position_embeddings", source),
            layernorm_epsilon=float(values["rms_norm_eps"]),
            tie_embeddings=bool(values["tie_word_embeddings"]),
            init_method_std=float(values["initializer_range"]),
            sliding_window=window,
            first_window_layer=first_window_layer,
            **_read_rope(config, float(values["rope_theta"]), source),
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
        "router_aux_loss_coef": float(values["router_aux_loss_coef"]),
    }


def _read_window(config: Mapping[str, Any], family: Family, layers: int, source: str) -> tuple[int | None, int]:
    """Return the sliding window and the first layer that has it, as transformers takes them from the file."""
    parts, kinds = FAMILIES[family], config.get("layer_types")
    window = config.get("sliding_window", FORMS[family].defaults.get("sliding_window")) if parts.window else None
    first = 0
    if parts.window_from_a_layer_on:
        window = config.get("sliding_window", _QWEN_WINDOW) if config.get("use_sliding_window", False) else None
        first = config.get("max_window_layers", _QWEN_WINDOW_LAYERS) if window is not None else layers
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


def _read_rope(config: Mapping[str, Any], base: float, source: str) -> dict[str, Any]:
    """Return the base of rotary frequencies, the factor of a linear scaling, and Llama 3.1's scaling."""
    rope: dict[str, Any] = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    base = float(rope.get("rope_theta") or base)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if float(rope.get("partial_rotary_factor") or 1) != 1:
        raise InputError(f"{source}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1 is.")
    try:
        if kind == "default":
            return {"rotary_base": base}
        if kind == "linear":
            return {"rotary_base": base, "rotary_linear_factor": float(rope["factor"])}
        if kind == "llama3":
            return {"rotary_base": base, "rope_scaling": RopeScaling(**{name: rope[name] for name in RopeScaling.__dataclass_fields__})}
    except KeyError as error:
        raise InputError(f"{source}: the rotary scaling {kind!r} lacks {error}; complete rope_parameters.") from error
    except ConfigError as error:
        raise InputError(f"{source}: {error}") from error
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
