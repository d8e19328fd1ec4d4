"""Matmuls that run in fp32 on CPUs without 16-bit instructions, or that accumulate."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fast_llm.model.attention import attention
from fast_llm.model.layers import Linear, enable_fp8
from fast_llm.model.linear import add_matmul_, matmul, upcasting
from fast_llm.model.loss import cross_entropy
from tests.model.test_attention import by_hand, documents

# A result is rounded once, by at most half a unit in its last place: sums in 16 bits would be ten
# times as far off at these sizes.
SHORT = [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)]


@pytest.fixture(params=["upcast", "native"])
def processor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Emulate a CPU without 16-bit instructions, or one with them."""
    torch.manual_seed(0)
    dtypes = () if request.param == "native" else (torch.bfloat16, torch.float16)
    with upcasting(*dtypes):
        yield str(request.param)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


# More columns than are cast at a time, as many, and fewer; wide and tall matrices.
SIZES = [(3, 1500, 7), (5, 1024, 1024), (64, 33, 2049), (1, 1, 1), (1025, 65, 2)]


@pytest.mark.parametrize(("dtype", "bound"), SHORT)
@pytest.mark.parametrize("sizes", SIZES)
@upcasting(torch.bfloat16, torch.float16)
def test_matmul(dtype: torch.dtype, bound: float, sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    left, right = (
        torch.randn(sizes[0], sizes[1]).to(dtype),
        torch.randn(sizes[1], sizes[2]).to(dtype),
    )
    wanted = left.double() @ right.double()
    # Rounding's worst case is half a unit; on average over many results it is a third of that.
    for one, other in ((left, right), (left.t().contiguous().t(), right.t().contiguous().t())):
        assert distance(matmul(one, other), wanted) < bound
        out = torch.full(wanted.shape, torch.nan, dtype=dtype)
        assert matmul(one, other, out=out) is out and distance(out, wanted) < bound
    total = torch.randn(wanted.shape)
    for first in (False, True):
        sums = total.clone()
        add_matmul_(sums, left, right, first=first)
        assert distance(sums, wanted if first else wanted + total.double()) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), SHORT)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layer(processor: str, dtype: torch.dtype, bound: float, bias: bool) -> None:
    layer = Linear(40, 1100, bias=bias).to(dtype)
    x = torch.randn(2, 33, 40).to(dtype).requires_grad_()
    cotangent = torch.randn(2, 33, 1100).to(dtype)
    leaves = [x, *layer.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact[0] @ exact[1].t() + (exact[2] if bias else 0)
    found = layer(x)
    assert (
        found.dtype == dtype and distance(found, wanted.detach()) < 2 * bound
    )  # the bias is added after a rounding
    gradients = zip(
        torch.autograd.grad(found, leaves, cotangent),
        torch.autograd.grad(wanted, exact, cotangent.double()),
        strict=True,
    )
    for one, other in gradients:
        assert (
            one.dtype == dtype and distance(one, other) < 4 * bound
        )  # PyTorch's own sum of 66 biases is not fp32


def test_only_needed_gradients_are_computed(processor: str) -> None:
    layer = Linear(8, 8).bfloat16()
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("flash", [False, True])
def test_attention(processor: str, flash: bool) -> None:
    q, k, v = (torch.randn(1, 130, heads, 16).bfloat16() for heads in (4, 2, 2))
    found = attention(q, k, v, documents(100, 30), flash)
    assert (
        found.dtype == torch.bfloat16
        and distance(found, by_hand(q, k, v, (100, 30)).double()) < 6e-3
    )


@pytest.mark.parametrize("implementation", ["torch", "fused"])
def test_head(processor: str, implementation: str) -> None:
    hidden, head = (
        torch.randn(50, 24).bfloat16().requires_grad_(),
        torch.randn(1200, 24).bfloat16().requires_grad_(),
    )
    labels = torch.randint(1200, (50,))
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, head)]
    wanted = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    found = cross_entropy(hidden, head, labels, implementation, None)
    assert found.item() == pytest.approx(wanted.item(), rel=2e-3)
    gradients = zip(
        torch.autograd.grad(found, (hidden, head)), torch.autograd.grad(wanted, exact), strict=True
    )
    for one, other in gradients:
        assert distance(one, other) < 1e-2  # logits are rounded to bf16


@upcasting(torch.bfloat16, torch.float16)
def test_compiled_equals_eager() -> None:
    torch.manual_seed(0)
    layer, x = (
        Linear(16, 2050).bfloat16(),
        torch.randn(4, 16, dtype=torch.bfloat16),
    )
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("fp8", [False, True])
def test_weight_gradients_accumulate_into_main_grad(fp8: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(32, 48).bfloat16()
    if fp8:
        enable_fp8(layer)
    assert layer.main_grad is None
    x, grad = torch.randn(2, 16, 32).bfloat16(), torch.randn(2, 16, 48).bfloat16()
    layer(x).backward(grad)
    assert layer.weight.grad is not None
    wanted = layer.weight.grad.double()
    layer.weight.grad = None
    layer.main_grad = torch.ones(48, 32)
    for _ in range(2):
        layer(x).backward(grad)
    assert layer.weight.grad is None and set(layer.state_dict()) == {"weight"}
    # The gradient that PyTorch makes is rounded to bf16.
    assert distance(layer.main_grad - 1, 2 * wanted) < 2**-8
