"""AdamW against torch.optim.AdamW and against the formula in float64."""

import pytest
import torch

from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.optim.optimizer import Optimizer, clip_factor, squared_norm


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "norm.weight": (5,), "empty": (0, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(weight.shape, generator=generator) for name, weight in weights().items()
    }


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
            moved = (
                first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            )
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


def test_split_masters_equal_fp32() -> None:
    """Split masters have exactly the values of fp32 masters."""
    fp32, high = weights(), {name: weight.to(torch.bfloat16) for name, weight in weights().items()}
    low = {name: torch.empty_like(weight, dtype=torch.int16) for name, weight in fp32.items()}
    for name, weight in fp32.items():
        split_master_(weight, high[name], low[name])
    one, other = Optimizer(fp32, OptimizerConfig()), Optimizer(high, OptimizerConfig(), low)
    for step in range(1, 11):
        one.step(gradients(step), 1e-3, 0.5)
        other.step(gradients(step), 1e-3, 0.5)
    for name, weight in fp32.items():
        assert torch.equal(join_master(high[name], low[name]), weight)
        assert torch.equal(one.exp_avg_sq[name], other.exp_avg_sq[name])


def test_bf16_squares_shrink() -> None:
    """With beta_2 0.999, rounding to the nearest would never let an average shrink."""
    weight = {"a": torch.zeros(2000)}
    optimizer = Optimizer(weight, OptimizerConfig(moments_dtype="bf16", beta_2=0.999))
    optimizer.step({"a": torch.ones(2000)}, 0.0, 1.0)
    before = optimizer.exp_avg_sq["a"].float().mean().item()
    for _ in range(300):
        optimizer.step({"a": torch.zeros(2000)}, 0.0, 1.0)
    # 2,000 random walks of 300 steps of at most 2^-8: within 1 %.
    assert optimizer.exp_avg_sq["a"].float().mean().item() == pytest.approx(
        before * 0.999**300, rel=0.01
    )


def test_8_bit_squares_shrink() -> None:
    """As for bf16. The mean of 2,000 walks of 300 steps of at most 2^-3 is uncertain by 1 %."""
    weight = {"a": torch.zeros(2000)}
    optimizer = Optimizer(weight, OptimizerConfig(moments_dtype="int8", beta_2=0.999))
    optimizer.step({"a": torch.ones(2000)}, 0.0, 1.0)
    with optimizer.moments() as (_, before):
        begin = before["a"].float().mean().item()
    for _ in range(300):
        optimizer.step({"a": torch.zeros(2000)}, 0.0, 1.0)
    with optimizer.moments() as (first, after):
        assert after["a"].float().mean().item() == pytest.approx(begin * 0.999**300, rel=0.03)
        assert first["a"].abs().max() < 1e-12  # 0.9^300


def steep(step: int) -> torch.Tensor:
    """Gradients of 6 · 100 weights over six powers of ten, tiny ones, and a last row of zeros."""
    generator = torch.Generator().manual_seed(step)
    gradient = torch.randn(6, 100, generator=generator)
    gradient[:3] *= torch.logspace(-6, 0, 100)  # within one block
    gradient[3] *= 1e-15
    gradient[4] *= 1e-30  # their squares are 0 in fp32
    gradient[5] = 0
    return gradient


