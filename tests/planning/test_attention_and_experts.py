"""Forecasts of windows under context parallelism, limited scores, and expert parallelism."""

import pytest

from fast_llm.planning.activations import (
    attended_keys,
    backward_temporaries,
    limited_scores,
)
from fast_llm.planning.devices import DEVICES
from fast_llm.planning.layout import LocalSizes, ParallelLayout, Workload
from fast_llm.planning.memory import ProcessMemory
from fast_llm.planning.time import StepTime
from tests.planning.configs import LLAMA, config

TRANSFORMER = "model.base_model.transformer"
CONTEXT = "model.distributed.sequence_data_parallel"
MOMENTS = "optimizer.moments_dtype=fp32"
EXPERTS = [
    "model.base_model.family=qwen3_moe",
    f"{TRANSFORMER}.num_experts=64",
    f"{TRANSFORMER}.num_experts_per_token=8",
    f"{TRANSFORMER}.expert_hidden_size=1024",
]


def sizes(processes: int, *further: str) -> LocalSizes:
    chosen = config([*LLAMA, MOMENTS, *further])
    layout = ParallelLayout.of(chosen, processes)
    return LocalSizes(Workload.of(chosen, 256), layout, "cuda")


def kinds(every: int) -> str:
    """`layer_types` of 32 blocks, of which one of `every` has full attention."""
    names = ["full" if layer % every == 0 else "sliding" for layer in range(32)]
    return f"{TRANSFORMER}.layer_types=[{','.join(f'{name}_attention' for name in names)}]"


def test_keys_of_context_parallelism_with_windows() -> None:
    """Two sequences of 4096 tokens in 8 chunks of 512: a window of 128 adds 127 to each chunk."""
    window = f"{TRANSFORMER}.window_size=128"
    own, every = 2 * 1024, 2 * 1024 * 4.5
    within = own + 2 * 2 * 127
    assert attended_keys(sizes(4, f"{CONTEXT}=4")) == every
    assert attended_keys(sizes(4, f"{CONTEXT}=4", window)) == within
    mixed = attended_keys(sizes(4, f"{CONTEXT}=4", window, kinds(4)))
    assert mixed == (8 * every + 24 * within) / 32
    # A window that is longer than a chunk needs all keys.
    assert attended_keys(sizes(4, f"{CONTEXT}=4", f"{TRANSFORMER}.window_size=513")) == every
    # Of n processes' keys, a window needs the end of each chunk alone.
    device = DEVICES["h200"]
    full, windowed = (
        StepTime(sizes(4, f"{CONTEXT}=4", *more), device).block_communication
        for more in ((), (window,))
    )
    assert windowed < full / 2  # a quarter of the bytes, and the latency


def test_limited_scores() -> None:
    """1024 queries and 4096 keys of 32 heads and two sequences: five tensors in fp32."""
    limited = sizes(1, f"{TRANSFORMER}.attention_softcap=50")
    assert limited_scores(sizes(1)) == 0
    assert limited_scores(limited) == 5 * 4 * 2 * 32 * 1024 * 4096
    assert backward_temporaries(limited) > backward_temporaries(sizes(1))
    # 1024 queries of a window of 2000 see 3024 keys.
    windowed = sizes(1, f"{TRANSFORMER}.attention_softcap=50", f"{TRANSFORMER}.window_size=2000")
    assert limited_scores(windowed) == 5 * 4 * 2 * 32 * 1024 * 3024


@pytest.mark.parametrize("stage", [1, 3])
def test_experts_are_gathered_by_the_processes_that_have_them(stage: int) -> None:
    zero, expert = f"model.multi_stage.zero_stage={stage}", "model.distributed.expert_parallel=8"
    alone, divided = sizes(16, *EXPERTS, zero), sizes(16, *EXPERTS, zero, expert)
    experts = 64 * 3 * 1024 * 4096
    assert alone.own_block_parameters - divided.own_block_parameters == experts - experts // 8
    one, eighth = ProcessMemory(alone), ProcessMemory(divided)
    assert one.state == eighth.state  # shards of all weights, in either way
    blocks = 32 if stage == 1 else 1
    assert one.gathered_for_head - eighth.gathered_for_head == 2 * blocks * experts * 7 / 8
    # Two all-to-alls forward and two backward, of 7/8 of the rows: 8 for each token.
    device = DEVICES["h200"]
    times = [StepTime(each, device).block_communication for each in (alone, divided)]
    rows = 8 * 2 * 4096 * 4096 * 2 * 7 / 8
    assert times[0] == 0
    assert times[1] == pytest.approx(4 * rows / device.link_bandwidth, rel=0.01)
