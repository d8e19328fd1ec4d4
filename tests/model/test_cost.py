"""Parameters and operations against published numbers."""

from fast_llm.config.train import BaseModelConfig, TransformerConfig
from fast_llm.model.cost import Cost, cost

LLAMA_8B = BaseModelConfig(
    vocab_size=128256,
    tie_word_embeddings=False,
    transformer=TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        head_groups=8,
        ffn_hidden_size=14336,
    ),
)


def test_llama_8b() -> None:
    found = cost(LLAMA_8B, 4096)
    assert found.parameters == 8_030_261_248  # as published with the model
    # 10,100 tokens/s at 487 TFLOP/s, the pair that Fast-LLM published: 48.2 GFLOP a token.
    assert round(found.model_flops_per_token / 1e9, 2) == 48.25
    assert found.hardware_flops_per_token - found.model_flops_per_token == 6 * 32 * 4096 * 4096 / 6


def test_peaks() -> None:
    assert Cost.peak_flops("NVIDIA H200") == 989e12
    assert Cost.peak_flops("Some other device") is None
