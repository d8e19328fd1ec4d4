"""Llama 1 to 3.2: config.json, parameter names and shapes, parameter counts and FLOPs. No torch.

config.json is read in both spellings: the published one (`rope_theta`, `rope_scaling`,
`torch_dtype`), and that of transformers 5 (`rope_parameters`, `dtype`). It is exported in the
spelling that it was read in.

Llama-3.1-8B at 4096 tokens: 8.03 billion parameters, 48.25 GFLOP a token.
"""

import json
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.dtypes import BY_NAME
from fast_llm.errors import CheckpointError
from fast_llm.models.flops import Cost
from fast_llm.models.tensor_plan import (
    Columns,
    Gather,
    Norm,
    Rows,
    TensorPlan,
    VocabEmbedding,
    VocabHead,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TENSOR_PLAN: TensorPlan = {
    "model.embed_tokens": VocabEmbedding(),
    "*.input_layernorm": Norm(),
    "*.self_attn": Gather(),
    "*.q_proj": Rows(),
    "*.k_proj": Rows(),
    "*.v_proj": Rows(),
    "*.o_proj": Columns(),
    "*.post_attention_layernorm": Norm(),
    "*.mlp": Gather(),
    "*.gate_proj": Rows(),
    "*.up_proj": Rows(),
    "*.down_proj": Columns(),
    "model.norm": Norm(),
    "lm_head": VocabHead(),
}
# (attention_bias, mlp_bias) → add_linear_biases
_BIASES = {
    (False, False): "nowhere",
    (True, True): "everywhere",
    (True, False): "only_attention",
    (False, True): "only_mlp",
}


def architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of `model.base_model` for a config.json; `source` names the file in errors.

    Raises CheckpointError for anything but a Llama of versions 1 to 3.2.
    """
    rope = _rope(config)
    if problems := _problems(config, rope):
        raise CheckpointError(
            "\n".join(
                f"{source}: {key}: given {json.dumps(given)[:80]}, must be {allowed}"
                for key, given, allowed in problems
            )
        )
    try:
        heads = config["num_attention_heads"]
        return {
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "transformer": {
                "num_layers": config["num_hidden_layers"],
                "hidden_size": config["hidden_size"],
                "num_attention_heads": heads,
                "head_groups": _given(config, "num_key_value_heads", lambda: heads),
                "kv_channels": _given(config, "head_dim", lambda: config["hidden_size"] // heads),
                "ffn_hidden_size": config["intermediate_size"],
                "gated": True,
                "activation_type": "silu",
                "add_linear_biases": _BIASES[
                    bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
                ],
                "normalization": {
                    "type": "rms_norm",
                    "epsilon": float(config.get("rms_norm_eps", 1e-6)),
                },
                "rotary": _rotary(config, rope),
            },
        }
    except KeyError as error:
        raise CheckpointError(
            f"{source}: {error.args[0]} is missing; it is not a Llama's configuration"
        ) from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: not a Llama's configuration: {error}") from error


def _rope(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key that holds the rotary embedding's parameters, and its value.

    As in transformers, `rope_scaling` takes precedence over `rope_parameters`, and both over keys
    of config.json itself.
    """
    spelling = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return spelling, config.get(spelling) or {}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _problems(config: Mapping[str, Any], rope: tuple[str, Any]) -> list[tuple[str, Any, str]]:
    """Unsupported values of a config.json: the key, the value, and the allowed values."""
    problems: list[tuple[str, Any, str]] = []
    if config.get("model_type") != "llama":
        allowed = '"llama": no other models can be trained here'
        problems.append(("model_type", config.get("model_type"), allowed))
    if config.get("hidden_act", "silu") != "silu":
        problems.append(("hidden_act", config["hidden_act"], '"silu"'))
    for key, allowed in (
        ("quantization_config", "absent: unquantized weights are trained"),
        ("auto_map", "absent: no code of a model is run"),
        ("attention_dropout", "0: there is no dropout"),
    ):
        if config.get(key):
            problems.append((key, config[key], allowed))
    spelling, parameters = rope
    if not isinstance(parameters, dict):
        problems.append((spelling, parameters, "an object or null"))
        parameters = {}
    if (kind := _rope_type(parameters)) not in ("default", "llama3"):
        problems.append((f"{spelling}.rope_type", kind, '"default" or "llama3"'))
    partial = config.get("partial_rotary_factor", 1)
    if (factor := parameters.get("partial_rotary_factor", partial)) not in (1, None):
        problems.append(("partial_rotary_factor", factor, "1"))
    return problems


def _rotary(config: Mapping[str, Any], rope: tuple[str, Any]) -> dict[str, Any]:
    """`model.base_model.transformer.rotary`."""
    parameters = rope[1]
    rotary: dict[str, Any] = {
        "type": _rope_type(parameters),
        "theta": float(parameters.get("rope_theta", config.get("rope_theta", 10000.0))),
    }
    if rotary["type"] == "llama3":
        original = "original_max_position_embeddings"
        trained = parameters.get(original, config.get("max_position_embeddings", 2048))
        rotary |= {
            "scale_factor": float(parameters["factor"]),
            "low_frequency_factor": float(parameters["low_freq_factor"]),
            "high_frequency_factor": float(parameters["high_freq_factor"]),
            "original_context_length": config.get(original, trained),
        }
    return rotary


def _given(config: Mapping[str, Any], key: str, default: Callable[[], Any]) -> Any:
    """A key's value; null means the default, as if the key were absent."""
    value = config.get(key)
    return default() if value is None else value


def export_config(
    source: Mapping[str, Any] | None,
    model: BaseModelConfig,
    dtype: str,
    tokens: Mapping[str, int | None],
    sequence_length: int = 0,
) -> dict[str, Any]:
    """config.json of an export.

    It is the source's, with the dtype, context length and tied embeddings of the trained model.
    Without a source, all keys are made from `model`. `tokens`: the ids `bos` and `eos`.
    `sequence_length`: of training, in tokens.
    """
    if source is not None:
        # transformers 5's spelling, or the one before.
        default = "dtype" if "rope_parameters" in source else "torch_dtype"
        spellings = [key for key in ("torch_dtype", "dtype") if key in source] or [default]
        changed = {**source, **dict.fromkeys(spellings, BY_NAME[dtype].torch)}
        if bool(source.get("tie_word_embeddings", False)) != model.tie_word_embeddings:
            changed["tie_word_embeddings"] = model.tie_word_embeddings
        return with_length(changed, sequence_length)
    t = model.transformer
    rotary = t.rotary
    scaling = None
    if rotary.type == "llama3":
        scaling = {
            "factor": rotary.scale_factor,
            "low_freq_factor": rotary.low_frequency_factor,
            "high_freq_factor": rotary.high_frequency_factor,
            "original_max_position_embeddings": rotary.original_context_length,
            "rope_type": "llama3",
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": t.add_linear_biases in ("everywhere", "only_attention"),
        "attention_dropout": 0.0,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": tokens.get("eos"),
        "head_dim": t.kv_channels,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": t.ffn_hidden_size,
        "max_position_embeddings": max(model.max_position_embeddings, sequence_length),
        "mlp_bias": t.add_linear_biases in ("everywhere", "only_mlp"),
        "model_type": "llama",
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_layers,
        "num_key_value_heads": t.head_groups,
        "pretraining_tp": 1,
        "rms_norm_eps": t.normalization.epsilon,
        "rope_scaling": scaling,
        "rope_theta": float(rotary.theta),
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": BY_NAME[dtype].torch,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def with_length(config: Mapping[str, Any], sequence_length: int) -> dict[str, Any]:
    """A config.json with at least this context length, in tokens. Rotary angles do not change."""
    before = config.get("max_position_embeddings") or 2048
    if sequence_length <= before:
        return dict(config)
    changed = {**config, "max_position_embeddings": sequence_length}
    for spelling in ("rope_scaling", "rope_parameters"):
        rope, original = config.get(spelling) or {}, "original_max_position_embeddings"
        if (
            rope.get("rope_type", rope.get("type", "default")) not in ("default", "linear")
            and original not in rope
        ):
            # Angles are scaled by this length; its default is max_position_embeddings.
            changed[spelling] = {**rope, original: config.get(original, before)}
    return changed


def shapes(config: BaseModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of each parameter, as `CausalLM.named_parameters()` has them."""
    t = config.transformer
    hidden, ffn = t.hidden_size, t.ffn_hidden_size
    queries, keys = t.num_attention_heads * t.kv_channels, t.head_groups * t.kv_channels
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(t.num_layers):
        above = f"model.layers.{layer}"
        for part, matrices, biases in (
            ("self_attn", attention, "only_attention"),
            ("mlp", mlp, "only_mlp"),
        ):
            for name, shape in matrices.items():
                found[f"{above}.{part}.{name}.weight"] = shape
                if t.add_linear_biases in ("everywhere", biases):
                    found[f"{above}.{part}.{name}.bias"] = shape[:1]
        found[f"{above}.input_layernorm.weight"] = (hidden,)
        found[f"{above}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    return found


def cost(config: BaseModelConfig, sequence_length: float) -> Cost:
    """Parameters, and FLOPs per token of a training step with sequences of `sequence_length`.

    For packed documents, `sequence_length` is Σ length² / Σ length over the documents.
    """
    t = config.transformer
    parameters = sum(math.prod(shape) for shape in shapes(config).values())
    base = 6 * t.num_layers
    heads = 2 * (t.num_attention_heads + t.head_groups) * t.kv_channels
    dense = base * t.hidden_size * (heads + 3 * t.ffn_hidden_size)
    head = 6 * t.hidden_size * config.vocab_size
    attention = base * t.num_attention_heads * t.kv_channels * sequence_length
    return Cost(parameters, dense + head + attention, dense + head + attention * 7 / 6)


def is_optional_tensor(name: str) -> bool:
    """Whether a folder may hold this tensor in addition to the model's parameters.

    These are rotary frequencies, which are computed here, and the head of a tied model, if it
    equals the embedding.
    """
    return name.endswith("rotary_emb.inv_freq") or name == HEAD


def stored_name(name: str, parameters: Container[str], files: Container[str]) -> str:
    """The name under which a folder's `files` hold one of a model's `parameters`.

    A tied embedding may be stored as the head: `save_model` of safetensors and accelerate does so.
    """
    as_head = name == EMBEDDING and HEAD not in parameters and name not in files and HEAD in files
    return HEAD if as_head else name
