"""Time: forecasts in the right order, speeds measured on an H200, and the guide's tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_llm.planning.devices import DEVICES
from fast_llm.planning.search import forecast_config
from tests.planning.configs import LEVEL, LLAMA, config

ROOT = Path(__file__).parent.parent.parent


def rate(*settings: str, processes: int = 8, device: str = "h100") -> float:
    return forecast_config(
        config([*LLAMA, *settings]), processes, DEVICES[device]
    ).gpu_tokens_per_second


def test_time() -> None:
    """Forecasts of different layouts are in the right order."""
    assert rate(device="a100") < rate(device="h100") < rate(device="h200") < rate(device="b200")
    assert rate("model.multi_stage.compile_all=yes") > rate("model.multi_stage.compile_all=no")
    levels = [
        rate(f"{LEVEL}={level}") for level in ("none", "activation", "selective", "full", "block")
    ]
    assert levels == sorted(levels, reverse=True) and levels[0] < 1.35 * levels[-1]
    assert (
        rate("model.multi_stage.zero_stage=1") >= rate() >= rate("model.multi_stage.zero_stage=3")
    )
    assert rate("model.distributed.tensor_parallel=4") > rate("model.distributed.tensor_parallel=8")
    assert rate(processes=16) > rate("model.multi_stage.zero_stage=3", processes=128)
    pipeline = "model.distributed.pipeline_parallel=4"
    few, many = (rate(pipeline, f"batch.batch_size={size}", processes=8) for size in (32, 256))
    assert few < many  # with more micro-batches at a time the bubble is smaller
    interleaved = [pipeline, "model.multi_stage.layers_per_stage=4", "batch.batch_size=32"]
    assert few < rate(*interleaved, processes=8)
    zero_bubble = "model.multi_stage.pipeline_schedule=interleaved_zero_bubble"
    assert rate(*interleaved, processes=8) < rate(*interleaved, zero_bubble, processes=8)
    moments = [rate(f"optimizer.moments_dtype={dtype}") for dtype in ("fp32", "bf16", "int8")]
    assert moments == sorted(moments)  # fewer bytes to read and write
    parts = forecast_config(config(LLAMA), 8, DEVICES["h100"]).parts
    assert max(parts, key=lambda part: parts[part]) == "matmuls"


def test_measured_on_an_h200() -> None:
    """Eight blocks of Llama-3.1-8B, and the complete model, on one H200 (docs/performance.md)."""
    blocks = [
        "model.base_model.transformer.num_layers=8",
        "batch.batch_size=8",
        "batch.cross_document_attention=yes",
        "model.multi_stage.compile_all=no",
    ]
    for level, tokens in (("none", 35_703), ("selective", 34_655), ("block", 30_286)):
        assert rate(*blocks, f"{LEVEL}={level}", processes=1, device="h200") == pytest.approx(
            tokens, rel=0.07
        )
    # The complete model, compiled, with 8-bit moments: GiB of tensors and tokens/s.
    complete = ["model.multi_stage.compile_all=yes", "optimizer.moments_dtype=int8"]
    long = ["batch.sequence_length=8192", "batch.batch_size=32"]
    for settings, gib, tokens, bound in (
        (["batch.micro_batch_size=3", "batch.batch_size=63"], 129.4, 12_432, 0.002),
        ([*long, "model.distributed.fp8=yes"], 137.5, 15_694, 0.002),
        (
            [*long, f"{LEVEL}=activation_and_input"],
            128.5,
            11_392,
            0.04,
        ),  # the compiler keeps less
    ):
        found = forecast_config(config([*LLAMA, *complete, *settings]), 1, DEVICES["h200"])
        assert found.peak.bytes / 2**30 == pytest.approx(gib, rel=bound)
        assert found.gpu_tokens_per_second == pytest.approx(tokens, rel=0.07)


def test_the_tables_of_the_guide() -> None:
    """The guide has the output of the benchmark."""
    said = subprocess.run(
        [sys.executable, "benchmarks/forecast.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    ).stdout
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    guide = (ROOT / "docs" / "forecasts.md").read_text()
    assert len(rows) > 20 and all(row in guide for row in rows)
