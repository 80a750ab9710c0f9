"""Random configurations of every family, as a config.json would hold them: sizes, groups, head sizes, ties, scalings, windows, experts."""

import random
from typing import Any

from tests.conversion.conftest import FAMILIES

NAMES = list(FAMILIES)


def random_config(number: int) -> dict[str, Any]:
    """Return the configuration of this number; the families take turns."""
    draw = random.Random(f"config {number}")
    family = NAMES[number % len(NAMES)]
    groups, queries = draw.choice([1, 2, 3, 4, 5, 8]), draw.choice([1, 1, 2, 3, 4, 7])
    heads, head = groups * queries, draw.choice([2, 4, 6, 8, 16, 24])
    hidden = heads * head
    if family in ("mistral", "qwen3", "mixtral") and draw.random() < 0.5:
        hidden = draw.randint(1, 12) * 8
    config: dict[str, Any] = {
        **FAMILIES[family],
        "vocab_size": draw.randint(1, 700),
        "hidden_size": hidden,
        "intermediate_size": draw.choice([1, 7, 48, 129, 176]),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "max_position_embeddings": draw.choice([17, 512, 131072]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 3e-4]),
        "tie_word_embeddings": draw.random() < 0.4,
        "initializer_range": draw.choice([0.02, 0.006]),
        **_rope(draw),
    }
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = draw.choice([None, 5, 4096])
    if family in ("qwen2", "qwen3") and draw.random() < 0.5:
        config |= {"use_sliding_window": True, "sliding_window": draw.choice([3, 300]), "max_window_layers": draw.randint(0, 5)}
    if family == "mixtral":
        number_of_experts = draw.randint(2, 6)
        config |= {"num_local_experts": number_of_experts, "num_experts_per_tok": draw.randint(2, number_of_experts)}
    return config


def _rope(draw: random.Random) -> dict[str, Any]:
    """Return the base and scaling of rotary positions, in transformers 5's form or the older one."""
    base = draw.choice([1e4, 5e5, 1e6, 12345.6])
    scaling: dict[str, Any] = draw.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": draw.choice([2.0, 4.5])},
            {
                "rope_type": "llama3",
                "factor": draw.choice([1.0, 8.0, 32.0]),
                "low_freq_factor": draw.choice([0.5, 1.0]),
                "high_freq_factor": draw.choice([4.0, 6.0]),
                "original_max_position_embeddings": draw.choice([16, 8192]),
            },
        ]
    )
    if draw.random() < 0.5:
        return {"rope_parameters": {**scaling, "rope_theta": base}}
    older: dict[str, Any] = {"rope_parameters": None, "rope_theta": base}
    return older if scaling["rope_type"] == "default" else {**older, "rope_scaling": scaling}
