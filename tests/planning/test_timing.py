"""Parts of a step's time, against sums done by hand."""

import dataclasses

import pytest

from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.planning.constants import load_constants
from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.gpus import find_gpu
from megatron_instruct.planning.shape import Shape

# a vocabulary of next to nothing: all stages are alike
EVEN = Shape(layers=32, hidden=4096, ffn=14336, heads=32, groups=8, head_size=128, vocab=1)
H100 = find_gpu("h100")


def estimate(layout: ParallelLayout, *, shape: Shape = EVEN, gpu: str = "h100", **changes: object) -> Estimate:
    execution = Execution(layout=layout, seq_length=4096, global_batch_size=64, micro_batch_size=1)
    return Estimate(shape, dataclasses.replace(execution, **changes), find_gpu(gpu), load_constants())  # type: ignore[arg-type]


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(4, None, 8), (4, 2, 8), (8, 4, 16)])
def test_the_bubble_is_that_of_the_schedule(stages: int, chunks: int | None, microbatches: int) -> None:
    """(p - 1) / (v m) of the time without it: arXiv:2104.04473, section 2.2.2."""
    layout = ParallelLayout(world_size=stages, pipeline=stages, virtual_pipeline=chunks)
    time = estimate(layout, global_batch_size=microbatches).time
    assert time.bubble / time.compute == pytest.approx((stages - 1) / ((chunks or 1) * microbatches), rel=0.01)


def test_full_recomputation_adds_the_forward_pass() -> None:
    layout = ParallelLayout()
    once, again = estimate(layout).time, estimate(layout, recompute="full").time
    assert again.compute == once.compute
    assert 0.28 < again.recompute / once.compute < 0.34, "a forward pass is a third, or a little less: gradients are written, too"


def test_tensor_ranks_send_two_sums_a_layer_each_way() -> None:
    volume = estimate(ParallelLayout(world_size=8, tensor=8, sequence_parallel=True)).time.volumes["tensor"]
    # all-reduce of [4096, 4096] in bf16, 2 x 7/8 of it a rank, twice forward and twice back, 32 layers, 64 microbatches
    assert volume.bytes == pytest.approx(2 * 7 / 8 * 4096 * 4096 * 2 * 4 * 32 * 64)
    assert volume.link == "NVLink"


def test_replicas_send_fp32_gradients_and_bf16_parameters() -> None:
    held = 32 * (EVEN.attention_weights + EVEN.expert_weights + EVEN.replicated_weights) + EVEN.hidden + 2 * 128 * EVEN.hidden
    volume = estimate(ParallelLayout(world_size=16)).time.volumes["data"]
    assert volume.bytes == pytest.approx((4 + 2) * held * 15 / 16)
    assert volume.link == "network"


def test_a_ring_over_machines_has_all_their_network_cards() -> None:
    assert H100.group_bandwidth(16, stride=1) == 8 * 50e9
    assert H100.group_bandwidth(16, stride=8) == 50e9
    assert H100.group_bandwidth(8, stride=1) == 450e9
    assert find_gpu("gb200").group_bandwidth(64, stride=1) == 900e9, "72 GPUs are one NVLink domain"


def test_communication_over_a_slower_network_takes_longer_and_inside_a_machine_it_does_not() -> None:
    layout = ParallelLayout(world_size=64, tensor=8, sequence_parallel=True, pipeline=2)
    fast = estimate(layout, overlap=False)
    slow = dataclasses.replace(fast, gpu=find_gpu("h100", network_gb_per_second=5))
    assert slow.time.data_communication == pytest.approx(10 * fast.time.data_communication)
    assert slow.time.pipeline_communication == pytest.approx(10 * fast.time.pipeline_communication)
    assert slow.time.tensor_communication == fast.time.tensor_communication


def test_fewer_layers_in_the_last_stage_help_where_the_output_layer_is_large() -> None:
    shape = dataclasses.replace(EVEN, vocab=256000)
    even = estimate(ParallelLayout(world_size=4, pipeline=4), shape=shape, global_batch_size=64)
    uneven = estimate(ParallelLayout(world_size=4, pipeline=4, layers_in_last_stage=5), shape=shape, global_batch_size=64)
    assert uneven.time.total < even.time.total


def test_fp8_is_faster_than_bf16_and_by_less_than_its_peak() -> None:
    bf16, fp8 = (estimate(ParallelLayout(), precision=precision).time.total for precision in ("bf16", "fp8"))
    assert 1.2 < bf16 / fp8 < 2.4


def test_cost_follows_from_the_rate() -> None:
    made = estimate(ParallelLayout(world_size=8))
    tokens = 1e12
    assert made.gpu_hours(tokens) == pytest.approx(24 * 8 * made.days(tokens))
    assert made.days(tokens) * 86400 == pytest.approx(tokens / made.tokens_per_step * made.time.total)
    assert made.mfu == pytest.approx(made.shape.flops_per_token(4096) * made.tokens_per_step / made.time.total / 8 / 989.4e12)
