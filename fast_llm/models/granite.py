"""Granite 3 (IBM 2024): embeddings, scores, residual additions and logits have factors."""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family

_DEFAULTS = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embedding_multiplier": float(config["embedding_multiplier"]),
        "logits_divisor": float(config["logits_scaling"]),
        "transformer": {
            "softmax_scale": float(config["attention_multiplier"]),
            "residual_multiplier": float(config["residual_multiplier"]),
        },
    }


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    scale = t.kv_channels**-0.5 if t.softmax_scale is None else t.softmax_scale
    return {
        "attention_bias": t.add_linear_biases in ("everywhere", "only_attention"),
        "attention_multiplier": scale,
        "embedding_multiplier": model.embedding_multiplier,
        "logits_scaling": model.logits_divisor,
        "mlp_bias": t.add_linear_biases in ("everywhere", "only_mlp"),
        "residual_multiplier": t.residual_multiplier,
    }


FAMILY = dense_family(
    Dialect(
        "granite",
        "GraniteForCausalLM",
        "Granite",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
    )
)
