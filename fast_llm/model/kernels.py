"""Kernels in Triton, for what PyTorch does in several passes over memory.

Triton comes with PyTorch for NVIDIA GPUs; without it nothing here is used. On the CPU the kernels run in
Triton's interpreter (TRITON_INTERPRET=1), for tests.
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
        logits,
        labels,
        log_sums,
        chosen,
        row_stride,
        vocabulary,
        ignored: tl.constexpr,
        known: tl.constexpr,
        gradient: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row: running maximum and sum (Milakov & Gimelshein 2018), then the gradient over the logits."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        label = tl.load(labels + row)
        offsets = tl.arange(0, BLOCK)
        if known:
            log_sum = tl.load(log_sums + row)
        else:
            # Every lane begins with a logit, so that no maximum is -inf but where all its logits are.
            largest = tl.full((BLOCK,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, vocabulary, BLOCK):
                inside = begin + offsets < vocabulary
                x = tl.load(logits + begin + offsets, mask=inside, other=float("-inf")).to(tl.float32)
                new = tl.maximum(largest, x)
                # A lane that has seen nothing yet holds -inf, and -inf - -inf is not a number.
                total = tl.where(new == float("-inf"), 0.0, total * tl.exp(largest - new) + tl.exp(x - new))
                largest = new
            maximum = tl.max(largest, 0)
            log_sum = maximum + tl.log(tl.sum(total * tl.exp(largest - maximum), 0))
            here = label >= 0
            target = tl.load(logits + tl.where(here, label, 0)).to(tl.float32)
            tl.store(chosen + row, tl.where(here, target, 0.0))
            tl.store(log_sums + row, log_sum)
        if gradient:
            # The label's logit was read above by every thread that needs it, before any is overwritten.
            tl.debug_barrier()
            scale = tl.where(label != ignored, 1.0, 0.0)
            for begin in range(0, vocabulary, BLOCK):
                inside = begin + offsets < vocabulary
                x = tl.load(logits + begin + offsets, mask=inside, other=float("-inf")).to(tl.float32)
                slope = scale * (tl.exp(x - log_sum) - tl.where(begin + offsets == label, 1.0, 0.0))
                tl.store(logits + begin + offsets, slope.to(logits.dtype.element_ty), mask=inside)


def softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, ignored: int, gradient: bool, log_sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log Σ exp of each row of logits [T, V] and its label's logit, both fp32 [T]; the loss is their difference.

    With `gradient` that of the summed loss replaces the logits. Labels below 0 have no logit here, and those that are
    `ignored` no gradient. `log_sums`: these, where they are known, as those of a wider vocabulary; nothing but the
    gradient is made then.
    """
    known = log_sums is not None
    if log_sums is None:
        log_sums = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_sums)
    block = min(8192, triton.next_power_of_2(logits.shape[1]))
    _softmax_cross_entropy[(len(labels),)](
        logits, labels, log_sums, chosen, logits.stride(0), logits.shape[1], ignored, known, gradient,
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return log_sums, chosen
