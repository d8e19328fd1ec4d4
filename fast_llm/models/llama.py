"""Llama 1 to 3.2, and models with its architecture (Granite code, DeepSeek Coder, Yi …)."""

from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    biases = model.transformer.add_linear_biases
    return {
        "attention_bias": biases in ("everywhere", "only_attention"),
        "mlp_bias": biases in ("everywhere", "only_mlp"),
        "pretraining_tp": 1,
    }


FAMILY = dense_family(Dialect("llama", "LlamaForCausalLM", "Llama", keys=_keys))
