"""The tensors that each level of recomputation keeps, and the matmuls that it repeats."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import Block
from fast_llm.model.rope import rotary_angles
from fast_llm.parallel.recompute import apply_recompute
from tests.helpers import TINY

TOKENS, HIDDEN, MLP = 64, 32, 128
LEVELS = ("none", "activation", "activation_and_input", "full", "selective", "block")


def cost(level: str) -> tuple[int, int]:
    """Bytes kept between forward and backward of a block, and the FLOPs of both in matmuls."""
    transformer = TINY["transformer"] | {
        "hidden_size": HIDDEN,
        "ffn_hidden_size": MLP,
        "kv_channels": 8,
    }
    config = validate(
        BaseModelConfig, Document(TINY | {"transformer": transformer}, {}, "")
    ).transformer
    torch.manual_seed(0)
    block = Block(config, 0)
    apply_recompute(block, level)
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    angles = rotary_angles(torch.arange(TOKENS)[None], config.rotary, config.kv_channels)
    gc.collect()  # tensors of earlier tests that are freed inside would count
    with FlopCounterMode(display=False) as flops:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
            out = block(hidden, angles, None)
        out.sum().backward()
    return sum(
        event.self_cpu_memory_usage for event in memory.key_averages()
    ), flops.get_total_flops()


def test_what_is_kept_and_what_is_computed_again() -> None:
    kept, flops = ({level: cost(level)[i] for level in LEVELS} for i in range(2))
    assert (
        kept["none"]
        > kept["activation"]
        > kept["activation_and_input"]
        > kept["full"]
        > kept["block"]
    )
    assert kept["none"] > kept["selective"] > kept["block"]
    # `block` keeps the block's output, which is the next block's input.
    assert kept["block"] == TOKENS * HIDDEN * 4
    assert (
        flops["none"] == flops["activation"] == flops["activation_and_input"] == flops["selective"]
    )
    # Of an MLP: three matmuls of 2 · tokens · hidden · MLP.
    assert flops["full"] - flops["none"] >= 2 * 2 * TOKENS * HIDDEN * MLP
    assert flops["block"] > flops["full"]
