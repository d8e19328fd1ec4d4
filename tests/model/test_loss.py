"""Each cross entropy against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fast_llm.errors import ConfigError
from fast_llm.model.linear import upcasting
from fast_llm.model.loss import ZLoss, choose_cross_entropy, cross_entropy
from fast_llm.models.sizes import FP32_LOGITS, LOGITS_PER_CHUNK, chunk_length
from tests.model.test_attention import Largest


# fp32: sums of 301 terms; bf16 and fp16: logits are rounded to 8 and 11 bits before they are
# exponentiated.
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize(
    ("implementation", "splits"), [("torch", None), ("fused", None), ("fused", 1), ("fused", 7)]
)
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_loss_and_gradients(
    dtype: torch.dtype, bound: float, implementation: str, splits: int | None, ignored: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(45, 19, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 19, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(301, (45,), generator=generator)
    if ignored != "none":
        labels[slice(3, 20) if ignored == "some" else slice(None)] = -100
    expected = F.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=-100, reduction="sum"
    )
    wanted = torch.autograd.grad(expected * 0.25, (hidden, weight))
    loss = cross_entropy(hidden, weight, labels, implementation, splits)
    found = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) <= bound * expected.item()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()
    terms = torch.full((45,), float("nan"))
    kept = cross_entropy(hidden, weight, labels, implementation, splits, token_losses=terms)
    assert torch.equal(kept, loss)
    for one, other in zip(torch.autograd.grad(kept * 0.25, (hidden, weight)), found, strict=True):
        assert torch.equal(one, other)
    exact = F.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=-100, reduction="none"
    )
    assert (terms.double() - exact).abs().max() <= bound * 8  # losses are up to 16
    assert not terms[labels == -100].any()
    if implementation == "fused":
        total = torch.full((301, 19), 2.0)
        for _ in range(2):
            again = cross_entropy(hidden, weight, labels, implementation, splits, main_grad=total)
            assert torch.equal(again, loss)
            (grad_hidden, none) = torch.autograd.grad(
                again * 0.25, (hidden, weight), allow_unused=True
            )
            assert torch.equal(grad_hidden, found[0]) and none is None
        # Twice the gradient, and 5,719 roundings in fp32 of numbers near 2 (1e-5 together).
        assert ((total - 2).double() - 2 * wanted[1].double()).norm() <= bound * 2 * wanted[
            1
        ].double().norm() + 1e-4
    with torch.no_grad():
        assert abs(
            cross_entropy(hidden, weight, labels, implementation, splits).item() - expected.item()
        ) <= (bound * expected.item())


def z_loss(coefficient: float) -> ZLoss:
    return ZLoss(coefficient, torch.zeros((), dtype=torch.float64))


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("implementation", ["torch", "fused"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_z_loss(
    dtype: torch.dtype, bound: float, implementation: str, softcap: float | None
) -> None:
    """Its gradient equals float64's. The returned loss is the cross entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(45, 19, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 19, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(301, (45,), generator=generator)
    labels[3:20] = -100
    logits = hidden.double() @ weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    squares = torch.logsumexp(logits, -1)[labels != -100].square().sum()
    cross = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    wanted = torch.autograd.grad((cross + 0.1 * squares) * 0.25, (hidden, weight))
    given = z_loss(0.1)
    loss = cross_entropy(
        hidden, weight, labels, implementation, None, softcap=softcap, z_loss=given
    )
    found = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert abs(loss.item() - cross.item()) <= bound * cross.item()
    assert abs(given.total.item() - squares.item()) <= bound * squares.item()
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()
    before = given.total.item()
    with torch.no_grad():
        cross_entropy(hidden, weight, labels, implementation, None, softcap=softcap, z_loss=given)
    assert given.total.item() == before


@pytest.mark.usefixtures("ways")
def test_fused_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 64 * 1000)
    monkeypatch.setitem(FP32_LOGITS, "cpu", 16 * 1000)
    hidden, weight = (
        torch.randn(640, 8, requires_grad=True),
        torch.randn(1000, 8, requires_grad=True),
    )
    labels = torch.randint(1000, (640,))
    with Largest() as largest:
        cross_entropy(hidden, weight, labels, "fused", None).backward()
    assert largest.elements == 64 * 1000
    with Largest() as largest, torch.no_grad():
        cross_entropy(hidden, weight, labels, "fused", None)
    assert largest.elements == 64 * 1000


def test_the_length_of_a_chunk() -> None:
    """Even a few tokens are divided: all their logits never exist at once."""
    assert chunk_length("cpu", 7, 100, None) == 4
    assert chunk_length("cpu", 8192, 128256, None) == 2**25 // 128256
    assert chunk_length("cuda", 16384, 128256, None) == 2**29 // 128256
    assert chunk_length("cpu", 8192, 128256, 3) == 2731
    assert chunk_length("cpu", 8, 2**26, None) == 1


@upcasting()
def test_evaluation_makes_no_gradients() -> None:
    # PyTorch's FLOP counter does not count the accumulating matmul of fp32.
    hidden, weight = torch.randn(40, 8).bfloat16(), torch.randn(100, 8).bfloat16()
    labels = torch.randint(100, (40,))
    for needs, expected in (
        ((False, False), 4),
        ((True, False), 8),
        ((False, True), 8),
        ((True, True), 12),
    ):
        inputs = hidden.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        with FlopCounterMode(display=False) as counter:
            cross_entropy(*inputs, labels, "fused", 4)
        # One matmul of 10 × 8 × 100 for each chunk and each result.
        assert counter.get_total_flops() == expected * 2 * 10 * 8 * 100


def test_gradients_are_freed_with_the_backward_pass() -> None:
    """A loss that is kept does not keep the gradient of the head."""
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.randint(50, (9,)), "fused", None)
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    (inner, _), (grad_weight, _) = loss.grad_fn.next_functions  # type: ignore[union-attr]
    (grad_hidden, _) = inner.next_functions[-1]  # type: ignore[union-attr]
    assert grad_weight.gradient is None and grad_hidden.gradient is None  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="cross entropy ran twice"):
        torch.autograd.grad(loss, (hidden, weight))


def test_the_gradient_of_the_head_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator).abs().bfloat16()
    weight = torch.randn(8, 16, generator=generator).mul(0.1).bfloat16().requires_grad_()
    labels = torch.randint(8, (512,), generator=generator)
    exact = weight.detach().double().requires_grad_()
    expected = F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, exact)
    (found,) = torch.autograd.grad(cross_entropy(hidden, weight, labels, "fused", 512), weight)
    # Summed in bf16, 512 chunks of one token have an error of 3 %; each alone is rounded to 0.2 %.
    assert (found.double() - wanted).norm() < 5e-3 * wanted.norm()


def test_choose_cross_entropy() -> None:
    assert choose_cross_entropy("auto", "cpu", True) == "fused"
    assert choose_cross_entropy("torch", "cpu", True) == "torch"
    assert choose_cross_entropy("auto", "cuda", False) == "fused"
    with pytest.raises(
        ConfigError, match="cross_entropy_impl: given triton, which needs an NVIDIA GPU"
    ):
        choose_cross_entropy("triton", "cpu", True)
