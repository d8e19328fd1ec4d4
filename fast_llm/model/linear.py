"""Matmuls on CPUs without 16-bit instructions, and matmuls that accumulate into an fp32 gradient.

On a CPU without bf16 instructions (AVX2 alone, say) PyTorch computes bf16 matmuls number by number:
19 GFLOP/s on two cores that reach 140 in fp32. There the operands are cast to fp32 piece by piece
in the cache, multiplied in fp32, and the result is rounded once: the same within rounding.

PyTorch computes a weight's gradient in the weight's dtype. Accumulating it then reads the gradient,
and reads and writes the sum: 12 bytes per weight and micro-batch, and a rounding. With `main_grad`,
`linear` accumulates within the matmul, in fp32 (Megatron-LM's fused gradient accumulation).

Letters: E input size, F output size, T tokens; M, K and N sizes of any matmul.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.kernels import triton as triton_kernels
from fast_llm.models.sizes import CHUNK_ROWS


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, main_grad: Tensor | None = None
) -> Tensor:
    """x [..., E] times weight [F, E], transposed, plus bias [F] → [..., F].

    With `main_grad`, fp32 [F, E], the weight gets no gradient: it is added to `main_grad`. There is
    no bias then.
    """
    out: Tensor
    if main_grad is not None:
        assert bias is None
        out = _AccumulatingLinear.apply(x, weight, main_grad)  # type: ignore[no-untyped-call]
        return out
    if not upcast_to_fp32(x):
        return F.linear(x, weight, bias)
    out = _UpcastLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


def upcast_to_fp32(x: Tensor) -> bool:
    """Whether matmuls of x run in fp32: on CPUs without instructions for its dtype."""
    return x.device.type == "cpu" and x.dtype in _UPCAST_DTYPES


def _dtypes_without_matmul() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return torch.bfloat16, torch.float16
    has = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return tuple(
        dtype
        for dtype, there in zip((torch.bfloat16, torch.float16), has, strict=True)
        if not there
    )


# A tuple: torch.compile would trace into a function.
_UPCAST_DTYPES = _dtypes_without_matmul()


@contextmanager
def upcasting(*dtypes: torch.dtype) -> Iterator[None]:
    """Compute as on a CPU whose only missing matmul instructions are those for `dtypes`."""
    global _UPCAST_DTYPES
    before, _UPCAST_DTYPES = _UPCAST_DTYPES, dtypes
    try:
        yield
    finally:
        _UPCAST_DTYPES = before


class _UpcastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.fast_llm.matmul(x.flatten(0, -2), weight.t())
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat, grad_x, grad_weight = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fast_llm.matmul(flat, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.fast_llm.matmul(flat.t(), x.flatten(0, -2))
        return grad_x, grad_weight


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] · right [K, N], accumulated in fp32 and rounded once."""
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
    if not upcast_to_fp32(left):
        return torch.mm(left, right, out=out)
    if right.shape[0] <= right.shape[1]:
        wide = left.float()
        for columns, target in zip(
            right.split(CHUNK_ROWS, 1), out.split(CHUNK_ROWS, 1), strict=True
        ):
            target.copy_(wide @ columns.float())
        return out
    sums = out.new_zeros(out.shape, dtype=torch.float32)
    for columns, rows in zip(left.split(CHUNK_ROWS, 1), right.split(CHUNK_ROWS), strict=True):
        sums.addmm_(columns.float(), rows.float())
    return out.copy_(sums)


# A custom operator, so that torch.compile does not unroll the chunks.
torch.library.define("fast_llm::matmul", "(Tensor left, Tensor right) -> Tensor")
torch.library.impl("fast_llm::matmul", "cpu", matmul)


@torch.library.register_fake("fast_llm::matmul")
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, main_grad)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, main_grad = ctx.saved_tensors
        torch.ops.fast_llm.add_matmul(main_grad, grad.flatten(0, -2), x.flatten(0, -2))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None


# A custom operator, opaque to torch.compile, which must only know that `main_grad` changes.
# `custom_op` would be shorter, but a call takes ten microseconds instead of one.
torch.library.define(
    "fast_llm::add_matmul", "(Tensor(a!) main_grad, Tensor left, Tensor right) -> ()"
)


@torch.library.impl("fast_llm::add_matmul", ("cpu", "cuda"))
def _add(main_grad: Tensor, left: Tensor, right: Tensor) -> None:
    add_matmul_(main_grad, left.t(), right)


@torch.library.register_fake("fast_llm::add_matmul")
def _(main_grad: Tensor, left: Tensor, right: Tensor) -> None:
    pass


# The same for a gradient that is already computed.
torch.library.define("fast_llm::add", "(Tensor(a!) main_grad, Tensor gradient) -> ()")


@torch.library.impl("fast_llm::add", ("cpu", "cuda"))
def _add_gradient(main_grad: Tensor, gradient: Tensor) -> None:
    if triton_kernels.AVAILABLE and main_grad.is_cuda and gradient.is_contiguous():
        triton_kernels.add_(main_grad, gradient)
    else:
        main_grad += gradient


@torch.library.register_fake("fast_llm::add")
def _(main_grad: Tensor, gradient: Tensor) -> None:
    pass


def add_matmul_(main_grad: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """Add left [F, T] · right [T, E] to an fp32 tensor [F, E]; `first` overwrites it instead."""
    if first and main_grad.is_cuda:
        main_grad.zero_()
    if left.dtype == torch.float32:
        torch.addmm(main_grad, left, right, beta=0 if first else 1, out=main_grad)
    elif left.is_cuda:
        torch.addmm(main_grad, left, right, out_dtype=torch.float32, out=main_grad)
    elif upcast_to_fp32(left):
        right = right.float()
        for rows, sums in zip(left.split(CHUNK_ROWS), main_grad.split(CHUNK_ROWS), strict=True):
            torch.addmm(sums, rows.float(), right, beta=0 if first else 1, out=sums)
    else:
        # PyTorch adds bf16 to fp32 through a new fp32 copy of all rows; here through a small one
        # that stays in the cache.
        part = right.new_empty(min(CHUNK_ROWS, len(left)), right.shape[1])
        wide = torch.empty_like(part, dtype=torch.float32)
        for rows, sums in zip(left.split(CHUNK_ROWS), main_grad.split(CHUNK_ROWS), strict=True):
            made = torch.mm(rows, right, out=part[: len(rows)])
            if first:
                sums.copy_(made)
            else:
                sums += wide[: len(rows)].copy_(made)
