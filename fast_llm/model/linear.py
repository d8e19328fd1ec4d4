"""Matrix products whose gradient by the weight is added to an fp32 sum as it is made.

PyTorch makes that gradient in the weight's dtype, and then someone reads it, reads the sum and writes the sum: 12 bytes a weight
for each micro-batch, and a rounding. Here the product itself adds, in fp32 (as Megatron-LM's fused gradient accumulation does).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 1024  # of a sum that are added at a time, by way of the cache


def linear(x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """x [..., E] times weight [F, E], transposed → [..., F]. The weight gets no gradient; it is added to `total`, fp32 [F, E]."""
    out: Tensor = _Linear.apply(x, weight, total)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, total = ctx.saved_tensors
        torch.ops.fast_llm.add_product(total, grad.flatten(0, -2), x.flatten(0, -2))
        return grad @ weight, None, None


# An operation of its own, so that the compiler leaves it alone: what is done to `total` is all that it must know. `custom_op` is
# shorter, but takes ten microseconds a call instead of one.
torch.library.define("fast_llm::add_product", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")


@torch.library.impl("fast_llm::add_product", ("cpu", "cuda"))
def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    add_product_(total, left.t(), right)


@torch.library.register_fake("fast_llm::add_product")
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    pass


# The same for a gradient that is there.
torch.library.define("fast_llm::add", "(Tensor(a!) total, Tensor gradient) -> ()")


@torch.library.impl("fast_llm::add", ("cpu", "cuda"))
def _add_gradient(total: Tensor, gradient: Tensor) -> None:
    total += gradient


@torch.library.register_fake("fast_llm::add")
def _(total: Tensor, gradient: Tensor) -> None:
    pass


def add_product_(total: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """Add left [F, T] · right [T, E] to an fp32 sum [F, E]; if it is the `first` it replaces what is there."""
    if first and total.is_cuda:
        total.zero_()
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        # PyTorch adds bf16 to fp32 by way of a new fp32 copy; here a few rows at a time go by way of the cache.
        part = right.new_empty(min(ROWS, len(left)), right.shape[1])
        wide = torch.empty_like(part, dtype=torch.float32)
        for rows, sums in zip(left.split(ROWS), total.split(ROWS), strict=True):
            product = torch.mm(rows, right, out=part[: len(rows)])
            if first:
                sums.copy_(product)
            else:
                sums += wide[: len(rows)].copy_(product)
