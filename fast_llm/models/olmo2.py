"""OLMo 2 (Ai2 2024): norms on the results of attention and MLP, and on all queries and keys."""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family

DEFAULTS = {"rms_norm_eps": 1e-5}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of norms and biases."""
    biases = "only_attention" if config["attention_bias"] else "nowhere"
    shape = {"norm_placement": "post", "qk_norm": "projection", "add_linear_biases": biases}
    return {"transformer": shape}


def keys(model: BaseModelConfig) -> dict[str, Any]:
    """The key of biases of a new config.json."""
    return {"attention_bias": model.transformer.add_linear_biases == "only_attention"}


FAMILY = dense_family(
    Dialect("olmo2", "Olmo2ForCausalLM", "OLMo 2", defaults=DEFAULTS, settings=settings, keys=keys)
)
