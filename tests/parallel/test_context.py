"""Context parallelism: attention of several processes equals that of one, with windows too."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fast_llm.model.attention import PackedSequences, VarlenQKV, attention
from fast_llm.model.batch import Batch
from fast_llm.parallel import context
from tests.helpers import slow, spawn
from tests.parallel.test_communication import Counting

ROWS, LENGTH = 2, 48
# Chunks of two processes have 12 tokens, those of four have 6: windows are shorter, as long, one
# longer, and longer than a sequence. A window of one token needs nobody's keys.
WINDOWS = [None, 1, 4, 6, 7, 12, 13, 30, 100]
PACKED = [(1, 29, 18, 5, 5, 1, 37), None]


def whole() -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, of all tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, LENGTH, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]


def sequences(lengths: tuple[int, ...] | None) -> PackedSequences | None:
    if lengths is None:
        return None
    return PackedSequences(lengths, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def share(size: int, window: int | None, lengths: tuple[int, ...] | None) -> list[Any]:
    """This process's result and gradients, the places of its tokens, and the bytes it gathers."""
    mesh = init_device_mesh("cpu", (size,))
    rank = mesh.get_rank()
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    batch = Batch(tokens, tokens, tokens, sequences(lengths), tokens.numel())
    own = context.shard_batch(batch, rank, size, window)
    assert isinstance(own.documents, VarlenQKV)
    q, k, v, grad = (x.flatten(0, 1)[own.tokens].requires_grad_() for x in whole())
    with Counting() as seen:
        out = context._attention(mesh, q, k, v, own.documents, True, window)
    found = out, *torch.autograd.grad(out, (q, k, v), grad)
    places, results = own.tokens.flatten(), (x.detach().flatten(0, 1) for x in found)
    return [places.numpy(), seen.bytes["all-gather"], *(x.numpy() for x in results)]


def shares(size: int) -> list[list[Any]]:
    """All windows and documents."""
    return [share(size, window, lengths) for window in WINDOWS for lengths in PACKED]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=slow)])
def test_attention_of_several_processes(size: int) -> None:
    found = spawn(size, shares, size)
    cases = [(window, lengths) for window in WINDOWS for lengths in PACKED]
    for number, (window, lengths) in enumerate(cases):
        q, k, v, grad = (x.requires_grad_() for x in whole())
        out = attention(q, k, v, sequences(lengths), True, window)
        wanted = out, *torch.autograd.grad(out, (q, k, v), grad)
        parts = [process[number] for process in found]
        for place, exact in enumerate(wanted, 2):
            together = torch.empty(ROWS * LENGTH, *exact.shape[2:])
            for part in parts:
                together[torch.from_numpy(part[0])] = torch.from_numpy(part[place])
            # Sums in another order, of at most 48 terms.
            difference = (together.view(exact.shape) - exact).abs().max()
            assert difference < 1e-5, (window, lengths, place, difference)
        chunk = LENGTH // (2 * size)
        gathered = chunk if window is None or window > chunk else window - 1
        # Keys and values of 2 heads in fp32, of two chunks of every process and sequence.
        sent = {part[1] for part in parts}
        assert sent == {ROWS * 2 * size * gathered * 2 * 2 * 8 * 4}, (window, lengths)
