"""Functions of a model with gradients of their own: fewer passes over memory than torch's composition of them, exact in fp32.

Shapes: S sequence, B batch, H heads, D head size, C hidden size, V ids of this rank; T tokens, of any rank. Does not know: modules.
"""

from typing import Any

import torch
from torch.autograd.function import Function, once_differentiable


def rms_norm(x_TC: torch.Tensor, weight_C: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / sqrt(mean of x² + epsilon) * weight, over the last dimension (arXiv:1910.07467), in fp32."""
    result: torch.Tensor = _RMSNorm.apply(x_TC, weight_C, epsilon)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_TC: torch.Tensor, weight_C: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TC, dim=-1, keepdim=True)
        scale_T1 = norm_T1.square_().div_(x_TC.size(-1)).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_TC, weight_C, scale_T1)
        return torch.mul(x_TC, scale_T1).mul_(weight_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_TC, weight_C, scale_T1 = ctx.saved_tensors
        size = x_TC.size(-1)
        product_TC, scale_T = (gradient_TC * x_TC).reshape(-1, size), scale_T1.reshape(-1)
        of_weight_C = torch.mv(product_TC.t(), scale_T)
        along_x_T1 = torch.mv(product_TC, weight_C).mul_(scale_T.pow(3)).div_(-size).view_as(scale_T1)
        return torch.mul(gradient_TC, weight_C).mul_(scale_T1).addcmul_(x_TC, along_x_T1), of_weight_C, None


def rotate(x_SBHD: torch.Tensor, angles_SD: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return x with each pair of its elements (i, i + D / 2) rotated (RoPE, arXiv:2104.09864), all times `scale`.

    angles_SD: in radians, with ones for B and H; the same in both halves.
    """
    result: torch.Tensor = _Rotation.apply(x_SBHD, torch.cos(angles_SD) * scale, torch.sin(angles_SD) * scale)  # type: ignore[no-untyped-call]
    return result


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x_SBHD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _rotated(x_SBHD, cos_SD, sin_SD, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SBHD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rotated(gradient_SBHD, *ctx.saved_tensors, direction=-1), None, None


def _rotated(x_SBHD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor, *, direction: int) -> torch.Tensor:
    turned_SBHD = torch.mul(x_SBHD, cos_SD)
    (first, second), (sin_first, sin_second) = x_SBHD.chunk(2, dim=-1), sin_SD.chunk(2, dim=-1)
    turned_first, turned_second = turned_SBHD.chunk(2, dim=-1)
    turned_first.addcmul_(second, sin_first, value=-direction)
    turned_second.addcmul_(first, sin_second, value=direction)
    return turned_SBHD


def swiglu(x_TF: torch.Tensor) -> torch.Tensor:
    """Return silu(first half) * second half of the last dimension (arXiv:2002.05202), which keeps nothing but x for its gradient."""
    result: torch.Tensor = _SwiGLU.apply(x_TF)  # type: ignore[no-untyped-call]
    return result


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x_TF: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TF)
        gate, value = x_TF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x_TF,) = ctx.saved_tensors
        gate, value = x_TF.chunk(2, dim=-1)
        result_TF = torch.empty_like(x_TF)
        of_gate, of_value = result_TF.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=of_value)
        of_value.mul_(gradient)
        torch.mul(gradient, value, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return result_TF


def multiply(x_SBC: torch.Tensor, weight_CV: torch.Tensor) -> torch.Tensor:
    """Return x @ weight, [S, B, V], in the order of memory in which MKL makes it sooner.

    Where ids outnumber the tokens, as logits do, the tokens of an id stand together: 1.1 to 1.3 times the rate from 8,192 to 151,936 ids.
    """
    tokens, ids = x_SBC.shape[:-1].numel(), weight_CV.size(-1)
    if x_SBC.dim() != 3 or x_SBC.dtype != torch.float32 or ids <= 4 * tokens:
        return torch.matmul(x_SBC, weight_CV)
    length, batch, size = x_SBC.shape
    result_SBV = x_SBC.new_empty_strided((length, batch, ids), (batch, 1, tokens))
    torch.mm(weight_CV.t(), x_SBC.reshape(tokens, size).t(), out=result_SBV.permute(2, 0, 1).view(ids, tokens))
    return result_SBV


def look_up(ids_T: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
    """Return the rows of `weight_VC` for `ids_T`, [T, C].

    Where megatron-core keeps a sum of the weight's gradients (main_grad), they are added to its rows, and no tensor of the weight's size
    is made, zeroed and added.
    """
    if not torch.is_grad_enabled() or not hasattr(weight_VC, "grad_added_to_main_grad") or hasattr(weight_VC, "__fsdp_param__"):
        return torch.nn.functional.embedding(ids_T, weight_VC)
    if getattr(weight_VC, "zero_out_wgrad", False):  # the output layer's weight, too: what it returns need no longer be added
        weight_VC.zero_out_wgrad, weight_VC.is_output_weight = False, True  # type: ignore[attr-defined]
    result: torch.Tensor = _LookUp.apply(weight_VC, ids_T)  # type: ignore[no-untyped-call]
    return result


class _LookUp(Function):
    @staticmethod
    def forward(ctx: Any, weight_VC: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        ctx.weight_VC, ctx.ids_T = weight_VC, ids_T
        return torch.nn.functional.embedding(ids_T, weight_VC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TC: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        weight_VC = ctx.weight_VC
        sum_VC = weight_VC.main_grad
        sum_VC.index_add_(0, ctx.ids_T.reshape(-1), gradient_TC.reshape(-1, gradient_TC.size(-1)).to(sum_VC.dtype))
        if getattr(weight_VC, "is_output_weight", False):
            return None, None  # the output layer returns a gradient
        weight_VC.grad_added_to_main_grad = True
        return torch.empty_like(weight_VC), None  # stands for a gradient, so that megatron-core learns that it is there
