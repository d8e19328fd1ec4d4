"""Matrix products: on processors without instructions for 16 bits, and ones that add to an fp32 sum as they are made.

Where a CPU has no instructions for bf16 (AVX2 alone, say) PyTorch makes bf16 products number by number: 19 GFLOP/s on two cores that
make 140 in fp32. There the factors are widened piece by piece in the cache, multiplied in fp32, and the result is rounded once: the same
numbers within the rounding of sums.

PyTorch makes the gradient by a weight in the weight's dtype, and then someone reads it, reads the sum and writes the sum: 12 bytes a
weight for each micro-batch, and a rounding. `linear` adds within the product, in fp32 (as Megatron-LM's fused gradient accumulation).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast_llm.model import kernels

ROWS = (
    1024  # of a sum that are added at a time, or of a factor that are widened, by way of the cache
)


class Linear(nn.Linear):
    """PyTorch's, fast on every processor."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., F]."""
        return project(x, self.weight, self.bias)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., E] times weight [F, E], transposed, plus bias [F] → [..., F]."""
    if not widened(x):
        return F.linear(x, weight, bias)
    out: Tensor = _Widened.apply(x, weight)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


def widened(x: Tensor) -> bool:
    """Whether products of such tensors are made in fp32, since this processor has none of their dtype."""
    return x.device.type == "cpu" and x.dtype in _WIDENED


def _without_products() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return torch.bfloat16, torch.float16
    has = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return tuple(
        dtype
        for dtype, there in zip((torch.bfloat16, torch.float16), has, strict=True)
        if not there
    )


_WIDENED = _without_products()  # a plain tuple: the compiler of models would look into a function


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.fast_llm.product(x.flatten(0, -2), weight.t())
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat, by_x, by_weight = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            by_x = torch.ops.fast_llm.product(flat, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            by_weight = torch.ops.fast_llm.product(flat.t(), x.flatten(0, -2))
        return by_x, by_weight


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] · right [K, N], summed in fp32 and rounded once."""
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
    if not widened(left):
        return torch.mm(left, right, out=out)
    if right.shape[0] <= right.shape[1]:
        wide = left.float()
        for columns, target in zip(right.split(ROWS, 1), out.split(ROWS, 1), strict=True):
            target.copy_(wide @ columns.float())
        return out
    total = out.new_zeros(out.shape, dtype=torch.float32)
    for columns, rows in zip(left.split(ROWS, 1), right.split(ROWS), strict=True):
        total.addmm_(columns.float(), rows.float())
    return out.copy_(total)


# An operation, so that the compiler does not unroll the pieces.
torch.library.define("fast_llm::product", "(Tensor left, Tensor right) -> Tensor")
torch.library.impl("fast_llm::product", "cpu", product)


@torch.library.register_fake("fast_llm::product")
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


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
    if kernels.AVAILABLE and total.is_cuda and gradient.is_contiguous():
        kernels.add_(total, gradient)
    else:
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
    elif widened(left):
        right = right.float()
        for rows, sums in zip(left.split(ROWS), total.split(ROWS), strict=True):
            torch.addmm(sums, rows.float(), right, beta=0 if first else 1, out=sums)
    else:
        # PyTorch adds bf16 to fp32 by way of a new fp32 copy; here a few rows at a time go by way of the cache.
        part = right.new_empty(min(ROWS, len(left)), right.shape[1])
        wide = torch.empty_like(part, dtype=torch.float32)
        for rows, sums in zip(left.split(ROWS), total.split(ROWS), strict=True):
            made = torch.mm(rows, right, out=part[: len(rows)])
            if first:
                sums.copy_(made)
            else:
                sums += wide[: len(rows)].copy_(made)
