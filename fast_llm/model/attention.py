"""Causal attention within documents, never across them.

Several documents share a sequence; none sees another. No mask is built, so the work is Σ length², not S²:

a GPU in 16 bits    cuDNN (model/cudnn.py) or PyTorch's variable-length kernel (FlashAttention) takes the boundaries
a CPU               ours does (model/native.cpp), in fp32 and bf16
elsewhere           each document goes through scaled_dot_product_attention by itself; documents of one length that
                    lie side by side go together

Letters: B sequences, S tokens of a sequence, H query heads, K key and value heads, D head dimensions.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from fast_llm.model import cudnn, native
from fast_llm.model.linear import widened

# Without our kernel: on the CPU PyTorch compiles its 16-bit kernel anew for every length (5 to 10 ms, and memory that is never given
# back), and below this length the fp32 one is as fast: bf16 15.7 ms, fp32 9.3 ms forward and backward at 8 × 256
# tokens, 6 heads of 32. So short documents are computed in fp32, long ones padded to a multiple of _STEP.
_SHORT = 512
_STEP = 64


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in the flattened B·S tokens; none crosses a sequence."""

    lengths: tuple[int, ...]
    boundaries: Tensor  # int32 [number of documents + 1], cumulative, on the model's device
    longest: int
    alike: bool = field(init=False)  # all of one length

    def __post_init__(self) -> None:
        # Here and not where it is asked for: the compiler would look at all the lengths, and again for every micro-batch.
        object.__setattr__(self, "alike", len(set(self.lengths)) == 1)

    def to(self, device: torch.device) -> "Documents":
        """The same on another device."""
        return Documents(self.lengths, self.boundaries.to(device, non_blocking=True), self.longest)

    def pin(self) -> "Documents":
        """The same in page-locked memory."""
        return Documents(self.lengths, self.boundaries.pin_memory(), self.longest)


@dataclass(frozen=True)
class Stretches:
    """Queries that are some of a document's, one stretch after the other, each with all keys up to its last query's."""

    queries: tuple[int, ...]  # of each stretch
    keys: tuple[int, ...]  # of each stretch, at least as many
    index: Tensor  # int64 [Σ keys]: the keys of all stretches among those that there are, on the model's device
    query_ends: Tensor  # int32 [stretches + 1], cumulative, on the model's device
    key_ends: Tensor
    longest_queries: int = field(init=False)
    longest_keys: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "longest_queries", max(self.queries))
        object.__setattr__(self, "longest_keys", max(self.keys))

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], index: Tensor) -> "Stretches":
        """With the ends counted."""
        ends = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            for lengths in (queries, keys)
        ]
        return Stretches(tuple(queries), tuple(keys), index, *ends)

    def to(self, device: torch.device) -> "Stretches":
        """The same on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Stretches":
        """The same in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Stretches":
        return Stretches(
            self.queries, self.keys, *map(change, (self.index, self.query_ends, self.key_ends))
        )


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, flash: bool) -> Tensor:
    """Softmax attention: q [B, S, H, D], k and v [B, S, K, D] → [B, S, H, D].

    `flash` false computes with plain matrix products, which hold the scores of whole documents.
    """
    whole = documents is None or (documents.alike and documents.longest == q.shape[1])
    out: Tensor
    if widened(q):
        out = attention(q.float(), k.float(), v.float(), documents, flash).to(q.dtype)
        return out
    if flash and native.usable(q, products=True) and q.shape[-1] % 2 == 0:
        if documents is None or whole:
            out = _Native.apply(q, k, v, _ends(q))  # type: ignore[no-untyped-call]
            return out
        out = _packed(q, k, v, documents)
        return out
    if documents is None or whole:
        return _batched(q, k, v, flash)
    if flash and _has_variable_length(q):
        ends, longest = documents.boundaries, documents.longest
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        return _variable_length(*flat, ends, ends, longest, longest).view(q.shape)
    out = _one_by_one(q, k, v, documents, flash)
    return out


