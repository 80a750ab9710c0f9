"""What third parties say on import and on saving that no user of this project can act on.

To be called before megatron-core is imported. Everything else that they say stays visible.
"""

import logging
import warnings

_WARNINGS = (
    "Transformer Engine and Apex are not installed",  # megatron-core then takes torch's own kernels, as the CPU wants;
    "Apex is not installed",  # on CUDA the build of the model asks for Transformer Engine by name
    "full scope is deprecated",  # megatron-core 0.19.2 meets its own default value
    "Please use DTensor instead and we are deprecating ShardedTensor",  # megatron-core's checkpoints use it (0.19.2, torch 2.13)
    "torch.distributed is disabled, unavailable or uninitialized",  # each rank reads its own parts of a checkpoint, as meant
    "The argument order of load has been changed",  # megatron-core names its arguments
    "Could not determine rank",  # where there is one process
    r"`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",  # Megatron-FSDP calls them (0.19.2, torch 2.13)
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",  # by megatron-core's zero_grad
    "There are still pending all-gather tasks",  # what Megatron-FSDP gathered ahead of a step's end, in order (0.19.2)
    ".* is experimental and still under active development",  # of megatron-core's multimodal parts, not used here
)
_LOGGERS = (
    "torch.utils.cpp_extension",  # "No CUDA runtime is found", though nothing is compiled
    "megatron.core.dist_checkpointing.strategies.torch",  # "async save is deprecated" from its own synchronous save (0.19.2)
    "megatron.core.distributed.distributed_data_parallel",  # that it lays out the distributed optimizer's buffers itself, as meant (0.19.2)
)

_SAID_BY_US = ("megatron.core.dist_checkpointing.strategies.filesystem_async",)
"""Loggers whose errors are raised, too, and end in a message of ours."""


def silence() -> None:
    """Drop these messages in this process."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in _SAID_BY_US:
        logging.getLogger(name).setLevel(logging.CRITICAL)
