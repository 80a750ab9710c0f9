"""8-bit numbers and their scales, in torch: what the FP8 recipes of Transformer Engine do to a tensor before a matrix product.

Comes in: tensors of any floating type. Goes out: 8-bit numbers with the inverse of their scales, from which the tensor that the
product sees is made again. Does not know: modules, recipes, ranks. Sources: Transformer Engine 2.x, "Using FP8 and FP4"
(recipes); FP8 Formats for Deep Learning (arXiv:2209.05433); OCP Microscaling Formats 1.0 (E8M0 scales).

Shapes: R rows, C columns; a block covers `rows` x `columns` numbers, and sizes need not be multiples of it.
"""

import math
from dataclasses import dataclass

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
_LARGEST_FP32 = torch.finfo(torch.float32).max
_LARGEST_E8M0_EXPONENT = 127


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix in 8 bits."""

    numbers_RC: torch.Tensor
    inverse_scale: torch.Tensor
    """One number, or one for each block: [R / rows, C / columns], rounded up."""
    rows: int | None = None
    columns: int | None = None

    def dequantized(self) -> torch.Tensor:
        """Return the matrix in fp32."""
        inverse = self.inverse_scale
        if self.rows is not None and self.columns is not None:
            rows, columns = self.numbers_RC.shape
            inverse = inverse.repeat_interleave(self.rows, 0)[:rows].repeat_interleave(self.columns, 1)[:, :columns]
        return self.numbers_RC.float() * inverse


def scale_for(
    amax: torch.Tensor, dtype: torch.dtype, *, previous: torch.Tensor | float = 1.0, margin: int = 0, power_of_two: bool = False
) -> torch.Tensor:
    """Return the factors that bring the largest absolute values to the largest number of `dtype`, less `margin` powers of two.

    Where the largest value is zero or not finite there is nothing to go by: the factor is the previous one.
    """
    scale = LARGEST[dtype] / amax.float() / 2.0**margin
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, _LARGEST_FP32), scale)
    if power_of_two:  # rounded down, so that nothing overflows
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    known = (amax > 0) & torch.isfinite(amax)
    return torch.where(known, scale, torch.as_tensor(previous, dtype=torch.float32, device=scale.device))


def quantize(matrix_RC: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """Return the matrix in 8 bits under one scale. What does not fit saturates; torch's own cast to E5M2 would make it infinite."""
    return Quantized(numbers_RC=_saturated(matrix_RC.float() * scale, dtype), inverse_scale=1.0 / scale)


def quantize_blocks(matrix_RC: torch.Tensor, dtype: torch.dtype, *, rows: int, columns: int, e8m0: bool = False) -> Quantized:
    """Return the matrix in 8 bits with a scale for each block, a power of two: rounded down, or with e8m0 as microscaling rounds it."""
    height, width = matrix_RC.shape
    down, right = math.ceil(height / rows), math.ceil(width / columns)
    padded = torch.nn.functional.pad(matrix_RC.float(), (0, right * columns - width, 0, down * rows - height))
    blocks = padded.view(down, rows, right, columns)
    amax = blocks.abs().amax((1, 3))
    scale = _e8m0_scale(amax, dtype) if e8m0 else scale_for(amax, dtype, power_of_two=True)
    numbers = _saturated(blocks * scale[:, None, :, None], dtype).view_as(padded)[:height, :width]
    return Quantized(numbers_RC=numbers, inverse_scale=1.0 / scale, rows=rows, columns=columns)


def update_scales(history_LN: torch.Tensor, scale_N: torch.Tensor, dtypes: tuple[torch.dtype, ...], *, algorithm: str, margin: int) -> None:
    """Make the scales of N tensors from the largest values of L passes, and let the history forget the oldest, in place.

    Row 0 holds the pass that ended; the next one is recorded there.
    """
    amax_N = history_LN.amax(0) if algorithm == "max" else history_LN[0].clone()
    for number, dtype in enumerate(dtypes):
        scale_N[number] = scale_for(amax_N[number], dtype, previous=scale_N[number], margin=margin)
    history_LN.copy_(history_LN.roll(-1, 0))
    history_LN[0] = 0.0


def _saturated(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def _e8m0_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return powers of two whose inverses, rounded up, are E8M0 numbers: 2^-127 to 2^127."""
    mantissa, exponent = torch.frexp(amax * (1.0 / LARGEST[dtype]))  # the mantissa is 0.5 to 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(amax == 0, torch.full_like(exponent, -_LARGEST_E8M0_EXPONENT), exponent)
    exponent = torch.where(torch.isfinite(amax), exponent, torch.full_like(exponent, _LARGEST_E8M0_EXPONENT))
    return torch.ldexp(torch.ones_like(amax), -exponent.clamp(-_LARGEST_E8M0_EXPONENT, _LARGEST_E8M0_EXPONENT))
