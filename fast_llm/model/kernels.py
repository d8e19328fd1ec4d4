"""Kernels in Triton, for what PyTorch does in several passes over memory.

Triton comes with PyTorch for NVIDIA GPUs; without it nothing here is used.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

if AVAILABLE:

    @triton.jit
    def _softmax_cross_entropy(  # type: ignore[no-untyped-def]
        logits, labels, losses, row_stride, vocabulary, ignored: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One row: running maximum and sum (Milakov & Gimelshein 2018), then the gradient over the logits."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        label = tl.load(labels + row)
        offsets = tl.arange(0, BLOCK)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, vocabulary, BLOCK):
            x = tl.load(logits + begin + offsets, mask=begin + offsets < vocabulary, other=float("-inf")).to(tl.float32)
            new = tl.maximum(largest, x)
            # A lane that has seen nothing yet holds -inf, and -inf - -inf is not a number.
            total = total * tl.where(largest == float("-inf"), 0.0, tl.exp(largest - new)) + tl.where(
                x == float("-inf"), 0.0, tl.exp(x - new)
            )
            largest = new
        maximum = tl.max(largest, 0)
        log_sum = maximum + tl.log(
            tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - maximum)), 0)
        )
        kept = label != ignored
        target = tl.load(logits + tl.where(kept, label, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(kept, log_sum - target, 0.0))
        scale = tl.where(kept, 1.0, 0.0)
        for begin in range(0, vocabulary, BLOCK):
            inside = begin + offsets < vocabulary
            x = tl.load(logits + begin + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = scale * (tl.exp(x - log_sum) - tl.where(begin + offsets == label, 1.0, 0.0))
            tl.store(logits + begin + offsets, gradient.to(logits.dtype.element_ty), mask=inside)


def softmax_cross_entropy_(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Each token's loss in fp32 [T]; the logits [T, V] are replaced by the gradient of the losses' sum."""
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    block = min(8192, triton.next_power_of_2(logits.shape[1]))
    _softmax_cross_entropy[(len(labels),)](
        logits, labels, losses, logits.stride(0), logits.shape[1], ignored, BLOCK=block, num_warps=8
    )
    return losses
