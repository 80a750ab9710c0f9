"""Functions with gradients of their own give what torch's compositions of them give."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_instruct.platform.cpu_functions import look_up, rms_norm, rotate, swiglu

pytestmark = pytest.mark.filterwarnings("ignore")


def composed_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, 1e-5)


def composed_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def angles(length: int, size: int) -> torch.Tensor:
    half = torch.arange(length)[:, None] * torch.logspace(0, -3, size // 2)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def composed_rotation(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return 1.5 * (x * angles(x.size(0), x.size(-1)).cos() + turned * angles(x.size(0), x.size(-1)).sin())


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-5), composed_rms_norm, ((7, 2, 24), (24,))),
    "swiglu": (swiglu, composed_swiglu, ((7, 2, 24),)),
    "rotate": (lambda x: rotate(x, angles(x.size(0), x.size(-1)), 1.5), composed_rotation, ((7, 2, 3, 8),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_values_and_gradients_are_those_of_torchs_composition(name: str, contiguous: bool) -> None:
    ours, composed, shapes = CASES[name]
    generator = torch.Generator().manual_seed(3)
    results: list[list[torch.Tensor]] = []
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    for function in (ours, composed):
        inputs = [value.clone() if contiguous else value.repeat_interleave(2, dim=-1)[..., ::2] for value in values]
        for value in inputs:
            value.requires_grad_()
        output = function(*inputs)
        weights = torch.linspace(-1, 2, output.numel()).view_as(output)
        (output * (weights if contiguous else weights.mT.contiguous().mT)).sum().backward()
        results.append([output.detach(), *(value.grad for value in inputs if value.grad is not None)])
    assert len(results[0]) == 1 + len(shapes)
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_small_differences(name: str) -> None:
    function, _, shapes = CASES[name]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_norm_of_zeros_is_zero_and_has_a_finite_gradient() -> None:
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    output = rms_norm(x, weight, 1e-5)
    output.sum().backward()
    assert not output.any()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e-5**-0.5))


def test_a_norm_in_bf16_is_torchs() -> None:
    from megatron_instruct.platform.cpu_modules import RMSNorm

    module = RMSNorm(SimpleNamespace(sequence_parallel=False), 8).to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(module(x), torch.nn.functional.rms_norm(x, (8,), module.weight, 1e-5))


def weight_with_a_sum(**marks: Any) -> Any:
    """A weight as megatron-core's data-parallel wrapper marks it."""
    weight: Any = torch.randn(6, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(6, 4), False
    for name, value in marks.items():
        setattr(weight, name, value)
    return weight


IDS = torch.tensor([[1, 3, 1], [5, 1, 0]])


def gradient_of_rows() -> torch.Tensor:
    rows = torch.zeros(6, 4)
    for place, row in zip(IDS.flatten().tolist(), torch.arange(24.0).view(6, 4), strict=True):
        rows[place] += row
    return rows


def test_the_gradient_of_an_embedding_is_added_to_the_rows_of_the_sum() -> None:
    weight = weight_with_a_sum()
    (look_up(IDS, weight) * torch.arange(24.0).view(2, 3, 4)).sum().backward()
    torch.testing.assert_close(weight.main_grad, 1 + gradient_of_rows())
    assert weight.grad_added_to_main_grad, "what stands for the gradient must not be added"
    assert weight.grad is not None, "megatron-core waits for it"


def test_with_tied_weights_the_output_layer_alone_returns_a_gradient() -> None:
    weight = weight_with_a_sum(zero_out_wgrad=True)
    rows = look_up(IDS, weight)
    assert not weight.zero_out_wgrad, "nothing needs to be zeroed for the sum of two gradients"
    (rows * torch.arange(24.0).view(2, 3, 4)).sum().backward()
    torch.testing.assert_close(weight.main_grad, 1 + gradient_of_rows())
    assert weight.grad is None
    assert not weight.grad_added_to_main_grad, "that is the output layer's to say"


def test_without_a_sum_an_embedding_has_a_gradient_as_ever() -> None:
    weight = torch.randn(6, 4, requires_grad=True)
    (look_up(IDS, weight) * torch.arange(24.0).view(2, 3, 4)).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, gradient_of_rows())
    with torch.no_grad():
        assert not look_up(IDS, weight_with_a_sum()).requires_grad
