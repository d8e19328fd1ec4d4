"""The elementwise part of an MLP: silu(gate) · up, or gelu(gate) · up (Shazeer 2020); or xIELU.

SwiGLU: on the CPU it is one pass forward and one backward, and only the two inputs are kept
(kernels/cpu.cpp).

Letters: F MLP size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.config.model import TransformerConfig
from fast_llm.kernels import cpu as cpu_kernels


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, each [..., F]."""
    if not cpu_kernels.usable(gate) or up.dtype != gate.dtype:
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, each [..., F], with the tanh approximation of GELU."""
    return F.gelu(gate, approximate="tanh") * up


def gate_function(config: TransformerConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of gate and up, each [..., F], that a model's MLPs or experts have."""
    match config.activation_type:
        case "gelu_pytorch_tanh":
            return geglu
        case "clamped_swiglu":
            return partial(clamped_swiglu, limit=config.swiglu_limit, alpha=config.swiglu_alpha)
    return swiglu


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """g · sigmoid(alpha · g) · (u + 1), of gates g up to `limit`, and u within ± `limit`.

    As in gpt-oss; computed in fp32.
    """
    out: Tensor = _ClampedSwiGLU.apply(gate, up, limit, alpha)  # type: ignore[no-untyped-call]
    return out


class _ClampedSwiGLU(torch.autograd.Function):
    """Keeps gate and up alone, and not what is computed from them in fp32."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.numbers = limit, alpha
        g, u = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
        return (g * torch.sigmoid(alpha * g) * (u + 1)).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        limit, alpha = ctx.numbers
        g, u, wide = gate.float().clamp(max=limit), up.float().clamp(-limit, limit), grad.float()
        sigmoid = torch.sigmoid(alpha * g)
        slope = sigmoid * (1 + alpha * g * (1 - sigmoid))
        grad_gate = (wide * (u + 1) * slope).masked_fill(gate > limit, 0)
        grad_up = (wide * g * sigmoid).masked_fill(up.abs() > limit, 0)
        return grad_gate.to(gate.dtype), grad_up.to(up.dtype), None, None


# Slope at 0, and the x below which expm1(x) is computed (Huang 2024, "Deriving Activation Functions
# via Integration"); files of models hold both.
XIELU_BETA, XIELU_EPSILON = 0.5, -1e-6


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """xIELU of x [..., F] with two parameters [1], computed in fp32; α = softplus of each.

    x > 0: α_p x² + x / 2. Else (α_n + 1/2) (expm1(x) - x) + x / 2.
    """
    out: Tensor = _XIELU.apply(x, alpha_p, alpha_n)  # type: ignore[no-untyped-call]
    return out


class _XIELU(torch.autograd.Function):
    """Keeps x alone, and not what is computed from it in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha_p, alpha_n)
        wide = x if x.dtype == torch.float32 else x.float()
        positive, negative = F.softplus(alpha_p.float()), F.softplus(alpha_n.float())
        below = (torch.expm1(wide.clamp(max=XIELU_EPSILON)) - wide) * (XIELU_BETA + negative)
        out = torch.where(wide > 0, positive * wide * wide, below) + XIELU_BETA * wide
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, alpha_p, alpha_n = ctx.saved_tensors
        exact = x.dtype == torch.float32
        wide, wide_grad = (x, grad) if exact else (x.float(), grad.float())
        positive, negative = F.softplus(alpha_p.float()), F.softplus(alpha_n.float())
        above = wide > 0
        decay = torch.expm1(wide.clamp(max=XIELU_EPSILON))
        # d/dx expm1(min(x, ε)) - x
        slope = torch.where(wide < XIELU_EPSILON, decay, -1) * (XIELU_BETA + negative)
        grad_x = wide_grad * (torch.where(above, 2 * positive * wide, slope) + XIELU_BETA)
        # Most of these sums cancels, so they are in fp64.
        of_p = (wide_grad * torch.where(above, wide * wide, 0)).sum(dtype=torch.float64)
        of_n = (wide_grad * torch.where(above, 0, decay - wide)).sum(dtype=torch.float64)
        of_p, of_n = of_p * alpha_p.double().sigmoid(), of_n * alpha_n.double().sigmoid()
        grad_x = grad_x if exact else grad_x.to(x.dtype)
        return grad_x, of_p.to(alpha_p.dtype), of_n.to(alpha_n.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        torch.ops.fast_llm.swiglu(out, gate, up, gate.numel())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        torch.ops.fast_llm.swiglu_backward(
            grad_gate, grad_up, grad.contiguous(), gate, up, gate.numel()
        )
        return grad_gate, grad_up
