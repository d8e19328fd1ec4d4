"""The language-model head and its cross entropy together.

`torch`    all logits of the micro-batch at once, PyTorch's own cross entropy.
`fused`    a stretch of tokens at a time: logits, their log-softmax, and at once the gradients of the hidden
           states and of the head, so that logits of the whole micro-batch never exist (the idea of Liger
           Kernel, Hsu et al. 2024). Costs an fp32 gradient of the head.
`triton`   as `fused`, with softmax, loss and gradient in one pass over the logits by a kernel.
`auto`     `triton` on a GPU that has Triton, else `fused`.

All give Σ -log p(label) over the labels that are not -100, in fp32, with softmax computed in fp32.
Letters: T tokens, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_llm.errors import ConfigError
from fast_llm.model import kernels

IGNORED = -100
# Logits held at once by `fused` and `triton`: small enough to be cheap, large enough to fill a matrix product.
CHUNK_ELEMENTS = 2**26


def choose_cross_entropy(name: str, device_type: str, triton_allowed: bool) -> str:
    """Which implementation `cross_entropy_impl: name` means on this device.

    Raises ConfigError for `triton` where it can not run.
    """
    possible = device_type == "cuda" and triton_allowed and kernels.AVAILABLE
    if name == "auto":
        return "triton" if possible else "fused"
    if name == "triton" and not possible:
        raise ConfigError(
            [
                "model.base_model.cross_entropy_impl: given triton, which needs an NVIDIA GPU with Triton"
                " (and run.enable_triton_kernels: yes); here it must be auto, fused or torch"
            ]
        )
    return name


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, implementation: str, splits: int | None) -> Tensor:
    """The summed loss of hidden states [T, E] under a head [V, E] for labels [T]: an fp32 scalar.

    `splits`: into how many stretches the tokens are cut; by default as few as keep the logits small.
    """
    if implementation == "torch":
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    tokens = len(labels)
    chunk = -(-tokens // splits) if splits else max(1, CHUNK_ELEMENTS // weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk, implementation == "triton")  # type: ignore[no-untyped-call]
        return loss
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = F.linear(rows, weight).float()
        total += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, triton: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        for begin in range(0, len(labels), chunk):
            rows, targets = hidden[begin : begin + chunk], labels[begin : begin + chunk]
            logits = F.linear(rows, weight)  # T V
            if triton:
                losses = kernels.softmax_cross_entropy_(logits, targets, IGNORED)
                gradient = logits
            else:
                losses, gradient = _softmax_cross_entropy(logits, targets)
            total += losses.sum()
            torch.mm(gradient, weight, out=grad_hidden[begin : begin + chunk])
            part = gradient.t() @ rows
            if grad_weight is None:
                # A single chunk needs no accumulator.
                grad_weight = part if chunk >= len(labels) else part.float()
            else:
                grad_weight += part
        assert grad_weight is not None
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def _softmax_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss in fp32 [T], and the gradient of their sum with respect to the logits [T, V]."""
    kept = labels != IGNORED
    index = labels.clamp_min(0)[:, None]
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = torch.where(kept, -log_p.gather(1, index)[:, 0], 0)
    gradient = log_p.exp_()
    gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
    if not bool(kept.all()):
        gradient.mul_(kept[:, None])
    return losses, gradient.to(logits.dtype)
