"""RMSNorm: x / √(mean x² + ε) · weight (Zhang & Sennrich 2019), all of it in fp32 but the result.

On a GPU the forward pass is PyTorch's, or what its compiler makes of it; the backward pass is a
Triton kernel where there is Triton (kernels/triton.py), since the compiler's takes more than twice
the time that memory asks for. On the CPU PyTorch runs it as a dozen operations that keep three fp32
copies of x for the backward pass; here nothing but x and one number a token is kept.
kernels/cpu.cpp has it in one pass; where that can not be built it is a few of PyTorch's operations.
Letters: T tokens, E hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.kernels import triton as triton_kernels


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[..., E] → [..., E], in the dtype of x; weight [E]."""
    return fused_add_rms_norm(x, weight, epsilon)[0]


def fused_add_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The normalised x, and x itself: for a residual stream, whose two gradients are then added where they are made."""
    normed: Tensor
    if x.device.type == "cpu":
        function = _CpuRMSNorm if cpu_kernels.usable(x) and weight.dtype == x.dtype else _RMSNorm
        normed = function.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
        return normed, x
    if triton_kernels.AVAILABLE and x.is_cuda and weight.dtype == x.dtype:
        both: tuple[Tensor, Tensor] = _FusedAddRMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
        return both
    return F.rms_norm(x, weight.shape, weight, epsilon), x


class _CpuRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        torch.ops.fast_llm.rms_norm(out, inverse, x, weight, inverse.numel(), x.shape[-1], epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        sizes = inverse.numel(), x.shape[-1]
        torch.ops.fast_llm.rms_norm_backward(
            grad_x, grad_weight, grad.contiguous(), x, weight, inverse, *sizes
        )
        return grad_x, grad_weight, None


class _FusedAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        normed, inverse = torch.ops.aten._fused_rms_norm(x, list(weight.shape), weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        ctx.set_materialize_grads(False)
        return normed, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, residual_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if grad is None:
            return residual_grad, None, None
        grad_x, grad_weight = torch.ops.fast_llm.rms_norm_gradients(
            grad, residual_grad, x, weight, inverse
        )
        return grad_x, grad_weight, None


# An operation, so that the compiler leaves it alone.
torch.library.define(
    "fast_llm::rms_norm_gradients",
    "(Tensor grad, Tensor? residual_grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)",
)


@torch.library.impl("fast_llm::rms_norm_gradients", ("cpu", "cuda"))
def _backward(
    grad: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    def rows(tensor: Tensor) -> Tensor:
        return tensor.contiguous().flatten(0, -2)

    along = None if residual_grad is None else rows(residual_grad)
    grad_x, grad_weight = triton_kernels.rms_norm_backward(
        rows(grad), along, rows(x), weight, inverse.flatten()
    )
    return grad_x.view(x.shape), grad_weight


@torch.library.register_fake("fast_llm::rms_norm_gradients")
def _(
    grad: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()  # ... 1
        ctx.save_for_backward(x, weight, inverse)
        # Not in place, for PyTorch 2.11's compiler (model/rope.py).
        normed: Tensor = x * inverse * weight
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = (x * inverse).flatten(0, -2)  # fp32 T E
        along = grad.flatten(0, -2).to(
            torch.float32, copy=True
        )  # the incoming gradient is not ours to change
        weight_grad = torch.mul(along, normed).sum(0)
        along.mul_(weight)
        # The part of the gradient along x changes nothing but the length, which is divided out.
        share = torch.linalg.vecdot(along, normed)[:, None].div_(x.shape[-1])
        along.addcmul_(normed, share, value=-1).mul_(inverse.flatten(0, -2))
        return along.to(x.dtype).view(x.shape), weight_grad.to(weight.dtype), None
