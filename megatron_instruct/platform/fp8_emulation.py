"""FP8 without the hardware: the linear layers of a decoder multiply what is left of their operands after 8 bits.

Inputs and weights are quantised to E4M3, gradients to E4M3 or E5M2, as the recipe says (fp8_numbers.py), made fp32 again and
multiplied in fp32; the result has the type of the layer. The three products of a layer (output, gradient of the input, gradient of
the weight) see the operands that Transformer Engine's would see: with scales for blocks, one that runs along the summed dimension.

With the recipe "delayed" every layer keeps the largest values of its input, weight and gradient. As in Transformer Engine, the largest
over the ranks of the amax reduction group count, scales change after the forward and after the backward pass of each microbatch, and
a forward pass that is only repeated (recomputation) has the scales of the first and leaves no trace. A validation leaves none either.
Weights are quantised in each microbatch; with the real thing megatron-core does so in the first one of a step.

Shapes: T tokens, I inputs, O outputs of the layer on this rank.
"""

import collections
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import is_checkpointing

from megatron_instruct.platform.fp8_numbers import E4M3, E5M2, Quantized, quantize, quantize_blocks, scale_for, update_scales
from megatron_instruct.platform.fp8_recipe import Fp8Recipe

_INPUT, _WEIGHT, _GRADIENT = range(3)
_BLOCK, _SMALL_BLOCK = 128, 32
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"e4m3": (E4M3, E4M3, E4M3), "hybrid": (E4M3, E4M3, E5M2)}
"""Of input, weight and gradient."""


