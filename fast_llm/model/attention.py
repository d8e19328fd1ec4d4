"""Causal attention within documents.

Several documents share a sequence, and no token attends to another document. No mask is built, so
the work is Σ length², not S²:

a GPU in 16 bits    cuDNN (kernels/cudnn.py), or PyTorch's varlen kernel (FlashAttention)
a CPU               our own kernel (kernels/cpu.cpp), in fp32 and bf16
elsewhere           scaled_dot_product_attention (model/sdpa.py), one call for each document;
                    neighbouring documents of the same length share a call

With a window of W tokens, a query sees itself and the W - 1 tokens before it in its document. The
work is then Σ length · W. Limited scores (`softcap`) are computed by our CPU kernel, or by
model/sdpa.py; sinks by these and by cuDNN (kernels/sinks.py).

Letters: B sequences, S tokens of a sequence, H query heads, K key and value heads, D head
dimensions.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.kernels import cudnn
from fast_llm.kernels.sinks import add_sinks, sink_gradient
from fast_llm.model.linear import upcast_to_fp32
from fast_llm.model.sdpa import Scoring, by_blocks, causal

# Window, scale, softcap and sinks (`Scoring`).
_Scoring = tuple[int | None, float | None, float | None, Tensor | None]


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

    Each has some of a document's queries, and the keys that these see, up to the last query.
    """

    lengths_q: tuple[int, ...]  # of each sequence
    lengths_k: tuple[int, ...]  # of each sequence, at least as many
    index: Tensor  # int64 [Σ keys]: where each sequence's keys are among the gathered ones
    cu_seqlens_q: Tensor  # int32 [sequences + 1], cumulative lengths; all on the model's device
    cu_seqlens_k: Tensor
    # Of blocks whose attention has a window: the keys that are within it. `last`: how many tokens
    # at the end of each chunk are gathered; None means all, without this process's own keys.
    windowed: "VarlenQKV | None" = None
    last: int | None = None
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
        return VarlenQKV(tuple(lengths_q), tuple(lengths_k), index, cu_seqlens[0], cu_seqlens[1])

    def to(self, device: torch.device) -> "VarlenQKV":
        """A copy on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "VarlenQKV":
        """A copy in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "VarlenQKV":
        return replace(
            self,
            index=change(self.index),
            cu_seqlens_q=change(self.cu_seqlens_q),
            cu_seqlens_k=change(self.cu_seqlens_k),
            windowed=None if self.windowed is None else self.windowed._with(change),
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: PackedSequences | None,
    flash: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention: q [B, S, H, D], k and v [B, S, K, D] → [B, S, H, D].

    `flash`: false computes with plain matmuls, which hold all scores of a document. `sinks` [H]: a
    score of each head that takes part in its softmax, without a value.
    """
    one_per_sequence = documents is None or (
        documents.equal_lengths and documents.max_seqlen == q.shape[1]
    )
    longest = q.shape[1] if documents is None else documents.max_seqlen
    if window is not None and window >= longest:
        window = None
    # A plain tuple: the compiler cannot keep a Scoring across what it does not compile.
    scoring = window, scale, softcap, sinks
    out: Tensor
    if upcast_to_fp32(q):
        out = attention(q.float(), k.float(), v.float(), documents, flash, *scoring).to(q.dtype)
        return out
    if flash and cpu_kernels.usable(q, matmul=True) and q.shape[-1] % 2 == 0:
        if documents is None or one_per_sequence:
            return _cpu_kernel(q, k, v, _equal_cu_seqlens(q), scoring)
        out = _packed(q, k, v, documents, scoring)
        return out
    kernel = flash and _has_varlen_kernel(q, *scoring)
    if documents is None or one_per_sequence:
        if (window is None and sinks is None) or not kernel:
            return causal(q, k, v, flash, Scoring(*scoring))
        cu_seqlens = _equal_cu_seqlens(q).to(q.device, non_blocking=True)
    else:
        cu_seqlens = documents.cu_seqlens
    if kernel:
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        lengths = longest, longest
        out = _varlen_kernel(*flat, cu_seqlens, cu_seqlens, *lengths, window, scale, sinks)
        return out.view(q.shape)
    assert documents is not None
    out = _sequence_by_sequence(q, k, v, documents, flash, scoring)
    return out


@torch.compiler.disable
def _packed(
    q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences, scoring: _Scoring
) -> Tensor:
    """Kept out of torch.compile: every micro-batch has another number of documents."""
    return _cpu_kernel(q, k, v, documents.cu_seqlens, scoring)


def _cpu_kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scoring: _Scoring) -> Tensor:
    """Our CPU kernel; 0 stands for no window, the default scale, and no limit."""
    window, scale, softcap, sinks = scoring
    numbers = window or 0, scale or 0.0, softcap or 0.0
    out: Tensor = _CpuAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, cu_seqlens, *numbers, sinks
    )
    return out


def _equal_cu_seqlens(q: Tensor) -> Tensor:
    """Cumulative lengths if each sequence is one document."""
    return torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
        window: int, scale: float, softcap: float, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        scoring = window, scale, softcap
        out, log_sums = torch.ops.fast_llm.attention(q, k, v, cu_seqlens, *scoring)  # H B·S
        if sinks is not None:
            with_sinks, total = add_sinks(out.flatten(0, 1), log_sums.t(), sinks)
            out, log_sums = with_sinks.view(out.shape), total.t().contiguous()
        ctx.save_for_backward(q, k, v, cu_seqlens, out, log_sums, sinks)
        ctx.scoring = scoring
        attended: Tensor = out
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, log_sums, sinks = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = len(cu_seqlens) - 1, q.shape[2], k.shape[2], q.shape[3]
        grad = grad.contiguous()
        given = grad, out, log_sums, q, k, v, cu_seqlens
        torch.ops.fast_llm.attention_backward(grad_q, grad_k, grad_v, *given, *sizes, *ctx.scoring)
        of_sinks = None
        if sinks is not None:
            of_sinks = sink_gradient(grad.flatten(0, 1), out.flatten(0, 1), log_sums.t(), sinks)
        return grad_q, grad_k, grad_v, None, None, None, None, of_sinks


# This operator returns new tensors, so that recomputation can keep them.
torch.library.define(
    "fast_llm::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int window, float scale, float softcap)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("fast_llm::attention", "cpu")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *scoring: Any
) -> tuple[Tensor, Tensor]:
    out, log_sums = _empty_results(q, k, v, cu_seqlens, *scoring)
    sizes = len(cu_seqlens) - 1, q.shape[2], k.shape[2], q.shape[3]
    cpu_kernels.run("attention", out, log_sums, q, k, v, cu_seqlens, *sizes, *scoring)
    return out, log_sums


@torch.library.register_fake("fast_llm::attention")
def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *scoring: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(
        q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32
    )


@torch.compiler.disable
def _sequence_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences, flash: bool, scoring: _Scoring
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
        outputs.append(causal(q_i, k_i, v_i, flash, Scoring(*scoring)).flatten(0, 1))
    return torch.cat(outputs).view(shape)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: VarlenQKV,
    flash: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [Σ queries, H, D], k and v [Σ keys, K, D] → [Σ queries, H, D].

    The last query of a sequence sees its keys up to the last one, the query before all but one, and
    so on.
    """
    scoring = window, scale, softcap, sinks
    if upcast_to_fp32(q):
        q32, k32, v32 = q.float(), k.float(), v.float()
        return varlen_attention(q32, k32, v32, varlen, flash, *scoring).to(q.dtype)
    if flash and _has_varlen_kernel(q, *scoring):
        longest = varlen.max_seqlen_q, varlen.max_seqlen_k
        ends = varlen.cu_seqlens_q, varlen.cu_seqlens_k, *longest
        if window is not None and window >= varlen.max_seqlen_k:
            window = None
        return _varlen_kernel(q, k, v, *ends, window, scale, sinks)
    out: Tensor = _varlen_loop(q, k, v, varlen, flash, scoring)
    return out


@torch.compiler.disable
def _varlen_loop(
    q: Tensor, k: Tensor, v: Tensor, varlen: VarlenQKV, flash: bool, scoring: _Scoring
) -> Tensor:
    lengths = varlen.lengths_q, varlen.lengths_k, varlen.lengths_k
    split = [x.split(each) for x, each in zip((q, k, v), lengths, strict=True)]
    outputs = []
    for q_i, k_i, v_i in zip(*split, strict=True):
        attend = causal if len(q_i) == len(k_i) else by_blocks
        outputs.append(attend(q_i[None], k_i[None], v_i[None], flash, Scoring(*scoring))[0])
    return torch.cat(outputs)


# The arguments for causal and grouped attention depend on PyTorch's version. 2.10 has `is_causal`,
# no window and no grouped heads. Later ones have `window_size`: the tokens before a query, where -1
# means all, and those after it. Some of them have `enable_gqa`, some `scale`.
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters


def _has_varlen_kernel(
    q: Tensor, window: int | None, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> bool:
    """FlashAttention's limits: 16 bits, Ampere or later, head size a multiple of 8 up to 256.

    It does not limit scores, and PyTorch 2.10 does not pass on a window or scale. Sinks need
    cuDNN's log Σ exp, which PyTorch does not differentiate.
    """
    supported = (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
    if not supported or softcap is not None:
        return False
    return cudnn.usable(q, window) or (
        sinks is None
        and (window is None or "window_size" in _VARLEN_PARAMETERS)
        and (scale is None or "scale" in _VARLEN_PARAMETERS)
    )


def _varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    if cudnn.usable(q, window):
        other = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
        ends = cu_seqlens_q, other, max_seqlen_q, max_seqlen_k
        return cudnn.attention(q, k, v, *ends, window, scale, sinks)
    options: dict[str, Any] = (
        {"is_causal": True}
        if "is_causal" in _VARLEN_PARAMETERS
        else {"window_size": (-1 if window is None else window - 1, 0)}
    )
    if scale is not None:
        options["scale"] = scale
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
