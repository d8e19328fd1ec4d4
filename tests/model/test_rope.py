"""Rotary positions against those of transformers."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fast_llm.config.model import RotaryConfig
from fast_llm.model.rope import frequencies, rotary_angles, rotate

LLAMA_3 = RotaryConfig(type="llama3", theta=500000, scale_factor=8, original_context_length=8192)
CASES = [
    (
        RotaryConfig(theta=10000),
        {"rope_type": "default", "rope_theta": 10000.0},
    ),
    (
        LLAMA_3,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
]


@pytest.mark.parametrize(("config", "parameters"), CASES)
@pytest.mark.parametrize("head_dim", [64, 128, 10])
def test_angles_equal_transformers(
    config: RotaryConfig, parameters: dict[str, object], head_dim: int
) -> None:
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            rope_parameters=parameters,
            max_position_embeddings=131072,
        )
    )
    assert torch.equal(frequencies(config, head_dim), theirs.inv_freq)
    positions = torch.tensor([[0, 1, 2, 1000, 8191, 131071]])
    cos, sin = rotary_angles(positions, config, head_dim)
    wanted_cos, wanted_sin = theirs(torch.zeros(1), positions)
    assert cos.dtype == torch.float32
    # The same roundings: cos and sin are equal to the last bit.
    assert (cos[:, :, 0] - wanted_cos).abs().max() < 1e-6
    assert (sin[:, :, 0, head_dim // 2 :] - wanted_sin[..., head_dim // 2 :]).abs().max() < 1e-6
    q = torch.randn(1, 6, 3, head_dim)
    wanted, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), wanted_cos, wanted_sin)
    assert (rotate(q, cos, sin) - wanted.transpose(1, 2)).abs().max() < 1e-6


def test_llama_3_scales_low_frequencies_only() -> None:
    plain, stretched = frequencies(RotaryConfig(theta=500000), 128), frequencies(LLAMA_3, 128)
    assert torch.equal(stretched[:29], plain[:29])  # wavelengths below 8192 / 4
    assert torch.equal(stretched[35:], plain[35:] / 8)  # above 8192
    between = stretched[29:35] / plain[29:35]
    assert ((between > 1 / 8) & (between < 1)).all()


@pytest.mark.usefixtures("ways")
def test_gradient_rotates_back() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).float().requires_grad_()
    cos, sin = rotary_angles(torch.arange(5).expand(2, 5), RotaryConfig(), 8)
    cotangent = torch.randn_like(x)
    (found,) = torch.autograd.grad(rotate(x, cos, sin), x, cotangent)
    # Rotation is orthogonal: rotated again, the gradient is the incoming one.
    assert (rotate(found, cos, sin) - cotangent).abs().max() < 1e-6
    (wanted,) = torch.autograd.grad(
        x * cos + torch.cat(x.chunk(2, -1)[::-1], -1) * sin, x, cotangent
    )
    assert (found - wanted).abs().max() < 1e-6


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_16_bits_are_rounded_once(dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(1, 50, 2, 8).to(dtype)
    cos, sin = rotary_angles(torch.arange(50)[None] + 5000, RotaryConfig(), 8)
    found, wanted = rotate(x, cos, sin), rotate(x.float(), cos, sin)
    assert found.dtype == dtype
    assert ((found.float() - wanted).abs() <= bound * wanted.abs() + 1e-7).all()
