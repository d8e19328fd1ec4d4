"""fp32 in two halves, and rounding by chance."""

import pytest
import torch

from fast_llm.model.rounding import join, round_by_chance_, split_


def test_halves_lose_nothing() -> None:
    """Every pattern of the upper 16 bits with some of the lower ones; infinities too, and all that is not NaN."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = ((upper << 16) + lower).view(torch.float32)
        numbers = numbers[numbers.isfinite()]
        high = torch.empty_like(numbers, dtype=torch.bfloat16)
        low = torch.empty_like(numbers, dtype=torch.int16)
        split_(numbers, high, low)
        assert torch.equal(join(high, low).view(torch.int32), numbers.view(torch.int32))
        nearest = numbers.to(torch.bfloat16)
        # Halves go away from zero here, and to even there.
        assert torch.equal(high.view(torch.int16), nearest.view(torch.int16)) == (lower != 0x8000)
        assert ((high.float() - numbers).abs() == (nearest.float() - numbers).abs())[nearest.isfinite()].all()


def test_by_chance_is_right_on_average() -> None:
    numbers = torch.tensor([1.0, 1.001, 1.0039, 3.1e-5, 0.0]).repeat_interleave(40_000)
    sums = torch.zeros_like(numbers, dtype=torch.float64)
    for seed in range(25):
        rounded = torch.empty_like(numbers, dtype=torch.bfloat16)
        round_by_chance_(numbers, rounded, seed)
        assert ((rounded.float() - numbers).abs() <= 2**-7 * numbers).all()
        sums += rounded
    # A million roundings of at most 2^-7: the mean's deviation is below 2^-8 / 1000.
    means = sums.view(5, -1).mean(1) / 25
    assert means.tolist() == pytest.approx([1.0, 1.001, 1.0039, 3.1e-5, 0.0], rel=2e-5)
    first, again, other = (torch.empty_like(numbers, dtype=torch.bfloat16) for _ in range(3))
    for rounded, seed in ((first, 1), (again, 1), (other, 2)):
        round_by_chance_(numbers, rounded, seed)
    assert torch.equal(first, again) and not torch.equal(first, other)
