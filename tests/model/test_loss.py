"""Each cross entropy against float64."""

import pytest
import torch
import torch.nn.functional as F

from fast_llm.errors import ConfigError
from fast_llm.model import loss as losses
from fast_llm.model.loss import choose_cross_entropy, cross_entropy
from tests.model.test_attention import Largest


# fp32: sums of 301 terms; bf16 and fp16: logits are rounded to 8 and 11 bits before they are exponentiated.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("implementation", "splits"), [("torch", None), ("fused", None), ("fused", 1), ("fused", 7)])
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
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=-100, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.25, (hidden, weight))
    loss = cross_entropy(hidden, weight, labels, implementation, splits)
    found = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) <= bound * expected.item()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()
    with torch.no_grad():
        assert abs(cross_entropy(hidden, weight, labels, implementation, splits).item() - expected.item()) <= (
            bound * expected.item()
        )


def test_fused_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 64 * 1000)
    hidden, weight = torch.randn(640, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(1000, (640,))
    with Largest() as largest:
        cross_entropy(hidden, weight, labels, "fused", None).backward()
    assert largest.elements == 64 * 1000
    with Largest() as largest, torch.no_grad():
        cross_entropy(hidden, weight, labels, "fused", None)
    assert largest.elements == 64 * 1000


def test_which_implementation_is_chosen() -> None:
    assert choose_cross_entropy("auto", "cpu", True) == "fused"
    assert choose_cross_entropy("torch", "cpu", True) == "torch"
    with pytest.raises(ConfigError, match="cross_entropy_impl: given triton, which needs an NVIDIA GPU"):
        choose_cross_entropy("triton", "cpu", True)
