"""How operands of matrix products become 8-bit numbers: the values that an emulation is told. Does not know: torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Names and values are megatron-core's."""

    format: Literal["e4m3", "hybrid"]
    """E4M3 throughout, or E5M2 for gradients."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    amax_history_len: int = 1
    amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    margin: int = 0
    layers_left_at_start: int = 0
    """Layers at the start of the model that are left as they are."""
    layers_left_at_end: int = 0
    """Layers at its end that are left as they are."""
