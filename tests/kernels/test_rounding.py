"""Split masters, stochastic rounding, and 8-bit quantization."""

import pytest
import torch

from fast_llm.kernels.rounding import (
    BLOCK,
    MAX_QUANTIZED,
    dequantize,
    join_master,
    quantize_,
    split_master_,
    stochastic_round_,
    zero_block_absmax,
)

KINDS = [torch.int8, torch.uint8]


def test_split_masters_are_exact() -> None:
    """All upper 16 bits but NaN, each with some of the lower 16 bits."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = ((upper << 16) + lower).view(torch.float32)
        numbers = numbers[numbers.isfinite()]
        high = torch.empty_like(numbers, dtype=torch.bfloat16)
        low = torch.empty_like(numbers, dtype=torch.int16)
        split_master_(numbers, high, low)
        assert torch.equal(join_master(high, low).view(torch.int32), numbers.view(torch.int32))
        nearest = numbers.to(torch.bfloat16)
        # Ties round away from zero here, and to even in PyTorch.
        assert torch.equal(high.view(torch.int16), nearest.view(torch.int16)) == (lower != 0x8000)
        assert ((high.float() - numbers).abs() == (nearest.float() - numbers).abs())[
            nearest.isfinite()
        ].all()


def test_stochastic_rounding_is_right_on_average() -> None:
    numbers = torch.tensor([1.0, 1.001, 1.0039, 3.1e-5, 0.0]).repeat_interleave(40_000)
    sums = torch.zeros_like(numbers, dtype=torch.float64)
    for seed in range(25):
        rounded = torch.empty_like(numbers, dtype=torch.bfloat16)
        stochastic_round_(numbers, rounded, seed)
        assert ((rounded.float() - numbers).abs() <= 2**-7 * numbers).all()
        sums += rounded
    # A million roundings of at most 2^-7: the mean's deviation is below 2^-8 / 1000.
    means = sums.view(5, -1).mean(1) / 25
    assert means.tolist() == pytest.approx([1.0, 1.001, 1.0039, 3.1e-5, 0.0], rel=2e-5)
    first, again, other = (torch.empty_like(numbers, dtype=torch.bfloat16) for _ in range(3))
    for rounded, seed in ((first, 1), (again, 1), (other, 2)):
        stochastic_round_(numbers, rounded, seed)
    assert torch.equal(first, again) and not torch.equal(first, other)


def wild(count: int, kind: torch.dtype, spread: float = 8.0) -> torch.Tensor:
    """Numbers of very different sizes, some of them 0; no negative numbers for uint8."""
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randn(count, generator=generator) * torch.exp(
        spread * torch.randn(count, generator=generator)
    )
    numbers[::7] = 0
    return numbers if kind == torch.int8 else numbers.abs()


def packed(
    numbers: torch.Tensor, kind: torch.dtype, seed: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized numbers, block_absmax, and the dequantized numbers."""
    codes, largest = torch.empty(numbers.shape, dtype=kind), zero_block_absmax(numbers)
    quantize_(numbers, codes, largest, seed)
    return codes, largest, dequantize(codes, largest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 2**16 + 5])
def test_quantizing_again_gives_the_same_bytes(
    kind: torch.dtype, seed: int | None, count: int
) -> None:
    """The bf16 numbers of a checkpoint also give the same bytes."""
    codes, largest, numbers = packed(wild(count, kind), kind, seed)
    stored = dequantize(codes, largest, torch.bfloat16)
    assert torch.equal(stored.float(), numbers)
    again = packed(stored.float(), kind)
    assert torch.equal(again[0], codes) and torch.equal(again[1], largest)


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantized_number_and_absmax(kind: torch.dtype) -> None:
    """Each finite block_absmax, with each quantized number above 0."""
    full = MAX_QUANTIZED[kind]
    for top in range(0x7F8):
        some = torch.arange(min(max(full - top + 1, 1), full), full)
        block = torch.cat(
            [torch.tensor([full if top else 0, 0]), some, -some if kind == torch.int8 else some]
        )
        # Each block begins with its largest number.
        parts = block[1:].split(BLOCK - 1)
        codes = torch.cat([torch.cat([block[:1], part]) for part in parts]).to(kind)
        largest = torch.full((len(parts),), top, dtype=torch.int16)
        again = packed(dequantize(codes, largest, torch.bfloat16).float(), kind)
        assert torch.equal(again[0], codes) and torch.equal(again[1], largest), top


@pytest.mark.parametrize("kind", KINDS)
def test_other_blocks_hold_the_same_numbers(kind: torch.dtype) -> None:
    """Other blocks have the same numbers, unless one is too small for its new block."""
    numbers = packed(wild(5000, kind, spread=1.0), kind, seed=5)[2]
    for begin, end in ((1, 5000), (37, 4000), (200, 201), (90, 90)):
        assert torch.equal(packed(numbers[begin:end], kind)[2], numbers[begin:end])


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_error(kind: torch.dtype) -> None:
    """At most 1/16 of a power of two.

    Below a block's range int8 has 0, uint8 its smallest number.
    """
    numbers = wild(2**16 + 5, kind)
    codes, _, found = packed(numbers, kind)
    largest = torch.cat([part.abs().max().expand(len(part)) for part in numbers.split(BLOCK)])
    within = numbers.abs() > largest * 2.0 ** (-14 if kind == torch.int8 else -30)
    assert (
        within.float().mean() > 0.05
        and ((found - numbers).abs() <= numbers.abs() / 17 + 1e-45)[within].all()
    )
    assert (found[numbers == 0] == 0).all()
    below = (numbers != 0) & (numbers.abs() < largest * 2.0 ** (-16 if kind == torch.int8 else -32))
    assert below.any() and (codes[below] == (0 if kind == torch.int8 else 1)).all()
    tiny = torch.tensor([1e-38, 1e-40, 1e-45, 0.0]).repeat(50)  # where fp32 itself has fewer bits
    error = (packed(tiny, kind)[2] - tiny).abs()
    assert (error <= 2.0**-130 + tiny / 17).all() and packed(torch.zeros(300), kind)[2].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_quantization_is_right_on_average(kind: torch.dtype) -> None:
    numbers = torch.tensor([1.0, 1.01, 0.99, 1.12, 3.1e-3, 0.0]).repeat_interleave(128 * 200)
    if kind == torch.int8:
        numbers[::2] *= -1
    sums = torch.zeros_like(numbers, dtype=torch.float64)
    for seed in range(25):
        found = packed(numbers, kind, seed)[2]
        assert ((found - numbers).abs() <= numbers.abs() / 8).all()
        sums += found * numbers.sign()
    # 640,000 roundings of 2^-3 at most: the mean's deviation is below 2^-4 / 800.
    assert (sums.view(6, -1).mean(1) / 25).tolist() == pytest.approx(
        [1.0, 1.01, 0.99, 1.12, 3.1e-3, 0.0], rel=4e-4
    )


def test_random_numbers_of_one_place_are_independent() -> None:
    """The two moments of a weight are rounded independently."""
    numbers = torch.full((100_000,), 1.06)
    first, second = (packed(numbers, kind, seed=1)[2] > 1.06 for kind in KINDS)
    shares = [share.float().mean().item() for share in (first, second, first & second)]
    assert all(0.4 < share < 0.6 for share in shares[:2])
    assert shares[2] == pytest.approx(shares[0] * shares[1], abs=0.01)  # six deviations
