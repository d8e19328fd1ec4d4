"""Mixtral (Jiang et al. 2024): Mistral with 8 experts in each block, of which 2 compute each token.

Files hold each matrix of each expert, under names of their own.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family, window_and_types
from fast_llm.models.family import Shapes, StoredPart

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}
_MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "transformer": {
            "add_linear_biases": "nowhere",
            **window_and_types(config["sliding_window"], [True] * config["num_hidden_layers"]),
            "num_experts": config["num_local_experts"],
            "num_experts_per_token": config["num_experts_per_tok"],
            "expert_hidden_size": None,
            "normalize_expert_weights": True,
            "layers_without_experts": [],
            "expert_auxiliary_loss_coefficient": float(config["router_aux_loss_coef"]),
        }
    }


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    return {
        "intermediate_size": t.expert_size,
        "num_experts_per_tok": t.num_experts_per_token,
        "num_local_experts": t.num_experts,
        "output_router_logits": False,
        "router_aux_loss_coef": t.expert_auxiliary_loss_coefficient,
        "router_jitter_noise": 0.0,
        "sliding_window": t.window_size,
    }


def stored_parts(name: str, shapes: Shapes) -> list[StoredPart] | None:
    """The names of router and experts in files: `block_sparse_moe.experts.3.w1.weight`."""
    above, mlp, part = name.partition(".mlp.")
    if not mlp:
        return None
    shape = shapes[name]
    if len(shape) != 3:
        return [StoredPart(f"{above}.block_sparse_moe.{part}", shape)]
    experts, matrix = f"{above}.block_sparse_moe.experts", _MATRICES[part.split(".")[1]]
    return [
        StoredPart(f"{experts}.{number}.{matrix}.weight", shape[1:], expert=number)
        for number in range(shape[0])
    ]


FAMILY = dense_family(
    Dialect(
        "mixtral",
        "MixtralForCausalLM",
        "Mixtral",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
        theta=1e6,
    ),
    stored_parts=stored_parts,
)
