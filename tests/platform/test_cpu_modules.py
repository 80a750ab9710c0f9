"""The CPU's attention and norm against their definitions."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_attention_equals_its_definition_with_grouped_heads(window: int | None) -> None:
    import torch

    from megatron_instruct.platform.cpu_modules import ScaledDotProductAttention

    torch.manual_seed(0)
    query, key, value = torch.randn(7, 2, 6, 8), torch.randn(7, 2, 3, 8), torch.randn(7, 2, 3, 8)
    config = SimpleNamespace(
        context_parallel_size=1,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[0, 1],
    )
    attention = ScaledDotProductAttention(config, 2, None, "self")
    found = attention(query, key, value)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key.repeat_interleave(2, dim=2)) / 8**0.5
    allowed = torch.tensor([[other <= token and (window is None or token - other < window) for other in range(7)] for token in range(7)])
    scores = scores.masked_fill(~allowed, float("-inf"))
    wanted = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value.repeat_interleave(2, dim=2)).reshape(7, 2, 48)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    if window == 1:  # and a mask of documents on top: no token sees the first one but itself
        torch.testing.assert_close(attention(query, key, value, torch.zeros(1, 1, 7, 7, dtype=torch.bool)), wanted, atol=1e-5, rtol=0)


def test_a_layer_without_the_window_attends_to_everything() -> None:
    from megatron_instruct.platform.cpu_modules import ScaledDotProductAttention

    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, window_size=(2, 0), window_attn_skip_freq=[0, 1])
    assert ScaledDotProductAttention(config, 1, None, "self").window is None
    assert ScaledDotProductAttention(config, 2, None, "self").window == 3


def test_the_norm_is_marked_for_sequence_parallelism_only_when_that_is_on() -> None:
    from megatron_instruct.platform.cpu_modules import RMSNorm

    assert RMSNorm(SimpleNamespace(sequence_parallel=True), 8).weight.sequence_parallel
    assert not hasattr(RMSNorm(SimpleNamespace(sequence_parallel=False), 8).weight, "sequence_parallel")
