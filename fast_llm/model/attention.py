"""Causal attention within documents.

Several documents share a sequence, and no token attends to another document. No mask is built, so
the work is Σ length², not S²:

a GPU in 16 bits    cuDNN (kernels/cudnn.py), or PyTorch's varlen kernel (FlashAttention)
a CPU               our own kernel (kernels/cpu.cpp), in fp32 and bf16
elsewhere           scaled_dot_product_attention, one call for each document; neighbouring documents
                    of the same length share a call

Letters: B sequences, S tokens of a sequence, H query heads, K key and value heads, D head
dimensions.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.kernels import cudnn
from fast_llm.model.linear import upcast_to_fp32

# Without our CPU kernel: PyTorch compiles its 16-bit CPU kernel anew for every length, which takes
# 5 to 10 ms and memory that is never freed. Below 512 tokens its fp32 kernel is as fast: bf16 15.7
# ms, fp32 9.3 ms forward and backward at 8 × 256 tokens, 6 heads of 32. So documents shorter than
# _SHORT are computed in fp32, and longer ones are padded to a multiple of _PADDED.
_SHORT = 512
_PADDED = 64


class DocumentBoundaries(Protocol):
    """Where the documents of a micro-batch begin and end. Only `Attention.core` looks inside.

    Implemented by `PackedSequences` and, under context parallelism, `VarlenQKV`.
    """

    def to(self, device: torch.device) -> "DocumentBoundaries":
        """A copy on another device."""
        ...

    def pin(self) -> "DocumentBoundaries":
        """A copy in page-locked memory."""
        ...


@dataclass(frozen=True)
class PackedSequences:
    """Documents in the flattened B·S tokens; no document crosses a sequence."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # int32 [documents + 1], cumulative lengths, on the model's device
    max_seqlen: int
    equal_lengths: bool = field(init=False)  # of all documents

    def __post_init__(self) -> None:
        # Computed here, because torch.compile would guard on all lengths, in every micro-batch.
        object.__setattr__(self, "equal_lengths", len(set(self.lengths)) == 1)

    def to(self, device: torch.device) -> "PackedSequences":
        """A copy on another device."""
        return PackedSequences(
            self.lengths, self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen
        )

    def pin(self) -> "PackedSequences":
        """A copy in page-locked memory."""
        return PackedSequences(self.lengths, self.cu_seqlens.pin_memory(), self.max_seqlen)


@dataclass(frozen=True)
class VarlenQKV:
    """Sequences that have fewer queries than keys, as under context parallelism.

    Each has some of a document's queries, and all keys up to the last of these queries.
    """

    lengths_q: tuple[int, ...]  # of each sequence
    lengths_k: tuple[int, ...]  # of each sequence, at least as many
    index: Tensor  # int64 [Σ keys]: where each sequence's keys are among the gathered ones
    cu_seqlens_q: Tensor  # int32 [sequences + 1], cumulative lengths; all on the model's device
    cu_seqlens_k: Tensor
    max_seqlen_q: int = field(init=False)
    max_seqlen_k: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_seqlen_q", max(self.lengths_q))
        object.__setattr__(self, "max_seqlen_k", max(self.lengths_k))

    @staticmethod
    def from_lengths(
        lengths_q: Sequence[int], lengths_k: Sequence[int], index: Tensor
    ) -> "VarlenQKV":
        """Compute cumulative lengths from lengths; `index` is as in the class."""
        cu_seqlens = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            for lengths in (lengths_q, lengths_k)
        ]
        return VarlenQKV(tuple(lengths_q), tuple(lengths_k), index, *cu_seqlens)

    def to(self, device: torch.device) -> "VarlenQKV":
        """A copy on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "VarlenQKV":
        """A copy in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "VarlenQKV":
        return VarlenQKV(
            self.lengths_q,
            self.lengths_k,
            *map(change, (self.index, self.cu_seqlens_q, self.cu_seqlens_k)),
        )


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None, flash: bool
) -> Tensor:
    """Softmax attention: q [B, S, H, D], k and v [B, S, K, D] → [B, S, H, D].

    `flash`: false computes with plain matmuls, which hold all scores of a document.
    """
    one_per_sequence = documents is None or (
        documents.equal_lengths and documents.max_seqlen == q.shape[1]
    )
    out: Tensor
    if upcast_to_fp32(q):
        out = attention(q.float(), k.float(), v.float(), documents, flash).to(q.dtype)
        return out
    if flash and cpu_kernels.usable(q, matmul=True) and q.shape[-1] % 2 == 0:
        if documents is None or one_per_sequence:
            cu_seqlens = _equal_cu_seqlens(q)
            out = _CpuAttention.apply(q, k, v, cu_seqlens)  # type: ignore[no-untyped-call]
            return out
        out = _packed(q, k, v, documents)
        return out
    if documents is None or one_per_sequence:
        return _batched(q, k, v, flash)
    if flash and _has_varlen_kernel(q):
        cu_seqlens, longest = documents.cu_seqlens, documents.max_seqlen
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        return _varlen_kernel(*flat, cu_seqlens, cu_seqlens, longest, longest).view(q.shape)
    out = _sequence_by_sequence(q, k, v, documents, flash)
    return out


@torch.compiler.disable
def _packed(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences) -> Tensor:
    """Kept out of torch.compile: every micro-batch has another number of documents."""
    cu_seqlens = documents.cu_seqlens
    out: Tensor = _CpuAttention.apply(q, k, v, cu_seqlens)  # type: ignore[no-untyped-call]
    return out


