"""OLMo 3 (Ai2 2025): OLMo 2 with a window on three of four layers; full layers may have YaRN."""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models import olmo2
from fast_llm.models.config_json import (
    Dialect,
    dense_family,
    layer_type_names,
    periodic_layers,
    window_and_types,
)
from fast_llm.models.rope import rotary_of

_THETA = 500000.0


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"]
    # transformers scales full layers only, and ignores `rope_theta` for the others.
    rotary = rotary_of(config, "sliding_attention", _THETA, None)
    own: dict[str, Any] = olmo2.settings(config)["transformer"]
    windows = window_and_types(window, periodic_layers(config, window, 4))
    return {"transformer": own | windows | {"sliding_rotary": rotary}}


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    keys = {"layer_types": layer_type_names(t), "sliding_window": t.window_size or 4096}
    return olmo2.keys(model) | keys


FAMILY = dense_family(
    Dialect(
        "olmo3",
        "Olmo3ForCausalLM",
        "OLMo 3",
        defaults={**olmo2.DEFAULTS, "sliding_window": 4096},
        settings=_settings,
        keys=_keys,
        theta=_THETA,
        rope_layers=("full_attention", "sliding_attention"),
    )
)
