"""The elementwise part of SwiGLU: silu(gate) · up (Shazeer 2020).

On the CPU it is one pass forward and one backward, and only the two inputs are kept
(kernels/cpu.cpp).

Letters: F MLP size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.kernels import cpu as cpu_kernels


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, each [..., F]."""
    if not cpu_kernels.usable(gate) or up.dtype != gate.dtype:
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


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
