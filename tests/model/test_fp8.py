"""fp8 quantization and linear layers against float64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fast_llm.model.fp8 import E4M3, E5M2, _scale
from fast_llm.model.layers import Linear, enable_fp8


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = _scale(x, dtype)
    short, turned = torch.ops.fast_llm.quantize_fp8(x, scale, dtype, True, True)
    assert torch.equal(short.t().view(torch.int8), turned.view(torch.int8))
    return short, scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_scales_use_the_whole_range(dtype: torch.dtype, size: float) -> None:
    x = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    short, scale = quantized(x, dtype)
    assert short.float().abs().max() == torch.finfo(dtype).max
    # Half a unit of three bits (or two), uniformly distributed, relative to numbers between 1 and
    # 2: 2^-4 (2^-3) / √3 · ~0.7.
    assert distance(short.double() * scale.double(), x.double()) < (0.03 if dtype == E4M3 else 0.06)


def test_zeros_and_nonfinite_numbers() -> None:
    short, scale = quantized(torch.zeros(4, 4, dtype=torch.bfloat16), E4M3)
    assert not short.float().any() and scale > 0
    bad = torch.ones(4, 4, dtype=torch.bfloat16)
    bad[1, 1] = torch.nan
    short, scale = quantized(bad, E4M3)
    assert (short.float() * scale).isnan().any(), "NaN must stay visible"
    bad[1, 1] = torch.inf
    short, scale = quantized(bad, E4M3)
    assert not (short.float() * scale).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 16, 64, 96), (1, 48, 32, 16)])
def test_linear_layers(shape: tuple[int, int, int, int]) -> None:
    batch, length, inner, outer = shape
    torch.manual_seed(0)
    layer = nn.Sequential(Linear(inner, outer), nn.SiLU(), Linear(outer, inner))
    exact = copy.deepcopy(layer).double()
    layer = layer.bfloat16()
    enable_fp8(layer)
    x, grad = torch.randn(2, batch, length, inner)
    inputs = x.bfloat16().requires_grad_(), x.double().requires_grad_()
    outputs = layer(inputs[0]), exact(inputs[1])
    for output in outputs:
        output.backward(grad.to(output.dtype))
    pairs = [outputs, (inputs[0].grad, inputs[1].grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)]
    for one, other in pairs:
        # Rounding errors of 2.6 % (e4m3) and 5.2 % (e5m2) of each operand, in two matmuls.
        assert one is not None and other is not None and 0.01 < distance(one, other) < 0.12
