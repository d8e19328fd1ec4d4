"""The language-model head and its cross entropy in one function.

`torch`    computes all logits of the micro-batch, then PyTorch's own cross entropy.
`fused`    takes a chunk of tokens at a time: logits, their softmax, and at once the gradients of
           the hidden states and of the head. So the logits of a micro-batch never exist together
           (the idea of Liger Kernel, Hsu et al. 2024). It costs an fp32 gradient of the head, and a
           pass over it for each chunk.
`triton`   is `fused` with one kernel that computes a chunk's loss and replaces its logits by their
           gradient. On the CPU `fused` has such a kernel too (kernels/cpu.cpp).
`auto`     is `triton` on a GPU that has Triton, else `fused`.

The head may be sharded by vocabulary over several processes (Megatron-LM, Shoeybi et al. 2019).
Each then has the logits of its shard, and exchanges two numbers a token: log Σ exp and the label's
logit. `torch` then means `fused` in one chunk.

All return Σ -log p(label) over the labels that are not -100, in fp32, with the softmax in fp32. The
head's gradient is summed in fp32 and rounded once, or, with `main_grad`, added to an fp32 tensor
and not rounded.

Letters: T tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.errors import ConfigError
from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.kernels import triton as triton_kernels
from fast_llm.model.linear import add_matmul_, linear, matmul
from fast_llm.models.sizes import CHUNK_ROWS, FP32_LOGITS, chunk_length

IGNORE_INDEX = -100
# (logits, labels, ignore_index, gradient, log_sums) → log Σ exp and the label's logit [T]; see
# kernels/triton.py.
Kernel = Callable[[Tensor, Tensor, int, bool, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VocabShard:
    """Which rows of a vocabulary-sharded head a process has."""

    first: int  # the token of the first row
    # log Σ exp and label's logit, each [T]: of this shard → of the full vocabulary
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def choose_cross_entropy(name: str, device_type: str, triton_allowed: bool) -> str:
    """Which implementation `cross_entropy_impl: name` means on this device.

    Raises ConfigError for `triton` where it cannot run.
    """
    possible = device_type == "cuda" and triton_allowed and triton_kernels.AVAILABLE
    if name == "auto":
        return "triton" if possible else "fused"
    if name == "triton" and not possible:
        raise ConfigError(
            [
                "model.base_model.cross_entropy_impl: given triton, which needs an NVIDIA GPU with"
                " Triton (and run.enable_triton_kernels: yes); here it must be auto, fused or torch"
            ]
        )
    return name


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    implementation: str,
    num_chunks: int | None,
    shard: VocabShard | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """The summed loss of hidden states [T, E] under a head [V, E] for labels [T]: an fp32 scalar.

    `implementation` is torch, fused or triton. `num_chunks`: see `chunk_length`. `shard`: `weight`
    is one shard of a head that several processes share. With `main_grad`, fp32 [V, E], the head's
    gradient is added to it and `weight` gets none; `torch` ignores it.
    """
    if implementation == "torch" and shard is not None:
        implementation, num_chunks = "fused", 1
    if implementation == "torch":
        logits = linear(hidden, weight).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    length = chunk_length(hidden.device.type, len(labels), weight.shape[0], num_chunks)
    grad = torch.is_grad_enabled()
    needs_hidden, needs_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    with torch.no_grad():
        loss, *gradients = _loss_and_gradients(
            hidden,
            weight,
            labels,
            length,
            _kernel(implementation, hidden),
            shard,
            needs_hidden,
            needs_weight,
        )
    # A node each: zero-bubble pipelines compute the hidden states' gradient first, and the weight's
    # later.
    for x, gradient, into in zip((hidden, weight), gradients, (None, main_grad), strict=True):
        if gradient is not None:
            loss = loss + _AttachGradient.apply(x, gradient, into)  # type: ignore[no-untyped-call]
    return loss


def _kernel(implementation: str, hidden: Tensor) -> Kernel | None:
    if implementation == "triton":
        return triton_kernels.softmax_cross_entropy_
    return cpu_kernels.softmax_cross_entropy_ if cpu_kernels.usable(hidden) else None


class _AttachGradient(torch.autograd.Function):
    """Returns 0. Its backward pass returns a gradient that the forward pass has computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, main_grad: Tensor | None) -> Tensor:
        ctx.gradient, ctx.dtype, ctx.main_grad = gradient, x.dtype, main_grad
        return torch.zeros((), dtype=torch.float32, device=x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError(
                "the backward pass of the cross entropy ran twice;"
                " its gradients are freed after the first"
            )
        # PyTorch's pipelines keep the losses to the end of the step, and would keep the gradients
        # with them.
        ctx.gradient = None
        if ctx.main_grad is not None:
            ctx.main_grad.addcmul_(gradient, grad)
            return None, None, None
        if gradient.dtype == ctx.dtype:
            return gradient * grad.to(ctx.dtype), None, None
        scaled = torch.empty_like(gradient, dtype=ctx.dtype)
        if scaled.is_cuda:
            return torch.mul(gradient, grad, out=scaled), None, None
        # In chunks that stay in the cache: multiplying and rounding are one pass over memory.
        for rows, target in zip(gradient.split(CHUNK_ROWS), scaled.split(CHUNK_ROWS), strict=True):
            target.copy_(rows * grad)
        return scaled, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    length: int,
    kernel: Kernel | None,
    shard: VocabShard | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients: by the hidden states in their dtype, by the head in fp32.

    A gradient that is not needed is None.
    """
    vocabulary = weight.shape[0]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if needs_hidden else None
    weight_grad = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
    buffer = hidden.new_empty(min(length, len(labels)), vocabulary)
    size = max(1, FP32_LOGITS.get(hidden.device.type, FP32_LOGITS["cuda"]) // vocabulary)
    scratch = (
        None
        if kernel is not None
        else hidden.new_empty(min(size, len(buffer)), vocabulary, dtype=torch.float32)
    )
    for begin in range(0, len(labels), length):
        rows, targets = hidden[begin : begin + length], labels[begin : begin + length]
        logits = matmul(rows, weight.t(), out=buffer[: len(rows)])  # T V
        gradient = needs_hidden or needs_weight
        if kernel is not None:
            loss += _kernel_softmax_cross_entropy_(kernel, logits, targets, shard, gradient)
        else:
            assert scratch is not None
            for piece, piece_targets in zip(logits.split(size), targets.split(size), strict=True):
                if shard is None:
                    loss += _softmax_cross_entropy_(piece, piece_targets, scratch, gradient)
                else:
                    loss += _sharded_softmax_cross_entropy_(
                        piece, piece_targets, scratch, shard, gradient
                    )
        if hidden_grad is not None:
            matmul(logits, weight, out=hidden_grad[begin : begin + length])
        if weight_grad is not None:
            add_matmul_(weight_grad, logits.t(), rows, first=begin == 0)
    return loss, hidden_grad, weight_grad


def _softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, scratch: Tensor, gradient: bool
) -> Tensor:
    """The summed loss, fp32; with `gradient` the logits [T, V] are replaced by the loss's gradient.

    `scratch`, fp32 [≥ T, V], is overwritten: allocating memory is slow on the CPU, so every pass
    runs in place.
    """
    scores = scratch[: len(logits)].copy_(logits)
    kept = labels != IGNORE_INDEX
    index = labels.clamp_min(0)[:, None]
    torch.log_softmax(scores, -1, out=scores)
    loss = torch.where(kept, -scores.gather(1, index)[:, 0], 0).sum()
    if gradient:
        scores.exp_().scatter_add_(1, index, scores.new_full((len(logits), 1), -1))
        if logits.is_cuda or not bool(
            kept.all()
        ):  # on a GPU a synchronisation costs more than the multiplication
            scores.mul_(kept[:, None])
        logits.copy_(scores)
    return loss


def _sharded_softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, scratch: Tensor, shard: VocabShard, gradient: bool
) -> Tensor:
    """`_softmax_cross_entropy_` of a vocabulary shard; the loss is that of the full vocabulary."""
    scores = scratch[: len(logits)].copy_(logits)
    kept, own = labels != IGNORE_INDEX, _local_labels(labels, shard, logits.shape[1])
    here = own >= 0
    index = own.clamp_min(0)[:, None]
    chosen = torch.where(here, scores.gather(1, index)[:, 0], 0)
    log_sums, chosen = shard.combine(torch.logsumexp(scores, -1), chosen)
    if gradient:
        scores.sub_(log_sums[:, None]).exp_().scatter_add_(
            1, index, -here[:, None].to(scores.dtype)
        )
        logits.copy_(scores.mul_(kept[:, None]))
    return torch.where(kept, log_sums - chosen, 0).sum()


def _kernel_softmax_cross_entropy_(
    kernel: Kernel, logits: Tensor, labels: Tensor, shard: VocabShard | None, gradient: bool
) -> Tensor:
    """The same with a kernel: one call, or with a shard one before and one after the exchange."""
    if shard is None:
        log_sums, chosen = kernel(logits, labels, IGNORE_INDEX, gradient, None)
    else:
        own = _local_labels(labels, shard, logits.shape[1])
        log_sums, chosen = shard.combine(*kernel(logits, own, IGNORE_INDEX, False, None))
        if gradient:
            kernel(logits, own, IGNORE_INDEX, True, log_sums)
    return torch.where(labels != IGNORE_INDEX, log_sums - chosen, 0).sum()


def _local_labels(labels: Tensor, shard: VocabShard, rows: int) -> Tensor:
    """Labels as rows of this shard; -1 for labels of other shards, and -100 for ignored ones."""
    own = labels - shard.first
    return torch.where(
        labels == IGNORE_INDEX, IGNORE_INDEX, torch.where((own >= 0) & (own < rows), own, -1)
    )
