"""Attention within documents: its results, and the size of its tensors."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fast_llm.model.attention import PackedSequences, VarlenQKV, attention, varlen_attention
from fast_llm.model.sdpa import Scoring

PLAIN = Scoring()


def documents(*lengths: int) -> PackedSequences:
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return PackedSequences(lengths, ends, max(lengths))


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scoring: Scoring = PLAIN
) -> Tensor:
    """Attention in float64 with an explicit mask."""
    shape = q.shape
    q, k, v = (x.double().flatten(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (number[:, None] == number[None]) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    window, scale, softcap, sinks = scoring
    if window is not None:  # as transformers' sliding_window_overlay
        place = torch.arange(len(q))
        mask &= place[None] > place[:, None] - window
    scores = torch.einsum("shd,thd->hst", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("hst,thd->shd", weights, v).view(shape)


# fp32 is exact to rounding; bf16 holds 8 bits, in which inputs, weights and the result are rounded.
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(
    ("batch", "lengths"),
    [(1, (700,)), (2, (350, 350)), (1, (1, 600, 99)), (2, (5, 5, 5, 335, 1, 349)), (1, (513, 187))],
)
def test_attention_and_its_gradients(
    dtype: torch.dtype, bound: float, flash: bool, batch: int, lengths: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, 700 // batch, heads, 8, generator=generator).to(dtype).requires_grad_()
        for heads in (6, 2, 2)
    )
    cotangent = torch.randn(q.shape, generator=generator)
    expected = by_hand(q, k, v, lengths)
    wanted = torch.autograd.grad((expected * cotangent).sum(), (q, k, v))
    out = attention(q, k, v, documents(*lengths), flash)
    found = torch.autograd.grad((out.float() * cotangent).sum(), (q, k, v))
    for one, other in ((out, expected), *zip(found, wanted, strict=True)):
        assert ((one.double() - other.double()).norm() / other.double().norm()) < bound


class Bytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that are kept for the backward pass."""

    def __init__(self) -> None:
        super().__init__(self.pack, lambda tensor: tensor)
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.total += tensor.nbytes
        return tensor


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_a_mask(dtype: torch.dtype) -> None:
    length = 2048
    q, k, v = (torch.randn(1, length, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    for packed in (documents(*(64,) * 32), documents(length - 700, 700)):
        with Largest() as largest:
            attention(q, k, v, packed, True).sum().backward()
        # Queries, keys and values have length × 16 elements; a mask has 256 times as many.
        assert largest.elements <= 2 * length * 16


def assert_close(found: Tensor, wanted: Tensor, bound: float, name: str) -> None:
    # With a window of one token, gradients of queries and keys are 0, from numbers of size 1.
    size = wanted.double().norm().item() or wanted.numel() ** 0.5
    distance = (found.double() - wanted.double()).norm().item() / size
    assert distance < bound, f"{name}: {distance:.1e}"


def random_problem(seed: int) -> tuple[tuple[int, ...], list[Tensor], Tensor]:
    """Documents of one sequence; queries, keys and values in fp32; and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)

    def below(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    lengths = tuple([1 + below(300) for _ in range(1 + below(4))] + [1, 1 + below(70)])
    kv_heads, head_dim = 1 + below(2), (2, 6, 8, 10, 34)[seed % 5]
    shapes = [
        (sum(lengths), heads, head_dim) for heads in (kv_heads * (1 + below(3)), *2 * [kv_heads])
    ]
    tensors = [torch.randn(1, *shape, generator=generator) for shape in shapes]
    return lengths, tensors, torch.randn(1, *shapes[0], generator=generator)


WINDOWS = [1, 2, 63, 64, 65, 200, 1000]


# Bounds as above. Of fp32, softcap limits tanh to 2e-7 of itself, and large scores cancel.
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("seed", range(14))
def test_windows_scales_and_limits(
    dtype: torch.dtype, bound: float, flash: bool, seed: int
) -> None:
    lengths, tensors, cotangent = random_problem(seed)
    scoring = Scoring(
        WINDOWS[seed % 7],
        scale=(None, 0.3)[seed % 2],
        softcap=(None, None, 3.0)[seed % 3],
    )
    given = [x.to(dtype).requires_grad_() for x in tensors]
    q, k, v = given
    expected = by_hand(q, k, v, lengths, scoring)
    wanted = torch.autograd.grad((expected * cotangent).sum(), given)
    out = attention(q, k, v, documents(*lengths), flash, *scoring)
    assert out.dtype == dtype
    found = torch.autograd.grad((out.float() * cotangent).sum(), given)
    assert_close(out, expected, bound, "results")
    for name, one, other in zip("qkv", found, wanted, strict=True):
        assert_close(one, other, bound, name)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_sinks(dtype: torch.dtype, bound: float, flash: bool, seed: int) -> None:
    lengths, tensors, cotangent = random_problem(seed)
    sinks = 2 * torch.randn(tensors[0].shape[2], generator=torch.Generator().manual_seed(seed))
    given = [x.to(dtype).requires_grad_() for x in (*tensors, sinks)]
    window, scale = (None, 3, 64, None)[seed], (None, 0.3)[seed % 2]
    q, k, v, sink = given
    expected = by_hand(q, k, v, lengths, Scoring(window, scale, sinks=sink))
    wanted = torch.autograd.grad((expected * cotangent).sum(), given)
    out = attention(q, k, v, documents(*lengths), flash, window, scale, sinks=sink)
    found = torch.autograd.grad((out.float() * cotangent).sum(), given)
    assert_close(out, expected, bound, "results")
    for name, one, other in zip(("q", "k", "v", "sinks"), found, wanted, strict=True):
        # A sink's gradient is one sum over all queries, most of which cancels.
        assert_close(one, other, (1 + (name == "sinks")) * bound, name)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("scoring", [Scoring(70), Scoring(None, 0.3, 4.0)])
def test_sequences_of_one_document_each(flash: bool, scoring: Scoring) -> None:
    q, k, v = (torch.randn(2, 300, heads, 8) for heads in (4, 2, 2))
    expected = by_hand(q, k, v, (300, 300), scoring)
    for packed in (None, documents(300, 300)):
        assert_close(attention(q, k, v, packed, flash, *scoring), expected, 1e-6, "results")


@pytest.mark.usefixtures("ways")
def test_a_window_that_no_document_fills_changes_no_bit() -> None:
    lengths = (300, 1, 399)
    q, k, v = (torch.randn(1, 700, heads, 8) for heads in (4, 2, 2))
    plain = attention(q, k, v, documents(*lengths), True)
    assert torch.equal(attention(q, k, v, documents(*lengths), True, 399), plain)
    assert not torch.equal(attention(q, k, v, documents(*lengths), True, 398), plain)
    # Documents that are shorter than the window keep their bits next to longer ones.
    part = attention(q, k, v, documents(*lengths), True, 300)
    assert torch.equal(part[:, :301], plain[:, :301])


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(
    "scoring", [Scoring(1), Scoring(40), Scoring(500, 0.3), Scoring(40, 0.3, 3.0)]
)
def test_windows_of_some_queries_of_a_document(flash: bool, scoring: Scoring) -> None:
    """As under context parallelism: the last 300 of 333 and 650 tokens, and all of 10."""
    lengths, queries = (333, 650, 10), (300, 300, 10)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, sum(lengths), heads, 8, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    ends = torch.tensor(lengths).cumsum(0)
    kept = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, queries, strict=True)])
    expected = by_hand(q, k, v, lengths, scoring)[:, kept]
    varlen = VarlenQKV.from_lengths(queries, lengths, torch.arange(sum(lengths)))
    out = varlen_attention(q[0, kept], k[0], v[0], varlen, flash, *scoring)
    assert_close(out, expected[0], 1e-6, "results")
    cotangent = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad((out * cotangent).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected[0] * cotangent).sum(), (q, k, v))
    for name, one, other in zip("qkv", found, wanted, strict=True):
        assert_close(one, other, 2e-6, name)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("scoring", [Scoring(64), Scoring(64, None, 3.0)])
def test_windows_need_no_tensor_of_the_size_of_a_mask(scoring: Scoring) -> None:
    length = 4096
    q, k, v = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
    for packed in (None, documents(length - 700, 700)):
        kept = Bytes()
        with Largest() as largest, kept:
            attention(q, k, v, packed, True, *scoring).sum().backward()
        # Blocks of 256 queries see 319 keys; scores of two heads.
        assert largest.elements <= max(2 * length * 16, 2 * 256 * 319)
        # Queries, keys, values and results, some of them twice; masks of 16 blocks.
        assert kept.total < 20 * q.nbytes + 17 * 256 * 319


def test_a_long_window_does_not_need_all_scores_at_once(plain: None) -> None:
    """As Gemma 2's on a GPU: blocks of 1,024 queries, whatever the window is."""
    length, scoring = 3000, Scoring(2000, None, 3.0)
    q, k, v = (torch.randn(1, length, 1, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        out = attention(q, k, v, None, True, *scoring)
        out.sum().backward()
    assert largest.elements <= 1024 * (1024 + 1999)
    assert_close(out, by_hand(q, k, v, (length,), scoring), 1e-6, "results")


class Pairs(TorchDispatchMode):
    """Counts the pairs of query and key in each call of PyTorch's CPU kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self.calls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            batch, heads, length, _ = args[0].shape
            self.total += batch * heads * length * args[1].shape[2]
            self.calls += 1
        return function(*args, **(kwargs or {}))


def test_work_grows_with_the_documents_lengths(plain: None) -> None:
    q = torch.randn(2, 512, 2, 8)
    for lengths in ((512, 512), (100, 412, 512), (64,) * 16):
        with Pairs() as pairs:
            attention(q, q, q, documents(*lengths), True)
        assert pairs.total == 2 * sum(length**2 for length in lengths)


def test_sequences_of_equal_length_share_a_call(plain: None) -> None:
    q = torch.randn(1, 512, 2, 8)
    with Pairs() as pairs:
        attention(q, q, q, documents(*(16,) * 16, 256), True)
    assert pairs.calls == 2
