"""Seed-OSS (ByteDance 2025): biases of queries, keys and values, and of the output if it says so.

Heads are wider than hidden_size / heads.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family
from fast_llm.models.rope import Problem

_DEFAULTS = {
    "max_position_embeddings": 524288,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "attention_out_bias": False,
}
# (attention_bias, attention_out_bias, mlp_bias) → add_linear_biases
_BIASES = {
    (False, False, False): "nowhere",
    (True, False, False): "only_attn_qkv",
    (True, True, False): "only_attention",
    (True, True, True): "everywhere",
    (False, False, True): "only_mlp",
}


def _biases(config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    keys = "attention_bias", "attention_out_bias", "mlp_bias"
    first, second, third = (bool(config[key]) for key in keys)
    return first, second, third


def _problems(config: Mapping[str, Any]) -> list[Problem]:
    if _biases(config) in _BIASES:
        return []
    allowed = "as attention_bias, with mlp_bias false" if config["mlp_bias"] else "false"
    return [("attention_out_bias", config["attention_out_bias"], allowed)]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"transformer": {"add_linear_biases": _BIASES[_biases(config)]}}


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    names = {name: biases for biases, name in _BIASES.items()}
    qkv, out, mlp = names[model.transformer.add_linear_biases]
    return {
        "attention_bias": qkv,
        "attention_out_bias": out,
        "mlp_bias": mlp,
        "residual_dropout": 0.0,
    }


FAMILY = dense_family(
    Dialect(
        "seed_oss",
        "SeedOssForCausalLM",
        "Seed-OSS",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
        problems=_problems,
    )
)
