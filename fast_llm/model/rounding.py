"""fp32 numbers in 16 bits, in two halves without loss or rounded by chance; and in 8.

    high    bf16, the nearest to the number (halves away from zero): what a model computes with
    low     int16, what is missing: the bits of the number are high · 2^16 + low

Together they take 4 bytes where an fp32 master beside a bf16 weight takes 6 (the idea of TransformerEngine's FusedAdam).

Rounding by chance goes up with the probability that makes it right on average. An average that moves by less than half a unit of bf16
would stand still if it was rounded to the nearest: that of squares with β2 = 0.999 could never shrink. The chance is a hash of
step and place (Wellons' lowbias32), the same on every device and at every resumption.

8 bits are those of fp32 itself: an exponent and the first three bits behind the comma, read as one integer, the number's grid. They are
counted from the largest of a block of 128 neighbours downwards (block-wise quantisation, Dettmers et al. 2022):

    grid    bits of |number| / 2^20, rounded: eight to each power of two, 6 to 12 % apart
    top     int16, the largest grid of a block
    code    int8 with the number's sign, 127 - (top - grid); uint8 for numbers that have none, 255 - (top - grid); 0 is 0

So a block reaches down to 2^-15 of its largest number, in uint8 to 2^-31. Below that int8 has 0 and uint8 its smallest number: what is
divided by must not vanish. The grid is the same for all blocks, and bf16 has all of it. So numbers that were packed are packed again, to
the nearest, into the very same codes and tops; and into blocks that begin elsewhere, as under another layout, without another rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = 0x9E3779B1  # 2^32 / the golden ratio: neighbouring places begin far apart
MIX = (0x7FEB352D, 0x846CA68B)
BLOCK = 128  # numbers that are counted from the same top
DROPPED = 20  # bits of fp32 that the grid has not
LEVELS = {torch.int8: 127, torch.uint8: 255}  # the code of a block's largest number
INFINITE = 0x7F800000 >> DROPPED  # the grid of infinities, and the least of NaN
_PIECE = 2**16  # numbers that are rounded at a time: in the cache


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
        chance = _hash(begin, len(piece), seed, number.device) & 0xFFFF
        into[begin : begin + _PIECE] = (piece + chance.to(torch.int32)) >> 16


def tops(number: Tensor) -> Tensor:
    """Room for the tops of as many numbers."""
    return torch.zeros(-(-number.numel() // BLOCK), dtype=torch.int16, device=number.device)


def pack_(number: Tensor, codes: Tensor, tops: Tensor, seed: int | None = None) -> None:
    """Put fp32 numbers into 8 bits, rounded by chance; without a seed to the nearest. Those for uint8 are 0 or more."""
    bits, into, largest = number.flatten().view(torch.int32), codes.view(-1), LEVELS[codes.dtype]
    for begin in range(0, len(bits), _PIECE):
        piece = bits[begin : begin + _PIECE]
        if seed is None:
            added: Tensor | int = 1 << (DROPPED - 1)
        else:
            # Two numbers of one place, a mean and a mean of squares, have chances of their own: the halves of a hash.
            chance = _hash(begin, len(piece), seed, number.device)
            added = (
                (chance >> 16 if codes.dtype == torch.int8 else chance & 0xFFFF) << (DROPPED - 16)
            ).to(torch.int32)
        grid = ((piece & 0x7FFFFFFF) + added) >> DROPPED
        blocks = F.pad(grid, (0, -len(grid) % BLOCK)).view(-1, BLOCK)
        top = blocks.amax(1, keepdim=True)
        code = (
            (blocks - top + largest)
            .clamp_min_(0 if codes.dtype == torch.int8 else 1)
            .mul_(blocks > 0)
        )
        code = code.flatten()[: len(grid)]
        into[begin : begin + _PIECE] = (
            torch.where(piece < 0, -code, code) if codes.dtype == torch.int8 else code
        )
        tops[begin // BLOCK : (begin + len(piece) - 1) // BLOCK + 1] = top.flatten()


def unpack(codes: Tensor, tops: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers, in fp32 or, the same, in bf16."""
    number = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    into, flat, largest = number.view(-1), codes.view(-1), LEVELS[codes.dtype]
    for begin in range(0, len(flat), _PIECE):
        code = flat[begin : begin + _PIECE].to(torch.int32)
        top = tops[begin // BLOCK : (begin + len(code) - 1) // BLOCK + 1].to(torch.int32)
        grid = (code.abs() + (top.repeat_interleave(BLOCK)[: len(code)] - largest)).mul_(code != 0)
        value = (grid << DROPPED).view(torch.float32)
        into[begin : begin + _PIECE] = torch.where(code < 0, -value, value)
    return number


def _hash(begin: int, count: int, seed: int, device: torch.device) -> Tensor:
    """32 bits for each place, of which each half is a chance. int64, since int32 has no unsigned shift."""
    x = (torch.arange(begin, begin + count, device=device) * GOLDEN + seed) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * MIX[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * MIX[1]) & 0xFFFFFFFF
    return x ^ (x >> 16)
