"""RMSNorm: x / √(mean x² + ε) · weight (Zhang & Sennrich 2019), computed in fp32 and rounded once.

On a GPU the forward pass is PyTorch's, or torch.compile's. The backward pass is a Triton kernel
(kernels/triton.py) where Triton is available: the compiler's takes more than twice the time that
memory bandwidth needs. On the CPU PyTorch runs a dozen operations and keeps three fp32 copies of x
for the backward pass; here only x and one number a token are kept. kernels/cpu.cpp computes it in
one pass; where it cannot be compiled, a few of PyTorch's operations do.

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
    """The normalised x, and x itself for the residual stream.

    The backward pass adds the gradients of both in the kernel that computes the first.
    """
    normed: Tensor
    if x.device.type == "cpu":
        function = _CpuRMSNorm if cpu_kernels.usable(x) and weight.dtype == x.dtype else _RMSNorm
        normed = function.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
        return normed, x
    if triton_kernels.AVAILABLE and x.is_cuda and weight.dtype == x.dtype:
        both: tuple[Tensor, Tensor]
        both = _FusedAddRMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
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


# A custom operator: opaque to torch.compile.
torch.library.define(
    "fast_llm::rms_norm_gradients",
    "(Tensor grad, Tensor? residual_grad, Tensor x, Tensor weight, Tensor inverse)"
    " -> (Tensor, Tensor)",
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
        # Not in place, because of PyTorch 2.11's compiler (model/rope.py).
        normed: Tensor = x * inverse * weight
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = (x * inverse).flatten(0, -2)  # fp32 T E
        along = grad.flatten(0, -2).to(
            torch.float32, copy=True
        )  # the incoming gradient must not change
        weight_grad = torch.mul(along, normed).sum(0)
        along.mul_(weight)
        # The component along x only changes the norm of x, which is divided out.
        share = torch.linalg.vecdot(along, normed)[:, None].div_(x.shape[-1])
        along.addcmul_(normed, share, value=-1).mul_(inverse.flatten(0, -2))
        return along.to(x.dtype).view(x.shape), weight_grad.to(weight.dtype), None
