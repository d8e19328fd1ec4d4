"""Qwen 2 and 2.5 (Qwen Team 2024): queries, keys and values have biases.

Layers from `max_window_layers` on have a window, if `use_sliding_window`. No published model does.
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

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of attention windows, as transformers reads them."""
    window = config["sliding_window"] if config["use_sliding_window"] else None
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    sliding = sliding_layers(config, window) or [layer >= first for layer in range(layers)]
    return window_and_types(window, sliding)


def window_keys(model: BaseModelConfig) -> dict[str, Any]:
    """The keys of attention windows of a new config.json."""
    t = model.transformer
    names = layer_type_names(t)
    slides = "sliding_attention" in names
    return {
        "layer_types": names,
        "max_window_layers": names.index("sliding_attention") if slides else t.num_layers,
        "sliding_window": t.window_size,
        "use_sliding_window": slides,
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"transformer": {"add_linear_biases": "only_attn_qkv", **windows(config)}}


FAMILY = dense_family(
    Dialect(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=window_keys,
    )
)
