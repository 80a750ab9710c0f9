"""Time of one training step, part by part, in seconds.

Products take their operations at the fraction of the peak that large products reach, and their operands' bytes at the memory's
speed; the rest of a layer takes its bytes. A collective takes its volume at the speed of its slowest link. Pipeline: Narayanan et
al., arXiv:2104.04473, section 2.2. What is hidden behind what follows megatron-core's schedules and is said at each term.
Does not know: kernel launches, latency, stragglers, failures, data loading, saving.
"""

from dataclasses import dataclass

from megatron_instruct.planning.constants import Constants
from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.gpus import Gpu
from megatron_instruct.planning.memory import RankParameters, padded_vocab, rank_parameters
from megatron_instruct.planning.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Volume:
    """What one GPU sends in a step for one kind of parallelism."""

    bytes: float
    link: str
    """NVLink or network."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step of the slowest stage, and what each GPU sends. Communication counts where computing does not hide it."""

    compute: float
    recompute: float
    tensor_communication: float
    context_communication: float
    expert_communication: float
    pipeline_communication: float
    bubble: float
    data_communication: float
    optimizer: float
    volumes: dict[str, Volume]

    @property
    def total(self) -> float:
        computing = self.compute + self.recompute + self.bubble + self.optimizer
        inside = self.tensor_communication + self.context_communication + self.expert_communication
        return computing + inside + self.pipeline_communication + self.data_communication


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Seconds of the forward (or backward) pass of a microbatch through one layer, or through the ends of the model."""

    compute: float
    attention: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.attention + self.tensor + self.context + self.expert


class _Rates:
    """Speeds that one execution reaches."""

    def __init__(self, execution: Execution, gpu: Gpu, constants: Constants) -> None:
        layout = execution.layout
        self.products = constants.product_flops(gpu, execution.precision)
        self.plain_products = constants.product_flops(gpu, "fp32" if execution.precision == "fp32" else "bf16")
        attention_precision = "fp32" if execution.precision == "fp32" else "bf16"
        self.attention = gpu.peak_flops[attention_precision] * constants.attention
        self.memory = gpu.memory_bandwidth * constants.memory_bandwidth
        self.number = 4 if execution.precision == "fp32" else 2
        self.tensor = gpu.group_bandwidth(layout.tensor, stride=1) * constants.links
        self.context = gpu.group_bandwidth(layout.context, stride=layout.tensor) * constants.links
        self.data = gpu.group_bandwidth(layout.context * layout.data, stride=layout.tensor) * constants.links
        inside = gpu.is_inside(execution.expert, stride=execution.expert_tensor)
        self.expert = (gpu.nvlink_bandwidth if inside else gpu.network_bandwidth) * constants.links
        pipeline_inside = gpu.is_inside(layout.world_size, stride=1)
        self.pipeline = (gpu.nvlink_bandwidth if pipeline_inside else gpu.network_bandwidth) * constants.links
        self.tensor_exposed = 1.0 - (constants.tensor_overlap if execution.tensor_overlap else 0.0)


def step_time(shape: Shape, execution: Execution, gpu: Gpu, constants: Constants) -> StepTime:
    """Return the parts of the time of one step."""
    rates, layout = _Rates(execution, gpu, constants), execution.layout
    forward, backward = _layer_forward(shape, execution, rates), _layer_backward(shape, execution, rates)
    again = _again(forward, execution)
    head_forward, head_backward = _head(shape, execution, rates)
    layer = forward.total + backward.total + again.total
    head = head_forward.total + head_backward.total
    stages = layout.pipeline
    ends = [execution.layers_of_stage(shape.layers, stage) for stage in (0, stages - 1)]
    first, last = ends[0] * layer, ends[1] * layer + head
    layers, with_head = (ends[1], True) if last >= first else (ends[0], False)
    # the others wait for a microbatch to run through all stages once, shortened by interleaving
    average = (shape.layers * layer + head) / stages
    microbatches, chunks = execution.num_microbatches, execution.chunks
    transfer = rates.number * execution.tokens * shape.hidden / (layout.tensor if layout.sequence_parallel else 1) / rates.pipeline
    pipeline = 0.0
    if stages > 1:  # there and back; the interleaved schedule sends while it computes, but for the way in and out
        pipeline = 2.0 * transfer * (microbatches if chunks == 1 else 0) + 2.0 * transfer * (stages - 1)
    ends_forward, ends_backward = (head_forward, head_backward) if with_head else (_Pass(compute=0.0), _Pass(compute=0.0))
    held = rank_parameters(shape, execution, 0 if not with_head else stages - 1)
    forward_window = layers * forward.total + ends_forward.total
    backward_window = layers * (backward.total + again.total) + ends_backward.total
    return StepTime(
        compute=microbatches
        * (
            layers * (forward.compute + forward.attention + backward.compute + backward.attention)
            + ends_forward.compute
            + ends_backward.compute
        ),
        recompute=microbatches * layers * (again.compute + again.attention),
        tensor_communication=microbatches
        * (layers * (forward.tensor + backward.tensor + again.tensor) + ends_forward.tensor + ends_backward.tensor),
        context_communication=microbatches * layers * (forward.context + backward.context + again.context),
        expert_communication=microbatches * layers * (forward.expert + backward.expert + again.expert),
        pipeline_communication=pipeline,
        bubble=(stages - 1) / chunks * average,
        data_communication=_data_communication(execution, held, rates, forward_window, backward_window),
        optimizer=_optimizer(execution, held, rates),
        volumes=_volumes(shape, execution, gpu, held, layers),
    )


def _product(rows: float, inner: float, columns: float, rates: _Rates, *, speed: float, operand: int) -> float:
    """Return the seconds of a product [rows, inner] x [inner, columns]. operand: bytes of a number that goes in."""
    moved = operand * (rows * inner + inner * columns) + rates.number * rows * columns
    return 2.0 * rows * inner * columns / speed + moved / rates.memory


def _products(shape: Shape, execution: Execution) -> list[tuple[float, float, float]]:
    """Return the products of a layer on one rank: rows, inner width, columns."""
    tensor, tokens = execution.layout.tensor, execution.tokens
    inner = execution.expert_tensor if shape.experts > 1 else tensor  # ranks that share the columns; the others share the tokens
    to_experts = tokens * shape.experts_per_token * inner / tensor
    return [
        (tokens, shape.hidden, (shape.query + 2 * shape.key_value) / tensor),
        (tokens, shape.query / tensor, shape.hidden),
        (to_experts, shape.hidden, shape.ffn_in / inner),
        (to_experts, shape.ffn / inner, shape.hidden),
    ]


def _elementwise_bytes(shape: Shape, execution: Execution, number: int) -> float:
    """Return the bytes that the forward pass of a layer reads and writes outside products and attention."""
    along_sequence = 2 * (2 + 3) * number * shape.hidden + (2 * (1 + number) * shape.hidden if shape.dropout else 0)
    positions = 2 * number * (shape.query + shape.key_value) if shape.gated else 0
    activation = number * (shape.ffn_in + shape.ffn) * shape.experts_per_token
    casts = 4 * shape.query + 2 * shape.ffn * shape.experts_per_token if execution.precision == "fp8" else 0
    permutation = 4 * number * shape.hidden * shape.experts_per_token if shape.experts > 1 else 0
    shared = (positions + activation + casts) / execution.layout.tensor
    return execution.tokens * ((along_sequence + permutation) / execution.sequence_shards + shared)


def _attention(shape: Shape, execution: Execution, rates: _Rates) -> tuple[float, float]:
    """Return the seconds of attention's forward and backward pass in a layer."""
    operations = 4.0 * execution.tokens * shape.query / execution.layout.tensor
    if execution.fused_attention:  # only below the diagonal; the backward pass computes the scores again
        forward = operations * shape.attended(execution.seq_length) / rates.attention
        return forward, 2.5 * forward
    scores = float(execution.tokens) * execution.seq_length * shape.heads / execution.layout.tensor
    products = operations * execution.seq_length / rates.plain_products
    # scores, softmax, mask and dropout, read and written in turn
    return products + 13 * scores / rates.memory, 2 * products + 16 * scores / rates.memory


