"""config.json of a Hugging Face folder <-> Architecture. What an Architecture cannot say is refused by name, never dropped.

Comes in: the parsed config.json, in the form of transformers 5 (rope_parameters) or older (rope_theta, rope_scaling).
Does not know: weights, megatron-core, transformers.
"""

from collections.abc import Mapping
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.models.architecture import Architecture, Family, RopeScaling

FAMILIES: dict[str, tuple[Family, str]] = {"llama": ("llama", "LlamaForCausalLM"), "mistral": ("mistral", "MistralForCausalLM")}
"""model_type -> the family here, and the class that transformers must name."""
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_decoder": (True, None, False),
}
"""Settings that change what the model computes, and the values that are the same model here; an absent one has the first value."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02},
    "mistral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02},
}
"""What transformers 5.19 takes where config.json is silent."""
_DEFAULT_SLIDING_WINDOW = 4096  # of transformers' MistralConfig
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def read_architecture(config: Mapping[str, Any], *, source: str, max_position_embeddings: int | None) -> Architecture:
    """Return the architecture that config.json describes; InputError names what is missing or not supported.

    source: what to call the file in messages. max_position_embeddings: takes the place of the file's, when given.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(f"{source}: model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}.")
    family, model_class = FAMILIES[model_type]
    classes = config.get("architectures") or [model_class]
    if model_class not in classes:
        raise InputError(f"{source}: architectures={classes} is not supported for model_type={model_type!r}; only {model_class} is.")
    for name, allowed in _REQUIRED_VALUES.items():
        if config.get(name, allowed[0]) not in allowed:
            raise InputError(f"{source}: {name}={config[name]!r} is not supported; only {name}={allowed[0]!r} is.")
    values = {**_DEFAULTS[model_type], **{name: value for name, value in config.items() if value is not None}}
    positions = max_position_embeddings or values["max_position_embeddings"]
    _check_window(config, model_type, positions, source)
    base, factor, scaling = _read_rope(config, source)
    heads, hidden = _integer(values, "num_attention_heads", source), _integer(values, "hidden_size", source)
    if "head_dim" not in values and hidden % heads:
        raise InputError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and head_dim is not given.")
    return Architecture(
        family=family,
        num_layers=_integer(values, "num_hidden_layers", source),
        hidden_size=hidden,
        ffn_hidden_size=_integer(values, "intermediate_size", source),
        num_attention_heads=heads,
        num_query_groups=_integer({"num_key_value_heads": heads, **values}, "num_key_value_heads", source),
        kv_channels=_integer({"head_dim": hidden // heads, **values}, "head_dim", source),
        vocab_size=_integer(values, "vocab_size", source),
        max_position_embeddings=positions,
        rotary_base=base,
        rotary_linear_factor=factor,
        rope_scaling=scaling,
        layernorm_epsilon=float(values["rms_norm_eps"]),
        tie_embeddings=bool(values["tie_word_embeddings"]),
        init_method_std=float(values["initializer_range"]),
    )


def write_config(architecture: Architecture, *, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the architecture, as transformers 5.19 and vLLM 0.32 read it.

    dtype: torch's name of it, such as bfloat16. token_ids: bos_token_id and the like.
    The base and the scaling of rotary positions are written in the older form too, so that older readers do not take another base.
    """
    model_class = next(name for family, name in FAMILIES.values() if family == architecture.family)
    if architecture.family == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        raise ConfigError(
            f"hidden_size={architecture.hidden_size} is not a multiple of num_attention_heads={architecture.num_attention_heads}, which "
            "transformers refuses of a Llama; train such a model as family mistral."
        )
    rope = _write_rope(architecture)
    config: dict[str, Any] = {
        "architectures": [model_class],
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
        **token_ids,
    }
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope  # with rope_theta: transformers 5 takes this key before rope_parameters
    config |= {"attention_bias": False, "mlp_bias": False} if architecture.family == "llama" else {"sliding_window": None}
    return dict(sorted(config.items()))


def token_ids_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens that config.json names."""
    return {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}


def _check_window(config: Mapping[str, Any], model_type: str, positions: int, source: str) -> None:
    """Refuse a sliding window that takes effect within `positions` tokens."""
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()) and config.get("sliding_window") is None:
        raise InputError(f"{source}: layer_types={config['layer_types']} is not supported; only full attention in every layer is.")
    window = config.get("sliding_window", _DEFAULT_SLIDING_WINDOW if model_type == "mistral" else None)
    if window is not None and model_type == "mistral" and positions > window:
        raise InputError(
            f"{source}: sliding_window={window} with max_position_embeddings={positions} is not supported; with "
            f"--max-position-embeddings {window} (or less) no sequence is longer than the window, which then has no effect."
        )


def _read_rope(config: Mapping[str, Any], source: str) -> tuple[float, float, RopeScaling | None]:
    """Return the base of rotary frequencies, the factor of a linear scaling, and Llama 3.1's scaling."""
    rope: dict[str, Any] = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if float(rope.get("partial_rotary_factor") or 1) != 1:
        raise InputError(f"{source}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1 is.")
    try:
        if kind == "default":
            return base, 1.0, None
        if kind == "linear":
            return base, float(rope["factor"]), None
        if kind == "llama3":
            return base, 1.0, RopeScaling(**{name: rope[name] for name in RopeScaling.__dataclass_fields__})
    except KeyError as error:
        raise InputError(f"{source}: the rotary scaling {kind!r} lacks {error}; complete rope_parameters.") from error
    raise InputError(f"{source}: rope_type={kind!r} is not supported; supported: default, linear, llama3.")


def _write_rope(architecture: Architecture) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rotary_base}
    scaling = architecture.rope_scaling
    if scaling is not None and architecture.rotary_linear_factor != 1.0:
        raise ConfigError("rope_scaling and rotary_linear_factor are both set; Hugging Face's configuration holds one of them.")
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
