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
logit. `torch` then means `fused` in one chunk, and so it does with a z-loss.

All return Σ -log p(label) over the labels that are not -100, in fp32, with the softmax in fp32. A
`ZLoss` adds its gradient, and sums its values beside the loss. The
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
# (logits, labels, ignore_index, gradient, log_sums, z_loss) → log Σ exp and the label's logit [T];
# see kernels/triton.py.
Kernel = Callable[[Tensor, Tensor, int, bool, Tensor | None, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ZLoss:
    """coefficient · (log Σ exp)² of each target token (Chowdhery et al. 2022, "PaLM").

    With p the softmax, its gradient by the logits is 2 · coefficient · log Σ exp · p. Passes with
    gradients add it, and add to `total`.
    """

    coefficient: float
    total: Tensor  # float64, a scalar: Σ (log Σ exp)² over target tokens; TrainStep sets it to 0

    def add(self, log_sums: Tensor, labels: Tensor) -> None:
        """Add to the total: log Σ exp [T] of the tokens with `labels` [T]."""
        squares = torch.where(labels != IGNORE_INDEX, log_sums.double().square(), 0)
        self.total.add_(squares.sum())


@dataclass(frozen=True)
class SourceLosses:
    """Sums over the forward passes of a head, by source of the data: losses and target tokens.

    A sequence belongs to one source. Token losses are the terms of the summed loss, so training
    does not depend on whether they are kept.
    """

    sums: Tensor  # float64 [2, sources]; TrainStep sets it to 0

    def add(self, token_losses: Tensor, labels: Tensor, sources: Tensor) -> None:
        """Add the losses [B·S] of labels [B, S], whose sequences belong to `sources` [B]."""
        of_rows = torch.stack(
            (
                token_losses.view(labels.shape).sum(1, dtype=torch.float64),
                (labels != IGNORE_INDEX).sum(1, dtype=torch.float64),
            )
        )  # 2 B
        numbers = torch.arange(self.sums.shape[1], device=labels.device)
        # `where` instead of a matmul with 0 and 1: a NaN stays with its source.
        chosen = torch.where(sources == numbers[:, None], of_rows[:, None], 0.0)  # 2 sources B
        self.sums.add_(chosen.sum(-1))


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of labels one by one, for evaluations; without gradients."""

    # fp32 [2, slots]: log p, and 1 for a label that is not the most likely token. Of equal logits
    # the first one counts as the most likely, as in torch.argmax.
    values: Tensor

    def add(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        slots: Tensor,
        shard: "VocabShard | None",
        softcap: float | None,
    ) -> Tensor:
        """Write the values of labels [T] that are not -100 to their slots [T].

        `hidden` [T, E], `weight` and `shard` are as in `cross_entropy`, whose loss this returns.
        """
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        kept = (labels != IGNORE_INDEX).nonzero()[:, 0]
        limit = FP32_LOGITS.get(hidden.device.type, FP32_LOGITS["cuda"])
        for rows in kept.split(max(1, limit // weight.shape[0])):
            logits = cap_logits(linear(hidden[rows], weight), softcap).float()
            log_sums, targets = torch.logsumexp(logits, -1), labels[rows]
            own = targets if shard is None else _local_labels(targets, shard, weight.shape[0])
            chosen = logits.gather(1, own.clamp_min(0)[:, None])[:, 0].where(own >= 0, 0)
            if shard is not None:
                log_sums, chosen = shard.combine(log_sums, chosen)
            tokens = torch.arange(weight.shape[0], device=logits.device)
            tokens = tokens if shard is None else tokens + shard.first
            above = (logits > chosen[:, None]) | (
                (logits == chosen[:, None]) & (tokens < targets[:, None])
            )
            ahead = above.sum(-1, dtype=torch.float32)
            if shard is not None:
                ahead = shard.combine(log_sums, ahead)[1]
            self.values[0, slots[rows]] = chosen - log_sums
            self.values[1, slots[rows]] = (ahead > 0).float()
            loss -= (chosen - log_sums).sum()
        return loss


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
    softcap: float | None = None,
    token_losses: Tensor | None = None,
    z_loss: ZLoss | None = None,
) -> Tensor:
    """The summed loss of hidden states [T, E] under a head [V, E] for labels [T]: an fp32 scalar.

    `implementation` is torch, fused or triton. `num_chunks`: see `chunk_length`. `shard`: `weight`
    is one shard of a head that several processes share. With `main_grad`, fp32 [V, E], the head's
    gradient is added to it and `weight` gets none; `torch` ignores it. `softcap`: see `cap_logits`.
    `token_losses`, fp32 [T], is overwritten by the losses that are summed. `z_loss`: add its
    gradient, and its values to its total; the returned loss does not contain it.
    """
    if implementation == "torch" and (shard is not None or z_loss is not None):
        implementation, num_chunks = "fused", 1
    if implementation == "torch":
        logits = cap_logits(linear(hidden, weight), softcap).float()
        if token_losses is not None:
            _write_token_losses(logits.detach(), labels, token_losses)
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
            softcap,
            token_losses,
            z_loss if needs_hidden or needs_weight else None,
        )
    # A node each: zero-bubble pipelines compute the hidden states' gradient first, and the weight's
    # later.
    for x, gradient, into in zip((hidden, weight), gradients, (None, main_grad), strict=True):
        if gradient is not None:
            loss = loss + _AttachGradient.apply(x, gradient, into)  # type: ignore[no-untyped-call]
    return loss


def _write_token_losses(logits: Tensor, labels: Tensor, token_losses: Tensor) -> None:
    """The loss of each token, some rows at a time: PyTorch's sum does not return its terms."""
    pieces = (each.split(CHUNK_ROWS) for each in (token_losses, logits, labels))
    for losses, rows, targets in zip(*pieces, strict=True):
        losses.copy_(F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="none"))


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
    softcap: float | None,
    token_losses: Tensor | None,
    z_loss: ZLoss | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients: by the hidden states in their dtype, by the head in fp32.

    A gradient that is not needed is None. `token_losses`, if given, is overwritten by the terms of
    the sum.
    """
    vocabulary, gradient = weight.shape[0], needs_hidden or needs_weight
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
        slopes = None if softcap is None else _cap_logits_(logits, softcap)
        if kernel is not None:
            losses = _kernel_softmax_cross_entropy_(
                kernel, logits, targets, shard, gradient, z_loss
            )
            loss += losses.sum()
        else:
            assert scratch is not None
            terms = []
            for piece, piece_targets in zip(logits.split(size), targets.split(size), strict=True):
                terms.append(
                    _softmax_cross_entropy_(piece, piece_targets, scratch, gradient, z_loss)
                    if shard is None
                    else _sharded_softmax_cross_entropy_(
                        piece, piece_targets, scratch, shard, gradient, z_loss
                    )
                )
                loss += terms[-1].sum()
            losses = torch.cat(terms)
        if token_losses is not None:
            token_losses[begin : begin + length] = losses
        if slopes is not None and gradient:
            logits.mul_(slopes)
        if hidden_grad is not None:
            matmul(logits, weight, out=hidden_grad[begin : begin + length])
        if weight_grad is not None:
            add_matmul_(weight_grad, logits.t(), rows, first=begin == 0)
    return loss, hidden_grad, weight_grad


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits limited to ±softcap: softcap · tanh(logits / softcap) (Gemma 2). None: no limit."""
    if softcap is None:
        return logits
    return (softcap * torch.tanh(logits.float() / softcap)).to(logits.dtype)


def _cap_logits_(logits: Tensor, softcap: float) -> Tensor:
    """`cap_logits` in place; returns the derivative."""
    tanh = torch.tanh(logits.float() / softcap)
    logits.copy_(softcap * tanh)
    return tanh.square_().neg_().add_(1).to(logits.dtype)


def _softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, scratch: Tensor, gradient: bool, z_loss: ZLoss | None
) -> Tensor:
    """The losses [T], fp32; with `gradient` the logits [T, V] are replaced by the loss's gradient.

    `scratch`, fp32 [≥ T, V], is overwritten: allocating memory is slow on the CPU, so every pass
    runs in place.
    """
    scores = scratch[: len(logits)].copy_(logits)
    kept = labels != IGNORE_INDEX
    index = labels.clamp_min(0)[:, None]
    log_sums = None if z_loss is None else torch.logsumexp(scores, -1)
    torch.log_softmax(scores, -1, out=scores)
    losses = torch.where(kept, -scores.gather(1, index)[:, 0], 0)
    if gradient:
        scores.exp_()
        if z_loss is not None and log_sums is not None:
            z_loss.add(log_sums, labels)
            scores.mul_(1 + 2 * z_loss.coefficient * log_sums[:, None])
        scores.scatter_add_(1, index, scores.new_full((len(logits), 1), -1))
        if logits.is_cuda or not bool(
            kept.all()
        ):  # on a GPU a synchronisation costs more than the multiplication
            scores.mul_(kept[:, None])
        logits.copy_(scores)
    return losses


