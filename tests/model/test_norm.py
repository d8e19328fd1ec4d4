"""RMSNorm against float64."""

import pytest
import torch
from torch import Tensor

from fast_llm.model.norm import rms_norm
from tests.model.test_attention import Bytes


def by_hand(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


# fp32: the rounding of a mean of 33 squares. 16 bits: each result is rounded once, to half of 2^-8
# and 2^-11.
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 3e-7), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)]
)
@pytest.mark.parametrize("shape", [(5, 33), (2, 7, 33), (1, 1, 1, 33)])
def test_norm_and_its_gradients(dtype: torch.dtype, bound: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(33, generator=generator)).to(dtype).requires_grad_()
    cotangent = torch.randn(shape, generator=generator).to(dtype)
    kept = cotangent.clone()
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = by_hand(*exact, 0.1)
    found = rms_norm(x, weight, 0.1)
    assert found.dtype == dtype
    gradients = torch.autograd.grad(found, (x, weight), cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for one, other in ((found, expected), *zip(gradients, wanted, strict=True)):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < bound * other.norm()
    assert torch.equal(cotangent, kept)  # the residual is not this function's to change


@pytest.mark.usefixtures("ways")
def test_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    found = rms_norm(x, torch.ones(4), 1e-5)
    found.sum().backward()
    assert x.grad is not None
    assert not found.any() and torch.isfinite(x.grad).all()


@pytest.mark.usefixtures("ways")
def test_only_x_and_one_number_a_token_are_kept() -> None:
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(256, dtype=torch.bfloat16, requires_grad=True)
    kept = Bytes()
    with kept:
        rms_norm(x, weight, 1e-5)
    assert kept.total == x.nbytes + weight.nbytes + 64 * 4
