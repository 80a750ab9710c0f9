"""Memory of the fullest GPU, part by part, in bytes.

Counted from what megatron-core 0.19.2 and Transformer Engine keep: weights, fp32 gradients, AdamW's state (over the replicas with
the distributed optimizer), and what the backward pass needs of the microbatches that are under way (Korthikanti et al.,
arXiv:2205.05198, section 4, without dropout and with gates; Narayanan et al., arXiv:2104.04473, for interleaving).
Does not know: the allocator. What it loses is a constant (constants.yaml).
"""

import math
from dataclasses import dataclass

from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.shape import Shape

_LOGIT_BYTES = 6
"""Of one logit: bf16, and fp32 for the loss, whose buffer also takes the gradient."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    fp8_copies: float
    logits: float
    gathered: float = 0.0
    """Of weights and gradients that are in shards, what is whole at a time."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.fp8_copies + self.logits + self.gathered


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Parameters that one rank of a stage holds."""

    shared: float
    """Of attention, dense layers, norms, embedding and output layer: reduced over DP x CP."""
    experts: float
    """Of experts: reduced over the replicas of these experts."""
    products: float
    """Of all these, the weights of matrix products inside layers, which FP8 copies."""

    @property
    def total(self) -> float:
        return self.shared + self.experts


def padded_vocab(shape: Shape, execution: Execution) -> int:
    """Return the rows of the embedding, as models/build.py pads it."""
    multiple = execution.vocab_divisor * execution.layout.tensor
    return math.ceil(shape.vocab / multiple) * multiple


def rank_parameters(shape: Shape, execution: Execution, stage: int) -> RankParameters:
    """Return what a rank of a stage holds."""
    tensor, last = execution.layout.tensor, execution.layout.pipeline - 1
    layers = execution.layers_of_stage(shape.layers, stage)
    ffn = shape.expert_weights / tensor
    attention = shape.attention_weights / tensor
    dense = attention + (ffn if shape.experts == 1 else 0) + shape.replicated_weights
    share = shape.expert_weights * shape.experts / (execution.expert * execution.expert_tensor)
    experts = layers * share if shape.experts > 1 else 0.0
    embedding = padded_vocab(shape, execution) * shape.hidden / tensor
    ends = embedding if stage == 0 else 0.0
    if stage == last:
        ends += shape.hidden + (0.0 if shape.tied and last == 0 else embedding)
    products = layers * (attention + (ffn if shape.experts == 1 else 0)) + experts
    return RankParameters(shared=layers * dense + ends, experts=experts, products=products)


def memory_of_stage(shape: Shape, execution: Execution, stage: int) -> Memory:
    """Return the parts on a GPU of a pipeline stage."""
    held = rank_parameters(shape, execution, stage)
    mixed = execution.precision != "fp32"
    replicas = execution.layout.data * execution.layout.context
    state = 12 if mixed else 8
    sharded = held.shared / replicas + held.experts / execution.layout.data_of_experts
    number = 2 if mixed else 4
    whole = _whole_at_a_time(shape, execution, held, stage) if replicas > 1 else 0.0
    is_last = stage == execution.layout.pipeline - 1
    logits = _LOGIT_BYTES * execution.tokens * padded_vocab(shape, execution) / execution.layout.tensor if is_last else 0.0
    return Memory(
        weights=number * (sharded if execution.shards_weights else held.total),
        gradients=4 * (sharded if execution.shards_gradients else held.total),
        optimizer=state * (sharded if execution.distributed_optimizer else held.total),
        activations=_activations(shape, execution, stage),
        # a copy in 8 bits of each matrix and one of its transpose, for as long as a step lasts
        fp8_copies=2 * held.products if execution.precision == "fp8" else 0.0,
        logits=logits,
        gathered=whole * (number * execution.shards_weights + 4 * execution.shards_gradients),
    )


def _whole_at_a_time(shape: Shape, execution: Execution, held: RankParameters, stage: int) -> float:
    """Return the parameters that Megatron-FSDP has whole beside the shards: the layer of now, the next, and what is no layer."""
    layers = execution.layers_of_stage(shape.layers, stage)
    inside = layers * shape.replicated_weights + held.products
    return held.total - inside + inside * min(2, layers) / layers


def fullest_stage(shape: Shape, execution: Execution) -> Memory:
    """Return the parts on the GPU that needs most: of the first stage, which has most microbatches under way, or of the last."""
    stages = {0, execution.layout.pipeline - 1}
    return max((memory_of_stage(shape, execution, stage) for stage in stages), key=lambda memory: memory.total)


def _activations(shape: Shape, execution: Execution, stage: int) -> float:
    layers_under_way = _layers_under_way(shape, execution, stage)
    layer = layer_activations(shape, execution)
    bytes_of_number = 4 if execution.precision == "fp32" else 2
    if execution.recompute == "full":  # the inputs of all layers, and one layer computed again
        inputs = bytes_of_number * shape.hidden * execution.tokens / execution.sequence_shards
        return layers_under_way * inputs + layer
    return layers_under_way * layer


def _layers_under_way(shape: Shape, execution: Execution, stage: int) -> float:
    """Return for how many layers, counted once per microbatch, a stage keeps activations when it keeps most."""
    layers, pipeline, chunks = execution.layers_of_stage(shape.layers, stage), execution.layout.pipeline, execution.chunks
    behind = pipeline - 1 - stage
    if chunks == 1:
        return layers * min(execution.num_microbatches, behind + 1)
    warm_up = 2 * behind + (chunks - 1) * pipeline + 1
    return layers / chunks * min(execution.num_microbatches * chunks, warm_up)


def layer_activations(shape: Shape, execution: Execution) -> float:
    """Return the bytes that one layer keeps of one microbatch, without recomputation of whole layers."""
    number = 4 if execution.precision == "fp32" else 2
    if execution.cpu_modules:
        return _layer_activations_on_cpu(shape, execution, number)
    product_input = 1 if execution.precision == "fp8" else number
    # inputs of the two norms, and of the products after them
    along_sequence = 2 * number * shape.hidden + 2 * product_input * shape.hidden
    attention = number * (2 * shape.query + 2 * shape.key_value) + 4 * shape.heads
    if product_input != number:
        attention += product_input * shape.query  # the output once for attention's own backward pass, once for the product after it
    hidden_layer = number * shape.ffn_in + product_input * shape.ffn
    if shape.experts > 1:  # tokens as they go to their experts, and as they come back
        hidden_layer = shape.experts_per_token * (hidden_layer + (product_input + number) * shape.hidden)
    if shape.dropout:
        along_sequence += 2 * shape.hidden
    scores = 0.0
    if not execution.fused_attention and execution.recompute == "none":
        scores = 5.0 * shape.heads * execution.seq_length / execution.layout.tensor  # softmax, mask, what dropout leaves
    return execution.tokens * (along_sequence / execution.sequence_shards + (attention + hidden_layer) / execution.layout.tensor + scores)


def _layer_activations_on_cpu(shape: Shape, execution: Execution, number: int) -> float:
    """Return the same where layers are torch's (platform/cpu_modules.py, of a dense, gated model on one rank).

    Each norm keeps its input, and in other precisions than fp32 its result as well, both in fp32; the fused query, key and value stay
    beside the turned queries and keys.
    """
    norms = 2 * (4 if number == 4 else 4 + 4) * shape.hidden + 2 * 4
    product_inputs = 2 * number * shape.hidden
    attention = number * (3 * shape.query + 3 * shape.key_value) + 4 * shape.heads
    positions = 4 * number * shape.head_size / execution.micro_batch_size
    hidden_layer = number * (shape.ffn_in + shape.ffn)
    return execution.tokens * (norms + product_inputs + attention + positions + hidden_layer)
