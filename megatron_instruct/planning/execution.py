"""How a model is trained, as far as memory and time depend on it: layout, batches, precision, what is kept and what overlaps."""

from dataclasses import dataclass
from typing import Literal

from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.planning.gpus import Precision

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One way to train a model."""

    layout: ParallelLayout
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    distributed_optimizer: bool = True
    shards_gradients: bool = False
    """Over the replicas, as Megatron-FSDP does: each microbatch reduces them."""
    shards_weights: bool = False
    """Over the replicas, as Megatron-FSDP does: each pass gathers them, a layer at a time."""
    overlap: bool = True
    """Gradients are reduced and parameters gathered while computing."""
    vocab_divisor: int = 128
    """The embedding is padded to a multiple of this times the tensor ranks."""
    fused_attention: bool = True
    """Attention never stores its scores (FlashAttention, cuDNN). False only for figures from before it."""
    tensor_overlap: bool = False
    """Communication of tensor parallelism overlaps with products (Megatron's --tp-comm-overlap), which this project does not do."""

    cpu_modules: bool = False
    """Layers of this project's modules for a CPU, each operation of which keeps its own inputs. Only to be held against what such a model
    keeps in memory, since no plan is for CPUs."""

    ends_as_layers: bool = False
    """Embedding and output layer each take the place of a layer in their stages. Only for figures of others, as above."""

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.layout.data)

    @property
    def chunks(self) -> int:
        """Model chunks of a stage."""
        return self.layout.virtual_pipeline or 1

    @property
    def expert(self) -> int:
        """Ranks that share the experts (EP)."""
        return self.layout.expert

    @property
    def expert_tensor(self) -> int:
        """Ranks that share each expert's matrices (ETP)."""
        return self.layout.tensor_of_experts

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one rank, before tensor ranks share them."""
        return self.seq_length * self.micro_batch_size // self.layout.context

    @property
    def sequence_shards(self) -> int:
        """Ranks that share norms and residuals."""
        return self.layout.tensor if self.layout.sequence_parallel else 1

    def layers_of_stage(self, layers: int, stage: int) -> int:
        """Return the layers that a pipeline stage holds, over all its chunks."""
        stages = self.layout.pipeline
        if self.ends_as_layers:
            return (layers + 2) // stages - (stage == 0) - (stage == stages - 1)
        return self.layout.layers_of_stage(layers, stage)
