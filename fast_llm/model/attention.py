"""Causal attention within documents, never across them.

Several documents share a sequence; none sees another. No mask is built: on a GPU in 16 bits PyTorch's
variable-length kernel takes the boundaries; elsewhere each document goes through scaled_dot_product_attention
by itself, and documents of one length that lie side by side go together. So the work is Σ length², not S².
Letters: B sequences, S tokens of a sequence, H query heads, K key and value heads, D head dimensions.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in the flattened B·S tokens; none crosses a sequence."""

    lengths: tuple[int, ...]
    boundaries: Tensor  # int32 [number of documents + 1], cumulative, on the model's device
    longest: int

    def to(self, device: torch.device) -> "Documents":
        """The same on another device."""
        return Documents(self.lengths, self.boundaries.to(device, non_blocking=True), self.longest)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, flash: bool) -> Tensor:
    """Softmax attention: q [B, S, H, D], k and v [B, S, K, D] → [B, S, H, D].

    `flash` false computes with plain matrix products, which hold the scores of whole documents.
    """
    if documents is not None and flash and q.is_cuda and q.dtype != torch.float32:
        return _variable_length(q, k, v, documents)
    if documents is None or set(documents.lengths) == {q.shape[1]}:
        return _batched(q, k, v, flash)
    shape = q.shape
    runs = [(length, len(list(group))) for length, group in groupby(documents.lengths)]
    sizes = [length * count for length, count in runs]
    parts = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]
    outputs = [
        _batched(*(x.unflatten(0, (count, length)) for x in run), flash).flatten(0, 1)
        for (length, count), *run in zip(runs, *parts, strict=True)
    ]
    return torch.cat(outputs).view(shape)


def _batched(q: Tensor, k: Tensor, v: Tensor, flash: bool) -> Tensor:
    """Each of the B sequences is one document."""
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
    return out.transpose(1, 2)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    causal: dict[str, bool | Sequence[int]] = (
        {"is_causal": True}
        if "is_causal" in inspect.signature(varlen_attn).parameters
        else {"window_size": (-1, 0)}
    )
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        causal["enable_gqa"] = True
    out = varlen_attn(
        *(x.flatten(0, 1) for x in (q, k, v)),
        documents.boundaries,
        documents.boundaries,
        documents.longest,
        documents.longest,
        **causal,
    )
    return out.view(q.shape)
