"""gpt-oss (OpenAI 2025): attention sinks, windows in every other layer, and experts with biases.

Files hold the experts of a layer in one tensor, with gate and up columns interleaved, and matrices
transposed. Published folders are in MXFP4, and refused: weights of a bf16 copy are trained.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import (
    Dialect,
    dense_family,
    layer_type_names,
    periodic_layers,
    window_and_types,
)
from fast_llm.models.family import Shapes, StoredPart
from fast_llm.models.rope import rotary_of

_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
_THETA = 150000.0
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"]
    shape: dict[str, Any] = {
        # Routers and experts always have biases.
        "add_linear_biases": "everywhere" if config["attention_bias"] else "only_mlp",
        "attention_sinks": True,
        "activation_type": "clamped_swiglu",
        "swiglu_alpha": float(config["swiglu_alpha"]),
        "swiglu_limit": float(config["swiglu_limit"]),
        **window_and_types(window, periodic_layers(config, window, 2)),
        "num_experts": config.get("num_experts", config["num_local_experts"]),
        "num_experts_per_token": config["num_experts_per_tok"],
        "normalize_expert_weights": True,
        "expert_auxiliary_loss_coefficient": _auxiliary(config),
    }
    if not config.get("rope_scaling") and config.get("rope_parameters") is None:
        shape["rotary"] = rotary_of({**config, "rope_parameters": _ROPE}, None, _THETA)
    return {"transformer": shape}


def _auxiliary(config: Mapping[str, Any]) -> float:
    """Weight of the load-balancing loss.

    Published files say 0.9, and that the loss is not used (`output_router_logits: false`). It would
    outweigh the cross entropy, so that more than the default is followed only where the file uses
    it.
    """
    given, usual = float(config["router_aux_loss_coef"]), float(_DEFAULTS["router_aux_loss_coef"])
    return given if config.get("output_router_logits") else min(given, usual)


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    keys: dict[str, Any] = {
        "attention_bias": t.add_linear_biases == "everywhere",
        "intermediate_size": t.expert_size,
        "layer_types": layer_type_names(t),
        "num_experts_per_tok": t.num_experts_per_token,
        "num_local_experts": t.num_experts,
        "output_router_logits": False,
        "router_aux_loss_coef": t.expert_auxiliary_loss_coefficient,
        "sliding_window": t.window_size or _DEFAULTS["sliding_window"],
        "swiglu_alpha": t.swiglu_alpha,
        "swiglu_limit": t.swiglu_limit,
    }
    if t.rotary.type == "default":  # without it, transformers scales
        keys["rope_scaling"] = {"rope_type": "default", "rope_theta": float(t.rotary.theta)}
    return keys


def _stored_parts(name: str, shapes: Shapes) -> list[StoredPart] | None:
    above, mlp, part = name.partition(".mlp.")
    shape = shapes[name]
    if not mlp:
        return None
    if part.startswith("gate."):
        return [StoredPart(f"{above}.mlp.router.{part.removeprefix('gate.')}", shape)]
    matrix, _, kind = part.removeprefix("experts.").rpartition(".")
    suffix = "_bias" if kind == "bias" else ""
    if matrix == "down_proj":
        stored = shape if suffix else (shape[0], shape[2], shape[1])
        place = f"{above}.mlp.experts.down_proj{suffix}"
        return [StoredPart(place, stored, transposed=not suffix)]
    columns = slice(0 if matrix == "gate_proj" else 1, None, 2)
    place = f"{above}.mlp.experts.gate_up_proj{suffix}"
    if suffix:
        return [StoredPart(place, (shape[0], 2 * shape[1]), (slice(None), columns))]
    stored = shape[0], shape[2], 2 * shape[1]
    return [StoredPart(place, stored, (slice(None), slice(None), columns), transposed=True)]


FAMILY = dense_family(
    Dialect(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
        theta=_THETA,
        quantization="absent: MXFP4 weights cannot be trained. Save a bf16 copy with"
        " AutoModelForCausalLM.from_pretrained(…,"
        " quantization_config=Mxfp4Config(dequantize=True)) and save_pretrained(…)",
    ),
    stored_parts=_stored_parts,
)
