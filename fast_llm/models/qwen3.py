"""Qwen 3 (Qwen Team 2025): each head of queries and keys is normalised before its rotation."""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family
from fast_llm.models.qwen2 import window_keys, windows

DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of attention that differ from Llama's."""
    biases = "only_attention" if config["attention_bias"] else "nowhere"
    return {"transformer": {"qk_norm": "head", "add_linear_biases": biases, **windows(config)}}


def keys(model: BaseModelConfig) -> dict[str, Any]:
    """The keys of attention of a new config.json."""
    biases = model.transformer.add_linear_biases == "only_attention"
    return {"attention_bias": biases, **window_keys(model)}


FAMILY = dense_family(
    Dialect("qwen3", "Qwen3ForCausalLM", "Qwen3", defaults=DEFAULTS, settings=settings, keys=keys)
)