def _sharded_softmax_cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    scratch: Tensor,
    shard: VocabShard,
    gradient: bool,
    z_loss: ZLoss | None,
) -> Tensor:
    """`_softmax_cross_entropy_` of a vocabulary shard; losses are those of the full vocabulary."""
    scores = scratch[: len(logits)].copy_(logits)
    kept, own = labels != IGNORE_INDEX, _local_labels(labels, shard, logits.shape[1])
    here = own >= 0
    index = own.clamp_min(0)[:, None]
    chosen = torch.where(here, scores.gather(1, index)[:, 0], 0)
    log_sums, chosen = shard.combine(torch.logsumexp(scores, -1), chosen)
    if gradient:
        scores.sub_(log_sums[:, None]).exp_()
        if z_loss is not None:
            z_loss.add(log_sums, labels)
            scores.mul_(1 + 2 * z_loss.coefficient * log_sums[:, None])
        scores.scatter_add_(1, index, -here[:, None].to(scores.dtype))
        logits.copy_(scores.mul_(kept[:, None]))
    return torch.where(kept, log_sums - chosen, 0)


def _kernel_softmax_cross_entropy_(
    kernel: Kernel,
    logits: Tensor,
    labels: Tensor,
    shard: VocabShard | None,
    gradient: bool,
    z_loss: ZLoss | None,
) -> Tensor:
    """The same with a kernel: one call, or with a shard one before and one after the exchange."""
    coefficient = 0.0 if z_loss is None else z_loss.coefficient
    if shard is None:
        log_sums, chosen = kernel(logits, labels, IGNORE_INDEX, gradient, None, coefficient)
    else:
        own = _local_labels(labels, shard, logits.shape[1])
        log_sums, chosen = shard.combine(*kernel(logits, own, IGNORE_INDEX, False, None, 0.0))
        if gradient:
            kernel(logits, own, IGNORE_INDEX, True, log_sums, coefficient)
    if z_loss is not None:
        z_loss.add(log_sums, labels)
    return torch.where(labels != IGNORE_INDEX, log_sums - chosen, 0)


def _local_labels(labels: Tensor, shard: VocabShard, rows: int) -> Tensor:
    """Labels as rows of this shard; -1 for labels of other shards, and -100 for ignored ones."""
    own = labels - shard.first
    return torch.where(
        labels == IGNORE_INDEX, IGNORE_INDEX, torch.where((own >= 0) & (own < rows), own, -1)
    )