def test_an_update_with_8_bits_is_an_update_in_float64() -> None:
    """From dequantized moments: weights equal up to fp32, new moments up to one level."""
    config = OptimizerConfig(moments_dtype="int8", weight_decay=0.1, beta_2=0.95)
    weight = {"a": torch.randn(6, 100, generator=torch.Generator().manual_seed(0))}
    optimizer = Optimizer(weight, config)
    for step in range(1, 31):
        with optimizer.moments() as (first, second):
            m, v, w = first["a"].double(), second["a"].double(), weight["a"].double()
        gradient = steep(step).double() * 0.5
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        w = w - 1e-2 * (m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * w)
        optimizer.step({"a": steep(step)}, 1e-2, 0.5)
        assert ((weight["a"] - w).abs() <= 3e-7 * w.abs() + 1e-8).all()
        with optimizer.moments() as (first, second):
            for exact, found, reach in ((m, first["a"], 2.0**-15), (v, second["a"], 2.0**-31)):
                # Of the largest of all blocks, which is that of each block or more.
                bottom = exact.abs().max() * reach
                assert ((found - exact).abs() <= exact.abs() / 8 + bottom).all(), step
                assert (found[5] == 0).all()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_where_the_gradient_was_always_zero_nothing_moves(moments: str) -> None:
    """No infinity or NaN either, with gradients of all sizes in the same block."""
    start = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    weight = {"a": start.clone()}
    optimizer = Optimizer(
        weight, OptimizerConfig.model_validate({"moments_dtype": moments, "weight_decay": 0.0})
    )
    for step in range(1, 51):
        optimizer.step({"a": steep(step)}, 1e-2, 1.0)
    assert torch.equal(weight["a"][5], start[5]) and not torch.equal(weight["a"][:3], start[:3])
    assert weight["a"].isfinite().all()
    # |m| ≤ (1 - β1) / sqrt((1 - β2) (1 - β1²/β2)) sqrt(v), 7.3, by Cauchy and Schwarz, and after
    # few steps at most sqrt(steps). Levels are off by an eighth each. What is below a block's range
    # is divided by more than it should be.
    assert ((weight["a"] - start).abs() <= 50 * 1e-2 * 7.3 * 1.2).all()


def test_8_bit_updates_are_near() -> None:
    """Weights of a wide block follow fp32's within 12 % a step, with independent errors."""
    start = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    moved = {}
    for moments in ("fp32", "int8"):
        weight = {"a": start.double().float()}
        optimizer = Optimizer(
            weight, OptimizerConfig.model_validate({"moments_dtype": moments, "weight_decay": 0.0})
        )
        for step in range(1, 101):
            optimizer.step({"a": steep(step)}, 1e-3, 1.0)
        moved[moments] = (weight["a"] - start)[:3]
    # A block's largest gradients are about 1; those below 2^-15 of it, or 3e-5, are lost, and their
    # weights stand still for a while.
    for columns, bound in (
        (slice(40, 60), 0.1),
        (slice(60, 80), 0.1),
        (slice(80, 100), 0.1),
    ):  # from 2e-4, 4e-3 and 6e-2 on
        error = (moved["int8"] - moved["fp32"])[:, columns].norm() / moved["fp32"][
            :, columns
        ].norm()
        assert 0 < error < bound, (columns, error)
    assert moved["int8"].norm() < 1.02 * moved["fp32"].norm()


def test_moments_move_between_dtypes() -> None:
    """8-bit moments are read exactly into any other dtype, and back into the same bytes."""
    optimizers = {
        moments: Optimizer(weights(), OptimizerConfig(moments_dtype=moments))
        for moments in ("fp32", "bf16", "int8")
    }
    for step in range(1, 6):
        optimizers["int8"].step(gradients(step), 1e-2, 1.0)
    codes = {name: code.clone() for name, code in optimizers["int8"].exp_avg_sq.items()}
    assert codes["a.weight"].any() and codes["a.weight"].dtype == torch.uint8
    for one, other in (("int8", "fp32"), ("fp32", "bf16"), ("bf16", "int8")):
        if other == "int8":
            optimizers["int8"].exp_avg_sq["a.weight"].zero_()
        with optimizers[one].moments() as source, optimizers[other].moments(changed=True) as target:
            for saved, read in zip(source, target, strict=True):
                for name in saved:
                    read[name].copy_(saved[name])
    for name, code in optimizers["int8"].exp_avg_sq.items():
        assert torch.equal(code, codes[name])
    assert optimizers["int8"].exp_avg_sq["empty"].shape == (0, 5)


def test_norm_and_clipping() -> None:
    parts = {"a": torch.full((3,), 2.0), "b": torch.full((2, 2), -1.0), "c": torch.empty(0)}
    assert squared_norm(parts, dict.fromkeys(parts, 1)).item() == pytest.approx(
        16, rel=1e-6
    )  # norms are fp32
    assert squared_norm(parts, {"a": 2, "b": 1, "c": 1}).item() == pytest.approx(10, rel=1e-6)
    assert clip_factor(4.0, 1.0) == pytest.approx(1 / (4 + 1e-6))
    assert clip_factor(0.5, 1.0) == 1 and clip_factor(4.0, None) == 1
