"""The learning rate against the published formulas, written here in the terms of their sources."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from fast_llm.config.learning_rate import LearningRateConfig, RateStage
from fast_llm.optim.schedule import borders, learning_rate, likely_mistakes, rise
from tests.config.common import load, wrong

RECIPE = LearningRateConfig(
    base=1e-4, minimum=1e-5, decay_style="cosine", decay_iterations=100_000, warmup_iterations=2000
)


def close(expected: float) -> Any:
    """Equal but for the rounding of a few float64 operations, 1e-12 of the peak rate (1e-4 here).

    Near the end of a decay two numbers of the size of the peak cancel.
    """
    return pytest.approx(expected, rel=1e-12, abs=1e-16)


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
    assert learning_rate(update, RECIPE) == close(expected)


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
    assert learning_rate(20, config) == close(expected)  # a quarter of the decay
    assert learning_rate(5, config) == 0.5
    assert learning_rate(99, config) == (1.0 if style == "constant" else 0.0)


def test_styles_of_earlier_versions_keep_their_bits() -> None:
    """Runs that resume continue with the rates that they had."""

    def earlier(t: int, base: float, low: float, warmup: int, end: int, power: float) -> float:
        if t < warmup:
            return base * t / warmup
        if t >= end:
            return low
        done = ((t - warmup) / (end - warmup)) ** power
        return base + 0.5 * (1 - math.cos(math.pi * done)) * (low - base)

    for power in (1.0, 0.7, 2.0):
        config = RECIPE.model_copy(update={"decay_power": power})
        for update in range(1, 110_000, 97):
            assert learning_rate(update, config) == earlier(
                update, 1e-4, 1e-5, 2000, 100_000, power
            )
        linear = config.model_copy(update={"decay_style": "linear"})
        update = 54_321
        done = ((update - 2000) / (100_000 - 2000)) ** power
        assert learning_rate(update, linear) == 1e-4 + done * (1e-5 - 1e-4)


# The decay of Hägele et al. 2024 (arXiv 2405.18392), section 3, for a final rate of 0: n is the
# step, N the last step, D the steps of the decay.
HAEGELE: dict[str, Callable[[int, int, int], float]] = {
    "linear": lambda n, N, D: 1 - (n - (N - D)) / D,
    "1-sqrt": lambda n, N, D: 1 - math.sqrt((n - (N - D)) / D),
    "cosine": lambda n, N, D: (1 + math.cos(math.pi * (n - (N - D)) / D)) / 2,
}


@pytest.mark.parametrize("shape", HAEGELE)
@pytest.mark.parametrize("minimum", [0.0, 3e-6])
@pytest.mark.parametrize("cooldown", [200, 0.2])
def test_wsd_is_that_of_its_paper(shape: Any, minimum: float, cooldown: float) -> None:
    peak, warmup, last, decay = 3e-4, 50, 1000, 200
    config = LearningRateConfig(
        base=peak,
        minimum=minimum,
        decay_style="wsd",
        decay_iterations=last,
        warmup_iterations=warmup,
        cooldown=cooldown,
        cooldown_style=shape,
    )
    for n in range(1, last + 1):
        if n < warmup:
            expected = n / warmup * peak
        elif n <= last - decay:
            expected = peak
        else:
            expected = minimum + (peak - minimum) * HAEGELE[shape](n, last, decay)
        assert learning_rate(n, config) == close(expected), n
    assert learning_rate(last, config) == learning_rate(last + 500, config) == minimum


def test_inverse_sqrt_is_that_of_its_paper() -> None:
    """Vaswani et al. 2017, equation 3: d^-0.5 · min(step^-0.5, step · warmup^-1.5)."""
    warmup, width = 400, 512
    config = LearningRateConfig(
        base=width**-0.5 * warmup**-0.5, decay_style="inverse_sqrt", warmup_iterations=warmup
    )
    for step in range(1, 20_000, 7):
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert learning_rate(step, config) == close(expected), step


def test_inverse_sqrt_has_a_floor_and_a_cooldown() -> None:
    """The floor as in Megatron-LM; the linear cooldown as in Zhai et al. 2022 (arXiv 2106.04560):
    times (end - step) / cooldown.
    """
    config = LearningRateConfig(
        base=1.0,
        decay_style="inverse_sqrt",
        warmup_iterations=10,
        decay_iterations=1000,
        cooldown=360,
    )
    begun = math.sqrt(10 / 640)
    assert learning_rate(640, config) == close(begun)
    for step in range(640, 1001):
        assert learning_rate(step, config) == close(begun * (1000 - step) / 360)
    floor = config.model_copy(update={"minimum": 0.5, "cooldown": None, "decay_iterations": None})
    assert learning_rate(40, floor) == 0.5
    assert learning_rate(39, floor) == math.sqrt(10 / 39)
    assert learning_rate(10**9, floor) == 0.5


def stages(*every: dict[str, Any]) -> LearningRateConfig:
    return LearningRateConfig(stages=[RateStage(**one) for one in every])


def test_stages_are_those_of_composable_schedulers() -> None:
    """An infinite schedule (Singh et al. 2025): warmup, decay, constant, final decay.

    Within a piece as in OLMo-core's ComposableScheduler: linear is start + (end - start) · c,
    cosine end + (start - end) · (1 + cos(π c)) / 2, with c the steps since the piece began over
    its length.
    """
    config = stages(
        {"until": 100, "shape": "linear", "end_rate": 4e-4},
        {"until": 500, "shape": "cosine", "end_rate": 1e-4},
        {"until": 800, "shape": "constant"},
        {"until": 1000, "shape": "1-sqrt", "end_rate": 1e-6},
    )
    for step in range(1, 1201):
        if step <= 100:
            expected = 0.0 + (4e-4 - 0.0) * (step / 100)
        elif step <= 500:
            expected = 1e-4 + (4e-4 - 1e-4) * (1 + math.cos(math.pi * (step - 100) / 400)) / 2
        elif step <= 800:
            expected = 1e-4
        else:
            expected = 1e-6 + (1e-4 - 1e-6) * (1 - math.sqrt(min(1, (step - 800) / 200)))
        assert learning_rate(step, config) == close(expected), step
    assert learning_rate(1000, config) == learning_rate(9999, config) == 1e-6  # to the bit


def test_a_stage_may_begin_with_another_rate() -> None:
    config = stages(
        {"until": 10, "shape": "constant", "start_rate": 1e-3},
        {"until": 20, "shape": "constant", "start_rate": 1e-5},
        {"until": 30, "shape": "linear", "start_rate": 2e-4, "end_rate": 1e-4},
    )
    rates = [learning_rate(step, config) for step in (1, 10, 11, 20, 25, 30, 40)]
    assert rates == [1e-3, 1e-3, 1e-5, 1e-5, close(1.5e-4), 1e-4, 1e-4]


def test_stages_and_wsd_agree() -> None:
    wsd = LearningRateConfig(
        base=2e-4,
        minimum=1e-5,
        decay_style="wsd",
        decay_iterations=400,
        warmup_iterations=40,
        cooldown=0.25,
    )
    pieces = stages(
        {"until": 40, "shape": "linear", "end_rate": 2e-4},
        {"until": 300, "shape": "constant"},
        {"until": 400, "shape": "linear", "end_rate": 1e-5},
    )
    for step in range(1, 500):
        assert learning_rate(step, wsd) == close(learning_rate(step, pieces)), step
    assert [step for step, _ in borders(wsd)] == [step for step, _ in borders(pieces)]


def config_of(**settings: Any) -> LearningRateConfig:
    return LearningRateConfig(base=1e-4, **settings)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LearningRateConfig(), [(1, "constant")]),
        (
            RECIPE,
            [(1, "linear warmup"), (2000, "cosine"), (100_000, "constant")],
        ),
        (
            config_of(decay_style="power", decay_iterations=50, decay_power=2.0),
            [(1, "power 2"), (50, "constant")],
        ),
        (
            config_of(decay_style="wsd", decay_iterations=50, warmup_iterations=20, cooldown=30),
            [(1, "linear warmup"), (20, "linear cooldown"), (50, "constant")],
        ),
        (
            config_of(decay_style="inverse_sqrt", warmup_iterations=5),
            [(1, "linear warmup"), (5, "inverse square root")],
        ),
    ],
)
def test_borders(config: LearningRateConfig, expected: list[tuple[int, str]]) -> None:
    assert borders(config) == expected


DECAY = "optimizer.learning_rate.decay_iterations: "


@pytest.mark.parametrize(
    ("config", "train_iters", "expected"),
    [
        (RECIPE, 100_000, []),
        (RECIPE, 0, []),
        (LearningRateConfig(), 50, []),
        (config_of(decay_style="constant", decay_iterations=10), 50, []),
        (config_of(decay_style="inverse_sqrt", warmup_iterations=5), 50, []),
        (
            RECIPE,
            50_000,
            [
                DECAY + "the schedule ends at step 100000, but training.train_iters is 50000:"
                " training ends with the rate 5.644e-05"
            ],
        ),
        (
            RECIPE,
            150_000,
            [
                DECAY + "the schedule ends at step 100000: the later steps to"
                " training.train_iters 150000 have the rate 1e-05"
            ],
        ),
        (
            config_of(decay_style="wsd", decay_iterations=40, cooldown=10),
            50,
            [
                DECAY + "the schedule ends at step 40 with the rate 0: the later steps to"
                " training.train_iters 50 change nothing"
            ],
        ),
        (
            config_of(decay_iterations=40),
            50,
            [DECAY + "has no effect with decay_style: constant, the default"],
        ),
        (
            config_of(warmup_iterations=60),
            50,
            [
                "optimizer.learning_rate.warmup_iterations: given 60, above training.train_iters"
                " 50: the rate never reaches base"
            ],
        ),
        (
            stages(
                {"until": 10, "shape": "linear", "end_rate": 1e-3},
                {"until": 50, "shape": "linear", "start_rate": 1e-4, "end_rate": 0.0},
            ),
            50,
            ["optimizer.learning_rate.stages: the rate jumps from 0.001 to 0.0001 after step 10"],
        ),
    ],
)
def test_likely_mistakes(config: LearningRateConfig, train_iters: int, expected: list[str]) -> None:
    assert likely_mistakes(config, train_iters) == expected


def test_a_rate_that_rises_at_once_after_a_change() -> None:
    """As when a finished run is extended from its last checkpoint, after the cooldown."""
    wsd = config_of(decay_style="wsd", decay_iterations=60, cooldown=20)
    longer = config_of(decay_style="wsd", decay_iterations=90, cooldown=20)
    assert rise(wsd, longer, 40) == rise(wsd, wsd, 60) == rise(longer, wsd, 80) == ""
    assert rise(wsd, longer, 60) == (
        "optimizer.learning_rate: the rate rises from 0 to 0.0001 after update 60, because the"
        " schedule changed: continue from a checkpoint before the cooldown, or give the schedule"
        " another warmup with stages"
    )


def test_from_and_to_are_names_too() -> None:
    stages = "optimizer.learning_rate.stages=[{until: 9, shape: linear, from: 1e-5, to: 1e-4}]"
    found = load(stages).optimizer.learning_rate.stages
    assert found is not None
    (stage,) = found
    assert (stage.start_rate, stage.end_rate) == (1e-5, 1e-4)
    assert wrong(stages.replace("1e-4", "-1")) == [
        "optimizer.learning_rate.stages.0.to: given -1, must be a number of 0 or more or null"
    ]
    (both,) = wrong(stages.replace("to:", "end_rate: 1e-4, to:"))
    assert both.startswith("optimizer.learning_rate.stages.0.to: no such setting")
