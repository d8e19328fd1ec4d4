"""The gradient of the embedding."""

import pytest
import torch
import torch.nn.functional as F

from fast_llm.model.embedding import embed


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)]
)
def test_many_occurrences_are_summed_exactly(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (2, 1000), generator=generator)
    weight = torch.randn(7, 5, generator=generator).to(dtype).requires_grad_()
    cotangent = torch.rand(2, 1000, 5, generator=generator).to(dtype)
    found = embed(tokens, weight)
    assert torch.equal(found, weight[tokens])
    (gradient,) = torch.autograd.grad(found, weight, cotangent)
    wanted = torch.zeros(7, 5, dtype=torch.float64)
    wanted.index_add_(0, tokens.flatten(), cotangent.double().flatten(0, 1))
    assert gradient.dtype == dtype
    # One rounding. Summed in bf16, 500 numbers of one sign are wrong by a tenth or more.
    assert (gradient.double() - wanted).norm() < bound * wanted.norm()
    assert not gradient[4:].any()


def test_pytorch_sums_in_the_weights_dtype() -> None:
    """If this fails, PyTorch sums in fp32 and `embed` is not needed."""
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    F.embedding(torch.zeros(1000, dtype=torch.long), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() < 500
