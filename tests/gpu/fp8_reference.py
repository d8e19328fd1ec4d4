"""`fast-llm` with fp8 as it is defined: operands rounded to fp8, products in fp32.

Kernels, transposes and cuBLAS's fp8 matmuls are replaced by three lines of PyTorch. A run of this
differs from fp32 by the number format, and one of the package differs from it by the package.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from fast_llm.cli import main
from fast_llm.model import layers
from fast_llm.model.fp8 import E4M3, E5M2


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in fp32 with the values that `dtype` can hold, by one scale for the tensor."""
    limit = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / limit).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-limit, limit).to(dtype).float() * scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
        x_rounded, weight_rounded = rounded(x, E4M3), rounded(weight, E4M3)
        ctx.save_for_backward(x_rounded, weight_rounded)
        ctx.main_grad = main_grad
        return (x_rounded @ weight_rounded.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_rounded = rounded(grad, E5M2)
        grad_x = (grad_rounded @ weight).to(grad.dtype)
        grad_weight = (grad_rounded.flatten(0, -2).t() @ x.flatten(0, -2)).to(grad.dtype)
        if ctx.main_grad is None:
            return grad_x, grad_weight, None
        ctx.main_grad.add_(grad_weight)
        return grad_x, None, None


def linear_fp8(x: Tensor, weight: Tensor, main_grad: Tensor | None = None) -> Tensor:
    """As fast_llm.model.fp8.linear_fp8."""
    out: Tensor = _Linear.apply(x, weight, main_grad)  # type: ignore[no-untyped-call]
    return out


if __name__ == "__main__":
    layers.linear_fp8 = linear_fp8  # type: ignore[attr-defined]
    sys.exit(main())
