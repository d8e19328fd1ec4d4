"""Rotary position embedding (Su et al. 2021), and Llama 3.1's stretch of it.

Pair i of a head's D dimensions turns by position · θ^(-2i/D); the pair is (i, i + D/2), the half-split
layout of Hugging Face. Llama 3.1 divides the frequencies whose wavelength exceeds the original context by
`scale_factor`, keeps the short ones, and blends in between ("The Llama 3 Herd of Models", 2024).

There is no buffer to shard, to save or to lose: angles are made from the positions in each forward pass.
Letters: B sequences, S tokens of a sequence, D head dimensions.
"""

import math

import torch
from torch import Tensor

from fast_llm.config.train import RotaryConfig


def frequencies(config: RotaryConfig, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position of each pair of dimensions: fp32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    turns = 1.0 / (config.theta**exponents)
    if config.type == "default":
        return turns
    wavelengths = 2 * math.pi / turns
    low, high = config.low_frequency_factor, config.high_frequency_factor
    blend = (config.original_context_length / wavelengths - low) / (high - low)
    blended = (1 - blend) * turns / config.scale_factor + blend * turns
    stretched = torch.where(wavelengths > config.original_context_length / low, turns / config.scale_factor, blended)
    return torch.where(wavelengths < config.original_context_length / high, turns, stretched)


def rotary(positions: Tensor, config: RotaryConfig, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles, each [B, S, 1, D], from positions [B, S].

    Angles are fp32. Both halves of D hold the same cosines; the sines' first half is negated, so that
    turning is x · cos + swap(x) · sin.
    """
    angles = positions[..., None].float() * frequencies(config, head_dim, positions.device)  # B S D/2
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1)[:, :, None].to(dtype),
        torch.cat((-sin, sin), dim=-1)[:, :, None].to(dtype),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads x [B, S, H, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin
