"""Matrix products in fp8: half the bytes and, from Hopper on, twice the rate of bf16.

Each factor is divided by a scale of its own, so that its greatest number becomes fp8's greatest (Micikevicius et al. 2022, "FP8 Formats for
Deep Learning"): e4m3 for what comes in and the weights, e5m2 with its wider range for gradients. Scales are made from the numbers at
hand, each time. Products add up in fp32; results are bf16, and the gradients by weights are summed in fp32 as without fp8.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fast_llm.model.linear  # noqa: F401  (what adds to a sum)
from fast_llm.model import kernels

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
    """The right factor of cuBLAS's fp8 products lies column by column: each number is needed as it is, and turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
        flat, scale, weight_scale = x.flatten(0, -2), _scale(x, FINE), _scale(weight, FINE)
        short, turned = torch.ops.fast_llm.shorten(flat, scale, FINE, True, True)
        short_weight, _ = torch.ops.fast_llm.shorten(weight, weight_scale, FINE, True, False)
        ctx.save_for_backward(turned, scale, weight, weight_scale)
        ctx.total, ctx.shape = total, x.shape
        out = torch._scaled_mm(short, short_weight.t(), scale, weight_scale, out_dtype=x.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        turned, scale, weight, weight_scale = ctx.saved_tensors
        grad_scale = _scale(grad, WIDE)
        short_grad, turned_grad = torch.ops.fast_llm.shorten(
            grad.flatten(0, -2), grad_scale, WIDE, True, True
        )
        _, turned_weight = torch.ops.fast_llm.shorten(weight, weight_scale, FINE, False, True)
        by_input = torch._scaled_mm(
            short_grad, turned_weight.t(), grad_scale, weight_scale, out_dtype=grad.dtype
        )
        by_weight = torch._scaled_mm(
            turned_grad, turned.t(), grad_scale, scale, out_dtype=grad.dtype
        )
        by_input = by_input.view(ctx.shape)
        if ctx.total is None:
            return by_input, by_weight, None
        torch.ops.fast_llm.add(ctx.total, by_weight)
        return by_input, None, None


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers are divided by for fp8, fp32."""
    scale: Tensor = torch.ops.fast_llm.amax(x) / torch.finfo(dtype).max
    return scale.clamp_min(torch.finfo(torch.float32).tiny)  # of zeros


# Operations, so that numbers are read once for both orders, and that the compiler does not make SwiGLU twice, for its greatest
# number and for itself.
torch.library.define("fast_llm::amax", "(Tensor x) -> Tensor")


def greatest(x: Tensor) -> Tensor:
    """The greatest magnitude, fp32; NaN if there is one."""
    return (
        kernels.amax(x.contiguous()) if kernels.AVAILABLE and x.is_cuda else x.abs().amax().float()
    )


torch.library.impl("fast_llm::amax", ("cpu", "cuda"), greatest)


@torch.library.register_fake("fast_llm::amax")
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


torch.library.define(
    "fast_llm::shorten",
    "(Tensor x, Tensor scale, ScalarType dtype, bool straight, bool turned) -> (Tensor, Tensor)",
)


def shorten(
    x: Tensor, scale: Tensor, dtype: torch.dtype, straight: bool, turned: bool
) -> tuple[Tensor, Tensor]:
    """x [M, N] divided by its scale, in fp8: [M, N] and [N, M], or what is asked for of them."""
    if kernels.AVAILABLE and x.is_cuda:
        made: tuple[Tensor, Tensor] = _empty(x, scale, dtype, straight, turned)
        kernels.shorten(x.contiguous(), scale, *made)
        return made
    limit = torch.finfo(dtype).max
    wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    short = wide.mul_(scale.reciprocal()).clamp_(-limit, limit).to(dtype)
    nothing = short.new_empty(0)
    return short if straight else nothing, short.t().clone(
        memory_format=torch.contiguous_format
    ) if turned else nothing


torch.library.impl("fast_llm::shorten", ("cpu", "cuda"), shorten)


@torch.library.register_fake("fast_llm::shorten")
def _empty(
    x: Tensor, scale: Tensor, dtype: torch.dtype, straight: bool, turned: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns) if straight else 0, dtype=dtype),
        x.new_empty((columns, rows) if turned else 0, dtype=dtype),
    )
