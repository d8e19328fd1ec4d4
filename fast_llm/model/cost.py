"""What a model costs: parameters, and floating-point operations per token.

Counted as in "Model FLOPs": products of matrices alone, a multiplication and an addition each; backward costs
twice forward; of attention the causal half counts. "Hardware" adds what flash attention computes again.
Llama-3.1-8B at 4096 tokens: 48.25 GFLOP a token.
"""

import math
import re
from dataclasses import dataclass

from fast_llm.config.train import BaseModelConfig

# Dense bf16 products in FLOP/s (fp16 for V100), from the makers' data sheets, without sparsity. The first line
# whose words all occur in the device's name counts.
_PEAKS = (
    ("B300", 2.25e15),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
)


@dataclass(frozen=True)
class Cost:
    """Of one model at one sequence length."""

    parameters: int
    model_flops_per_token: float  # forward and backward
    hardware_flops_per_token: float

    @staticmethod
    def peak_flops(device: str) -> float | None:
        """The dense bf16 peak of a device in FLOP/s, if its name (`NVIDIA H100 80GB HBM3`) is known."""
        words = set(re.split(r"[^A-Z0-9]+", device.upper()))
        return next((peak for names, peak in _PEAKS if words.issuperset(names.split())), None)


def shapes(config: BaseModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape."""
    t = config.transformer
    hidden, ffn = t.hidden_size, t.ffn_hidden_size
    queries, keys = t.num_attention_heads * t.kv_channels, t.head_groups * t.kv_channels
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(t.num_layers):
        above = f"model.layers.{layer}"
        for part, matrices, who in (
            ("self_attn", attention, "only_attention"),
            ("mlp", mlp, "only_mlp"),
        ):
            for name, shape in matrices.items():
                found[f"{above}.{part}.{name}.weight"] = shape
                if t.add_linear_biases in ("everywhere", who):
                    found[f"{above}.{part}.{name}.bias"] = shape[:1]
        found[f"{above}.input_layernorm.weight"] = (hidden,)
        found[f"{above}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    return found


def cost(config: BaseModelConfig, sequence_length: float) -> Cost:
    """The cost of a training step's token in sequences of `sequence_length`.

    For documents that do not attend to one another, `sequence_length` is Σ length² / Σ length over them.
    """
    t = config.transformer
    parameters = sum(math.prod(shape) for shape in shapes(config).values())
    base = 6 * t.num_layers
    heads = 2 * (t.num_attention_heads + t.head_groups) * t.kv_channels
    dense = base * t.hidden_size * (heads + 3 * t.ffn_hidden_size)
    head = 6 * t.hidden_size * config.vocab_size
    attention = base * t.num_attention_heads * t.kv_channels * sequence_length
    return Cost(parameters, dense + head + attention, dense + head + attention * 7 / 6)