class EmulatedProduct(torch.nn.Module):
    """The matrix product of one linear layer, and what its recipe remembers."""

    def __init__(self, recipe: Fp8Recipe, decoder: "EmulatedDecoder") -> None:
        super().__init__()
        self.recipe, self._decoder = recipe, [decoder]  # in a list, where torch does not look for modules
        self.scale_N = torch.ones(3)
        self.history_LN = torch.zeros(recipe.amax_history_len if recipe.recipe == "delayed" else 0, 3)
        self._scales_to_repeat: collections.deque[torch.Tensor] = collections.deque()

    def multiply(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Stand for megatron-core's linear_with_grad_accumulation_and_async_allreduce."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        if not input.numel():  # an expert without tokens
            return torch.nn.functional.linear(input, weight, bias)
        scale_N, records = self._scales()
        output: torch.Tensor = _Product.apply(input, weight, self, scale_N, records)  # type: ignore[no-untyped-call]
        return output if bias is None else output + bias

    def _scales(self) -> tuple[torch.Tensor, bool]:
        """Return the scales of this pass, and whether it is to be recorded."""
        if self.recipe.recipe != "delayed" or not self.training:
            return self.scale_N, False
        self._decoder[0].note_first(self)
        if torch.is_grad_enabled():
            return (self._scales_to_repeat.popleft(), False) if is_checkpointing() else (self.scale_N.clone(), True)
        self._scales_to_repeat.append(self.scale_N.clone())  # of an activation that will be computed again
        return self._scales_to_repeat[-1], True

    def operand(self, matrix_RC: torch.Tensor, which: int, scale_N: torch.Tensor, *, records: bool) -> tuple[Quantized, Quantized]:
        """Return a matrix in 8 bits twice: for a sum along its columns' dimension (within rows), and for one along its rows'."""
        dtype, recipe = _DTYPES[self.recipe.format][which], self.recipe.recipe
        if recipe == "mxfp8":
            within_rows = quantize_blocks(matrix_RC, dtype, rows=1, columns=_SMALL_BLOCK, e8m0=True)
            return within_rows, quantize_blocks(matrix_RC, dtype, rows=_SMALL_BLOCK, columns=1, e8m0=True)
        if recipe == "blockwise" and which == _WEIGHT:
            square = quantize_blocks(matrix_RC, dtype, rows=_BLOCK, columns=_BLOCK)
            return square, square
        if recipe == "blockwise":
            within_rows = quantize_blocks(matrix_RC, dtype, rows=1, columns=_BLOCK)
            return within_rows, quantize_blocks(matrix_RC, dtype, rows=_BLOCK, columns=1)
        amax = matrix_RC.detach().abs().amax().float()
        if records:
            self.history_LN[0, which] = torch.maximum(self.history_LN[0, which], amax)
        whole = quantize(matrix_RC, scale_N[which] if recipe == "delayed" else scale_for(amax, dtype), dtype)
        return whole, whole

    def backward_is_over(self) -> None:
        """To be called when the gradients of this layer are computed."""
        self._decoder[0].backward_is_over(self)

    def _apply(self, fn: Any, recurse: bool = True) -> "EmulatedProduct":
        """Follow the layer to its device; scales stay fp32 whatever type the layer is given."""
        device = fn(torch.empty(0, device=self.scale_N.device)).device
        self.scale_N, self.history_LN = self.scale_N.to(device), self.history_LN.to(device)
        return self


class RememberingProduct(EmulatedProduct):
    """Of a recipe whose scales follow from the steps before: they are part of a checkpoint.

    Other recipes add nothing to it: the layers that they leave in 16 bits would be holes that megatron-core does not save (0.19.2).
    """

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale_N.clone(), "amax_history": self.history_LN.clone()}

    def set_extra_state(self, state: Any) -> None:
        if state is not None:
            self.scale_N.copy_(state["scale"])
            self.history_LN.copy_(state["amax_history"])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_TI: torch.Tensor, weight_OI: torch.Tensor, product: EmulatedProduct, scale_N: torch.Tensor, records: bool
    ) -> torch.Tensor:
        rows_TI = input_TI.reshape(-1, input_TI.size(-1))
        input_in_rows, ctx.input_in_columns = product.operand(rows_TI, _INPUT, scale_N, records=records)
        weight_in_rows, ctx.weight_in_columns = product.operand(weight_OI, _WEIGHT, scale_N, records=records)
        ctx.product, ctx.shape, ctx.dtypes = product, input_TI.shape, (input_TI.dtype, weight_OI.dtype)
        output_TO = input_in_rows.dequantized() @ weight_in_rows.dequantized().t()
        return output_TO.to(input_TI.dtype).view(*input_TI.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        product: EmulatedProduct = ctx.product
        records = product.recipe.recipe == "delayed"
        rows_TO = gradient.reshape(-1, gradient.size(-1))
        in_rows, in_columns = product.operand(rows_TO, _GRADIENT, product.scale_N, records=records)
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = (in_rows.dequantized() @ ctx.weight_in_columns.dequantized()).to(ctx.dtypes[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            of_weight = (in_columns.dequantized().t() @ ctx.input_in_columns.dequantized()).to(ctx.dtypes[1])
        product.backward_is_over()
        return of_input, of_weight, None, None, None


class EmulatedDecoder:
    """The emulated layers of one model chunk on this rank, whose scales change together."""

    def __init__(self, decoder: torch.nn.Module, recipe: Fp8Recipe, *, num_layers: int) -> None:
        """num_layers: of the whole model."""
        self._recipe = recipe
        self._first: EmulatedProduct | None = None
        self._products: list[EmulatedProduct] = []
        last = num_layers - recipe.layers_left_at_end
        for layer in decoder.layers:  # type: ignore[union-attr]
            if recipe.layers_left_at_start < layer.layer_number <= last:
                self._products += [self._emulate(linear) for linear in _linears(layer)]
        if recipe.recipe == "delayed":
            decoder.register_forward_hook(self._forward_is_over)

    def _emulate(self, linear: torch.nn.Module) -> EmulatedProduct:
        product = (RememberingProduct if self._recipe.recipe == "delayed" else EmulatedProduct)(self._recipe, self)
        linear.fp8 = product
        linear._forward_impl = product.multiply  # type: ignore[assignment]
        return product

    def note_first(self, product: EmulatedProduct) -> None:
        """Remember the layer whose backward pass comes last."""
        self._first = self._first or product

    def backward_is_over(self, product: EmulatedProduct) -> None:
        if self._recipe.recipe == "delayed" and product is self._first:
            self._update(slice(_GRADIENT, None))

    def _forward_is_over(self, decoder: torch.nn.Module, *_: Any) -> None:
        if decoder.training and torch.is_grad_enabled():
            self._update(slice(_INPUT, _GRADIENT))

    @torch.no_grad()
    def _update(self, which: slice) -> None:
        amax_MN = torch.stack([product.history_LN[0, which] for product in self._products])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        if group.size() > 1:
            torch.distributed.all_reduce(amax_MN, op=torch.distributed.ReduceOp.MAX, group=group)
        recipe = self._recipe
        for product, amax_N in zip(self._products, amax_MN, strict=True):
            product.history_LN[0, which] = amax_N
            update_scales(
                product.history_LN[:, which],
                product.scale_N[which],
                _DTYPES[recipe.format][which],
                algorithm=recipe.amax_compute_algo,
                margin=recipe.margin,
            )


def _linears(layer: Any) -> Iterator[torch.nn.Module]:
    """Yield the linear layers in a fixed order; the router of experts is none of them."""
    for module in layer.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield module
