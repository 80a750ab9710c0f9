"""Which sizes the 8-bit matrix products of each recipe can take. Source: Transformer Engine 2.x, "Using FP8". Does not know: torch."""

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.layout import ParallelLayout

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
