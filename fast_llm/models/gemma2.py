"""Gemma 2 (Google 2024): four norms a block, GeGLU, capped scores and logits, a window on every
other layer.

Weights of norms are zero-centred, and embeddings are multiplied by √hidden_size.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import (
    Dialect,
    dense_family,
    layer_type_names,
    periodic_layers,
    window_and_types,
)
from fast_llm.models.rope import Problem

DEFAULTS = {
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def problems(config: Mapping[str, Any]) -> list[Problem]:
    """Encoders are made of Gemma, too."""
    key = "use_bidirectional_attention"
    return [(key, config[key], "false: attention is causal")] if config.get(key) else []


def settings(config: Mapping[str, Any], period: int = 2) -> dict[str, Any]:
    """All settings but those of positions and of norms of heads. One of `period` layers is full."""
    window = config["sliding_window"]
    attention_cap, logits_cap = (
        None if config[key] is None else float(config[key])
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    return {
        "embedding_multiplier": float(config["hidden_size"] ** 0.5),
        "logits_softcap": logits_cap,
        "transformer": {
            "add_linear_biases": "only_attention" if config["attention_bias"] else "nowhere",
            "normalization": {
                "type": "rms_norm",
                "epsilon": float(config["rms_norm_eps"]),
                "zero_centered": True,
            },
            "norm_placement": "both",
            "softmax_scale": float(config["query_pre_attn_scalar"] ** -0.5),
            "attention_softcap": attention_cap,
            **window_and_types(window, periodic_layers(config, window, period)),
        },
    }


def keys(model: BaseModelConfig) -> dict[str, Any]:
    """The keys of a new config.json that Gemma has."""
    t = model.transformer
    scale = t.kv_channels**-0.5 if t.softmax_scale is None else t.softmax_scale
    scalar = scale**-2
    return {
        "attention_bias": t.add_linear_biases == "only_attention",
        "attn_logit_softcapping": t.attention_softcap,
        "final_logit_softcapping": model.logits_softcap,
        "layer_types": layer_type_names(t),
        # Whole numbers are written as such; the square root has rounded them.
        "query_pre_attn_scalar": round(scalar)
        if abs(scalar - round(scalar)) < 1e-9 * scalar
        else scalar,
        "sliding_window": t.window_size or 4096,
    }


FAMILY = dense_family(
    Dialect(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma 2",
        defaults=DEFAULTS,
        settings=settings,
        keys=keys,
        problems=problems,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    )
)
