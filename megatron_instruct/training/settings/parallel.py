"""Settings of the layout over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the model is laid out over the processes that torchrun starts."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers (PP)."""
    context_parallel_size: int = 1
    """Processes that share each sequence (CP)."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one model chunk, for the interleaved pipeline schedule."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage, which also computes the output layer; None for an even split."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor ranks."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs use_distributed_optimizer."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them."""
    bf16: bool = False
    """Parameters and activations in bfloat16 with fp32 master weights; fp32 otherwise."""
    num_threads: int | None = None
    """CPU threads of each process (default: OMP_NUM_THREADS, else the machine's cores divided by its processes)."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another process (minutes)."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads={self.num_threads} must be at least 1; leave it out for the default.")
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ConfigError("overlap_param_gather=True needs use_distributed_optimizer=True; set it or drop overlap_param_gather.")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError("overlap_param_gather=True needs overlap_grad_reduce=True; set it or drop overlap_param_gather.")
