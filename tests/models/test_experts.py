"""Parameters and FLOPs of models with experts."""

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.models import FAMILIES

# The keys of the published files that decide the shape.
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": None,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
}


def read(config: dict[str, object]) -> BaseModelConfig:
    family = FAMILIES[str(config["model_type"])]
    values = family.architecture(config, "config.json")
    return validate(BaseModelConfig, Document(values, {}, ""))


def test_qwen3_30b_a3b_has_the_published_sizes() -> None:
    """30.5 billion parameters, 3.3 billion of them active."""
    cost = FAMILIES["qwen3_moe"].cost(read(QWEN3_30B_A3B), 4096)
    assert cost.parameters == 30_532_122_624
    assert round(cost.active_parameters / 1e9, 2) == 3.35
    # Six for each active matrix weight but the embedding, and half of all pairs of attention.
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    matrices = cost.active_parameters - 151936 * 2048 - norms
    assert cost.model_flops_per_token == 6 * matrices + 6 * 48 * 32 * 128 * 4096


def test_mixtral_8x7b_has_the_published_sizes() -> None:
    """46.7 billion parameters, 12.9 billion of them active."""
    cost = FAMILIES["mixtral"].cost(read(MIXTRAL_8X7B), 4096)
    assert cost.parameters == 46_702_792_704
    assert round(cost.active_parameters / 1e9, 1) == 12.9
