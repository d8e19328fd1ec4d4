"""Causal attention within documents, never across them.

Several documents share a sequence; none sees another. No mask is built, so the work is Σ length², not S²:

a GPU in 16 bits    PyTorch's variable-length kernel (FlashAttention) takes the boundaries
elsewhere           each document goes through scaled_dot_product_attention by itself; documents of one length that
                    lie side by side go together

Letters: B sequences, S tokens of a sequence, H query heads, K key and value heads, D head dimensions.
"""

import inspect
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

# On the CPU PyTorch compiles its 16-bit kernel anew for every length (5 to 10 ms, and memory that is never given
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

    def to(self, device: torch.device) -> "Documents":
        """The same on another device."""
        return Documents(self.lengths, self.boundaries.to(device, non_blocking=True), self.longest)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, flash: bool) -> Tensor:
    """Softmax attention: q [B, S, H, D], k and v [B, S, K, D] → [B, S, H, D].

    `flash` false computes with plain matrix products, which hold the scores of whole documents.
    """
    if documents is None or set(documents.lengths) == {q.shape[1]}:
        return _batched(q, k, v, flash)
    if flash and _has_variable_length(q):
        return _variable_length(q, k, v, documents)
    shape = q.shape
    runs = [(length, len(list(group))) for length, group in groupby(documents.lengths)]
    sizes = [length * count for length, count in runs]
    # Splitting, unlike slicing, has a backward pass that writes each gradient once.
    parts = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]
    outputs = []
    for (length, count), *run in zip(runs, *parts, strict=True):
        one, two, three = (x.unflatten(0, (count, length)) for x in run)
        outputs.append(_batched(one, two, three, flash).flatten(0, 1))
    return torch.cat(outputs).view(shape)


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


def _variable_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    how = dict(_CAUSAL)
    if q.shape[2] != k.shape[2]:
        if "enable_gqa" in _KNOWN:
            how["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    ends, longest = documents.boundaries, documents.longest
    out: Any = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, longest, longest, **how)
    attended: Tensor = out.view(q.shape)
    return attended