def _equal_cu_seqlens(q: Tensor) -> Tensor:
    """Cumulative lengths if each sequence is one document."""
    return torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, log_sums = torch.ops.fast_llm.attention(q, k, v, cu_seqlens)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, log_sums)
        attended: Tensor = out
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, cu_seqlens, out, log_sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = len(cu_seqlens) - 1, q.shape[2], k.shape[2], q.shape[3]
        torch.ops.fast_llm.attention_backward(
            grad_q, grad_k, grad_v, grad.contiguous(), out, log_sums, q, k, v, cu_seqlens, *sizes
        )
        return grad_q, grad_k, grad_v, None


# This operator returns new tensors, so that recomputation can keep them.
torch.library.define(
    "fast_llm::attention", "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens) -> (Tensor, Tensor)"
)


@torch.library.impl("fast_llm::attention", "cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sums = _empty_results(q, k, v, cu_seqlens)
    sizes = len(cu_seqlens) - 1, q.shape[2], k.shape[2], q.shape[3]
    cpu_kernels.run("attention", out, log_sums, q, k, v, cu_seqlens, *sizes)
    return out, log_sums


@torch.library.register_fake("fast_llm::attention")
def _empty_results(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(
        q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32
    )


@torch.compiler.disable
def _sequence_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences, flash: bool
) -> Tensor:
    """Kept out of torch.compile: every micro-batch has other lengths."""
    shape = q.shape
    runs = [(length, len(list(group))) for length, group in groupby(documents.lengths)]
    sizes = [length * count for length, count in runs]
    # The backward pass of split, unlike that of slicing, writes each gradient once.
    split = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]
    outputs = []
    for (length, count), *run in zip(runs, *split, strict=True):
        q_i, k_i, v_i = (x.unflatten(0, (count, length)) for x in run)
        outputs.append(_batched(q_i, k_i, v_i, flash).flatten(0, 1))
    return torch.cat(outputs).view(shape)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, varlen: VarlenQKV, flash: bool) -> Tensor:
    """Softmax attention of q [Σ queries, H, D], k and v [Σ keys, K, D] → [Σ queries, H, D].

    The last query of a sequence sees all of its keys, the one before all but one, and so on.
    """
    if upcast_to_fp32(q):
        return varlen_attention(q.float(), k.float(), v.float(), varlen, flash).to(q.dtype)
    if flash and _has_varlen_kernel(q):
        longest = varlen.max_seqlen_q, varlen.max_seqlen_k
        return _varlen_kernel(q, k, v, varlen.cu_seqlens_q, varlen.cu_seqlens_k, *longest)
    out: Tensor = _varlen_loop(q, k, v, varlen, flash)
    return out


@torch.compiler.disable
def _varlen_loop(q: Tensor, k: Tensor, v: Tensor, varlen: VarlenQKV, flash: bool) -> Tensor:
    lengths = varlen.lengths_q, varlen.lengths_k, varlen.lengths_k
    split = [x.split(each) for x, each in zip((q, k, v), lengths, strict=True)]
    outputs = []
    for q_i, k_i, v_i in zip(*split, strict=True):
        if len(q_i) == len(k_i):
            outputs.append(_batched(q_i[None], k_i[None], v_i[None], flash)[0])
        else:
            outputs.append(_masked(q_i, k_i, v_i, flash))
    return torch.cat(outputs)


def _masked(q: Tensor, k: Tensor, v: Tensor, flash: bool) -> Tensor:
    """One sequence with more keys than queries, with an explicit mask."""
    dtype = q.dtype
    if not q.is_cuda and dtype != torch.float32 and len(k) < _SHORT:
        q, k, v = q.float(), k.float(), v.float()
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # 1 H S D
    with nullcontext() if flash else sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1).to(dtype)


def _batched(q: Tensor, k: Tensor, v: Tensor, flash: bool) -> Tensor:
    """Attention in which each of the B sequences is one document."""
    length, dtype = q.shape[1], q.dtype
    if flash and not q.is_cuda:
        if dtype != torch.float32 and length < _SHORT:
            q, k, v = q.float(), k.float(), v.float()
        elif dtype != torch.float32 and length % _PADDED:
            # Padding at the end is invisible to the tokens before it.
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % _PADDED)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B H S D
    grouped = q.shape[1] != k.shape[1]
    if flash:
        if grouped and not q.is_cuda:
            # PyTorch's CPU kernel needs as many key heads as query heads.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out[:, :, :length].transpose(1, 2).to(dtype)


def _has_varlen_kernel(q: Tensor) -> bool:
    """FlashAttention's limits: 16 bits, Ampere or later, head size a multiple of 8 up to 256."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


# The arguments for causal and grouped attention depend on PyTorch's version. 2.10 has `is_causal`
# and no grouped heads. Later ones have `window_size`, where (-1, 0) means causal, and some of them
# `enable_gqa`.
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = (
    {"is_causal": True} if "is_causal" in _VARLEN_PARAMETERS else {"window_size": (-1, 0)}
)


def _varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    if cudnn.usable(q):
        other = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
        return cudnn.attention(q, k, v, cu_seqlens_q, other, max_seqlen_q, max_seqlen_k)
    options = dict(_CAUSAL)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out: Any = varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    )
    attended: Tensor = out
    return attended