@torch.compiler.disable
def _packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Not compiled: every micro-batch has another number of documents."""
    out: Tensor = _Native.apply(q, k, v, documents.boundaries)  # type: ignore[no-untyped-call]
    return out


def _ends(q: Tensor) -> Tensor:
    """The boundaries of documents that are whole sequences."""
    return torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, log_sums = torch.ops.fast_llm.attention(q, k, v, ends)
        ctx.save_for_backward(q, k, v, ends, out, log_sums)
        attended: Tensor = out
        return attended

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, ends, out, log_sums = ctx.saved_tensors
        by_q, by_k, by_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = len(ends) - 1, q.shape[2], k.shape[2], q.shape[3]
        torch.ops.fast_llm.attention_back(
            by_q, by_k, by_v, grad.contiguous(), out, log_sums, q, k, v, ends, *sizes
        )
        return by_q, by_k, by_v, None


# This one returns what it makes, so that recomputation can keep it.
torch.library.define(
    "fast_llm::attention", "(Tensor q, Tensor k, Tensor v, Tensor ends) -> (Tensor, Tensor)"
)


@torch.library.impl("fast_llm::attention", "cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sums = _nothing_yet(q, k, v, ends)
    native.run(
        "attention", out, log_sums, q, k, v, ends, len(ends) - 1, q.shape[2], k.shape[2], q.shape[3]
    )
    return out, log_sums


@torch.library.register_fake("fast_llm::attention")
def _nothing_yet(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(
        q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32
    )


@torch.compiler.disable
def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents, flash: bool) -> Tensor:
    """Not compiled: every micro-batch has other lengths."""
    shape = q.shape
    runs = [(length, len(list(group))) for length, group in groupby(documents.lengths)]
    sizes = [length * count for length, count in runs]
    # Splitting, unlike slicing, has a backward pass that writes each gradient once.
    pieces = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]
    outputs = []
    for (length, count), *run in zip(runs, *pieces, strict=True):
        one, two, three = (x.unflatten(0, (count, length)) for x in run)
        outputs.append(_batched(one, two, three, flash).flatten(0, 1))
    return torch.cat(outputs).view(shape)


def attend(q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, flash: bool) -> Tensor:
    """Softmax attention of stretches: q [Σ queries, H, D], k and v [Σ keys, K, D] → [Σ queries, H, D].

    The last query of a stretch sees all of its keys, the one before all but one, and so on.
    """
    if widened(q):
        return attend(q.float(), k.float(), v.float(), stretches, flash).to(q.dtype)
    if flash and _has_variable_length(q):
        longest = stretches.longest_queries, stretches.longest_keys
        return _variable_length(q, k, v, stretches.query_ends, stretches.key_ends, *longest)
    out: Tensor = _stretch_by_stretch(q, k, v, stretches, flash)
    return out


@torch.compiler.disable
def _stretch_by_stretch(
    q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, flash: bool
) -> Tensor:
    parts = zip(
        q.split(stretches.queries), k.split(stretches.keys), v.split(stretches.keys), strict=True
    )
    outputs = []
    for one, two, three in parts:
        if len(one) == len(two):
            outputs.append(_batched(one[None], two[None], three[None], flash)[0])
        else:
            outputs.append(_masked(one, two, three, flash))
    return torch.cat(outputs)


def _masked(q: Tensor, k: Tensor, v: Tensor, flash: bool) -> Tensor:
    """One stretch with more keys than queries, under a mask."""
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
    """Each of the B sequences is one document."""
    length, dtype = q.shape[1], q.dtype
    if flash and not q.is_cuda:
        if dtype != torch.float32 and length < _SHORT:
            q, k, v = q.float(), k.float(), v.float()
        elif dtype != torch.float32 and length % _STEP:
            # Behind the end nothing is seen by what comes before it.
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % _STEP)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B H S D
    grouped = q.shape[1] != k.shape[1]
    if flash:
        if grouped and not q.is_cuda:
            # The CPU kernel takes grouped heads only from a copy of the keys and values.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out[:, :, :length].transpose(1, 2).to(dtype)


def _has_variable_length(q: Tensor) -> bool:
    """FlashAttention's limits: 16 bits, Ampere or later, head dimensions that are a multiple of 8 up to 256."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


# PyTorch's versions spell causal and grouped attention differently: 2.10 has is_causal and repeats no heads; later a
# window that reaches back without limit and not ahead means causal, and groups are asked for where that is known.
_KNOWN = inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _KNOWN else {"window_size": (-1, 0)}


def _variable_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
) -> Tensor:
    if cudnn.usable(q):
        other_ends = None if key_ends is query_ends else key_ends
        return cudnn.attention(q, k, v, query_ends, other_ends, longest_query, longest_key)
    how = dict(_CAUSAL)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _KNOWN:
            how["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out: Any = varlen_attn(q, k, v, query_ends, key_ends, longest_query, longest_key, **how)
    attended: Tensor = out
    return attended
