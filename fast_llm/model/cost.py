"""What a model costs: parameters, and floating-point operations per token.

Counted as in "Model FLOPs": products of matrices alone, a multiplication and an addition each; backward costs
twice forward; of attention the causal half counts. "Hardware" adds what flash attention computes again.
Llama-3.1-8B at 4096 tokens: 48.25 GFLOP a token.
"""

from dataclasses import dataclass

from fast_llm.config.train import BaseModelConfig

# Dense bf16 products, FLOP/s, from the makers' data sheets (without sparsity).
_PEAKS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class Cost:
    """Of one model at one sequence length."""

    parameters: int
    model_flops_per_token: float  # forward and backward
    hardware_flops_per_token: float

    @staticmethod
    def peak_flops(device: str) -> float | None:
        """The dense bf16 peak of a device whose name is known, in FLOP/s."""
        return next((peak for name, peak in _PEAKS.items() if name in device.upper()), None)


def shapes(config: BaseModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape."""
    t = config.transformer
    hidden, ffn = t.hidden_size, t.ffn_hidden_size
    queries, keys = t.num_attention_heads * t.kv_channels, t.head_groups * t.kv_channels
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    for layer in range(t.num_layers):
        above = f"model.layers.{layer}"
        for part, matrices, who in (("self_attn", attention, "only_attention"), ("mlp", mlp, "only_mlp")):
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


def cost(config: BaseModelConfig, sequence_length: int) -> Cost:
    """The cost of a training step's token in sequences of `sequence_length`."""
    t = config.transformer
    parameters = 0
    for shape in shapes(config).values():
        size = 1
        for length in shape:
            size *= length
        parameters += size
    base = 6 * t.num_layers
    heads = 2 * (t.num_attention_heads + t.head_groups) * t.kv_channels
    dense = base * t.hidden_size * (heads + 3 * t.ffn_hidden_size)
    head = 6 * t.hidden_size * config.vocab_size
    attention = base * t.num_attention_heads * t.kv_channels * sequence_length
    return Cost(parameters, dense + head + attention, dense + head + attention * 7 / 6)
