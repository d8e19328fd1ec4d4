"""Rotary position embedding (Su et al. 2021), and Llama 3.1's scaling of it.

Pair i of a head's D dimensions is rotated by position · θ^(-2i/D). A pair is (i, i + D/2), as in
Hugging Face. Llama 3.1 divides frequencies whose wavelength exceeds the original context by
`scale_factor`, keeps the short ones, and blends in between ("The Llama 3 Herd of Models", 2024).

Angles are computed from positions in each forward pass, so there is no buffer to shard or to save.
Rotation is computed in fp32 whatever the dtype. The gradient of a rotation is the rotation by the
negative angle: only the angles, which all layers share, are kept for the backward pass.

Letters: B sequences, S tokens of a sequence, H heads, D head dimensions.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.config.model import RotaryConfig
from fast_llm.kernels import cpu as cpu_kernels

Angles = tuple[Tensor, Tensor]


def frequencies(config: RotaryConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: fp32 [D/2], on the CPU.

    In fp32 and on the CPU, as in transformers: at position 100,000 another rounding of the
    frequencies changes an angle by 0.01.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    rates: Tensor = 1.0 / (config.theta**exponents)
    if config.type == "default":
        return rates
    wavelengths = 2 * math.pi / rates
    low, high = config.low_frequency_factor, config.high_frequency_factor
    blend = (config.original_context_length / wavelengths - low) / (high - low)
    blended = (1 - blend) * rates / config.scale_factor + blend * rates
    scaled = torch.where(
        wavelengths > config.original_context_length / low, rates / config.scale_factor, blended
    )
    return torch.where(wavelengths < config.original_context_length / high, rates, scaled)


@cache
def _frequencies_on(device: torch.device, config: RotaryConfig, head_dim: int) -> Tensor:
    return frequencies(config, head_dim).to(device)


def rotary_angles(positions: Tensor, config: RotaryConfig, head_dim: int) -> Angles:
    """Cosines and sines of all angles, each fp32 [B, S, 1, D], from positions [B, S].

    Both halves of D hold the same cosines; the sines' first half is negated, so that rotating is
    x · cos + swap(x) · sin.
    """
    angles = positions[..., None].float() * _frequencies_on(
        positions.device, config, head_dim
    )  # B S D/2
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, :, None], torch.cat((-sin, sin), dim=-1)[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads x [B, S, H, D]; the dtype is kept."""
    rotated: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _apply(grad, cos, sin, -1), None, None


def _apply(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    if cpu_kernels.usable(x) and cos.shape[:2] == x.shape[:2]:
        x = x.contiguous()
        out = torch.empty_like(x)
        torch.ops.fast_llm.rotate(
            out, x, cos, sin, x.shape[0] * x.shape[1], *x.shape[2:], direction
        )
        return out
    # No conversions to the same dtype: where a Function's result is an intermediate tensor
    # itself, PyTorch 2.11's compiler returns gradients of zero (pytorch/pytorch#180642).
    exact = x.dtype == torch.float32
    wide = x if exact else x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.addcmul(wide * cos, torch.cat((second, first), dim=-1), sin, value=direction)
    return rotated if exact else rotated.to(x.dtype)
