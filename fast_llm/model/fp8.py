"""Linear layers with matmuls in fp8: half the bytes of bf16, and twice the FLOP/s on GPUs from
Hopper on.

Each operand is divided by its own scale, so that its largest magnitude becomes the largest fp8
number (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): e4m3 for activations and
weights, e5m2 with its wider range for gradients. Scales are computed from the tensor itself, every
time. Matmuls accumulate in fp32; results are bf16, and weight gradients are summed in fp32 as they
are without fp8.

Letters: E input size, F output size, M and N rows and columns of any matrix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import fast_llm.model.linear  # noqa: F401  (defines fast_llm::add)
from fast_llm.kernels import triton as triton_kernels

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def linear_fp8(x: Tensor, weight: Tensor, main_grad: Tensor | None = None) -> Tensor:
    """x [..., E] times weight [F, E], transposed → [..., F], forward and backward in fp8.

    With `main_grad`, fp32 [F, E], the weight's gradient is added to it, and the weight gets none.
    """
    out: Tensor = _LinearFp8.apply(x, weight, main_grad)  # type: ignore[no-untyped-call]
    return out


class _LinearFp8(torch.autograd.Function):
    """cuBLAS needs the right operand of an fp8 matmul column-major: both layouts are quantized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
        flat, scale, weight_scale = x.flatten(0, -2), _scale(x, E4M3), _scale(weight, E4M3)
        quantized, transposed = torch.ops.fast_llm.quantize_fp8(flat, scale, E4M3, True, True)
        quantized_weight, _ = torch.ops.fast_llm.quantize_fp8(
            weight, weight_scale, E4M3, True, False
        )
        ctx.save_for_backward(transposed, scale, weight, weight_scale)
        ctx.main_grad, ctx.shape = main_grad, x.shape
        out = torch._scaled_mm(
            quantized, quantized_weight.t(), scale, weight_scale, out_dtype=x.dtype
        )
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        transposed, scale, weight, weight_scale = ctx.saved_tensors
        by_x, by_weight = ctx.needs_input_grad[:2]  # false of frozen weights, and of their inputs
        grad_scale = _scale(grad, E5M2)
        quantized_grad, transposed_grad = torch.ops.fast_llm.quantize_fp8(
            grad.flatten(0, -2), grad_scale, E5M2, by_x, by_weight
        )
        grad_x = grad_weight = None
        if by_x:
            _, transposed_weight = torch.ops.fast_llm.quantize_fp8(
                weight, weight_scale, E4M3, False, True
            )
            grad_x = torch._scaled_mm(
                quantized_grad,
                transposed_weight.t(),
                grad_scale,
                weight_scale,
                out_dtype=grad.dtype,
            ).view(ctx.shape)
        if by_weight:
            grad_weight = torch._scaled_mm(
                transposed_grad, transposed.t(), grad_scale, scale, out_dtype=grad.dtype
            )
            if ctx.main_grad is not None:
                torch.ops.fast_llm.add(ctx.main_grad, grad_weight)
                grad_weight = None
        return grad_x, grad_weight, None


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 scalar that x is divided by before it is rounded to an fp8 dtype; never 0."""
    scale: Tensor = torch.ops.fast_llm.amax(x) / torch.finfo(dtype).max
    return scale.clamp_min(torch.finfo(torch.float32).tiny)  # of zeros


# Custom operators: quantize_fp8 reads its input once for both layouts, and the compiler does not
# compute SwiGLU twice, for its largest magnitude and for itself.
torch.library.define("fast_llm::amax", "(Tensor x) -> Tensor")


def absmax(x: Tensor) -> Tensor:
    """The largest magnitude in x, an fp32 scalar; NaN if x contains one."""
    return (
        triton_kernels.amax(x.contiguous())
        if triton_kernels.AVAILABLE and x.is_cuda
        else x.abs().amax().float()
    )


torch.library.impl("fast_llm::amax", ("cpu", "cuda"), absmax)


@torch.library.register_fake("fast_llm::amax")
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


torch.library.define(
    "fast_llm::quantize_fp8",
    "(Tensor x, Tensor scale, ScalarType dtype, bool row_major, bool transposed)"
    " -> (Tensor, Tensor)",
)


def quantize_fp8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, row_major: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """x [M, N] divided by `scale` and rounded to an fp8 dtype: [M, N] and its transpose [N, M].

    A layout that is not asked for is returned as an empty tensor.
    """
    if triton_kernels.AVAILABLE and x.is_cuda:
        results: tuple[Tensor, Tensor] = _empty(x, scale, dtype, row_major, transposed)
        triton_kernels.quantize_fp8(x.contiguous(), scale, *results)
        return results
    limit = torch.finfo(dtype).max
    wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    quantized = wide.mul_(scale.reciprocal()).clamp_(-limit, limit).to(dtype)
    empty = quantized.new_empty(0)
    return quantized if row_major else empty, quantized.t().clone(
        memory_format=torch.contiguous_format
    ) if transposed else empty


torch.library.impl("fast_llm::quantize_fp8", ("cpu", "cuda"), quantize_fp8)


@torch.library.register_fake("fast_llm::quantize_fp8")
def _empty(
    x: Tensor, scale: Tensor, dtype: torch.dtype, row_major: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns) if row_major else 0, dtype=dtype),
        x.new_empty((columns, rows) if transposed else 0, dtype=dtype),
    )
