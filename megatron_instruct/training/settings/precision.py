"""Settings of precision: 16 bits, the scale of the loss, 8 bits."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.training.settings.idle import check_idle

_SCALING = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
"""How the factor of the loss follows the gradients."""
_DELAYED = ("fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_margin")
_LEFT_OUT = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Half precision, and the scale of the loss that it needs."""

    fp16: bool = False
    """Parameters and activations in float16 with fp32 master weights. Its range is small: the loss is scaled up before the backward pass,
    and a step whose gradients overflow leaves the weights as they are."""
    loss_scale: float | None = None
    """Factor of the loss with fp16, the same in every step. Default: it follows the gradients, as the next four say."""
    initial_loss_scale: float = 2.0**32
    """Factor of the loss in the first step."""
    min_loss_scale: float = 1.0
    """Lowest factor of the loss."""
    loss_scale_window: int = 1000
    """Steps without an overflow after which the factor is doubled."""
    hysteresis: int = 2
    """Steps with an overflow after which the factor is halved each time, until it is doubled again."""

    def __post_init__(self) -> None:
        if not self.fp16:
            check_idle(self, ("loss_scale", *_SCALING), needs="fp16=True")
        if self.loss_scale is not None:
            check_idle(self, _SCALING, needs="a loss_scale that is left out")
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be a positive number.")
        if self.min_loss_scale > self.initial_loss_scale:
            raise ConfigError(
                f"min_loss_scale={self.min_loss_scale} is above initial_loss_scale={self.initial_loss_scale}; lower it, or raise the other."
            )
        for name in ("loss_scale_window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def loss_scaling(self) -> dict[str, Any] | None:
        """What decides the factors of the loss; None where there are none."""
        if not self.fp16:
            return None
        if self.loss_scale is not None:
            return {"loss_scale": self.loss_scale}
        return {name: getattr(self, name) for name in _SCALING}


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """Matrix products in 8 bits, by Transformer Engine on NVIDIA GPUs; the weights themselves stay in bfloat16 with fp32 master weights."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Format of the numbers: e4m3 throughout, or hybrid (e4m3 forward, e5m2 for gradients). Default: no FP8. Needs bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How numbers are scaled: by the largest of earlier steps, by each tensor's own, by blocks (Hopper), by blocks of 32 (Blackwell)."""
    fp8_emulation: bool = False
    """Imitate the recipe without the hardware, on CPU too: operands of the linear layers are rounded to 8 bits and multiplied in fp32.
    Slower than no FP8; for trying a recipe. Goes with any precision."""
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
        if self.fp8_format is None:
            names = ("fp8_recipe", "fp8_emulation", "first_last_layers_bf16", *_DELAYED, *_LEFT_OUT)
            check_idle(self, names, needs="fp8_format, without which nothing is in 8 bits")
        if self.fp8_recipe != "delayed":
            check_idle(self, _DELAYED, needs="fp8_recipe=delayed")
        if not self.first_last_layers_bf16:
            check_idle(self, _LEFT_OUT, needs="first_last_layers_bf16=True")
        for name in _LEFT_OUT:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ConfigError(
                "first_last_layers_bf16=True does not go with fp8_recipe=delayed, whose history is one for all layers; "
                "take tensorwise or blockwise."
            )
