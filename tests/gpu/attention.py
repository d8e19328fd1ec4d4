"""Attention on a GPU against float64: packed documents, windows, and context parallelism."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from fast_llm.kernels import cudnn
from fast_llm.model.attention import PackedSequences, attention, varlen_attention
from fast_llm.model.sdpa import Scoring
from fast_llm.parallel.context import Sharding
from tests.gpu.checks import Rows, farthest

DEVICE = torch.device("cuda", 0)
PLAIN = Scoring()
LENGTHS = (1, 700, 323, 1000, 24)  # of documents in two sequences of 1,024 tokens
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def short(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Packed attention by `cuDNN` or `PyTorch`; AssertionError if cuDNN is not available."""
    problem = cudnn.load(DEVICE) if name == "cuDNN" else ""
    assert not problem, f"cuDNN: {problem}"
    try:
        yield
    finally:
        cudnn.unload()
        torch._dynamo.reset()


def engines(dtype: torch.dtype) -> list[str]:
    """Those of which a dtype has a choice, if the package is installed."""
    installed = find_spec("cudnn") is not None
    return ["PyTorch", "cuDNN"] if installed and dtype != torch.float32 else ["PyTorch"]


def packed(lengths: tuple[int, ...]) -> PackedSequences:
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    return PackedSequences(lengths, ends, max(lengths))


