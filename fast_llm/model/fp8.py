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
from fast_llm.kernels import triton as triton_kernels

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Linear(nn.Linear):
    """A layer without bias whose three matmuls run in fp8. With `main_grad`, the weight's gradient is added to it."""

    main_grad: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., F]."""
        out: Tensor = _Fp8Linear.apply(x, self.weight, getattr(self, "main_grad", None))  # type: ignore[no-untyped-call]
        return out


def apply_fp8(block: nn.Module) -> None:
    """Let a block's matrix products be made in fp8; what is stored stays as it is."""
    for module in block.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            module.__class__ = Fp8Linear


class _Fp8Linear(torch.autograd.Function):
    """The right factor of cuBLAS's fp8 products lies column by column: each number is needed as it is, and transposed."""

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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        transposed, scale, weight, weight_scale = ctx.saved_tensors
        grad_scale = _scale(grad, E5M2)
        quantized_grad, transposed_grad = torch.ops.fast_llm.quantize_fp8(
            grad.flatten(0, -2), grad_scale, E5M2, True, True
        )
        _, transposed_weight = torch.ops.fast_llm.quantize_fp8(
            weight, weight_scale, E4M3, False, True
        )
        grad_x = torch._scaled_mm(
            quantized_grad, transposed_weight.t(), grad_scale, weight_scale, out_dtype=grad.dtype
        )
        grad_weight = torch._scaled_mm(
            transposed_grad, transposed.t(), grad_scale, scale, out_dtype=grad.dtype
        )
        grad_x = grad_x.view(ctx.shape)
        if ctx.main_grad is None:
            return grad_x, grad_weight, None
        torch.ops.fast_llm.add(ctx.main_grad, grad_weight)
        return grad_x, None, None


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers are divided by for fp8, fp32."""
    scale: Tensor = torch.ops.fast_llm.amax(x) / torch.finfo(dtype).max
    return scale.clamp_min(torch.finfo(torch.float32).tiny)  # of zeros


# Operations, so that numbers are read once for both orders, and that the compiler does not make SwiGLU twice, for its greatest
# number and for itself.
torch.library.define("fast_llm::amax", "(Tensor x) -> Tensor")


def absmax(x: Tensor) -> Tensor:
    """The greatest magnitude, fp32; NaN if there is one."""
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
    "(Tensor x, Tensor scale, ScalarType dtype, bool row_major, bool transposed) -> (Tensor, Tensor)",
)


def quantize_fp8(
    x: Tensor, scale: Tensor, dtype: torch.dtype, row_major: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """x [M, N] divided by its scale, in fp8: [M, N] and [N, M], or what is asked for of them."""
    if triton_kernels.AVAILABLE and x.is_cuda:
        made: tuple[Tensor, Tensor] = _empty(x, scale, dtype, row_major, transposed)
        triton_kernels.quantize_fp8(x.contiguous(), scale, *made)
        return made
    limit = torch.finfo(dtype).max
    wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    quantized = wide.mul_(scale.reciprocal()).clamp_(-limit, limit).to(dtype)
    nothing = quantized.new_empty(0)
    return quantized if row_major else nothing, quantized.t().clone(
        memory_format=torch.contiguous_format
    ) if transposed else nothing


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
