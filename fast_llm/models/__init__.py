"""Families of models: config.json, parameter names and shapes, FLOPs. No torch.

`models/` describes an architecture; `model/` computes it; `config/model.py` has its settings. A
family is one torch-free file and a row of `FAMILIES`. Other packages read families from here only.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig, TransformerConfig
from fast_llm.config.text import format_value
from fast_llm.config.validate import validate
from fast_llm.errors import CheckpointError
from fast_llm.models import (
    apertus,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from fast_llm.models.family import Family as Family
from fast_llm.models.family import StoredPart as StoredPart
from fast_llm.models.others import OTHERS

# `model_type` of a config.json → family. config/families.py lists the names.
FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "mistral": mistral.FAMILY,
    "ministral3": ministral3.FAMILY,
    "granite": granite.FAMILY,
    "seed_oss": seed_oss.FAMILY,
    "smollm3": smollm3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "exaone4": exaone4.FAMILY,
    "phi3": phi3.FAMILY,
    "apertus": apertus.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
}


def family_of(config: BaseModelConfig) -> Family:
    """The family of a configuration. Everything but the reading of config.json asks here."""
    return FAMILIES[config.family]


def family_of_json(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json, by its `model_type`; `source` names the file in errors.

    Raises CheckpointError for a model that cannot be trained.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    allowed = ", ".join(f'"{name}"' for name in sorted(FAMILIES))
    reason = OTHERS.get(kind, "") if isinstance(kind, str) else ""
    raise CheckpointError(
        f"{source}: model_type: given {json.dumps(kind)[:80]}, must be one of {allowed}"
        + (f"; {reason}" if reason else "")
    )


def contradictions(
    config: BaseModelConfig, written: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Settings of a new model that config.json of its family cannot say. `written`: the config.json
    that should say them, if it is not made from the settings.

    Each is a dotted name below `model.base_model`, and what is wrong.
    """
    family = family_of(config)
    try:
        written = written or family.export_config(None, config, "fp32", {})
        values = family.architecture(written, "config.json")
    except CheckpointError as error:
        return [("family", f"given {config.family}, whose config.json cannot say this: {error}")]
    again = validate(BaseModelConfig, Document(values, {}, "config.json"))
    ours, theirs = _meaning(config), _meaning(again)
    return [
        (
            name,
            f"given {format_value(value)}, but {family.title} has {format_value(theirs[name])};"
            " choose another model.base_model.family",
        )
        for name, value in ours.items()
        if not _equal(value, theirs[name])
    ]


def _meaning(config: BaseModelConfig) -> dict[str, Any]:
    """The settings that a family decides, by dotted name; windows and positions layer by layer."""
    t = config.transformer
    layers = range(t.num_layers)
    return {
        "embedding_multiplier": config.embedding_multiplier,
        "logits_divisor": config.logits_divisor,
        "logits_softcap": config.logits_softcap,
        "transformer.activation_type": t.activation_type,
        "transformer.gated": t.gated,
        "transformer.attention_sinks": t.attention_sinks,
        **{
            f"transformer.swiglu_{name}": getattr(t, f"swiglu_{name}")
            for name in ("limit", "alpha")
            if t.activation_type == "clamped_swiglu"
        },
        "transformer.add_linear_biases": t.add_linear_biases,
        "transformer.normalization.zero_centered": t.normalization.zero_centered,
        "transformer.norm_placement": t.norm_placement,
        "transformer.qk_norm": t.qk_norm,
        "transformer.softmax_scale": t.softmax_scale or t.kv_channels**-0.5,
        "transformer.attention_softcap": t.attention_softcap,
        "transformer.attention_temperature": t.attention_temperature
        and t.attention_temperature.model_dump(),
        "transformer.residual_multiplier": t.residual_multiplier,
        "transformer.num_experts": [
            t.num_experts if t.has_experts(layer) else 1 for layer in layers
        ],
        "transformer.num_experts_per_token": t.num_experts_per_token,
        "transformer.normalize_expert_weights": t.normalize_expert_weights or t.num_experts == 1,
        "transformer.window_size": [t.window(layer) for layer in layers],
        **{
            f"transformer.rotary.{name}": [_rotary_meaning(t, layer, name) for layer in layers]
            for name in ("type", "theta", "partial_rotary_factor", *_OF_ROTARY_TYPES)
        },
    }


# Setting of `rotary` → the types that use it.
_OF_ROTARY_TYPES = {
    "scale_factor": ("linear", "dynamic", "yarn", "llama3"),
    "low_frequency_factor": ("llama3",),
    "high_frequency_factor": ("llama3",),
    "original_context_length": ("dynamic", "yarn", "llama3", "longrope"),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "truncate": ("yarn",),
    "magnitude": ("yarn", "longrope"),
    "short_factor": ("longrope",),
    "long_factor": ("longrope",),
}


def _rotary_meaning(t: TransformerConfig, layer: int, name: str) -> Any:
    """A setting of a block's positions; None where they do not use it."""
    rotary = t.rotary_of(layer)
    if name == "type":
        return rotary.type if rotary else "none"
    if rotary is None or rotary.type not in _OF_ROTARY_TYPES.get(name, (rotary.type,)):
        return None
    return getattr(rotary, name)


def _equal(one: Any, other: Any) -> bool:
    """Equal, or as equal as numbers are that were computed from one another."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
