"""Gemma (Google 2024) and CodeGemma: Llama's block with zero-centred norms and GeGLU.

Embeddings are multiplied by √hidden_size, and heads may be wider than hidden_size divided by their
number.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models import config_json
from fast_llm.models.config_json import Dialect, dense_family
from fast_llm.models.gemma2 import problems

_ACTIVATION = "gelu_pytorch_tanh"
_DEFAULTS = {
    "max_position_embeddings": 8192,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "tie_word_embeddings": True,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embedding_multiplier": float(config["hidden_size"] ** 0.5),
        "transformer": {
            "add_linear_biases": "only_attention" if config["attention_bias"] else "nowhere",
            "normalization": {
                "type": "rms_norm",
                "epsilon": float(config["rms_norm_eps"]),
                "zero_centered": True,
            },
        },
    }


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.transformer.add_linear_biases == "only_attention"}


_DIALECT = Dialect(
    "gemma",
    "GemmaForCausalLM",
    "Gemma",
    defaults=_DEFAULTS,
    settings=_settings,
    keys=_keys,
    problems=problems,
    activation=_ACTIVATION,
)


def _architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Published files say `gelu`, and mean its tanh approximation, as transformers reads it."""
    if config.get("hidden_act") == "gelu":
        config = {**config, "hidden_act": _ACTIVATION}
    return config_json.architecture(_DIALECT, config, source)


FAMILY = dense_family(_DIALECT, architecture=_architecture)
