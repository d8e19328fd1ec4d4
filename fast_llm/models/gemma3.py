"""Gemma 3's text models (Google 2025): five of six layers have a window and positions of their own.

Else as Gemma 2, with norms of each head of queries and keys and without caps. `gemma3_text` alone;
folders with images nest it in `gemma3`.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models import gemma2
from fast_llm.models.config_json import Dialect, dense_family
from fast_llm.models.rope import Problem, rotary_of

_GLOBAL, _LOCAL = 1000000.0, 10000.0
_DEFAULTS = {
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}


def _problems(config: Mapping[str, Any]) -> list[Problem]:
    """transformers reads the cap of scores, and does not apply it."""
    key = "attn_logit_softcapping"
    capped = [(key, config[key], "null: Gemma 3 has no cap of scores")]
    return gemma2.problems(config) + (capped if config[key] is not None else [])


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    found = gemma2.settings(config, config["sliding_window_pattern"])
    rotary = rotary_of(config, "sliding_attention", _LOCAL, "rope_local_base_freq")
    found["transformer"] |= {"qk_norm": "head", "sliding_rotary": rotary}
    return found


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    local = t.rotary if t.sliding_rotary is None else t.sliding_rotary
    return gemma2.keys(model) | {"rope_local_base_freq": float(local.theta)}


FAMILY = dense_family(
    Dialect(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma 3",
        defaults={**gemma2.DEFAULTS, **_DEFAULTS},
        settings=_settings,
        keys=_keys,
        problems=_problems,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        theta=_GLOBAL,
        rope_layers=("full_attention", "sliding_attention"),
    )
)
