"""Qwen 3 with experts (Qwen Team 2025): 128 experts, of which 8 compute each token.

Blocks of `mlp_only_layers`, and those that `decoder_sparse_step` leaves out, have an ordinary MLP.
Files hold each matrix of each expert.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.config_json import Dialect, dense_family, window_and_types
from fast_llm.models.family import Shapes, StoredPart

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "mlp_only_layers": None,
    "decoder_sparse_step": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = config["sliding_window"] if config["use_sliding_window"] else None
    dense = set(config["mlp_only_layers"] or ())
    step = config["decoder_sparse_step"]
    return {
        "transformer": {
            "qk_norm": "head",
            "add_linear_biases": "only_attention" if config["attention_bias"] else "nowhere",
            **window_and_types(window, [True] * layers),
            # transformers 5 writes it under Mixtral's name.
            "num_experts": config.get("num_local_experts", config["num_experts"]),
            "num_experts_per_token": config["num_experts_per_tok"],
            "expert_hidden_size": config["moe_intermediate_size"],
            "normalize_expert_weights": bool(config["norm_topk_prob"]),
            "layers_without_experts": [
                layer for layer in range(layers) if layer in dense or (layer + 1) % step
            ],
            "expert_auxiliary_loss_coefficient": float(config["router_aux_loss_coef"]),
        }
    }


def _keys(model: BaseModelConfig) -> dict[str, Any]:
    t = model.transformer
    return {
        "attention_bias": t.add_linear_biases == "only_attention",
        "sliding_window": t.window_size,
        "use_sliding_window": t.window_size is not None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(t.layers_without_experts),
        "moe_intermediate_size": t.expert_size,
        "norm_topk_prob": t.normalize_expert_weights,
        "num_experts": t.num_experts,
        "num_experts_per_tok": t.num_experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": t.expert_auxiliary_loss_coefficient,
    }


def stored_parts(name: str, shapes: Shapes) -> list[StoredPart] | None:
    """The names of experts in files: `mlp.experts.3.up_proj.weight`."""
    shape = shapes[name]
    if len(shape) != 3:
        return None
    above, experts, matrix = name.partition(".experts.")
    return [
        StoredPart(f"{above}{experts}{expert}.{matrix}", shape[1:], expert=expert)
        for expert in range(shape[0])
    ]


FAMILY = dense_family(
    Dialect(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3-MoE",
        defaults=_DEFAULTS,
        settings=_settings,
        keys=_keys,
    ),
    stored_parts=stored_parts,
)
