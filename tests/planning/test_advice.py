"""The line of `fast-llm plan` that says what to change for more speed."""

import pytest

from fast_llm.planning.advice import speed_advice
from fast_llm.planning.devices import DEVICES
from fast_llm.planning.search import forecast_config, resolve_auto
from tests.planning.configs import LEVEL, LLAMA, config


def advice(*settings: str, processes: int = 8, device: str = "h100") -> tuple[str, str]:
    kind = DEVICES[device]
    found = resolve_auto(config([*LLAMA, *settings]), processes, kind.memory, "cuda")
    return speed_advice(found, processes, kind)


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ("model.multi_stage.compile_all=no", "model.multi_stage.compile_all=yes"),
        (f"{LEVEL}=block", f"{LEVEL}=none"),
        ("model.multi_stage.zero_stage=3", "model.multi_stage.zero_stage=2"),
    ],
)
def test_one_change(given: str, change: str) -> None:
    """It is undone alone, and the speed is that of a forecast with it."""
    moments = "optimizer.moments_dtype=bf16"  # `auto` would differ with the memory
    label, words = advice(given, moments)
    rate = forecast_config(config([*LLAMA, moments, given, change]), 8, DEVICES["h100"])
    assert rate.fits
    assert label == "Faster"
    assert words.startswith(f"{change}: {rate.gpu_tokens_per_second:,.0f} tokens/s a GPU (+")


def test_nothing_to_change() -> None:
    assert advice() == ("Faster", "nothing to change in this layout, by forecast")


def test_zero_before_tensor_parallelism() -> None:
    """Where the model fits with ZeRO alone, that is faster."""
    words = advice("model.distributed.tensor_parallel=2", "batch.micro_batch_size=1")[1]
    assert words.startswith("model.distributed.tensor_parallel=1 batch.micro_batch_size=2: ")


def test_what_does_not_fit() -> None:
    """What makes it fit is named; else that nothing does."""
    label, words = advice("batch.micro_batch_size=16")
    assert label == "To fit"
    changes = words.partition(": ")[0].split()
    assert forecast_config(config([*LLAMA, *changes]), 8, DEVICES["h100"]).fits
    assert advice(processes=1) == (
        "To fit",
        "no micro-batch, recomputation or ZeRO stage is enough, by forecast",
    )
