"""Phi-3, 3.5 and 4 (Microsoft 2024): as Mistral, with part of each head rotated in some models.

Files hold queries, keys and values in one matrix, and gate and up in another. They name Python code
(`auto_map`) from before transformers had the family; it is not run.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family, window_and_types
from fast_llm.models.family import Shapes, StoredPart
from fast_llm.models.rope import ORIGINAL, with_length

_CONTEXT = 4096
_DEFAULTS = {
    "max_position_embeddings": _CONTEXT,
    ORIGINAL: _CONTEXT,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
# Matrices that files hold together, one above the other.
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    windows = window_and_types(config["sliding_window"], [True] * config["num_hidden_layers"])
    # transformers ignores `attention_bias`, which published files have.
    return {"transformer": {"add_linear_biases": "nowhere", **windows}}


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    rotary = model.transformer.rotary
    scaled = rotary.type == "longrope"
    return {
        ORIGINAL: rotary.original_context_length if scaled else _CONTEXT,
        "partial_rotary_factor": rotary.partial_rotary_factor,
        "sliding_window": model.transformer.window_size,
    }


def _with_length(config: Mapping[str, Any], sequence_length: int) -> dict[str, Any]:
    if sequence_length <= (config.get("max_position_embeddings") or _CONTEXT):
        return dict(config)
    return with_length({ORIGINAL: _CONTEXT, **config}, sequence_length, _CONTEXT)


def _stored_parts(name: str, shapes: Shapes) -> list[StoredPart] | None:
    above, _, matrix = name.removesuffix(".weight").rpartition(".")
    for joined, members in _JOINED.items():
        if matrix in members:
            rows = [shapes[f"{above}.{member}.weight"][0] for member in members]
            first = sum(rows[: members.index(matrix)])
            region = (slice(first, first + shapes[name][0]),)
            shape = (sum(rows), shapes[name][1])
            return [StoredPart(f"{above}.{joined}.weight", shape, region)]
    return None


FAMILY = dense_family(
    Dialect(
        "phi3",
        "Phi3ForCausalLM",
        "Phi-3",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
        rope_types=("default", "longrope"),
        partial_rotary=True,
        code_is_outdated=True,
    ),
    stored_parts=_stored_parts,
    with_length=_with_length,
)
