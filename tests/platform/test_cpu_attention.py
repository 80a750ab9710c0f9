"""The CPU's attention for short sequences against torch's in double precision, gradients included; when it is taken."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("length", "batch", "heads", "groups", "size", "scale"),
    [(64, 1, 1, 1, 8, None), (128, 2, 4, 2, 16, 0.5), (192, 3, 6, 1, 32, None), (512, 2, 9, 3, 64, None), (2048, 1, 9, 3, 64, None)],
)
def test_output_and_gradients_are_those_of_double_precision(
    length: int, batch: int, heads: int, groups: int, size: int, scale: float | None
) -> None:
    import torch

    from megatron_instruct.platform.cpu_attention import causal_attention

    torch.manual_seed(0)
    parts = [torch.randn(length, batch, count, size, requires_grad=True) for count in (heads, groups, groups)]
    output = causal_attention(*parts, scale=scale)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad(output, parts, weights)
    exact = [part.detach().double().permute(1, 2, 0, 3).requires_grad_() for part in parts]
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True, scale=scale)
    wanted = wanted.permute(2, 0, 1, 3).reshape(length, batch, -1)
    torch.testing.assert_close(output.double(), wanted, atol=2e-6, rtol=0)
    for found, right in zip(gradients, torch.autograd.grad(wanted, exact, weights.double()), strict=True):
        torch.testing.assert_close(found.double(), right.permute(2, 0, 1, 3), atol=2e-5, rtol=0)


def test_it_is_taken_for_short_causal_sequences_in_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_instruct.platform import cpu_modules

    taken: list[int] = []

    def noticed(query: Any, *rest: Any, **named: Any) -> Any:
        taken.append(query.size(0))
        return original(query, *rest, **named)

    original = cpu_modules.causal_attention
    monkeypatch.setattr(cpu_modules, "causal_attention", noticed)
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, window_size=None, window_attn_skip_freq=None)
    attention = cpu_modules.ScaledDotProductAttention(config, 1, None, "self")
    of_length = {length: [torch.randn(length, 1, 2, 8) for _ in range(3)] for length in (64, 100, 2048, 2112)}
    results = {length: attention(*parts) for length, parts in of_length.items()}
    attention(*(part.bfloat16() for part in of_length[64]))
    masked = attention(*of_length[64], torch.ones(64, 64, dtype=torch.bool).triu(1)[None, None])
    assert taken == [64, 2048]
    torch.testing.assert_close(results[64], masked, atol=1e-6, rtol=0)
    dropping = cpu_modules.ScaledDotProductAttention(SimpleNamespace(**vars(config) | {"attention_dropout": 0.1}), 1, None, "self")
    assert dropping.eval()(*of_length[64]).equal(results[64])
    assert taken == [64, 2048, 64], "dropout is for training alone"
