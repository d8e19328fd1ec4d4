"""Causal attention through PyTorch's scaled_dot_product_attention, where no other kernel runs.

With a window, limited scores or sinks, queries are taken in blocks. A block of n queries sees at
most n + window - 1 keys, under a mask of that size. So time grows with S · window, and memory with
min(n, 1024) · window.

Letters: B sequences, S tokens of a sequence, H query heads, K key and value heads, D head
dimensions.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fast_llm.models.sizes import queries_per_block

# PyTorch compiles its 16-bit CPU kernel anew for every length, which takes 5 to 10 ms and memory
# that is never freed. Below 512 tokens its fp32 kernel is as fast: bf16 15.7 ms, fp32 9.3 ms
# forward and backward at 8 × 256 tokens, 6 heads of 32. So documents shorter than _SHORT are
# computed in fp32, and longer ones are padded to a multiple of _PADDED.
_SHORT = 512
_PADDED = 64


class Scoring(NamedTuple):
    """How a query's scores are made."""

    window: int | None = None  # tokens that it sees, itself included
    scale: float | None = None  # factor; D^-½ by default
    softcap: float | None = None  # limit: cap · tanh(score / cap)
    sinks: Tensor | None = None  # [H], scores without a value: see kernels/sinks.py

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's attention computes weights from such scores."""
        return self.softcap is None and self.sinks is None

    def within(self, length: int) -> "Scoring":
        """The same for sequences of `length`: no window, if none is longer."""
        return self._replace(window=None) if (self.window or length) >= length else self


def causal(q: Tensor, k: Tensor, v: Tensor, flash: bool, scoring: Scoring) -> Tensor:
    """q [B, S, H, D], k and v [B, S, K, D] → [B, S, H, D]; each of B sequences is one document.

    `flash`: false computes with plain matmuls.
    """
    length, dtype = q.shape[1], q.dtype
    scoring = scoring.within(length)
    if scoring.window is not None or not scoring.is_plain:
        return by_blocks(q, k, v, flash, scoring)
    if flash and not q.is_cuda:
        if dtype != torch.float32 and length < _SHORT:
            q, k, v = q.float(), k.float(), v.float()
        elif dtype != torch.float32 and length % _PADDED:
            # Padding at the end is invisible to the tokens before it.
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -length % _PADDED)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B H S D
    grouped = q.shape[1] != k.shape[1]
    if flash and grouped and not q.is_cuda:
        # PyTorch's CPU kernel needs as many key heads as query heads.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    with nullcontext() if flash else sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=grouped
        )
    return out[:, :, :length].transpose(1, 2).to(dtype)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, flash: bool, scoring: Scoring) -> Tensor:
    """q [B, S, H, D], k and v [B, S', K, D] → [B, S, H, D], where S' ≥ S.

    The last query of a sequence sees the keys up to the last one, the query before all but one, and
    so on.
    """
    length, before = q.shape[1], k.shape[1] - q.shape[1]
    window = scoring.window
    size = length if window is None and scoring.is_plain else queries_per_block(window)
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        keys = slice(first, before + end)
        outputs.append(_masked(q[:, start:end], k[:, keys], v[:, keys], flash, scoring))
    return torch.cat(outputs, dim=1) if outputs[1:] else outputs[0]


def _masked(q: Tensor, k: Tensor, v: Tensor, flash: bool, scoring: Scoring) -> Tensor:
    """Attention of some queries to the keys that any of them sees, with an explicit mask."""
    dtype, queries, keys = q.dtype, q.shape[1], k.shape[1]
    if not q.is_cuda and dtype != torch.float32 and keys < _SHORT:
        q, k, v = q.float(), k.float(), v.float()
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if scoring.window is not None:
        mask = mask.triu(keys - queries - scoring.window + 1)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B H S D
    if not scoring.is_plain:
        # Scores are computed again in the backward pass: kept, they would have the size S².
        limited = partial(_limited, mask=mask, scoring=scoring)
        out = limited(q, k, v) if not flash else checkpoint(limited, q, k, v, use_reentrant=False)
    else:
        with nullcontext() if flash else sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale)
    return out.transpose(1, 2).to(dtype)


def _limited(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention with limited scores, or with sinks, in fp32."""
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if scoring.sinks is None:
        return scores.softmax(-1) @ v.float()
    sinks = scoring.sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1] @ v.float()
