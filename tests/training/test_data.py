"""Blends, splits and the order of samples."""

import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.batches import BatchPlan

pytestmark = pytest.mark.filterwarnings("ignore")
"""megatron-core's imports warn about packages that a CPU has no use for."""


def flatten(plan: BatchPlan, iteration: int) -> list[int]:
    """The samples of one step over all data-parallel ranks, sorted."""
    ranks = [list(plan.microbatches(rank, start_iteration=iteration, iterations=1)) for rank in range(plan.data_parallel)]
    return sorted(sample for rank in ranks for microbatch in rank for sample in microbatch)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("data_parallel", [1, 2])
def test_a_step_holds_the_same_samples_whatever_the_layout_and_the_micro_batch(micro_batch_size: int, data_parallel: int) -> None:
    plan = BatchPlan(global_batch_size=8, micro_batch_size=micro_batch_size, data_parallel=data_parallel, train_iters=5)
    assert flatten(plan, 3) == list(range(24, 32))
    assert plan.num_microbatches == 8 // (micro_batch_size * data_parallel)


def test_a_resumed_run_goes_on_with_the_next_sample() -> None:
    plan = BatchPlan(global_batch_size=4, micro_batch_size=2, data_parallel=1, train_iters=5)
    whole = list(plan.microbatches(0, start_iteration=0, iterations=5))
    assert whole[6:] == list(plan.microbatches(0, start_iteration=3, iterations=2))


def test_blends_are_read_as_megatron_writes_them() -> None:
    from megatron_instruct.training.sources import parse_blend

    assert parse_blend(["a"], field="data_path") == (["a"], None)
    assert parse_blend(["a", "b"], field="data_path") == (["a", "b"], None)
    assert parse_blend(["0.3", "a", "7", "b"], field="data_path") == (["a", "b"], [0.3, 7.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.3", "a", "b"], "3 words"),
        (["0.3", "a", "x0", "b"], "the weight 'x0' of b"),
        (["0.3", "a", "0", "b"], "the weight '0' of b"),
        (["0.3", "a", "nan", "b"], "the weight 'nan' of b"),
        (["0.3", "a", "inf", "b"], "the weight 'inf' of b"),
        (["0.3", "0.4", "0.5", "b"], "'0.4' stands where a prefix must"),
    ],
)
def test_a_broken_blend_is_an_error_that_names_the_word(words: list[str], message: str) -> None:
    from megatron_instruct.training.sources import parse_blend

    with pytest.raises(ConfigError, match=message):
        parse_blend(words, field="data_path")


@pytest.mark.parametrize("split", ["1", "1,2", "a,b,c", "0,0,0", "-1,2,3", "1,2,3,4"])
def test_a_broken_split_is_an_error(split: str) -> None:
    from megatron_instruct.training.sources import check_split

    with pytest.raises(ConfigError, match="three shares"):
        check_split(split)
