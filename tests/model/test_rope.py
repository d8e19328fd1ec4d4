"""Rotary positions against those of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partly

from fast_llm.config.rotary import RotaryConfig
from fast_llm.model.rope import frequencies, rotary_angles, rotate
from fast_llm.models.rope import rope_problems, rotary_of

LLAMA_3 = RotaryConfig(type="llama3", theta=500000, scale_factor=8, original_context_length=8192)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# rope_scaling of config.json, and further keys of it. max_position_embeddings is 131,072.
FILES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "DeepSeek-Coder": {
        "rope_theta": 100000,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "max_position_embeddings": 16384,
    },
    "linear, 1": {"rope_scaling": {"type": "linear", "factor": 1}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, uneven": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.1},
        "max_position_embeddings": 3000,
    },
    "yarn": {"rope_theta": 1000000.0, "rope_scaling": YARN},
    "yarn, no truncation": {
        "rope_theta": 150000.0,
        "rope_scaling": {
            **YARN,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
    "yarn, attention factor": {
        "rope_scaling": {**YARN, "attention_factor": 1.2079441541679836, "beta_fast": 24}
    },
    "yarn, mscale": {
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.5, "beta_slow": 2}
    },
    "yarn, mscale alone": {"rope_scaling": {**YARN, "mscale": 0.707}},
    "yarn, no factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, original length of the file": {
        "rope_scaling": YARN,
        "original_max_position_embeddings": 16384,
    },
    "yarn, no original length": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
}


def angles_of_transformers(config: Any, positions: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Their module, and its cosines and sines at `positions`."""
    kind = Phi3RotaryEmbedding if isinstance(config, Phi3Config) else LlamaRotaryEmbedding
    theirs = kind(config)
    return theirs, torch.stack(theirs(torch.zeros(1), positions))


def assert_equal_angles(
    rotary: RotaryConfig, config: Any, head_dim: int, positions: torch.Tensor
) -> None:
    """Frequencies, cosines and sines have the bits of transformers; a rotation has its numbers."""
    theirs, (wanted_cos, wanted_sin) = angles_of_transformers(config, positions)
    assert torch.equal(frequencies(rotary, head_dim), theirs.inv_freq)
    cos, sin = rotary_angles(positions, rotary, head_dim)
    half = cos.shape[-1] // 2
    assert cos.dtype == torch.float32
    assert torch.equal(cos[:, :, 0], wanted_cos)
    assert torch.equal(sin[:, :, 0, half:], wanted_sin[..., half:])
    q = torch.randn(1, positions.shape[1], 3, head_dim)
    apply = apply_partly if isinstance(config, Phi3Config) else apply_rotary_pos_emb
    wanted, _ = apply(q.transpose(1, 2), q.transpose(1, 2), wanted_cos, wanted_sin)
    # One rounding of a sum whose terms reach 5 × the largest factor, 1.6.
    assert (rotate(q, cos, sin) - wanted.transpose(1, 2)).abs().max() < 2e-6


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("head_dim", [64, 128, 10])
def test_angles_equal_transformers(name: str, head_dim: int) -> None:
    file = {"max_position_embeddings": 131072, **FILES[name]}
    assert rope_problems(file) == []
    rotary = RotaryConfig.model_validate(rotary_of(file))
    longest = file["max_position_embeddings"]
    positions = torch.tensor([[0, 1, 2, 1000, longest // 2, longest - 1]])
    theirs = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **file)
    assert_equal_angles(rotary.for_context(longest), theirs, head_dim, positions)


@pytest.mark.parametrize("name", ["dynamic", "dynamic, uneven"])
def test_dynamic_angles_of_longer_contexts_equal_transformers(name: str) -> None:
    file = {"max_position_embeddings": 4096, **FILES[name]}
    rotary = RotaryConfig.model_validate(rotary_of(file))
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=4, **file)
    for length in (4097, 16384, 131072):
        positions = torch.tensor([[0, 1, 4096, length - 1]])
        assert_equal_angles(rotary.for_context(length), theirs, 64, positions)
    short = frequencies(rotary.for_context(100), 64)
    assert torch.equal(short, LlamaRotaryEmbedding(theirs).inv_freq)
    assert (frequencies(rotary.for_context(8192), 64)[1:] < short[1:]).all()


@pytest.mark.parametrize("share", [0.75, 1.0])
@pytest.mark.parametrize("kind", ["longrope", "default"])
@pytest.mark.parametrize("length", [4096, 4097, 131072])
def test_angles_of_phi_equal_transformers(share: float, kind: str, length: int) -> None:
    pairs = int(128 * share) // 2
    file: dict[str, Any] = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": share,
        "rope_theta": 10000.0,
    }
    if kind != "default":
        file["rope_scaling"] = {
            "type": kind,
            "short_factor": [1 + i / 64 for i in range(pairs)],
            "long_factor": [1 + i * 0.9 for i in range(pairs)],
        }
    assert rope_problems(file, partial=True) == []
    rotary = RotaryConfig.model_validate(rotary_of(file)).for_context(length)
    theirs = Phi3Config(hidden_size=512, num_attention_heads=4, **file)
    positions = torch.tensor([[0, 1, 4095, length - 1]])
    assert_equal_angles(rotary, theirs, 128, positions)
    assert (rotary.magnitude == 1) == (kind == "default")


@pytest.mark.usefixtures("ways")
def test_scaled_and_partial_rotation_has_the_gradient_of_its_formula() -> None:
    config = RotaryConfig(type="yarn", scale_factor=8, partial_rotary_factor=0.5)
    x = torch.randn(2, 5, 3, 16).requires_grad_()
    cos, sin = rotary_angles(torch.arange(5).expand(2, 5), config, 16)
    cotangent = torch.randn_like(x)
    found = rotate(x, cos, sin)
    turned, kept = x[..., :8], x[..., 8:]
    wanted = torch.cat(
        (turned * cos + torch.cat(turned.chunk(2, -1)[::-1], -1) * sin, kept), dim=-1
    )
    assert torch.equal(found[..., 8:], x[..., 8:])
    assert (found - wanted).abs().max() < 1e-6
    grads = [torch.autograd.grad(out, x, cotangent)[0] for out in (found, wanted)]
    assert (grads[0] - grads[1]).abs().max() < 1e-6
    assert rotary_angles(torch.arange(5)[None], RotaryConfig(type="default"), 16)[0].shape[-1] == 16


def test_no_rotary_positions_change_nothing() -> None:
    config = RotaryConfig.model_construct(type="none", theta=1e4)
    x = torch.randn(1, 5, 3, 16)
    assert rotate(x, *rotary_angles(torch.arange(5)[None], config, 16)) is x


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
