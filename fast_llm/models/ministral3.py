"""Ministral 3 (Mistral AI 2025): YaRN, and queries that grow with the position.

The text models alone (`ministral3`); the published folders nest them in `mistral3`.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family, window_and_types
from fast_llm.models.rope import ORIGINAL, rope_of, rope_scaling

_BETA = "llama_4_scaling_beta"
_DEFAULTS = {
    "max_position_embeddings": 262144,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_ROPE = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    ORIGINAL: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    _BETA: 0.1,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_of(config)[1]
    sliding = [True] * config["num_hidden_layers"]
    return {
        "transformer": {
            "add_linear_biases": "nowhere",
            "attention_temperature": {"beta": float(rope[_BETA]), "length": rope[ORIGINAL]},
            **window_and_types(config["sliding_window"], sliding),
        }
    }


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    rope = {"rope_theta": float(t.rotary.theta), "rope_type": t.rotary.type}
    rope |= rope_scaling(t.rotary) or {}
    if t.attention_temperature is not None:
        rope |= {_BETA: t.attention_temperature.beta, ORIGINAL: t.attention_temperature.length}
    return {"rope_parameters": rope, "rope_scaling": None, "sliding_window": t.window_size}


FAMILY = dense_family(
    Dialect(
        "ministral3",
        "Ministral3ForCausalLM",
        "Ministral 3",
        defaults={**_DEFAULTS, "rope_parameters": _ROPE},
        settings=_settings,
        keys=_keys,
    )
)
