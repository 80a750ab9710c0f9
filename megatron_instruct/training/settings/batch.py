"""Settings of batches, steps and the optimizer."""

from dataclasses import dataclass
from typing import Literal

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batches, steps and the optimizer."""

    train_iters: int
    """Optimizer steps."""
    seq_length: int = 2048
    """Tokens of one sequence."""
    micro_batch_size: int = 1
    """Sequences that one process computes at once."""
    global_batch_size: int
    """Sequences of one optimizer step, over all processes."""
    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """How the learning rate falls after warm-up; WSD: it stays, and falls over the last lr_wsd_decay_iters steps."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How it falls there."""
    lr_wsd_decay_iters: int | None = None
    """Last steps of lr_decay_iters in which it falls, with lr_decay_style=WSD."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_decay_iters: int | None = None
    """Steps after which the learning rate is min_lr (default: train_iters)."""
    weight_decay: float = 0.1
    """AdamW's weight decay; norms are exempt."""
    clip_grad: float = 1.0
    """Highest norm of the gradient; 0 to leave it as it is."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    seed: int = 1234
    """Of initial weights and of the order of the data."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0.0 <= self.min_lr <= self.lr or self.lr == 0.0:
            raise ConfigError(f"min_lr={self.min_lr}, lr={self.lr}: 0 <= min_lr <= lr and lr > 0 must hold; change either.")
        decay = self.lr_decay_iters or self.train_iters
        if self.lr_warmup_iters >= decay:
            raise ConfigError(f"lr_warmup_iters={self.lr_warmup_iters} must be below lr_decay_iters={decay} (by default train_iters).")
        falls = self.lr_wsd_decay_iters
        if (self.lr_decay_style == "WSD") != (falls is not None):
            raise ConfigError("lr_decay_style=WSD and lr_wsd_decay_iters go together; give both or neither.")
        if falls is not None and not 0 < falls <= decay - self.lr_warmup_iters:
            raise ConfigError(
                f"lr_wsd_decay_iters={falls} must lie between 1 and lr_decay_iters - lr_warmup_iters = {decay - self.lr_warmup_iters}."
            )
