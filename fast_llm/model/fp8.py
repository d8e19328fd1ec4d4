"""Matrix products in fp8: half the bytes and, from Hopper on, twice the rate of bf16.

Each factor is divided by a scale of its own, so that its greatest number becomes fp8's greatest (Micikevicius et al. 2022, "FP8 Formats for
Deep Learning"): e4m3 for what comes in and the weights, e5m2 with its wider range for gradients. Scales are made from the numbers at
hand, each time. Products add up in fp32; results are bf16, and the gradients by weights are summed in fp32 as without fp8.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fast_llm.model.linear  # noqa: F401

FINE, WIDE = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Linear(nn.Linear):
    """A layer without bias whose three products are made in fp8. With `total` its weight's gradient goes there, as in model/linear.py."""

    total: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., F]."""
        out: Tensor = _Product.apply(x, self.weight, getattr(self, "total", None))  # type: ignore[no-untyped-call]
        return out


def apply_fp8(block: nn.Module) -> None:
    """Let a block's matrix products be made in fp8; what is stored stays as it is."""
    for module in block.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            module.__class__ = Fp8Linear


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
        short, scale = _shorten(x.flatten(0, -2), FINE)
        short_weight, weight_scale = _shorten(weight, FINE)
        ctx.save_for_backward(short, scale, weight, weight_scale)
        ctx.total, ctx.shape = total, x.shape
        return _product(short, short_weight.t(), scale, weight_scale, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        short, scale, weight, weight_scale = ctx.saved_tensors
        short_grad, grad_scale = _shorten(grad.flatten(0, -2), WIDE)
        # The right factor of cuBLAS's fp8 products lies column by column.
        columns = _with_scale(weight.t(), weight_scale, FINE).contiguous().t()
        by_input = _product(short_grad, columns, grad_scale, weight_scale, grad.dtype).view(ctx.shape)
        columns = short.t().contiguous().t()
        by_weight = _product(short_grad.t().contiguous(), columns, grad_scale, scale, grad.dtype)
        if ctx.total is None:
            return by_input, by_weight, None
        torch.ops.fast_llm.add(ctx.total, by_weight)
        return by_input, None, None


def _shorten(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers in fp8, and by what they were divided."""
    scale = x.abs().amax().float() / torch.finfo(dtype).max
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # of zeros
    return _with_scale(x, scale, dtype), scale


def _with_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def _product(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=dtype)
