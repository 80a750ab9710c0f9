"""Settings of 8-bit precision."""

from dataclasses import dataclass
from typing import Literal

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """Matrix products in 8 bits, by Transformer Engine on NVIDIA GPUs; the weights themselves stay in bfloat16 with fp32 master weights."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Format of the numbers: e4m3 throughout, or hybrid (e4m3 forward, e5m2 for gradients). Default: no FP8. Needs bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How numbers are scaled: by the largest of earlier steps, by each tensor's own, by blocks (Hopper), by blocks of 32 (Blackwell)."""
    fp8_amax_history_len: int = 1024
    """Steps whose largest values the delayed recipe looks at."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "max"
    """Which of them it takes."""
    fp8_margin: int = 0
    """Powers of two that the delayed recipe leaves free above it."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers out of FP8; not with the delayed recipe."""
    num_layers_at_start_in_bf16: int = 1
    """Layers at the start that are kept out."""
    num_layers_at_end_in_bf16: int = 1
    """Layers at the end that are kept out."""

    def __post_init__(self) -> None:
        if self.fp8_amax_history_len < 1:
            raise ConfigError(f"fp8_amax_history_len={self.fp8_amax_history_len} must be at least 1.")
        if self.fp8_format is None and self.first_last_layers_bf16:
            raise ConfigError("first_last_layers_bf16=True needs fp8_format; set it, or drop the flag.")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ConfigError(
                "first_last_layers_bf16=True does not go with fp8_recipe=delayed, whose history is one for all layers; "
                "take tensorwise or blockwise."
            )
