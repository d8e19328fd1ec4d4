"""The language-model head and its cross entropy together.

`torch`    all logits of the micro-batch at once, PyTorch's own cross entropy.
`fused`    a stretch of tokens at a time: logits, their softmax, and at once the gradients of the hidden states
           and of the head, so that the logits of the whole micro-batch never exist (the idea of Liger Kernel,
           Hsu et al. 2024). Costs an fp32 gradient of the head, and a pass over it for each stretch.
`triton`   as `fused`; one kernel makes loss and gradient of a stretch, in place of its logits. On the CPU `fused` has such a
           kernel, too (kernels/cpu.cpp).
`auto`     `triton` on a GPU that has Triton, else `fused`.

A head may be cut by vocabulary over several processes (Megatron-LM, Shoeybi et al. 2019): each has the logits of its
shard, and of each token only log Σ exp and the label's logit pass between them. `torch` is `fused` in one stretch then.

All give Σ -log p(label) over the labels that are not -100, in fp32, with softmax computed in fp32; the
gradient of the head is summed in fp32 and rounded once, or not at all if it is added to a sum in fp32 (`main_grad`).
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
from fast_llm.model.linear import CHUNK_ROWS, add_matmul_, linear, matmul

IGNORED = -100
Kernel = Callable[[Tensor, Tensor, int, bool, Tensor | None], tuple[Tensor, Tensor]]
# Logits of a stretch. Each stretch costs a pass over the head's gradient (12 bytes a weight), worth 1.5 ms on an
# H200 for a head of 128,256 × 4,096, whose products take 4 ms per 1,024 tokens: so long stretches on a GPU (a
# gigabyte of logits; at most as much more at the peak, if nothing else is as large), where the CPU's memory is slow when it is new.
LOGITS_PER_CHUNK = {"cuda": 2**29, "cpu": 2**25}
# Logits that are held in fp32.
FP32_LOGITS_PER_PIECE = {"cuda": 2**26, "cpu": 2**22}


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary a head is, and how to learn about the whole."""

    first: int  # the token of the head's first row
    combine: Callable[
        [Tensor, Tensor], tuple[Tensor, Tensor]
    ]  # log Σ exp and label's logit [T]: part → whole


