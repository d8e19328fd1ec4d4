"""Apertus (Swiss AI 2025): an MLP without gate, whose activation xIELU has two trained parameters.

Else as Qwen 3. Files hold the fixed numbers of xIELU, too, and other names of the norms.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.models.config_json import Dialect, dense_family
from fast_llm.models.family import Shapes, StoredPart
from fast_llm.models.rope import Problem, rotary_of

_THETA = 12000000.0
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": _THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_DEFAULTS = {"max_position_embeddings": 65536, "rms_norm_eps": 1e-5}
_NORMS = {
    "input_layernorm.weight": "attention_layernorm.weight",
    "post_attention_layernorm.weight": "feedforward_layernorm.weight",
}
_CONSTANTS = {"beta": 0.5, "eps": -1e-6}


def _is_scaled(config: Mapping[str, Any]) -> bool:
    return bool(config.get("rope_scaling")) or config.get("rope_parameters") is not None


def _problems(config: Mapping[str, Any]) -> list[Problem]:
    """What the files of other architectures with this name say, and what transformers ignores."""
    problems: list[Problem] = [
        (key, config[key], f"{wanted}: transformers ignores it".lower())
        for key, wanted in (("qk_norm", True), ("post_norm", False), ("mlp_bias", False))
        if config.get(key, wanted) != wanted
    ]
    theta = config.get("rope_theta", _THETA)
    if not _is_scaled(config) and theta != _THETA:
        # transformers then takes `_ROPE`, and ignores `rope_theta`.
        problems.append(("rope_theta", theta, "12000000.0, or with rope_scaling"))
    return problems


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "gated": False,
        "qk_norm": "head",
        "add_linear_biases": "only_attention" if config["attention_bias"] else "nowhere",
    }
    if not _is_scaled(config):
        shape["rotary"] = rotary_of({**config, "rope_parameters": _ROPE})
    return {"transformer": shape}


def _keys(model: Any) -> dict[str, Any]:
    t = model.transformer
    keys: dict[str, Any] = {
        "attention_bias": t.add_linear_biases == "only_attention",
        "mlp_bias": False,
        "post_norm": False,
        "qk_norm": True,
    }
    if t.rotary.type == "default":
        keys["rope_scaling"] = {"rope_type": "default", "rope_theta": float(t.rotary.theta)}
    return keys


def _stored_parts(name: str, shapes: Shapes) -> list[StoredPart] | None:
    """The names of norms in files."""
    for ours, theirs in _NORMS.items():
        if name.endswith(f".{ours}"):
            return [StoredPart(name.removesuffix(ours) + theirs, shapes[name])]
    return None


def _constants(name: str) -> Mapping[str, float]:
    """The numbers of xIELU that are not trained."""
    above, part, _ = name.partition("act_fn.alpha_p")
    return {f"{above}act_fn.{key}": value for key, value in _CONSTANTS.items()} if part else {}


FAMILY = dense_family(
    Dialect(
        "apertus",
        "ApertusForCausalLM",
        "Apertus",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
        problems=_problems,
        activation="xielu",
        theta=_THETA,
    ),
    stored_parts=_stored_parts,
    constants=_constants,
)