def _tensor_volume(shape: Shape, execution: Execution, number: int) -> float:
    """Return the bytes that a rank sends in the forward pass of a layer: two sums over the tensor ranks, in halves under SP.

    The second is over the ranks that share an expert's matrices, where there are experts, and of each token as often as it is computed.
    """
    tensor = execution.layout.tensor
    inner, times = (execution.expert_tensor, shape.experts_per_token) if shape.experts > 1 else (tensor, 1)
    parts = (tensor - 1) / tensor + times * (inner - 1) / inner
    return 2.0 * parts * number * execution.tokens * shape.hidden


def _layer_forward(shape: Shape, execution: Execution, rates: _Rates) -> _Pass:
    operand = 1 if execution.precision == "fp8" else rates.number
    compute = sum(_product(*sizes, rates, speed=rates.products, operand=operand) for sizes in _products(shape, execution))
    compute += _elementwise_bytes(shape, execution, rates.number) / rates.memory
    attention, _ = _attention(shape, execution, rates)
    ring = _ring_volume(shape, execution, rates.number) / rates.context
    return _Pass(
        compute=compute,
        attention=attention,
        tensor=_tensor_volume(shape, execution, rates.number) / rates.tensor * rates.tensor_exposed,
        context=max(0.0, ring - attention),  # keys and values of the next rank arrive while those of the last are used
        expert=_expert_volume(shape, execution, rates.number) / rates.expert,
    )


