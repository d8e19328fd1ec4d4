"""Gradients of every ZeRO stage, accumulation and number of processes, against float64.

They are as near to float64 as those of one process without FSDP2.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.attention import PackedSequences
from fast_llm.model.decoder import Block, CausalLM, init_weights
from fast_llm.parallel.fsdp import ShardedWeights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.recompute import apply_recompute
from fast_llm.parallel.single import SingleWeights
from fast_llm.parallel.weights import Weights
from fast_llm.tensors import distributed_like
from tests import exact
from tests.helpers import TINY, some_fast, spawn

SEQUENCES, LENGTH = 8, 12
# The ends of documents differ, so that micro-batches have different numbers of targets.
CUTS = [(12,), (5, 7), (1, 11), (12,), (4, 4, 4), (6, 6), (12,), (11, 1)]


def model_config(tied: bool, recompute: str) -> BaseModelConfig:
    # 255 and 63 do not divide by 2 or 4: shards are uneven, and some are empty (norms of 63 on 4
    # processes are not).
    transformer = TINY["transformer"] | {
        "hidden_size": 63,
        "kv_channels": 16,
        "mlp_recompute_level": recompute,
    }
    values = TINY | {"vocab_size": 255, "tie_word_embeddings": tied, "transformer": transformer}
    return validate(BaseModelConfig, Document(values, {}, ""))


def micro_batch(
    first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, PackedSequences, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(255, (SEQUENCES, LENGTH + 1), generator=generator)[first : first + count]
    labels = tokens[:, 1:].clone()
    positions: list[torch.Tensor] = []
    lengths: list[int] = []
    for row in range(count):
        cut = CUTS[first + row]
        positions.append(torch.cat([torch.arange(n) for n in cut]))
        for end in np.cumsum(cut)[:-1]:
            labels[row, end - 1] = -100
        lengths += cut
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return (
        tokens[:, :-1],
        torch.stack(positions),
        PackedSequences(tuple(lengths), ends, max(lengths)),
        labels,
    )


def gradients(
    zero_stage: int,
    accumulation: int,
    dtype: torch.dtype,
    tied: bool = False,
    recompute: str = "none",
    shard_size: int | None = None,
    fuse_grad_accumulation: bool = False,
    compiled: bool = False,
    cross_entropy: str = "fused",
) -> dict[str, np.ndarray]:
    """Gradients of the second of two steps, which depend on the first update of every process.

    Stage 0: without FSDP2.
    """
    mesh = Mesh(60, 60, shard_size)
    config = model_config(tied, recompute)
    with torch.device("meta"):
        model = CausalLM(config, cross_entropy)
    for block in model.model.layers.values():
        assert isinstance(block, Block)
        apply_recompute(block, recompute)
        if compiled:
            block.compile(backend="aot_eager")
    weights: Weights
    if zero_stage == 0:
        weights = SingleWeights(model, dtype, mesh.device, fuse_grad_accumulation)
    else:
        data = mesh.weights_mesh if mesh.weights_mesh is not None else init_device_mesh("cpu", (1,))
        weights = ShardedWeights([model], data, zero_stage, dtype)
    with weights.masters(changed=True) as tensors:
        init_weights(tensors, config, 0)
    weights.sync_model_weights()
    size = SEQUENCES // (accumulation * mesh.size)
    whole = {}
    for _ in range(2):
        for number in range(accumulation):
            weights.before_micro_batch(number == 0, number == accumulation - 1)
            tokens, positions, documents, labels = micro_batch(
                (number * mesh.size + mesh.rank) * size, size
            )
            (
                model(tokens, positions, documents, labels) * mesh.size / (SEQUENCES * LENGTH)
            ).backward()
        found = weights.local_gradients()
        with torch.no_grad(), weights.masters(changed=True) as tensors:
            for name, tensor in tensors.items():
                tensor.sub_(distributed_like(tensor, found[name]), alpha=0.5)
            whole = {
                name: distributed_like(tensor, found[name]) for name, tensor in tensors.items()
            }
        weights.sync_model_weights()
    return {
        n: (g.full_tensor() if isinstance(g, DTensor) else g).numpy().copy()
        for n, g in whole.items()
    }


@functools.cache
def reference(dtype: torch.dtype, tied: bool) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = spawn(1, gradients, 0, 1, dtype, tied)[0]
    return found


@functools.cache
def in_float64(tied: bool) -> dict[str, np.ndarray]:
    """The same two steps in float64."""
    config = model_config(tied, "none")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in CausalLM(config).named_parameters()}
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    init_weights(weights, config, 0)
    weights = {name: weight.double() for name, weight in weights.items()}
    tokens, positions, documents, labels = micro_batch(0, SEQUENCES)
    for _ in range(2):
        leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
        logits = exact.logits(
            leaves, config, tokens.flatten(), positions.flatten(), documents.lengths
        )
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / (SEQUENCES * LENGTH)
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        weights = {name: (leaf - 0.5 * found[name]).detach() for name, leaf in leaves.items()}
    return {name: gradient.numpy() for name, gradient in found.items()}


def check_fp32(found: dict[str, np.ndarray], tied: bool = False) -> None:
    """Each gradient is about as near to float64's as that of one process.

    Both are the same sums in other orders, and which order is the processor's choice: no number of
    ours bounds how far apart they are. The rounding of hundreds of numbers has a norm that hardly
    depends on the order, so that the two distances are alike: 1.3 times at most, on all processors
    of tests/test_processors.py. What is wrong in the least, a target too many or a factor rounded
    to bf16, is a thousand times as far off.
    """
    wanted, one = in_float64(tied), reference(torch.float32, tied)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert distance(found[name], gradient) <= 2 * distance(one[name], gradient), name


def check_bf16(
    found: dict[str, np.ndarray], one: dict[str, np.ndarray], tied: bool = False
) -> None:
    """Two results in bf16 are nearer to one another than to float64.

    They round the same weights, and for the most part the same activations: were their errors
    independent, they would be √2 as far apart as each is off. Measured 0.7 times at most, on all
    processors of tests/test_processors.py.
    """
    assert all(gradient.dtype == np.float32 for gradient in found.values())
    assert worst(found, one) < worst(one, in_float64(tied))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm, in float64."""
    return float(np.linalg.norm(found - expected.astype(np.float64)) / np.linalg.norm(expected))


def worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    return max(distance(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("tied", [False, True])
def test_one_process_is_near_float64(tied: bool) -> None:
    # A sum of n products rounds by √n · 2^-24 of its size, if errors are random; n is 255 at most.
    # On the longest way to a gradient of the second step lie less than a hundred sums (nine a layer
    # and three, forward and back, twice), whose errors add as squares: 9.5e-6. Measured 2.7e-6 at
    # most.
    assert worst(reference(torch.float32, tied), in_float64(tied)) < 2**-24 * (255 * 100) ** 0.5


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("world", some_fast([1, 2, 4], lambda world: world < 4))
def test_fp32(world: int, zero_stage: int, accumulation: int) -> None:
    accumulation = min(accumulation, SEQUENCES // world)
    for found in spawn(world, gradients, zero_stage, accumulation, torch.float32):
        check_fp32(found)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_fp32_one_process_accumulates(accumulation: int) -> None:
    check_fp32(spawn(1, gradients, 0, accumulation, torch.float32)[0])


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_tied_embeddings(zero_stage: int) -> None:
    for found in spawn(2, gradients, zero_stage, 2, torch.float32, True):
        check_fp32(found, tied=True)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("world", "shard_size"), some_fast([(2, 1), (4, 2), (4, 8)], lambda one: one != (4, 8))
)
def test_hybrid_sharding(world: int, shard_size: int, zero_stage: int) -> None:
    for found in spawn(world, gradients, zero_stage, 2, torch.float32, True, "none", shard_size):
        check_fp32(found, tied=True)


@pytest.mark.parametrize(
    "level", ["activation", "activation_and_input", "full", "selective", "block"]
)
@pytest.mark.parametrize(("world", "zero_stage"), [(1, 0), (2, 3)])
def test_recomputation_changes_nothing(world: int, zero_stage: int, level: str) -> None:
    for found in spawn(world, gradients, zero_stage, 2, torch.float32, False, level):
        check_fp32(found)


def test_bf16_is_near_float64() -> None:
    found = spawn(1, gradients, 0, 2, torch.bfloat16)[0]
    assert all(gradient.dtype == np.float32 for gradient in found.values())
    # Two layers of products whose inputs hold 8 bits (0.4 % an operation, some ten in a row), at
    # weights that one coarse update has moved: measured 4 %.
    assert worst(found, in_float64(False)) < 0.1


@pytest.mark.parametrize(("world", "zero_stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_bf16_is_the_same_on_several_processes(world: int, zero_stage: int) -> None:
    for found in spawn(world, gradients, zero_stage, 2, torch.bfloat16):
        # Each micro-batch's gradients are rounded to 8 bits before they are summed in fp32; with
        # other micro-batches, otherwise.
        check_bf16(found, reference(torch.bfloat16, False))


@functools.cache
def four_micro_batches(tied: bool = False, cross_entropy: str = "fused") -> dict[str, np.ndarray]:
    given = (0, 4, torch.bfloat16, tied, "none", None, False, False, cross_entropy)
    found: dict[str, np.ndarray] = spawn(1, gradients, *given)[0]
    return found


@pytest.mark.parametrize("compiled", some_fast([False, True], lambda compiled: not compiled))
@pytest.mark.parametrize("level", ["none", "activation", "full", "selective", "block"])
def test_products_that_add_in_fp32(level: str, compiled: bool) -> None:
    """As on a GPU, where the sum is not rounded in between; here by the CPU's matmuls."""
    found = spawn(1, gradients, 0, 4, torch.bfloat16, False, level, None, True, compiled)[0]
    # The same micro-batches. After the first step, weights halfway between two bf16 numbers were
    # rounded the other way, and the compiler omits some roundings.
    check_bf16(found, four_micro_batches())


@pytest.mark.parametrize("cross_entropy", ["fused", "torch"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_cross_entropy_that_adds_in_fp32(tied: bool, cross_entropy: str) -> None:
    """It adds to the embedding's `main_grad` if tied; torch's loss gives the weight a gradient."""
    found = spawn(
        1, gradients, 0, 4, torch.bfloat16, tied, "none", None, True, False, cross_entropy
    )[0]
    check_bf16(found, four_micro_batches(tied, cross_entropy), tied)
