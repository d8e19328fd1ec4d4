"""What is applied to blocks from outside leaves them alike: they are compiled once, not once each.

PyTorch gives up after eight variants of a function and continues without the compiler, with no more
than a warning.
"""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.model.attention import PackedSequences
from fast_llm.model.batch import Batch
from fast_llm.model.decoder import Block, CausalLM, init_weights
from fast_llm.models.parameters import tensor_plan
from fast_llm.parallel.context import apply_context_parallel, shard_batch
from fast_llm.parallel.fsdp import ShardedWeights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.recompute import apply_recompute
from fast_llm.parallel.single import SingleWeights
from fast_llm.parallel.tensor import apply_tensor_parallel
from fast_llm.parallel.weights import Weights
from tests.helpers import TINY, slow, some_fast, spawn


def graphs(
    layers: int, steps: int, level: str, tensor: int, context: int, sequence: bool, packed: bool
) -> int:
    """The number of graphs that are compiled for a model's blocks."""
    cpu_kernels.load()  # before compilation, as in training
    mesh = Mesh(60, 60, tensor=tensor, context=context)
    values = TINY | {"transformer": TINY["transformer"] | {"num_layers": layers}}
    config = validate(BaseModelConfig, Document(values, {}, ""))
    with torch.device("meta"):
        model = CausalLM(config)
    for block in model.model.layers.values():
        assert isinstance(block, Block)
        apply_recompute(block, level)
        apply_context_parallel(block, mesh.context)
    apply_tensor_parallel(model, tensor_plan(model.config), mesh.tensor, sequence)
    for block in model.model.layers.values():
        block.compile(backend="aot_eager")
    weights: Weights
    if mesh.weights_mesh is None:
        weights = SingleWeights(model, torch.bfloat16, mesh.device, fuse_grad_accumulation=True)
    else:
        weights = ShardedWeights([model], mesh.weights_mesh, 3, torch.bfloat16)
    with weights.masters(changed=True) as tensors:
        init_weights(tensors, config, 0)
    weights.sync_model_weights()
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        weights.before_micro_batch(number == 0, number == steps - 1)
        ends = torch.randperm(31, generator=generator)[: 3 + number].sort().values + 1
        lengths = torch.diff(torch.cat([torch.zeros(1), ends, torch.full((1,), 32)])).int().tolist()
        tokens = torch.randint(256, (1, 32), generator=generator)
        documents = (
            PackedSequences(
                tuple(lengths), torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
            )
            if packed
            else None
        )
        batch = shard_batch(
            Batch(tokens, tokens, torch.arange(32)[None], documents, 32), mesh.context.rank, context
        )
        model(batch.tokens, batch.positions, batch.documents, batch.labels).backward()
    with torch.no_grad():
        model(batch.tokens, batch.positions, batch.documents, batch.labels)
    return int(counters["stats"]["unique_graphs"])


def many_and_one(*how: Any) -> tuple[int, int]:
    """Graphs of four blocks and four micro-batches, and of one and three: sizes become dynamic."""
    many = graphs(4, 4, *how)
    torch._dynamo.reset()
    counters.clear()
    return many, graphs(1, 3, *how)


@pytest.mark.parametrize(
    ("tensor", "context", "sequence", "packed"),
    some_fast(
        [(1, 1, False, True), (2, 1, False, False), (2, 1, True, True), (1, 2, False, True)],
        lambda one: one == (2, 1, True, True),
    ),
)
def test_blocks_are_compiled_once(tensor: int, context: int, sequence: bool, packed: bool) -> None:
    """With gradients and without, and before and after an attention that is left out."""
    for many, one in spawn(
        tensor * context, many_and_one, "none", tensor, context, sequence, packed
    ):
        assert many == one >= 2


@slow
@pytest.mark.parametrize(
    "level",
    ["none", "activation", "full", "selective", "block"],
)
def test_recomputed_ones_as_well(level: str) -> None:
    assert spawn(1, graphs, 4, 3, level, 1, 1, False, False) == [2]


def worst_gradient(
    dtype: torch.dtype, fuse_grad_accumulation: bool, kernels: bool, packed: bool
) -> float:
    """Largest relative difference of a weight's gradient with and without the compiler."""
    cpu_kernels.load()  # before compilation, as in training
    if not kernels:
        with cpu_kernels.disabled():
            return worst_gradient_here(dtype, fuse_grad_accumulation, packed)
    return worst_gradient_here(dtype, fuse_grad_accumulation, packed)


def worst_gradient_here(dtype: torch.dtype, fuse_grad_accumulation: bool, packed: bool) -> float:
    """The same with the CPU kernels of this machine."""
    config = validate(BaseModelConfig, Document(TINY, {}, ""))
    documents = (
        PackedSequences((9, 14, 9), torch.tensor([0, 9, 23, 32], dtype=torch.int32), 14)
        if packed
        else None
    )
    tokens = torch.randint(256, (1, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for backend in (None, "aot_eager"):
        with torch.device("meta"):
            model = CausalLM(config)
        if backend is not None:
            for block in model.model.layers.values():
                block.compile(backend=backend)
        weights = SingleWeights(model, dtype, torch.device("cpu"), fuse_grad_accumulation)
        with weights.masters(changed=True) as tensors:
            init_weights(tensors, config, 0)
        weights.sync_model_weights()
        weights.before_micro_batch(True, True)
        model(tokens[:, :-1], torch.arange(32)[None], documents, tokens[:, 1:]).backward()
        found.append(
            {name: gradient.double() for name, gradient in weights.local_gradients().items()}
        )
    return max(float((found[1][n] - exact).norm() / exact.norm()) for n, exact in found[0].items())


@pytest.mark.parametrize("packed", some_fast([False, True], bool))
@pytest.mark.parametrize("kernels", some_fast([False, True], bool))
@pytest.mark.parametrize(
    ("dtype", "fuse_grad_accumulation", "bound"),
    some_fast(
        [(torch.float32, False, 2e-6), (torch.bfloat16, False, 3e-2), (torch.bfloat16, True, 3e-2)],
        lambda one: one[:2] != (torch.bfloat16, False),
    ),
)
def test_the_compiler_makes_the_same_gradients(
    dtype: torch.dtype, fuse_grad_accumulation: bool, bound: float, kernels: bool, packed: bool
) -> None:
    """For every weight: PyTorch 2.11 dropped fp32 gradients of queries and keys, which were zero.

    The bounds are the rounding of sums in another order. In bf16 the gradients of queries and keys,
    which nearly cancel here, differ by 1 to 2 %.
    """
    assert spawn(1, worst_gradient, dtype, fuse_grad_accumulation, kernels, packed)[0] < bound
