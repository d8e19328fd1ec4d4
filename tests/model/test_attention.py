"""Attention within documents: its results, and the size of its tensors."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fast_llm.model.attention import PackedSequences, attention


def documents(*lengths: int) -> PackedSequences:
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return PackedSequences(lengths, ends, max(lengths))


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention in float64 with an explicit mask."""
    shape = q.shape
    q, k, v = (x.double().flatten(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (number[:, None] == number[None]) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    scores = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
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
    """Bytes that are kept for the backward pass."""

    def __init__(self) -> None:
        super().__init__(self.pack, lambda tensor: tensor)
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.total += tensor.nbytes
        return tensor


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is created."""

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


class Pairs(TorchDispatchMode):
    """How many pairs of query and key PyTorch's CPU kernel gets, and in how many calls."""

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
