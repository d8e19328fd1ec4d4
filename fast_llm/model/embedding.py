"""Token embedding with a gradient that is summed in fp32.

On the CPU PyTorch sums the gradients of a token's occurrences in the dtype of the weight. In bf16,
the second hundred occurrences of a frequent token would be lost almost entirely. Here they are
summed in fp32 and rounded once, as PyTorch does on a GPU.

Letters: B sequences, S tokens of a sequence, V vocabulary, E hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, S, E] of the weight [V, E]."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return F.embedding(tokens, weight)
    rows: Tensor = _Embedding.apply(tokens, weight)  # type: ignore[no-untyped-call]
    return rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.vocabulary = len(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        seen, place = tokens.unique(return_inverse=True)
        sums = grad.new_zeros(len(seen), grad.shape[-1], dtype=torch.float32)
        sums.index_add_(0, place.flatten(), grad.flatten(0, -2).float())
        full = grad.new_zeros(ctx.vocabulary, grad.shape[-1])
        full[seen] = sums.to(grad.dtype)
        return None, full