def exactly(lengths: tuple[int, ...], tensors: list[Tensor], scoring: Scoring = PLAIN) -> Tensor:
    """Attention of flat [T, H, D] tensors, document by document."""
    outs = []
    window, scale, softcap, sinks = scoring
    for part in zip(*(x.split(lengths) for x in tensors), strict=True):
        one, two, three = (x.transpose(0, 1) for x in part)  # H T D
        two, three = (x.repeat_interleave(len(one) // len(two), 0) for x in (two, three))
        seen = torch.ones(one.shape[1], one.shape[1], dtype=torch.bool, device=DEVICE).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        scores = one @ two.transpose(1, 2) * (scale or one.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(-1)[..., : len(part[0])]
        outs.append((weights @ three).transpose(0, 1))
    return torch.cat(outs)


def packed_attention() -> Rows:
    documents = packed(LENGTHS)
    for dtype, bound in BOUNDS.items():
        for width in (64, 128):
            shapes = ((2, 1024, heads, width) for heads in (8, 2, 2))
            q, k, v = (
                torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
                for shape in shapes
            )
            exact = [x.detach().double().flatten(0, 1).requires_grad_() for x in (q, k, v)]
            expected = exactly(LENGTHS, exact)
            wanted = expected, *torch.autograd.grad(expected.square().sum(), exact)

            def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attention(q, k, v, documents, True)

            for name in engines(dtype):
                for compiled in (False, True):
                    with engine(name):
                        function: Callable[..., Tensor] = (
                            torch.compile(attended) if compiled else attended
                        )
                        with torch.no_grad():
                            before = function(q, k, v)
                        out = function(q, k, v)
                        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
                        with torch.no_grad():
                            after = function(q, k, v)
                    found = [x.flatten(0, 1) for x in (out, *gradients, before, after)]
                    how = f"{short(dtype)}, heads of {width}, {name}{', compiled' * compiled}"
                    yield (
                        f"attention within documents, {how}",
                        farthest(found, (*wanted, expected, expected)),
                        bound,
                    )


# Windows shorter and longer than most documents, another scale, and limited scores.
SCORINGS = [Scoring(1), Scoring(100), Scoring(500, 0.2), Scoring(None, 0.2), Scoring(100, 0.2, 5)]


def windowed_attention() -> Rows:
    """Packed documents, and one document a sequence, with windows, scales and limited scores."""
    for dtype, bound in BOUNDS.items():
        for lengths, scoring in product((LENGTHS, (1024, 1024)), SCORINGS):
            documents = packed(lengths)
            shapes = ((2, 1024, heads, 64) for heads in (8, 2, 2))
            q, k, v = (
                torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
                for shape in shapes
            )
            exact = [x.detach().double().flatten(0, 1).requires_grad_() for x in (q, k, v)]
            expected = exactly(lengths, exact, scoring)
            wanted = expected, *torch.autograd.grad(expected.square().sum(), exact)
            for name in engines(dtype):
                with engine(name):
                    out = attention(q, k, v, documents, True, *scoring)
                    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
                # With a window of 1, gradients of queries and keys are 0.
                compared = (0, 3) if scoring.window == 1 else (0, 1, 2, 3)
                found = [(out, *gradients)[at].flatten(0, 1) for at in compared]
                window, scale, softcap, _ = scoring
                yield (
                    f"attention, {short(dtype)}, {name}, {len(lengths)} documents, window {window},"
                    f" scale {scale}, limit {softcap}",
                    farthest(found, [wanted[at] for at in compared]),
                    bound,
                )


def attention_with_sinks() -> Rows:
    """Packed documents, one document a sequence, and windows; the gradient of sinks, too."""
    for dtype, bound in BOUNDS.items():
        for lengths, window in product((LENGTHS, (1024, 1024)), (None, 128)):
            documents = packed(lengths)
            shapes = ((2, 1024, heads, 64) for heads in (8, 2, 2))
            given = [
                torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
                for shape in shapes
            ]
            sinks = torch.randn(8, device=DEVICE, dtype=dtype, requires_grad=True)
            exact = [x.detach().double().flatten(0, 1).requires_grad_() for x in given]
            exact_sinks = sinks.detach().double().requires_grad_()
            expected = exactly(lengths, exact, Scoring(window, sinks=exact_sinks))
            leaves = (*exact, exact_sinks)
            wanted = expected, *torch.autograd.grad(expected.square().sum(), leaves)

            attended = partial(attention, documents=documents, flash=True, window=window)
            for name in engines(dtype):
                for compiled in (False, True):
                    function: Callable[..., Tensor] = (
                        torch.compile(attended) if compiled else attended
                    )
                    with engine(name):
                        out = function(*given, sinks=sinks)
                        loss = out.float().square().sum()
                        *gradients, of_sinks = torch.autograd.grad(loss, (*given, sinks))
                    found = [*(x.flatten(0, 1) for x in (out, *gradients)), of_sinks]
                    yield (
                        f"attention with sinks, {short(dtype)}, {name}{', compiled' * compiled},"
                        f" {len(lengths)} documents, window {window}",
                        farthest(found, wanted),
                        bound,
                    )


def attention_of_context_parallelism() -> Rows:
    """Four processes' shares, one after the other, against all at once."""
    rows, length, size = 2, 1024, 4
    documents = packed(LENGTHS)
    # Chunks have 128 tokens.
    for dtype, window in product((torch.float32, torch.bfloat16), (None, 100, 300)):
        q, k, v = (
            torch.randn(rows * length, heads, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2)
        )
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        expected = exactly(LENGTHS, exact, Scoring(window))
        wanted = expected, *torch.autograd.grad(expected.square().sum(), exact)
        # Where each token lies among those gathered, process by process.
        every = torch.arange(rows * length).numpy()
        places = torch.from_numpy(Sharding(0, size, rows, length).gathered_index(every, None)).to(
            DEVICE
        )
        for name in engines(dtype):
            gathered = [
                torch.empty_like(x).index_copy_(0, places, x).requires_grad_() for x in (q, k, v)
            ]
            outs = []
            with engine(name):
                for rank in range(size):
                    own = Sharding(rank, size, rows, length).varlen_qkv(documents, window)
                    own = (own if window is None else own.windowed or own).to(DEVICE)
                    part = gathered[0].chunk(size)[rank]
                    keys, values = (
                        received(x, rank, size, rows, own.last).index_select(0, own.index)
                        for x in gathered[1:]
                    )
                    outs.append(varlen_attention(part, keys, values, own, True, window))
                out = torch.cat(outs)
                gradients = torch.autograd.grad(out.float().square().sum(), gathered)
                with torch.no_grad():
                    quiet = varlen_attention(part, keys, values, own, True, window)
            found = [x[places] for x in (out, *gradients)]
            yield (
                f"attention of context parallelism, {short(dtype)}, {name}, window {window}",
                max(farthest(found, wanted), farthest([quiet], [outs[-1]])),
                BOUNDS[dtype],
            )


def received(x: Tensor, rank: int, size: int, rows: int, last: int | None) -> Tensor:
    """Of all keys, those that a process has or receives, as parallel/context.py orders them."""
    if last is None:
        return x
    by_chunk = x.unflatten(0, (size, rows, 2, -1))
    sent = by_chunk[:, :, :, by_chunk.shape[3] - last :].flatten(0, 3)
    return torch.cat((by_chunk[rank].flatten(0, 2), sent))
