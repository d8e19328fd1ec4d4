"""Mistral (Jiang et al. 2023): all layers have one window, or none."""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family, window_and_types

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    sliding = [True] * config["num_hidden_layers"]
    windows = window_and_types(config["sliding_window"], sliding)
    return {"transformer": {"add_linear_biases": "nowhere", **windows}}


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.transformer.window_size}


FAMILY = dense_family(
    Dialect(
        "mistral",
        "MistralForCausalLM",
        "Mistral",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
    )
)