def _layer_backward(shape: Shape, execution: Execution, rates: _Rates) -> _Pass:
    """Twice the products, and each weight's fp32 gradient read and written."""
    operand = 1 if execution.precision == "fp8" else rates.number
    sizes = _products(shape, execution)
    compute = sum(2.0 * _product(*size, rates, speed=rates.products, operand=operand) for size in sizes)
    held = sum(inner * columns for _, inner, columns in sizes[:2])
    held += sum(inner * columns for _, inner, columns in sizes[2:]) * shape.experts / execution.expert
    compute += (8.0 * held + 2.0 * _elementwise_bytes(shape, execution, rates.number)) / rates.memory
    _, attention = _attention(shape, execution, rates)
    ring = 2.0 * _ring_volume(shape, execution, rates.number) / rates.context
    # of the four halves two are hidden behind the products that make the weights' gradients
    tensor = 0.5 * _tensor_volume(shape, execution, rates.number) / rates.tensor * rates.tensor_exposed
    return _Pass(
        compute=compute,
        attention=attention,
        tensor=tensor,
        context=max(0.0, ring - attention),
        expert=_expert_volume(shape, execution, rates.number) / rates.expert,
    )


def _again(forward: _Pass, execution: Execution) -> _Pass:
    """Return what the backward pass computes again of a layer."""
    if execution.recompute == "full":
        return forward
    if execution.recompute == "selective":
        return _Pass(compute=0.0, attention=forward.attention, context=forward.context)
    return _Pass(compute=0.0)


def _head(shape: Shape, execution: Execution, rates: _Rates) -> tuple[_Pass, _Pass]:
    """Return the output layer and the loss, forward and backward; they are not in 8 bits."""
    columns = padded_vocab(shape, execution) / execution.layout.tensor
    product = _product(execution.tokens, shape.hidden, columns, rates, speed=rates.plain_products, operand=rates.number)
    loss = 10.0 * execution.tokens * columns / rates.memory  # bf16 in, fp32 out, sum; the same back
    sends = 0.25 * _tensor_volume(shape, execution, rates.number) / rates.tensor
    return _Pass(compute=product + loss, tensor=sends), _Pass(compute=2.0 * product + loss, tensor=sends)


