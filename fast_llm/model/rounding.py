"""fp32 numbers in 16 bits: in two halves without loss, or rounded by chance.

    high    bf16, the nearest to the number (halves away from zero): what a model computes with
    low     int16, what is missing: the bits of the number are high · 2^16 + low

Together they take 4 bytes where an fp32 master beside a bf16 weight takes 6 (the idea of TransformerEngine's FusedAdam).

Rounding by chance goes up with the probability that makes it right on average. An average that moves by less than half a unit of bf16
would stand still if it was rounded to the nearest: that of squares with β2 = 0.999 could never shrink. The chance is a hash of
step and place (Wellons' lowbias32), the same on every device and at every resumption.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B1  # 2^32 / the golden ratio: neighbouring places begin far apart
MIX = (0x7FEB352D, 0x846CA68B)
_PIECE = 2**16  # numbers whose chances are made at a time: in the cache


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def split_(number: Tensor, high: Tensor, low: Tensor) -> None:
    """Put fp32 numbers into their halves."""
    bits = number.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low.copy_(bits - (upper << 16))
    high.view(torch.int16).copy_(upper)


def round_by_chance_(number: Tensor, rounded: Tensor, seed: int) -> None:
    """Put fp32 numbers of 0 or more into a bf16 tensor."""
    bits, into = number.flatten().view(torch.int32), rounded.view(torch.int16).flatten()
    for begin in range(0, len(bits), _PIECE):
        piece = bits[begin : begin + _PIECE]
        place = torch.arange(begin, begin + len(piece), device=number.device)
        into[begin : begin + _PIECE] = (piece + _chance(place, seed)) >> 16


def _chance(place: Tensor, seed: int) -> Tensor:
    """16 bits for each place. int64, since int32 has no unsigned shift."""
    x = (place * GOLDEN + seed) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * MIX[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * MIX[1]) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFF).to(torch.int32)
