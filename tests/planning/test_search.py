"""The fastest layouts fit and keep all constraints; what `auto` becomes."""

import pytest

from fast_llm.planning.devices import DEVICES
from fast_llm.planning.layout import LocalSizes, ParallelLayout, Workload
from fast_llm.planning.memory import ProcessMemory, required_bytes
from fast_llm.planning.search import (
    fastest_layouts,
    forecast_config,
    forecast_lengths,
    resolve_auto,
)
from fast_llm.planning.stages import total_flops
from tests.helpers import slow
from tests.planning.configs import LEVEL, LLAMA, config


def test_the_fastest_layouts_fit_and_keep_all_constraints() -> None:
    for processes in (1, 8, 48, 1024):
        for choice, one in fastest_layouts(config(LLAMA), processes, DEVICES["h100"]):
            settings = [
                f"{path}={'null' if value is None else value}" for path, value in choice.items()
            ]
            again = forecast_config(config([*LLAMA, *settings]), processes, DEVICES["h100"])
            assert again.fits and again.gpu_tokens_per_second == one.gpu_tokens_per_second
    assert not fastest_layouts(config(LLAMA), 1, DEVICES["h100"])  # 18 bytes a weight
    fastest = fastest_layouts(config(LLAMA), 8, DEVICES["h100"])[0][1]
    assert fastest.gpu_tokens_per_second >= (
        forecast_config(
            config([*LLAMA, f"{LEVEL}=activation"]), 8, DEVICES["h100"]
        ).gpu_tokens_per_second
    )


def resolved(
    memory: float, *settings: str, processes: int = 1, kind: str = "cuda"
) -> tuple[object, str, str]:
    """Micro-batch size (None if it does not fit), recomputation and dtype of moments."""
    auto = ["batch.micro_batch_size=auto", "optimizer.moments_dtype=auto"]
    found = resolve_auto(config([*LLAMA, *auto, *settings]), processes, memory, kind)
    shape = Workload.of(found, 256)
    fits = required_bytes(shape, ParallelLayout.of(found, processes), kind) <= memory
    level = found.model.base_model.transformer.mlp_recompute_level
    return (found.batch.micro_batch_size if fits else None), level, found.optimizer.moments_dtype


def test_what_auto_becomes() -> None:
    """Llama-3.1-8B: 12 bytes a weight do not fit 80 GB.

    8 GPUs have room for fp32 moments and larger micro-batches.
    """
    h100, h200, b200 = (DEVICES[name].memory for name in ("h100", "h200", "b200"))
    assert resolved(h100)[::2] == (None, "bf16")
    rows, level, moments = resolved(h200)
    assert rows in (1, 2) and level in ("none", "activation", "selective") and moments == "bf16"
    rows, level, moments = resolved(h200, "optimizer.moments_dtype=fp32")
    assert (
        rows and level in ("full", "block") and moments == "fp32"
    )  # fp32 was given: blocks are recomputed instead
    assert resolved(h200, "batch.micro_batch_size=2", f"{LEVEL}=activation") == (
        2,
        "activation",
        "bf16",
    )
    # 8-bit moments are never chosen by `auto`; they leave room for twice the tokens, or for fp8 and
    # long sequences.
    rows, level, moments = resolved(h200, "optimizer.moments_dtype=int8")
    assert rows and level not in ("full", "block") and moments == "int8"
    eight = config([*LLAMA, "optimizer.moments_dtype=int8"])
    state = ProcessMemory(LocalSizes(Workload.of(eight, 256), ParallelLayout.of(eight, 1), "cuda"))
    assert sum(state.state.values()) + state.accumulated == pytest.approx(10.03 * 8.03e9, rel=1e-3)
    assert resolved(b200)[::2] == (2, "fp32")
    rows, level, moments = resolved(h100, processes=8)
    assert rows in (2, 4) and moments == "fp32" and level not in ("full", "block")
    assert resolved(h200, "batch.micro_batch_size=2", "batch.batch_size=255", processes=8)[::2] == (
        2,
        "fp32",
    )  # padded
    # More memory never makes the result slower.
    rates = []
    for memory in (60e9, h100, h200, b200):
        found = resolve_auto(config([*LLAMA, "batch.micro_batch_size=auto"]), 8, memory, "cuda")
        rates.append(forecast_config(found, 8, DEVICES["h100"]).gpu_tokens_per_second)
    assert rates == sorted(rates) and rates[0] < rates[-1]
    small = "model.base_model.transformer.num_layers=1"
    assert resolved(40e9, small, kind="cpu")[2] == "fp32" and resolved(40e9, small, kind="cpu")[
        0
    ] in (1, 2, 4, 8, 16)


STAGED = [
    *(one for one in LLAMA if not one.startswith("data.")),
    "data.format=mixture",
    "data.sources={a: a}",
    "data.stages=[{until: 8}, {sequence_length: 32768, rotary: {theta: 8e6}}]",
]


def test_stages_of_several_lengths() -> None:
    """Each length is forecast as a run of its own; `auto` is what the longest one needs."""
    device = DEVICES["h200"]
    found = forecast_lengths(config(STAGED), 8, device)
    alone = [
        forecast_config(config([*LLAMA, "optimizer.moments_dtype=bf16", *settings]), 8, device)
        for settings in (
            [],
            ["batch.sequence_length=32768", "batch.batch_size=32", "batch.micro_batch_size=1"],
        )
    ]
    assert [steps for steps, _ in found] == [8, 2]
    for (_, one), other in zip(found, alone, strict=True):
        packed = other.workload.__dict__ | {"packed": True}  # random tokens are not
        assert one.workload.__dict__ == packed and one.layout == other.layout
        assert one.model_flops == other.model_flops
    assert found[1][1].memory > found[0][1].memory
    flops = sum(steps * 2**20 * one.model_flops for steps, one in found)
    assert total_flops(config(STAGED), 256) == pytest.approx(flops)
    auto = ["batch.micro_batch_size=auto", "optimizer.moments_dtype=auto"]
    long = ["batch.sequence_length=32768", "batch.batch_size=32", *auto, "data.stages=[]"]
    chosen = resolve_auto(config([*STAGED, *auto]), 8, device.memory, "cuda")
    wanted = resolve_auto(config([*STAGED, *long]), 8, device.memory, "cuda")
    assert chosen.in_stage(1).batch.micro_batch_size == wanted.batch.micro_batch_size
    rows = wanted.batch.micro_batch_size
    assert isinstance(rows, int) and chosen.batch.micro_batch_size == rows * 8
    for inside in (chosen, chosen.in_stage(1)):
        assert inside.optimizer.moments_dtype == wanted.optimizer.moments_dtype
        assert (
            inside.model.base_model.transformer.mlp_recompute_level
            == wanted.model.base_model.transformer.mlp_recompute_level
        )


@slow
def test_the_fastest_layouts_fit_every_length() -> None:
    device = DEVICES["h200"]
    fastest = fastest_layouts(config(STAGED), 8, device)
    assert fastest and all(one.workload.sequence_length == 32768 for _, one in fastest)
    for choice, _ in fastest:
        settings = [f"{path}={'null' if v is None else v}" for path, v in choice.items()]
        again = forecast_lengths(config([*STAGED, *settings]), 8, device)
        assert all(one.fits for _, one in again)
