"""Settings of the kind of optimizer, and those of Muon."""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.training.settings.idle import check_idle


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The kind of optimizer: AdamW, or Muon (K. Jordan, 2024; arXiv:2502.16982) for matrices and AdamW for everything else."""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam: AdamW. muon: momentum made orthogonal for the matrices inside layers; embedding, output layer, norms and biases with AdamW."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_nesterov: bool = False
    """Look ahead along the momentum, as Nesterov."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Size of an update by the rows and columns of the matrix: sqrt(max(rows, columns)), sqrt(rows / columns), or
    sqrt(max(1, rows / columns))."""
    muon_extra_scale_factor: float = 1.0
    """Factor of every update besides; with spectral, 0.2 gives updates the size of AdamW's, for learning rates tuned for it."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations that make a matrix orthogonal."""
    muon_coefficient_type: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    """Coefficients of these iterations."""
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"
    """Precision of their products: bfloat16 (medium), as TF32 on GPUs that have it (high), fp32 (highest)."""
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = "duplicated"
    """Matrices that tensor ranks share: whole on each rank (duplicated), together (distributed), or each rank its own part, which is
    cheapest and makes the result depend on the number of tensor ranks (blockwise)."""
    muon_no_split_qkv: bool = False
    """Make query, key and value orthogonal as one matrix instead of three."""

    def __post_init__(self) -> None:
        if self.optimizer != "muon":
            check_idle(self, [field.name for field in dataclasses.fields(self) if field.name != "optimizer"], needs="optimizer=muon")
        if not 0.0 <= self.muon_momentum < 1.0:
            raise ConfigError(f"muon_momentum={self.muon_momentum} must be at least 0 and below 1.")
        if not 0.0 < self.muon_extra_scale_factor < math.inf:
            raise ConfigError(f"muon_extra_scale_factor={self.muon_extra_scale_factor} must be a positive number.")
        if self.muon_num_ns_steps < 1:
            raise ConfigError(f"muon_num_ns_steps={self.muon_num_ns_steps} must be at least 1.")

    @property
    def is_muon(self) -> bool:
        return self.optimizer == "muon"

    @property
    def megatron_fields(self) -> dict[str, Any]:
        """Fields of megatron-core's OptimizerConfig."""
        if not self.is_muon:
            return {"optimizer": self.optimizer}
        values = dataclasses.asdict(self)
        split = not values.pop("muon_no_split_qkv")
        return {**values, "muon_split_qkv": split}

    @property
    def of_result(self) -> dict[str, Any] | None:
        """What decides the result of a run; None for AdamW, whose settings stand elsewhere."""
        return self.megatron_fields if self.is_muon else None

    def check_installed(self) -> None:
        """Raise MissingPackageError where the package that megatron-core takes Muon from is not there."""
        if self.is_muon and importlib.util.find_spec("emerging_optimizers") is None:
            raise MissingPackageError("emerging-optimizers", extra="muon", purpose="optimizer=muon")
