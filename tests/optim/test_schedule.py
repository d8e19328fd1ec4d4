"""The learning rate against values of the formula, computed by other means."""

from typing import Any

import pytest

from fast_llm.config.train import LearningRateConfig
from fast_llm.optim.schedule import learning_rate

RECIPE = LearningRateConfig(
    base=1e-4, minimum=1e-5, decay_style="cosine", decay_iterations=100_000, warmup_iterations=2000
)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (1, 5.0e-8),
        (1000, 5.0e-5),
        (2000, 1.0e-4),
        (26_500, 8.681980515339464e-5),  # 1e-5 + 9e-5 · (1 + cos(π/4)) / 2
        (51_000, 5.5e-5),
        (75_500, 2.3180194846605364e-5),  # 1e-5 + 9e-5 · (1 - cos(π/4)) / 2
        (100_000, 1.0e-5),
        (123_456, 1.0e-5),
    ],
)
def test_the_recipes_learning_rates(update: int, expected: float) -> None:
    assert learning_rate(update, RECIPE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "power", "expected"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 1.0, 0.75),
        ("power", 2.0, 0.9375),
        ("linear", 2.0, 0.9375),
    ],
)
def test_other_styles(style: Any, power: float, expected: float) -> None:
    config = LearningRateConfig(
        base=1.0,
        minimum=0.0,
        decay_style=style,
        decay_power=power,
        decay_iterations=50,
        warmup_iterations=10,
    )
    assert learning_rate(20, config) == pytest.approx(expected, rel=1e-12)  # a quarter of the decay
    assert learning_rate(5, config) == 0.5
    assert learning_rate(99, config) == (1.0 if style == "constant" else 0.0)
