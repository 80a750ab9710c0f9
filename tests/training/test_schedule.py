"""The learning rate, step by step."""

from typing import Any

import pytest

from megatron_instruct.errors import ConfigError
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