def _ring_volume(shape: Shape, execution: Execution, number: int) -> float:
    """Return the bytes of keys and values that a rank passes on in the forward pass of a layer."""
    return (execution.layout.context - 1) * 2.0 * number * execution.tokens * shape.key_value / execution.layout.tensor


def _expert_volume(shape: Shape, execution: Execution, number: int) -> float:
    """Return the bytes that a rank sends to experts elsewhere and back in one pass of a layer."""
    ranks = execution.expert
    return 2.0 * (ranks - 1) / ranks * number * execution.tokens / execution.sequence_shards * shape.experts_per_token * shape.hidden


def _data_volumes(execution: Execution, held: RankParameters) -> tuple[float, float]:
    """Return the bytes that a rank sends in a step to reduce fp32 gradients, and to gather parameters."""
    replicas = execution.layout.data * execution.layout.context
    of_experts = execution.layout.data_of_experts
    part = held.shared * (replicas - 1) / replicas + held.experts * (of_experts - 1) / of_experts
    number = 4 if execution.precision == "fp32" else 2
    if not execution.distributed_optimizer:
        return 8.0 * part, 0.0
    reductions, gatherings = _reductions(execution), 2 * execution.num_microbatches if execution.shards_weights else 1
    return 4.0 * part * reductions, number * part * gatherings


def _reductions(execution: Execution) -> int:
    """Return how often a step reduces gradients; those in shards are not added up before."""
    return execution.num_microbatches if execution.shards_gradients else 1


def _data_communication(execution: Execution, held: RankParameters, rates: _Rates, forward: float, backward: float) -> float:
    """Return the seconds that reduction and gathering stick out of the passes behind which they are hidden.

    These are the last backward and the first forward pass of a step; of all passes, where gradients and weights are in shards.
    """
    reduced, gathered = (volume / rates.data for volume in _data_volumes(execution, held))
    if not execution.overlap:
        return reduced + gathered
    beside = execution.num_microbatches * (forward + backward) if execution.shards_weights else forward
    return max(0.0, reduced - _reductions(execution) * backward) + max(0.0, gathered - beside)


def _optimizer(execution: Execution, held: RankParameters, rates: _Rates) -> float:
    """Return the seconds in which AdamW reads and writes its state: gradient twice (norm, step), weight and two moments both ways."""
    replicas = execution.layout.data * execution.layout.context if execution.distributed_optimizer else 1
    of_experts = execution.layout.data_of_experts if execution.distributed_optimizer else 1
    return 34.0 * (held.shared / replicas + held.experts / of_experts) / rates.memory


def _volumes(shape: Shape, execution: Execution, gpu: Gpu, held: RankParameters, layers: int) -> dict[str, Volume]:
    layout, number = execution.layout, 4 if execution.precision == "fp32" else 2
    passes = execution.num_microbatches * layers * (3 if execution.recompute == "full" else 2)
    sent = {
        "tensor": (passes * _tensor_volume(shape, execution, number), gpu.is_inside(layout.tensor, stride=1)),
        "context": (1.5 * passes * _ring_volume(shape, execution, number), gpu.is_inside(layout.context, stride=layout.tensor)),
        "expert": (passes * _expert_volume(shape, execution, number), gpu.is_inside(execution.expert, stride=execution.expert_tensor)),
        "pipeline": (
            2.0 * execution.num_microbatches * execution.chunks * number * execution.tokens * shape.hidden / execution.sequence_shards
            if layout.pipeline > 1
            else 0.0,
            gpu.is_inside(layout.world_size, stride=1),
        ),
        "data": (sum(_data_volumes(execution, held)), gpu.is_inside(layout.data * layout.context, stride=layout.tensor)),
    }
    return {name: Volume(bytes=volume, link="NVLink" if inside else "network") for name, (volume, inside) in sent.items() if volume}
