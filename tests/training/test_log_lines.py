"""The lines of the log: what is in them, and that they fit a terminal."""

import math
from typing import Any

import pytest

from fast_llm.training.log_lines import evaluation_lines, training_line

TIME = "11-30 08:49:30 "
RECORD: dict[str, Any] = {
    "step": 12000,
    "train_iters": 100000,
    "phase": "training",
    "language_model_loss": 2.34562,
    "grad_norm": 0.12345,
    "learning_rate": 2.96e-5,
    "tokens_per_sec_per_gpu": 12345.6,
    "max_reserved": 72_960.0,
    "remaining_time": 11_520.0,
    "skipped_iters": 0,
    "nan_iters": 0,
    "spikes": 0,
    "data_wait_ms": 1.0,
    "step_time_ms": 1000.0,
}


def test_a_training_line() -> None:
    line = training_line(RECORD, 8)
    assert line == (
        "step  12000/100000  loss 2.3456  grad 0.123  lr 3.0e-5  98.8k tok/s  77GB  3h12m left"
    )
    cpu = {name: value for name, value in RECORD.items() if name != "max_reserved"}
    assert "  0.4GB  " in training_line(cpu | {"resident": 400.0}, 1)


@pytest.mark.parametrize("steps", [10, 100_000, 999_999])
@pytest.mark.parametrize("loss", [0.0001, 2.5, 11.9, 123.4, math.nan])
@pytest.mark.parametrize("norm", [0.0, 0.5, 12.3, 123.4, 5e9, math.nan, math.inf])
@pytest.mark.parametrize("rate", [1.0, 999.6, 123456.0, 9.9e7])
def test_a_training_line_fits_a_hundred_columns(
    steps: int, loss: float, norm: float, rate: float
) -> None:
    values = {"step": steps, "train_iters": steps, "language_model_loss": loss, "grad_norm": norm}
    for seconds in (0, 59, 600, 35_999, 86_399, 1e7):
        more = {"tokens_per_sec_per_gpu": rate, "remaining_time": seconds}
        assert len(TIME + training_line(RECORD | values | more, 1)) <= 100


def test_what_is_unusual_follows() -> None:
    more = {"skipped_iters": 2, "nan_iters": 1, "spikes": 3, "data_wait_ms": 345.0}
    assert training_line(RECORD | more, 1).endswith(
        " left  2 skipped  1 not finite  3 spikes  34% waiting for data"
    )
    assert training_line(RECORD | {"spikes": 1}, 1).endswith(" left  1 spike")
    nothing = {"language_model_loss": math.nan, "grad_norm": math.nan, "learning_rate": 0.0}
    assert "  loss nan  grad nan  lr 0  " in training_line(RECORD | nothing, 1)


def test_losses_by_source_follow() -> None:
    sources = {"code": {"loss": 1.23456}, "prose": {"loss": None}}
    assert training_line(RECORD | {"sources": sources}, 1).endswith(" left  (code 1.2346, prose -)")
    many = {f"source {number}": {"loss": 1.0} for number in range(7)}
    assert training_line(RECORD | {"sources": many}, 1) == training_line(RECORD, 1)
    values = {"step": 5, "train_iters": 10, "phase": "validation", "tokens": 81920, "seconds": 3.21}
    losses = {"language_model_loss": 2.3456, "prose_loss": 10.5}
    further = {"sources": sources, "bits_per_byte": 0.81234, "prose_bits_per_byte": 3.5}
    assert evaluation_lines(values | further, losses) == [
        "step  5/10  validation loss 2.3456  perplexity 10.44  0.812 bits/byte  81,920 tokens of"
        " all sets in 3.2 s",
        "step  5/10  validation by source: code 1.2346, prose -",
        "step  5/10  validation of prose loss 10.500  perplexity 3.63e+04  3.500 bits/byte",
    ]


def test_evaluation_lines() -> None:
    values = {"step": 5, "train_iters": 10, "phase": "validation", "tokens": 81920, "seconds": 3.21}
    losses = {"language_model_loss": 2.3456, "prose_loss": 10.5, "few_loss": None}
    assert evaluation_lines(values, losses) == [
        "step  5/10  validation loss 2.3456  perplexity 10.44  81,920 tokens of all sets in 3.2 s",
        "step  5/10  validation of prose loss 10.500  perplexity 3.63e+04",
        "step  5/10  validation of few: no target tokens",
    ]
    del losses["prose_loss"], losses["few_loss"]
    assert evaluation_lines(values, losses) == [
        "step  5/10  validation loss 2.3456  perplexity 10.44  81,920 tokens in 3.2 s"
    ]
