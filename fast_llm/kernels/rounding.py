"""fp32 numbers stored in fewer bits: split master weights, stochastic rounding and 8-bit moments.

**Split masters.** An fp32 master weight is stored without loss in two 16-bit parts:

    high        bf16, the nearest to the number (ties away from zero): the model's weight
    low_bits    int16, the remaining bits: the number's bits are high · 2^16 + low_bits

Together they take 4 bytes; an fp32 master next to a bf16 weight takes 6 (TransformerEngine's
FusedAdam has the same idea).

**Stochastic rounding** rounds up with the probability that makes the result right on average. A
running average that changes by less than half a unit of bf16 would never move if it were rounded to
the nearest: with β2 = 0.999 the second moment could never shrink. The random bits are a hash of
step and place (Wellons' lowbias32): the same on every device and after every resume.

**8 bits** keep fp32's exponent and the first three bits of its mantissa, read as one integer, the
number's level. Levels are counted downwards from the largest of a block of 128 numbers (block-wise
quantization, Dettmers et al. 2022):

    level          bits of |number| / 2^20, rounded: eight to each power of two, 6 to 12 % apart
    block_absmax   int16, the largest level of a block
    quantized      int8 with the number's sign: 127 - (block_absmax - level); for numbers without a
                   sign uint8: 255 - (block_absmax - level). 0 stands for 0.

A block reaches down to 2^-15 of its largest number, in uint8 to 2^-31. Below that int8 stores 0,
and uint8 its smallest number, because a divisor must not vanish. Levels are the same in all blocks,
and bf16 holds each of them. So dequantized numbers that are quantized again, to the nearest, give
the same bytes. In blocks that begin elsewhere, as under another layout, they are not rounded a
second time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_llm.models.sizes import QUANTIZATION_BLOCK

GOLDEN = 0x9E3779B1  # 2^32 / the golden ratio: neighbouring places begin far apart
MIX = (0x7FEB352D, 0x846CA68B)
BLOCK = QUANTIZATION_BLOCK
DROPPED_BITS = 20  # bits of fp32 that levels leave out
MAX_QUANTIZED = {torch.int8: 127, torch.uint8: 255}  # what a block's largest number is stored as
INFINITE_LEVEL = 0x7F800000 >> DROPPED_BITS  # the level of infinities; those of NaN are no smaller
_PIECE = 2**16  # numbers that are rounded at a time: they stay in the cache


def join_master(high: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 numbers of split masters."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low_bits).view(torch.float32)


def split_master_(number: Tensor, high: Tensor, low_bits: Tensor) -> None:
    """Split fp32 numbers into `high`, bf16, and `low_bits`, int16."""
    bits = number.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low_bits.copy_(bits - (upper << 16))
    high.view(torch.int16).copy_(upper)


def stochastic_round_(number: Tensor, rounded: Tensor, seed: int) -> None:
    """Round fp32 numbers of 0 or more stochastically into a bf16 tensor."""
    bits, into = number.flatten().view(torch.int32), rounded.view(torch.int16).flatten()
    for begin in range(0, len(bits), _PIECE):
        piece = bits[begin : begin + _PIECE]
        random = _hash(begin, len(piece), seed, number.device) & 0xFFFF
        into[begin : begin + _PIECE] = (piece + random.to(torch.int32)) >> 16


def zero_block_absmax(number: Tensor) -> Tensor:
    """Zeros for the `block_absmax` of a tensor of this size."""
    return torch.zeros(-(-number.numel() // BLOCK), dtype=torch.int16, device=number.device)


def quantize_(
    number: Tensor, quantized: Tensor, block_absmax: Tensor, seed: int | None = None
) -> None:
    """Quantize fp32 numbers to 8 bits: stochastically, or without a seed to the nearest.

    For uint8 the numbers must be 0 or more.
    """
    bits, into = number.flatten().view(torch.int32), quantized.view(-1)
    signed, largest = quantized.dtype == torch.int8, MAX_QUANTIZED[quantized.dtype]
    for begin in range(0, len(bits), _PIECE):
        piece = bits[begin : begin + _PIECE]
        if seed is None:
            added: Tensor | int = 1 << (DROPPED_BITS - 1)
        else:
            # The two moments of a place are rounded by different halves of its hash.
            random = _hash(begin, len(piece), seed, number.device)
            half = random >> 16 if signed else random & 0xFFFF
            added = (half << (DROPPED_BITS - 16)).to(torch.int32)
        levels = ((piece & 0x7FFFFFFF) + added) >> DROPPED_BITS
        blocks = F.pad(levels, (0, -len(levels) % BLOCK)).view(-1, BLOCK)
        top = blocks.amax(1, keepdim=True)
        value = (blocks - top + largest).clamp_min_(0 if signed else 1).mul_(blocks > 0)
        value = value.flatten()[: len(levels)]
        into[begin : begin + _PIECE] = torch.where(piece < 0, -value, value) if signed else value
        block_absmax[begin // BLOCK : (begin + len(piece) - 1) // BLOCK + 1] = top.flatten()


def dequantize(
    quantized: Tensor, block_absmax: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers in fp32, or in bf16, which holds them exactly."""
    number = torch.empty(quantized.shape, dtype=dtype, device=quantized.device)
    into, flat, largest = number.view(-1), quantized.view(-1), MAX_QUANTIZED[quantized.dtype]
    for begin in range(0, len(flat), _PIECE):
        value = flat[begin : begin + _PIECE].to(torch.int32)
        top = block_absmax[begin // BLOCK : (begin + len(value) - 1) // BLOCK + 1].to(torch.int32)
        offset = top.repeat_interleave(BLOCK)[: len(value)] - largest
        levels = (value.abs() + offset).mul_(value != 0)
        magnitude = (levels << DROPPED_BITS).view(torch.float32)
        into[begin : begin + _PIECE] = torch.where(value < 0, -magnitude, magnitude)
    return number


def _hash(begin: int, count: int, seed: int, device: torch.device) -> Tensor:
    """32 random bits for each place, in int64: int32 has no unsigned shift."""
    x = (torch.arange(begin, begin + count, device=device) * GOLDEN + seed) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * MIX[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * MIX[1]) & 0xFFFFFFFF
    return x ^ (x >> 16)
