"""The fp16 loss scale, step by step."""

from fast_llm.config.optimizer import GradientScalerConfig
from fast_llm.optim.loss_scale import LossScale


def test_it_halves_and_doubles() -> None:
    scale = LossScale(GradientScalerConfig(initial=8, minimum=2, window=3, hysteresis=2), "fp16")
    seen = []
    for finite in (False, False, False, True, True, True, False, False, False, False, False):
        scale.update(finite)
        seen.append(scale.value)
    # The first halving takes two overflows, and so does the next one after a doubling.
    assert seen == [8, 4, 2, 2, 2, 4, 4, 2, 2, 2, 2]
    assert scale.exhausted


def test_state_goes_through_a_checkpoint() -> None:
    config = GradientScalerConfig(initial=8, window=3)
    one, other = LossScale(config, "fp16"), LossScale(config, "fp16")
    for finite in (True, False, True, True):
        one.update(finite)
    other.load(one.state())
    for finite in (True, True, False, False, False):
        one.update(finite)
        other.update(finite)
        assert one.state() == other.state()


def test_bf16_and_constants_do_not_move() -> None:
    for scale, value in (
        (LossScale(GradientScalerConfig(), "bf16"), 1.0),
        (LossScale(GradientScalerConfig(constant=64), "fp16"), 64),
    ):
        scale.update(False)
        assert scale.value == value and scale.exhausted
