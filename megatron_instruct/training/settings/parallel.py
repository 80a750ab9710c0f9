"""Settings of the layout over processes."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_instruct.errors import ConfigError

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)

ShardingStrategy = Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the model is laid out over the processes that torchrun starts."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers (PP)."""
    context_parallel_size: int = 1
    """Processes that share each sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Processes that share the experts of each layer (EP), for a mixture of experts."""
    expert_tensor_parallel_size: int | None = None
    """Processes that share each expert's matrices (default: tensor_model_parallel_size)."""
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
    """Gather updated parameters while the forward pass already runs; needs use_distributed_optimizer or use_megatron_fsdp."""
    use_megatron_fsdp: bool = False
    """Shard parameters, gradients and the optimizer's state over the data-parallel ranks by Megatron-FSDP."""
    data_parallel_sharding_strategy: ShardingStrategy | None = None
    """With use_megatron_fsdp, what is sharded: nothing, the optimizer's state, gradients too, or parameters too (default)."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: none, those inside attention, or whole layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: all layers in groups of recompute_num_layers (uniform, default), or only the first recompute_num_layers (block)."""
    recompute_num_layers: int | None = None
    """With full: layers of a group, or layers of each stage or chunk that are recomputed (default 1)."""
    bf16: bool = False
    """Parameters and activations in bfloat16 with fp32 master weights; fp32 otherwise."""
    num_threads: int | None = None
    """CPU threads of each process (default: OMP_NUM_THREADS, else the machine's cores divided by its processes)."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another process (minutes)."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1, which divides nothing.")
        if not 0.0 < self.distributed_timeout_minutes < math.inf:
            raise ConfigError(f"distributed_timeout_minutes={self.distributed_timeout_minutes} must be a positive number.")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads={self.num_threads} must be at least 1; leave it out for the default.")
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(self, name) is not None and self.recompute_granularity != "full":
                raise ConfigError(f"{name}={getattr(self, name)} goes with recompute_granularity=full; set it or drop {name}.")
        if self.recompute_num_layers is not None and self.recompute_num_layers < 1:
            raise ConfigError(f"recompute_num_layers={self.recompute_num_layers} must be at least 1.")
        if self.overlap_param_gather and not (self.use_distributed_optimizer or self.use_megatron_fsdp):
            raise ConfigError(
                "overlap_param_gather=True needs use_distributed_optimizer=True or use_megatron_fsdp=True; set one, or drop "
                "overlap_param_gather."
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError("overlap_param_gather=True needs overlap_grad_reduce=True; set it or drop overlap_param_gather.")
        self._check_sharding()

    def _check_sharding(self) -> None:
        strategy = self.data_parallel_sharding_strategy
        if strategy is not None and not self.use_megatron_fsdp:
            raise ConfigError(f"data_parallel_sharding_strategy={strategy} goes with use_megatron_fsdp=True; set it, or drop the strategy.")
        if self.use_megatron_fsdp and self.pipeline_model_parallel_size > 1:
            raise ConfigError(
                f"use_megatron_fsdp=True does not go with pipeline_model_parallel_size={self.pipeline_model_parallel_size}: megatron-core "
                "0.19.2 lays its shards out over data, context and tensor ranks alone; use use_distributed_optimizer=True instead, or "
                "divide the model by tensor parallelism."
            )

    @property
    def sharding_strategy(self) -> ShardingStrategy | None:
        """What Megatron-FSDP shards; None without it."""
        return (self.data_parallel_sharding_strategy or "optim_grads_params") if self.use_megatron_fsdp else None

    @property
    def shards_optimizer(self) -> bool:
        """Whether the optimizer's state is divided over the data-parallel ranks."""
        return self.sharding_strategy != "no_shard" if self.use_megatron_fsdp else self.use_distributed_optimizer

    @property
    def shards_gradients(self) -> bool:
        return self.sharding_strategy in ("optim_grads", "optim_grads_params")

    @property
    def shards_weights(self) -> bool:
        return self.sharding_strategy == "optim_grads_params"
