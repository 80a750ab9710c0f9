"""The CPU's attention and norm against their definitions."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


def test_attention_equals_its_definition_with_grouped_heads() -> None:
    import torch

    from megatron_instruct.platform.cpu_modules import ScaledDotProductAttention

    torch.manual_seed(0)
    query, key, value = torch.randn(7, 2, 6, 8), torch.randn(7, 2, 3, 8), torch.randn(7, 2, 3, 8)
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0)
    found = ScaledDotProductAttention(config, 1, None, "self")(query, key, value)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key.repeat_interleave(2, dim=2)) / 8**0.5
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    wanted = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value.repeat_interleave(2, dim=2)).reshape(7, 2, 48)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_norm_is_marked_for_sequence_parallelism_only_when_that_is_on() -> None:
    from megatron_instruct.platform.cpu_modules import RMSNorm

    assert RMSNorm(SimpleNamespace(sequence_parallel=True), 8).weight.sequence_parallel
    assert not hasattr(RMSNorm(SimpleNamespace(sequence_parallel=False), 8).weight, "sequence_parallel")
