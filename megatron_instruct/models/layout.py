"""How a model is laid out over ranks: a pure value, checked before any process group exists."""

from dataclasses import dataclass

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel groups. Ranks are ordered as megatron-core orders them: tensor, then context, then data, then pipeline;
    for the experts alone: expert tensor, then expert, then data, then pipeline."""

    world_size: int = 1
    tensor: int = 1
    """Ranks that share each layer's matrices (TP)."""
    context: int = 1
    """Ranks that share each sequence (CP)."""
    pipeline: int = 1
    """Stages that share the layers (PP)."""
    virtual_pipeline: int | None = None
    """Model chunks of one stage, for the interleaved schedule; None for one chunk."""
    sequence_parallel: bool = False
    """Whether norms and residuals are split along the sequence over the tensor ranks."""
    expert: int = 1
    """Ranks that share the experts of each layer (EP); they are taken from those that share or repeat everything else."""
    expert_tensor: int | None = None
    """Ranks that share each expert's matrices (ETP); None for as many as `tensor`."""
    layers_in_last_stage: int | None = None
    """Layers of the last pipeline stage, which also computes the output layer; None for an even split."""

    @property
    def data(self) -> int:
        """Replicas of the model (DP)."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def tensor_of_experts(self) -> int:
        """Ranks that share each expert's matrices."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def data_of_experts(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.tensor_of_experts * self.expert * self.pipeline)

    def tokens_of_rank(self, micro_batch_size: int, seq_length: int) -> int:
        """Return the tokens of a microbatch whose norms and residuals one rank computes."""
        return micro_batch_size * seq_length // (self.context * (self.tensor if self.sequence_parallel else 1))

    def layers_of_stage(self, layers: int, stage: int) -> int:
        """Return how many of the model's layers a pipeline stage has, over all its chunks."""
        if self.layers_in_last_stage is None:
            return layers // self.pipeline
        if stage == self.pipeline - 1:
            return self.layers_in_last_stage
        return (layers - self.layers_in_last_stage) // (self.pipeline - 1)

    def parameters_of_stage(self, architecture: Architecture, stage: int) -> int:
        """Return the parameters of a pipeline stage over its tensor ranks, without padding; a tied embedding is in both end stages."""
        embedding = architecture.vocab_size * architecture.hidden_size
        outside = embedding * (1 if architecture.tie_embeddings else 2) + architecture.hidden_size
        layers = (architecture.num_parameters - outside) // architecture.num_layers * self.layers_of_stage(architecture.num_layers, stage)
        if self.pipeline == 1:
            return layers + outside
        last = stage == self.pipeline - 1
        return layers + (embedding if stage == 0 or last else 0) + (architecture.hidden_size if last else 0)

    def parameters_of_rank(self, architecture: Architecture, stage: int) -> int:
        """Return the parameters of one rank of a stage, without padding: its part of what tensor ranks share, and of the experts."""
        experts = 3 * architecture.hidden_size * architecture.ffn_hidden_size * (architecture.num_experts or 0)
        of_experts = experts * self.layers_of_stage(architecture.num_layers, stage)
        shared = self.parameters_of_stage(architecture, stage) - of_experts
        return shared // self.tensor + of_experts // (self.expert * self.tensor_of_experts)

    def check(self, architecture: Architecture) -> None:
        """Raise ConfigError for a layout that the model or the number of processes does not allow."""
        model_ranks = self.tensor * self.context * self.pipeline
        if min(self.tensor, self.context, self.pipeline) < 1:
            raise ConfigError(f"tensor={self.tensor}, context={self.context}, pipeline={self.pipeline}: parallel sizes must be at least 1.")
        if self.world_size % model_ranks:
            raise ConfigError(
                f"world_size={self.world_size} is not a multiple of tensor_model_parallel_size * context_parallel_size * "
                f"pipeline_model_parallel_size = {self.tensor} * {self.context} * {self.pipeline} = {model_ranks}; "
                f"start torchrun with --nproc-per-node {model_ranks} or a multiple."
            )
        self._check_tensor(architecture)
        self._check_pipeline(architecture)
        self._check_experts(architecture)

    def _check_tensor(self, architecture: Architecture) -> None:
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            value = getattr(architecture, name)
            if value % self.tensor:
                allowed = [size for size in range(1, value + 1) if _divides_all(size, architecture)]
                raise ConfigError(
                    f"{name}={value} is not a multiple of tensor_model_parallel_size={self.tensor}; "
                    f"this model allows {', '.join(map(str, allowed))}."
                )
        if architecture.parts.experts and self.tensor > 1 and not self.sequence_parallel:
            raise ConfigError(f"a mixture of experts over tensor_model_parallel_size={self.tensor} needs sequence_parallel=True; set it.")
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError("sequence_parallel=True needs tensor_model_parallel_size of at least 2; raise it or drop the flag.")

    def _check_pipeline(self, architecture: Architecture) -> None:
        layers = architecture.num_layers
        if self.layers_in_last_stage is not None:
            first_layers = layers - self.layers_in_last_stage
            if self.pipeline == 1 or self.virtual_pipeline is not None or self.layers_in_last_stage < 1 or first_layers < self.pipeline - 1:
                raise ConfigError(
                    f"num_layers_in_last_pipeline_stage={self.layers_in_last_stage} needs 2 or more stages, at least one layer in each, "
                    f"and no interleaving; num_layers={layers}, pipeline_model_parallel_size={self.pipeline}."
                )
            if first_layers % (self.pipeline - 1):
                raise ConfigError(
                    f"num_layers={layers} minus num_layers_in_last_pipeline_stage={self.layers_in_last_stage} leaves {first_layers}, "
                    f"not a multiple of the other {self.pipeline - 1} stages; change either."
                )
            return
        chunks = self.pipeline * (self.virtual_pipeline or 1)
        if layers % chunks:
            raise ConfigError(
                f"num_layers={layers} is not a multiple of the {chunks} pipeline stages or chunks "
                f"(pipeline_model_parallel_size={self.pipeline}); change pipeline_model_parallel_size, "
                "or set num_layers_in_last_pipeline_stage."
            )
        if self.virtual_pipeline is not None and self.pipeline < 2:
            raise ConfigError("an interleaved pipeline needs pipeline_model_parallel_size of at least 2.")

    def _check_experts(self, architecture: Architecture) -> None:
        expert, tensor = self.expert, self.tensor_of_experts
        if architecture.num_experts is None:
            if expert != 1 or self.expert_tensor is not None:
                raise ConfigError(
                    f"expert_model_parallel_size={expert}, expert_tensor_parallel_size={self.expert_tensor}: the family "
                    f"{architecture.family} has no experts; drop them, or train a mixture of experts (preset 8x7B)."
                )
            return
        if min(expert, tensor) < 1:
            raise ConfigError(f"expert={expert}, expert_tensor={tensor}: parallel sizes must be at least 1.")
        if architecture.num_experts % expert:
            allowed = [size for size in range(1, architecture.num_experts + 1) if architecture.num_experts % size == 0]
            raise ConfigError(
                f"num_experts={architecture.num_experts} is not a multiple of expert_model_parallel_size={expert}; "
                f"this model allows {', '.join(map(str, allowed))}."
            )
        if architecture.ffn_hidden_size % tensor:
            raise ConfigError(
                f"ffn_hidden_size={architecture.ffn_hidden_size} is not a multiple of expert_tensor_parallel_size={tensor}; change either."
            )
        of_experts = expert * tensor * self.pipeline
        if self.world_size % of_experts:
            raise ConfigError(
                f"world_size={self.world_size} is not a multiple of expert_model_parallel_size * expert_tensor_parallel_size * "
                f"pipeline_model_parallel_size = {expert} * {tensor} * {self.pipeline} = {of_experts}; lower them, or start "
                f"torchrun with a multiple of {of_experts} processes."
            )


def _divides_all(size: int, architecture: Architecture) -> bool:
    return all(
        value % size == 0 for value in (architecture.num_attention_heads, architecture.num_query_groups, architecture.ffn_hidden_size)
    )
