"""8-bit numbers and their scales: saturation, blocks, powers of two, and the sequence of delayed scales."""

import math

import pytest
import torch

from megatron_instruct.platform.fp8_numbers import E4M3, E5M2, LARGEST, quantize, quantize_blocks, scale_for, update_scales

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_does_not_fit_saturates(dtype: torch.dtype) -> None:
    largest = LARGEST[dtype]
    values = torch.tensor([[largest * 4, -largest * 1.1, INF, -INF, largest, 1.0, 0.0]])
    found = quantize(values, torch.tensor(1.0), dtype).dequantized()
    assert found.tolist() == [[largest, -largest, largest, -largest, largest, 1.0, 0.0]]
    assert torch.isnan(quantize(torch.tensor([[NAN]]), torch.tensor(1.0), dtype).dequantized()).all()


@pytest.mark.parametrize(("dtype", "worst"), [(E4M3, 2.0**-4), (E5M2, 2.0**-3)])
def test_normal_numbers_are_off_by_half_a_unit_at_most(dtype: torch.dtype, worst: float) -> None:
    torch.manual_seed(1)
    values = torch.rand(64, 64) * 0.9 + 0.1
    found = quantize(values, scale_for(values.abs().amax(), dtype), dtype).dequantized()
    error = ((found - values) / values).abs()
    assert float(error.max()) <= worst * 1.0001
    assert float(error.max()) > worst / 2, "that is what 8 bits are"


@pytest.mark.parametrize(
    ("amax", "previous", "expected"),
    [(448.0, 7.0, 1.0), (0.0, 7.0, 7.0), (INF, 7.0, 7.0), (NAN, 7.0, 7.0), (1e-38, 7.0, torch.finfo(torch.float32).max), (3.5, 7.0, 128.0)],
)
def test_scales_at_the_edges(amax: float, previous: float, expected: float) -> None:
    assert float(scale_for(torch.tensor(amax), E4M3, previous=torch.tensor(previous))) == expected


def test_a_margin_leaves_powers_of_two_free() -> None:
    assert float(scale_for(torch.tensor(3.5), E4M3, margin=2)) == 32.0


def test_scales_of_blocks_are_powers_of_two_under_which_nothing_overflows() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(130, 300) * torch.logspace(-6, 6, 300)
    for rows, columns, e8m0 in ((1, 128, False), (128, 128, False), (128, 1, False), (1, 32, True), (32, 1, True)):
        found = quantize_blocks(matrix, E4M3, rows=rows, columns=columns, e8m0=e8m0)
        assert found.inverse_scale.shape == (math.ceil(130 / rows), math.ceil(300 / columns))
        assert (torch.frexp(found.inverse_scale)[0] == 0.5).all(), "powers of two"
        block = (slice(0, rows), slice(0, columns))
        amax, inverse = float(matrix[block].abs().max()), float(found.inverse_scale[0, 0])
        assert inverse / 2 < amax / 448.0 <= inverse
        assert float(found.numbers_RC.float().abs().max()) <= 448.0
        assert found.dequantized().shape == matrix.shape


def test_a_block_far_from_the_others_keeps_its_own_scale() -> None:
    matrix = torch.cat([torch.full((1, 128), 1e-6), torch.full((1, 128), 1e6)], dim=1)
    assert torch.allclose(quantize_blocks(matrix, E4M3, rows=1, columns=128).dequantized(), matrix, rtol=2**-4)
    whole = quantize(matrix, scale_for(matrix.abs().amax(), E4M3), E4M3).dequantized()
    assert (whole[0, :128] == 0).all(), "one scale for all loses the small ones"


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("max", [448 / 8, 448 / 8, 448 / 8, 448 / 2]), ("most_recent", [448 / 8, 448, 448 / 2, 448 / 2])]
)
def test_delayed_scales_follow_the_largest_values_of_earlier_passes(algorithm: str, expected: list[float]) -> None:
    history_LN, scale_N = torch.zeros(3, 1), torch.ones(1)
    found = []
    for amax in (8.0, 1.0, 2.0, 0.0):
        history_LN[0, 0] = amax
        update_scales(history_LN, scale_N, (E4M3,), algorithm=algorithm, margin=0)
        found.append(float(scale_N[0]))
        assert float(history_LN[0, 0]) == 0.0
    assert found == expected
