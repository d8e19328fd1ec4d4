"""SmolLM3 (Hugging Face 2025): every fourth layer has no position embedding.

In config.json, `no_rope_layers` has a 1 for each layer that has one.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import (
    Dialect,
    dense_family,
    given,
    layer_type_names,
    sliding_layers,
    window_and_types,
)

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "sliding_window": None,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotates = given(
        config,
        "no_rope_layers",
        lambda: [(layer + 1) % interval != 0 for layer in range(layers)],
    )
    window = config["sliding_window"] if config["use_sliding_window"] else None
    # transformers' masks follow layer_types alone, its kernels use_sliding_window, too.
    sliding = sliding_layers(config, window) or [not rotates[layer] for layer in range(layers)]
    return {
        "transformer": {
            "layers_without_rotary": [layer for layer in range(layers) if not rotates[layer]],
            **window_and_types(window, sliding),
        }
    }


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    return {
        "attention_bias": t.add_linear_biases in ("everywhere", "only_attention"),
        "layer_types": layer_type_names(t),
        "mlp_bias": t.add_linear_biases in ("everywhere", "only_mlp"),
        "no_rope_layers": [int(t.rotary_of(layer) is not None) for layer in range(t.num_layers)],
        "sliding_window": t.window_size,
        "use_sliding_window": t.window_size is not None,
    }


FAMILY = dense_family(
    Dialect(
        "smollm3",
        "SmolLM3ForCausalLM",
        "SmolLM3",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
        theta=2000000.0,
    )
)
