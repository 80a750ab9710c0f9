"""Which GPU each recipe of 8-bit matrix products needs, and which sizes they can take. Does not know: torch.

Source: Transformer Engine 2.x, "Using FP8".
"""

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.layout import ParallelLayout

Capability = tuple[int, int]
NEEDS: dict[str, tuple[Capability, str]] = {
    "delayed": ((8, 9), "Ada or Hopper"),
    "tensorwise": ((8, 9), "Ada or Hopper"),
    "blockwise": ((9, 0), "Hopper"),
    "mxfp8": ((10, 0), "Blackwell"),
}
"""The least compute capability, and the kind of GPU that has it first."""
CAPABILITIES: dict[str, Capability] = {"ampere": (8, 0), "ada": (8, 9), "hopper": (9, 0), "blackwell": (10, 0)}
"""Compute capability by generation (NVIDIA, CUDA GPU Compute Capability)."""
_MULTIPLE, _MXFP8_MULTIPLE = 16, 32


def check_fp8_sizes(recipe: str, architecture: Architecture, layout: ParallelLayout, *, tokens: int) -> None:
    """Raise ConfigError for sizes that the recipe's products cannot take. tokens: of one microbatch on one rank."""
    multiple = _MXFP8_MULTIPLE if recipe == "mxfp8" else _MULTIPLE
    sizes = {
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size / tensor_model_parallel_size": architecture.ffn_hidden_size // layout.tensor,
        "micro_batch_size * seq_length of one rank": tokens,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(f"{name} = {size} is not a multiple of {multiple}, as FP8 products with fp8_recipe={recipe} need; change it.")
