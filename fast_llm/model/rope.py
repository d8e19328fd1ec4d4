"""Rotary position embedding (Su et al. 2021), and how published models scale it.

Pair i of the D' rotated dimensions is rotated by position · θ^(-2i/D'). A pair is (i, i + D'/2), as
in Hugging Face. Dimensions behind the rotated ones are kept. Scalings, for contexts longer than
those of pretraining, are those of transformers:

linear      all frequencies are divided (Chen et al. 2023)
dynamic     θ grows with the context (bloc97 and emozilla, 2023)
yarn        low frequencies are divided, with a linear blend; cosines and sines are scaled (Peng et
            al. 2023)
llama3      low frequencies are divided, with another blend ("The Llama 3 Herd of Models", 2024)
longrope    each frequency is divided by a number of its own (Ding et al. 2024)

transformers chooses the angles of `dynamic` and `longrope` by the longest input so far. Here the
context length of training decides, so that they do not depend on batches and their order.

Angles are computed from positions in each forward pass, so there is no buffer to shard or to save.
Rotation is computed in fp32 whatever the dtype. The gradient of a rotation is the rotation by the
negative angle: only the angles, which all layers share, are kept for the backward pass.

Letters: B sequences, S tokens of a sequence, H heads, D head dimensions, D' of them rotated.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_llm.config.rotary import RotaryConfig
from fast_llm.kernels import cpu as cpu_kernels

Angles = tuple[Tensor, ...]  # cosines and sines; of keys and of queries, where these differ


def frequencies(config: RotaryConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: fp32 [D'/2], on the CPU.

    In fp32 and on the CPU, as in transformers: at position 100,000 another rounding of the
    frequencies changes an angle by 0.01.
    """
    if config.type == "none":
        return torch.empty(0)
    dims = config.rotated_dims(head_dim)
    exponents = torch.arange(0, dims, 2, dtype=torch.int64, device="cpu").float() / dims
    powers = _theta(config, dims) ** exponents
    if config.type == "longrope":
        extended = (config.context_length or 0) > config.original_context_length
        divisors = config.long_factor if extended else config.short_factor
        assert divisors is not None, "config/model_checks.py asks for both"
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * powers)
    rates: Tensor = 1.0 / powers
    if config.type == "linear":
        return rates / config.scale_factor
    if config.type == "yarn":
        return _yarn(rates, powers, config, dims)
    return _llama3(rates, config) if config.type == "llama3" else rates


def _theta(config: RotaryConfig, dims: int) -> float | Tensor:
    """The base of the frequencies; `dynamic` raises it with the context."""
    if config.type != "dynamic":
        return config.theta
    factor, original, length = (
        config.scale_factor,
        config.original_context_length,
        config.context_length or 0,
    )
    exponent = dims / (dims - 2)
    if length <= original:
        # 1, or as close to it as transformers is.
        kept: float = config.theta * ((factor * original / original) - (factor - 1)) ** exponent
        return kept
    # transformers has the length in a tensor, so the rest is in fp32.
    longest = torch.tensor(length, device="cpu")
    raised: Tensor = config.theta * ((factor * longest / original) - (factor - 1)) ** exponent
    return raised


def _yarn(rates: Tensor, powers: Tensor, config: RotaryConfig, dims: int) -> Tensor:
    """Frequencies of which the low ones are divided by `scale_factor`, with a linear blend."""

    def pair_of(rotations: float) -> float:
        """The pair that makes so many rotations in the original context."""
        wavelengths = config.original_context_length / (rotations * 2 * math.pi)
        return (dims * math.log(wavelengths)) / (2 * math.log(config.theta))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low if high != low else high + 0.001 - low
    pairs = torch.arange(dims // 2, dtype=torch.float32, device="cpu")
    kept = 1 - torch.clamp((pairs - low) / width, 0, 1)
    divided = 1.0 / (config.scale_factor * powers)
    return divided * (1 - kept) + rates * kept


def _llama3(rates: Tensor, config: RotaryConfig) -> Tensor:
    """Frequencies of which the low ones are divided by `scale_factor`, with a blend."""
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
    """Cosines and sines of all angles, each fp32 [B, S, 1, D'], from positions [B, S].

    Both halves of D' hold the same cosines; the sines' first half is negated, so that rotating is
    x · cos + swap(x) · sin. They are scaled as `config` says.
    """
    angles = positions[..., None].float() * _frequencies_on(
        positions.device, config, head_dim
    )  # B S D'/2
    cos, sin = angles.cos(), angles.sin()
    if config.magnitude != 1:
        cos, sin = cos * config.magnitude, sin * config.magnitude
    return torch.cat((cos, cos), dim=-1)[:, :, None], torch.cat((-sin, sin), dim=-1)[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first D' dimensions of heads x [B, S, H, D]; the dtype is kept."""
    if not cos.shape[-1]:
        return x
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
            out, x, cos, sin, x.shape[0] * x.shape[1], *x.shape[2:], cos.shape[-1], direction
        )
        return out
    if cos.shape[-1] < x.shape[-1]:
        x, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat((_apply(x, cos, sin, direction), kept), dim=-1)
    # No conversions to the same dtype: where a Function's result is an intermediate tensor
    # itself, PyTorch 2.11's compiler returns gradients of zero (pytorch/pytorch#180642).
    exact = x.dtype == torch.float32
    wide = x if exact else x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.addcmul(wide * cos, torch.cat((second, first), dim=-1), sin, value=direction)
    return rotated if exact else rotated.to(x.dtype)
