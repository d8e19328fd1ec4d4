"""Copies of training state in host memory, and the parts that are joined from them."""

import torch

from fast_llm.checkpoint import staging
from fast_llm.checkpoint.staging import HostCopy, copied_bytes
from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.optim.optimizer import Optimizer
from fast_llm.tensors import Stored


def test_parts_are_those_at_the_time_of_the_copy() -> None:
    master = torch.randn(40, 33)
    high, low = torch.empty(40, 33, dtype=torch.bfloat16), torch.empty(40, 33, dtype=torch.int16)
    split_master_(master.clone(), high, low)
    stored = {"split": Stored.of(high, (high, low), join_master), "plain": Stored.of(low, (low,))}
    copy = HostCopy()
    copy.copy(stored)
    high.zero_()
    low.zero_()
    assert torch.equal(copy.part("split", stored["split"]), master)
    assert stored["split"].part().count_nonzero() == 0
    assert copied_bytes(stored) == 40 * 33 * (2 + 2 + 2)
    assert stored["split"].like.dtype == torch.float32
    assert stored["split"].like.device.type == "meta"
    copy.copy(stored)  # reuses its memory
    assert copy.part("split", stored["split"]).count_nonzero() == 0


def test_stored_moments_are_those_that_checkpoints_hold() -> None:
    weights = {"w": torch.randn(9, 130), "n": torch.ones(5)}
    for dtype in ("fp32", "bf16", "int8"):
        optimizer = Optimizer(weights, OptimizerConfig(moments_dtype=dtype))
        optimizer.step({name: torch.randn_like(one) for name, one in weights.items()}, 1e-2, 1.0)
        stored = optimizer.stored({name: Stored.of(one, (one,)) for name, one in weights.items()})
        with optimizer.moments() as moments:
            for found, values in zip(stored.values(), moments, strict=True):
                assert found.keys() == values.keys() == weights.keys()
                for name, one in found.items():
                    assert one.like.dtype == values[name].dtype
                    assert torch.equal(one.part(), values[name]) and values[name].any()


def test_page_locked_memory_is_taken_by_pieces() -> None:
    sources = [torch.empty(n, dtype=torch.int8, device="meta") for n in (3, 2**30, 1, 64, 2**31, 5)]
    slabs = [[source.nbytes for source in slab] for slab in staging._slabs(sources)]
    assert slabs == [[3, 2**30], [1, 64, 2**31], [5]]
