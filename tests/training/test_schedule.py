"""The learning rate, step by step."""

from typing import Any

import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.batches import BatchPlan, BatchRamp, cut_batch
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.training.settings.batch import BatchOptions

pytestmark = pytest.mark.filterwarnings("ignore")


def options(**given: Any) -> BatchOptions:
    return BatchOptions(**{"train_iters": 20, "global_batch_size": 4, "lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 4, **given})


def rates(batch: BatchOptions) -> list[float]:
    """The learning rate of each step."""
    import torch

    from megatron_instruct.training.optimizer import make_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    scheduler = make_scheduler(optimizer, batch)  # type: ignore[arg-type]
    found = []
    for _ in range(batch.train_iters):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=batch.global_batch_size)
    return found


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_rises_stays_and_falls_over_the_last_steps(style: Any) -> None:
    found = rates(options(lr_decay_style="WSD", lr_wsd_decay_iters=6, lr_wsd_decay_style=style))
    assert found[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found[4:15] == [1.0] * 11
    falling = found[14:]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == 6
    if style == "linear":
        assert falling == pytest.approx([1.0 - 0.9 * step / 6 for step in range(6)])


def test_cosine_reaches_half_way_in_the_middle() -> None:
    assert rates(options())[12] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_decay_style": "WSD"}, "lr_decay_style=WSD and lr_wsd_decay_iters go together"),
        ({"lr_wsd_decay_iters": 3}, "lr_decay_style=WSD and lr_wsd_decay_iters go together"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 17}, "must lie between 1 and lr_decay_iters - lr_warmup_iters = 16"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0}, "must lie between 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**given)


def test_the_batch_grows_in_equal_shares_of_the_samples_and_takes_them_in_their_order() -> None:
    plan = BatchPlan(
        global_batch_size=8, micro_batch_size=1, data_parallel=2, train_iters=12, ramp=BatchRamp(start=2, increment=2, samples=24)
    )
    assert [plan.samples_before(iterations) for iterations in range(10)] == [0, 2, 4, 6, 8, 12, 16, 22, 28, 36]  # 8 samples a size
    assert [plan.batch_size(iteration) for iteration in range(1, 13)] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8, 8, 8]
    assert [plan.num_microbatches_of(iteration) for iteration in (1, 5, 7, 9)] == [1, 2, 3, 4]
    of_ranks = [plan.microbatches(rank, start_iteration=3, iterations=9) for rank in (0, 1)]
    samples = [sample for pair in zip(*of_ranks, strict=True) for micro in pair for sample in micro]
    assert samples == list(range(plan.samples_before(3), plan.samples_before(12)))


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ((0, 2, 8), "rampup_batch_size=0 2 8: give START INCREMENT SAMPLES"),
        ((1, 2, 8), "does not reach global_batch_size=4; the difference, 3, must be a multiple of 2"),
        ((8, 2, 8), "does not reach global_batch_size=4"),
    ],
)
def test_a_batch_that_cannot_grow_to_its_size_is_refused(ramp: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(rampup_batch_size=ramp)


def test_a_batch_that_grows_by_what_the_replicas_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has steps of 2 sequences, not a multiple of .* = 2 \* 2 = 4"):
        cut_batch(
            ParallelLayout(world_size=2),
            global_batch_size=8,
            micro_batch_size=2,
            train_iters=4,
            ramp=BatchRamp(start=2, increment=2, samples=8),
        )