def choose_cross_entropy(name: str, device_type: str, triton_allowed: bool) -> str:
    """Which implementation `cross_entropy_impl: name` means on this device.

    Raises ConfigError for `triton` where it can not run.
    """
    possible = device_type == "cuda" and triton_allowed and triton_kernels.AVAILABLE
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

    `implementation` is torch, fused or triton. `num_chunks`: into how many stretches the tokens are cut, by default as
    few as keep the logits small, and at least two. `part`: `weight` is one of several heads, each on its process.
    `main_grad`, fp32 [V, E]: the head's gradient is added to it, and the weight gets none; not with torch.
    """
    if implementation == "torch" and shard is not None:
        implementation, num_chunks = "fused", 1
    if implementation == "torch":
        logits = linear(hidden, weight).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    length = chunk_length(hidden.device.type, len(labels), weight.shape[0], num_chunks)
    wanted = torch.is_grad_enabled()
    needs_hidden, needs_weight = wanted and hidden.requires_grad, wanted and weight.requires_grad
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
    # A branch each: zero-bubble pipelines go back to the hidden states first, and to the weight later.
    for x, gradient, into in zip((hidden, weight), gradients, (None, main_grad), strict=True):
        if gradient is not None:
            loss = loss + _AttachGradient.apply(x, gradient, into)  # type: ignore[no-untyped-call]
    return loss


def _kernel(implementation: str, hidden: Tensor) -> Kernel | None:
    if implementation == "triton":
        return triton_kernels.softmax_cross_entropy_
    return cpu_kernels.softmax_cross_entropy_ if cpu_kernels.usable(hidden) else None


def chunk_length(device_type: str, tokens: int, vocabulary: int, num_chunks: int | None) -> int:
    """How many tokens have logits at once."""
    halves = -(-tokens // (num_chunks or 2))
    if num_chunks is None:
        halves = min(
            halves, LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"]) // vocabulary
        )
    return max(1, halves)


class _AttachGradient(torch.autograd.Function):
    """Zero, with the loss's gradient by something, which was made in the forward pass, while the logits were there."""

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
                "the cross entropy's backward pass ran twice; its gradients are gone after the first"
            )
        # Whoever keeps the loss, PyTorch's pipelines for one, would keep it to the end of the step.
        ctx.gradient = None
        if ctx.main_grad is not None:
            ctx.main_grad.addcmul_(gradient, grad)
            return None, None, None
        if gradient.dtype == ctx.dtype:
            return gradient * grad.to(ctx.dtype), None, None
        scaled = torch.empty_like(gradient, dtype=ctx.dtype)
        if scaled.is_cuda:
            return torch.mul(gradient, grad, out=scaled), None, None
        # Piece by piece: product and rounding are one pass over memory.
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
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss, and where asked for its gradients by hidden states (in their dtype) and head (fp32)."""
    vocabulary = weight.shape[0]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if with_hidden else None
    weight_grad = torch.empty_like(weight, dtype=torch.float32) if with_weight else None
    buffer = hidden.new_empty(min(length, len(labels)), vocabulary)
    size = max(
        1,
        FP32_LOGITS_PER_PIECE.get(hidden.device.type, FP32_LOGITS_PER_PIECE["cuda"]) // vocabulary,
    )
    scratch = (
        None
        if kernel is not None
        else hidden.new_empty(min(size, len(buffer)), vocabulary, dtype=torch.float32)
    )
    for begin in range(0, len(labels), length):
        rows, targets = hidden[begin : begin + length], labels[begin : begin + length]
        logits = matmul(rows, weight.t(), out=buffer[: len(rows)])  # T V
        gradient = with_hidden or with_weight
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
    """The summed loss, fp32; with `gradient` the logits [T, V] are replaced by its gradient.

    `scratch` fp32 [≥ T, V]. New memory is what costs on the CPU, so all passes run in place.
    """
    scores = scratch[: len(logits)].copy_(logits)
    kept = labels != IGNORED
    index = labels.clamp_min(0)[:, None]
    torch.log_softmax(scores, -1, out=scores)
    loss = torch.where(kept, -scores.gather(1, index)[:, 0], 0).sum()
    if gradient:
        scores.exp_().scatter_add_(1, index, scores.new_full((len(logits), 1), -1))
        if logits.is_cuda or not bool(kept.all()):  # on a GPU to ask costs more than to multiply
            scores.mul_(kept[:, None])
        logits.copy_(scores)
    return loss


def _sharded_softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, scratch: Tensor, shard: VocabShard, gradient: bool
) -> Tensor:
    """As `_softmax_cross_entropy_`, for the logits of a part of the vocabulary: the loss under all of it."""
    scores = scratch[: len(logits)].copy_(logits)
    kept, own = labels != IGNORED, _local_labels(labels, shard, logits.shape[1])
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
    """The same with a kernel: at once, or around the exchange with the other parts."""
    if shard is None:
        log_sums, chosen = kernel(logits, labels, IGNORED, gradient, None)
    else:
        own = _local_labels(labels, shard, logits.shape[1])
        log_sums, chosen = shard.combine(*kernel(logits, own, IGNORED, False, None))
        if gradient:
            kernel(logits, own, IGNORED, True, log_sums)
    return torch.where(labels != IGNORED, log_sums - chosen, 0).sum()


def _local_labels(labels: Tensor, shard: VocabShard, rows: int) -> Tensor:
    """Labels as rows of this part; -1 where another part has it, and where ignored, -100."""
    own = labels - shard.first
    return torch.where(labels == IGNORED, IGNORED, torch.where((own >= 0) & (own < rows), own, -1))
