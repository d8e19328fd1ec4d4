"""AdamW against torch.optim.AdamW and against the formula in float64."""

import pytest
import torch

from fast_llm.config.train import OptimizerConfig
from fast_llm.model.rounding import join, split_
from fast_llm.optim.optimizer import Optimizer, clip_factor, squared_norm


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "norm.weight": (5,), "empty": (0, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in weights().items()}


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_equals_the_formula_in_float64(factor: float) -> None:
    config = OptimizerConfig(weight_decay=0.1, beta_1=0.9, beta_2=0.95)
    found = weights()
    optimizer = Optimizer(found, config)
    expected = {name: weight.double() for name, weight in weights().items()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step in range(1, 21):
        rate = 1e-2 / step
        optimizer.step(gradients(step), rate, factor)
        for name, gradient in gradients(step).items():
            g = gradient.double() * factor
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            moved = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.1 if name == "a.weight" else 0.0
            expected[name] = expected[name] - rate * (moved + decay * expected[name])
    for name, weight in found.items():
        # Twenty updates, each rounded once or twice in fp32 (6e-8).
        assert (weight - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_only_matrices_decay() -> None:
    found = weights()
    optimizer = Optimizer(found, OptimizerConfig(weight_decay=0.5))
    optimizer.step({name: torch.zeros_like(weight) for name, weight in found.items()}, 0.1, 1.0)
    for name, before in weights().items():
        assert torch.equal(found[name], before * 0.95 if name == "a.weight" else before), name


def test_bf16_moments_are_near() -> None:
    exact, rounded = weights(), weights()
    one = Optimizer(exact, OptimizerConfig())
    other = Optimizer(rounded, OptimizerConfig(moments_dtype="bf16"))
    assert other.exp_avg["a.weight"].dtype == torch.bfloat16
    for step in range(1, 11):
        one.step(gradients(step), 1e-2, 1.0)
        other.step(gradients(step), 1e-2, 1.0)
    moved = (exact["a.weight"] - weights()["a.weight"]).norm()
    # bf16 rounds to 8 bits: an update's direction is kept to a per cent.
    assert 0 < (exact["a.weight"] - rounded["a.weight"]).norm() < 0.02 * moved


def test_halves_are_fp32() -> None:
    """Weights in two halves go through the very numbers that fp32 weights do."""
    whole, high = weights(), {name: weight.to(torch.bfloat16) for name, weight in weights().items()}
    low = {name: torch.empty_like(weight, dtype=torch.int16) for name, weight in whole.items()}
    for name, weight in whole.items():
        split_(weight, high[name], low[name])
    one, other = Optimizer(whole, OptimizerConfig()), Optimizer(high, OptimizerConfig(), low)
    for step in range(1, 11):
        one.step(gradients(step), 1e-3, 0.5)
        other.step(gradients(step), 1e-3, 0.5)
    for name, weight in whole.items():
        assert torch.equal(join(high[name], low[name]), weight)
        assert torch.equal(one.exp_avg_sq[name], other.exp_avg_sq[name])


def test_bf16_squares_shrink() -> None:
    """With beta_2 0.999 an average that is rounded to the nearest would never get smaller again."""
    weight = {"a": torch.zeros(2000)}
    optimizer = Optimizer(weight, OptimizerConfig(moments_dtype="bf16", beta_2=0.999))
    optimizer.step({"a": torch.ones(2000)}, 0.0, 1.0)
    before = optimizer.exp_avg_sq["a"].float().mean().item()
    for _ in range(300):
        optimizer.step({"a": torch.zeros(2000)}, 0.0, 1.0)
    # 2,000 random walks of 300 steps of at most 2^-8 each: within 1 %.
    assert optimizer.exp_avg_sq["a"].float().mean().item() == pytest.approx(before * 0.999**300, rel=0.01)


def test_norm_and_clipping() -> None:
    parts = {"a": torch.full((3,), 2.0), "b": torch.full((2, 2), -1.0), "c": torch.empty(0)}
    assert squared_norm(parts, dict.fromkeys(parts, 1)).item() == pytest.approx(16, rel=1e-6)  # norms are fp32
    assert squared_norm(parts, {"a": 2, "b": 1, "c": 1}).item() == pytest.approx(10, rel=1e-6)
    assert clip_factor(4.0, 1.0) == pytest.approx(1 / (4 + 1e-6))
    assert clip_factor(0.5, 1.0) == 1 and clip_factor(4.0, None) == 1
