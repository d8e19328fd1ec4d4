"""Grouped matmuls: rows that are sorted by group, each group times its own matrix.

On GPUs one kernel of PyTorch computes all groups (`torch._grouped_mm`): bf16, and sizes that are
multiples of 8. Everywhere else a loop over the groups calls ordinary matmuls. The loop needs the
sizes of the groups on the host, for which it waits for the device.

Letters: M rows, N groups, E input size, F output size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.model.linear import add_matmul_, matmul


def grouped_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, main_grad: Tensor | None = None
) -> Tensor:
    """rows [M, E] times weight [N, F, E], transposed → [M, F].

    The rows of group i end at `ends[i]`, int32. With `main_grad`, fp32 [N, F, E], the weight gets
    no gradient: it is added to `main_grad`.
    """
    out: Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        rows, weight, ends, main_grad
    )
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, main_grad: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, ends, main_grad)
        out: Tensor = torch.ops.fast_llm.grouped_matmul(rows, weight.transpose(1, 2), ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, ends, main_grad = ctx.saved_tensors
        grad, grad_rows, grad_weight = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.ops.fast_llm.grouped_matmul(grad, weight, ends)
        if main_grad is not None:
            torch.ops.fast_llm.add_grouped_outer(main_grad, grad, rows, ends)
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.ops.fast_llm.grouped_outer(grad, rows, ends)
        return grad_rows, grad_weight, None, None


def add_biases(rows: Tensor, biases: Tensor, ends: Tensor) -> Tensor:
    """rows [M, F] plus the bias of each row's group, of biases [N, F]."""
    out: Tensor = _AddBiases.apply(rows, biases, ends)  # type: ignore[no-untyped-call]
    return out


class _AddBiases(torch.autograd.Function):
    """PyTorch's gradient of an index adds rows in an order that differs from run to run."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, biases: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        numbers = torch.arange(len(rows), device=ends.device, dtype=ends.dtype)
        return rows + biases[torch.searchsorted(ends, numbers, right=True)].to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (ends,) = ctx.saved_tensors
        grad = grad.contiguous()
        # Sums of rows are products with ones; the kernel takes multiples of eight columns.
        sums = torch.ops.fast_llm.grouped_outer(grad, grad.new_ones(len(grad), 8), ends)
        return grad, sums[..., 0].contiguous(), None


# Custom operators: recomputation saves their results, and the compiler does not look inside.
torch.library.define(
    "fast_llm::grouped_matmul", "(Tensor rows, Tensor matrices, Tensor ends) -> Tensor"
)
torch.library.define(
    "fast_llm::grouped_outer", "(Tensor left, Tensor right, Tensor ends) -> Tensor"
)
torch.library.define(
    "fast_llm::add_grouped_outer",
    "(Tensor(a!) main_grad, Tensor left, Tensor right, Tensor ends) -> ()",
)


@torch.library.impl("fast_llm::grouped_matmul", ("cpu", "cuda"))
def _grouped_matmul(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [M, E] · matrices [N, E, F] → [M, F], by group."""
    if has_kernel(rows, matrices):
        return torch._grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(len(rows), matrices.shape[2])
    begin = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        if end > begin:
            matmul(rows[begin:end], matrix, out=out[begin:end])
        begin = end
    return out


@torch.library.impl("fast_llm::grouped_outer", ("cpu", "cuda"))
def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [M, F], transposed, · right [M, E] → [N, F, E], by group; 0 for groups without rows."""
    if has_kernel(left, right):
        out = torch._grouped_mm(left.t(), right, offs=ends)
        if torch.cuda.get_device_capability(left.device)[0] >= 10:
            # There the kernel leaves the result of an empty group undefined (pytorch#172439).
            out.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
        return out
    out = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    begin = 0
    for target, end in zip(out, ends.tolist(), strict=True):
        if end > begin:
            matmul(left[begin:end].t(), right[begin:end], out=target)
        begin = end
    return out


@torch.library.impl("fast_llm::add_grouped_outer", ("cpu", "cuda"))
def _add_grouped_outer(main_grad: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """Add `grouped_outer` to an fp32 tensor [N, F, E]."""
    if has_kernel(left, right):
        torch.ops.fast_llm.add(main_grad, torch.ops.fast_llm.grouped_outer(left, right, ends))
        return
    begin = 0
    for sums, end in zip(main_grad, ends.tolist(), strict=True):
        if end > begin:
            add_matmul_(sums, left[begin:end].t(), right[begin:end])
        begin = end


@torch.library.register_fake("fast_llm::grouped_matmul")
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@torch.library.register_fake("fast_llm::grouped_outer")
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


@torch.library.register_fake("fast_llm::add_grouped_outer")
def _(main_grad: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    pass


def has_kernel(left: Tensor, right: Tensor) -> bool:
    """Whether PyTorch's kernel computes these: bf16 on a GPU, every row a multiple of 16 bytes."""
    return (
        left.is_cuda
        and left.dtype == torch.bfloat16
        and left.shape[1] % 8 == 0
        and right.shape[-1] % 8 == 0
        and len(left) > 0
    )
