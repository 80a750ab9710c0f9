"""Settings of a mixture of experts."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """How tokens find their experts in training; for a mixture of experts (family mixtral) only."""

    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] | None = None
    """What keeps the experts equally busy: a loss over each microbatch (default), each sequence, the whole batch so far; or nothing."""
    moe_aux_loss_coeff: float | None = None
    """Weight of that loss (default: the model's router_aux_loss_coef)."""
    moe_z_loss_coeff: float | None = None
    """Weight of the loss that keeps the router's logits small (arXiv:2202.08906); default: none."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] | None = None
    """How tokens get to experts of other processes: all to all, or each to its own (default where that runs). The result is the same."""

    def __post_init__(self) -> None:
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be a number that is not negative.")
        if self.moe_router_load_balancing_type == "none" and self.moe_aux_loss_coeff:
            raise ConfigError(
                f"moe_aux_loss_coeff={self.moe_aux_loss_coeff} does not go with moe_router_load_balancing_type=none; drop one of them."
            )

    @property
    def of_result(self) -> dict[str, Any]:
        """The settings that decide the result, those that are given."""
        names = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def megatron_fields(self) -> dict[str, Any]:
        """The fields of megatron-core's TransformerConfig, those that are given."""
        dispatcher = self.moe_token_dispatcher_type
        none = {"moe_aux_loss_coeff": 0.0} if self.moe_router_load_balancing_type == "none" else {}
        return {**self.of_result, **none, **({"moe_token_dispatcher_type": dispatcher} if dispatcher else {})}
