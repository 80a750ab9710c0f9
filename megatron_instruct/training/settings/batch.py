"""Settings of batches, steps and the optimizer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.batches import BatchPlan, BatchRamp
from megatron_instruct.training.settings.idle import check_idle

_SEEDS = 2**31
"""numpy takes seeds below 2^32, and parts of a run add to theirs."""


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
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: the batch begins with START sequences and grows by INCREMENT to global_batch_size, over SAMPLES of them."""
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
    """Weight decay; norms, biases and all that has one dimension are exempt."""
    no_weight_decay_on_embeddings: bool = False
    """Exempt the word embedding and the output layer, too."""
    z_loss_coeff: float | None = None
    """Weight of log(Z)², which keeps the output's logits small (PaLM used 1e-4); the loss that is shown stays the cross entropy."""
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

    @property
    def ramp(self) -> BatchRamp | None:
        """How the batch grows at the start."""
        given = self.rampup_batch_size
        return None if given is None else BatchRamp(start=given[0], increment=given[1], samples=given[2])

    def samples_before(self, iterations: int) -> int:
        """Return the sequences of the first steps, while the batch grows or not."""
        plan = BatchPlan(
            global_batch_size=self.global_batch_size, micro_batch_size=1, data_parallel=1, train_iters=self.train_iters, ramp=self.ramp
        )
        return plan.samples_before(iterations)

    @property
    def of_optional_parts(self) -> dict[str, Any]:
        """What of the optional parts decides the result; None where a part is not used."""
        values = {name: getattr(self, name) or None for name in ("rampup_batch_size", "no_weight_decay_on_embeddings", "z_loss_coeff")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __post_init__(self) -> None:
        for name in ("train_iters", "seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        self._check_ramp()
        self._check_numbers()
        if not 0.0 <= self.min_lr <= self.lr < math.inf or self.lr == 0.0:
            raise ConfigError(f"min_lr={self.min_lr}, lr={self.lr}: 0 <= min_lr <= lr and lr > 0 must hold, both finite; change either.")
        decay = self.lr_decay_iters or self.train_iters
        if self.lr_warmup_iters >= decay:
            raise ConfigError(f"lr_warmup_iters={self.lr_warmup_iters} must be below lr_decay_iters={decay} (by default train_iters).")
        if self.lr_decay_style == "inverse-square-root" and self.lr_warmup_iters == 0:
            raise ConfigError(
                "lr_decay_style=inverse-square-root falls with the steps since the warm-up began, counted in warm-ups, and "
                "lr_warmup_iters=0; give lr_warmup_iters of at least 1."
            )
        falls = self.lr_wsd_decay_iters
        if (self.lr_decay_style == "WSD") != (falls is not None):
            raise ConfigError("lr_decay_style=WSD and lr_wsd_decay_iters go together; give both or neither.")
        if falls is None:
            check_idle(self, ("lr_wsd_decay_style",), needs="lr_decay_style=WSD")
        if falls is not None and not 0 < falls <= decay - self.lr_warmup_iters:
            raise ConfigError(
                f"lr_wsd_decay_iters={falls} must lie between 1 and lr_decay_iters - lr_warmup_iters = {decay - self.lr_warmup_iters}."
            )

    def _check_numbers(self) -> None:
        for name in ("weight_decay", "clip_grad", "z_loss_coeff"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ConfigError(f"{name}={value} must be a number that is not negative.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not 0.0 < self.adam_eps < math.inf:
            raise ConfigError(f"adam_eps={self.adam_eps} must be a positive number.")
        if self.lr_warmup_iters < 0:
            raise ConfigError(f"lr_warmup_iters={self.lr_warmup_iters} must not be negative; 0 starts at the highest rate.")
        if self.lr_decay_iters is not None and self.lr_decay_iters < 1:
            raise ConfigError(f"lr_decay_iters={self.lr_decay_iters} must be at least 1; leave it out for train_iters.")
        if not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"seed={self.seed} must lie between 0 and {_SEEDS - 1}.")

    def _check_ramp(self) -> None:
        if self.rampup_batch_size is None:
            return
        start, increment, samples = self.rampup_batch_size
        said = f"rampup_batch_size={start} {increment} {samples}"
        if min(start, increment) < 1 or samples < 0:
            raise ConfigError(f"{said}: give START INCREMENT SAMPLES, the first two at least 1, the third not negative.")
        if start > self.global_batch_size or (self.global_batch_size - start) % increment:
            raise ConfigError(
                f"{said}: from {start} by {increment} the batch does not reach global_batch_size={self.global_batch_size}; "
                f"the difference, {self.global_batch_size - start}, must be a multiple of {increment} and not negative."
            )
