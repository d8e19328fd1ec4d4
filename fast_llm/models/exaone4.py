"""EXAONE 4 (LG AI Research 2025): norms on results, and of each head of queries and keys.

Where three of four layers have a window, these alone have position embeddings.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import (
    Dialect,
    dense_family,
    layer_type_names,
    sliding_layers,
    window_and_types,
)
from fast_llm.models.rope import rope_scaling, rotary_of

_DEFAULTS = {
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    layers, window = config["num_hidden_layers"], config["sliding_window"]
    pattern = config["sliding_window_pattern"]
    period = len(pattern) if isinstance(pattern, str) else pattern
    sliding = sliding_layers(config, window)
    if sliding is None and window is not None:
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
    shape: dict[str, Any] = {
        "norm_placement": "post",
        "qk_norm": "head",
        "add_linear_biases": "nowhere",
        **window_and_types(window, sliding or [False] * layers),
    }
    if window is not None:
        rotary = rotary_of(config)
        shape |= {"rotary": {"type": "none"}, "sliding_rotary": rotary}
    return {"transformer": shape}


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    rotary = t.rotary if t.sliding_rotary is None else t.sliding_rotary
    return {
        "layer_types": layer_type_names(t),
        "rope_scaling": rope_scaling(rotary),
        "rope_theta": float(rotary.theta),
        "sliding_window": t.window_size,
        "sliding_window_pattern": None if t.window_size is None else 4,
    }


FAMILY = dense_family(
    Dialect(
        "exaone4",
        "Exaone4ForCausalLM",
        "EXAONE 4",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
    )
)
