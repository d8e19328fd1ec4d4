"""Reading and writing a dense model's config.json, whatever its family. No torch.

It is read in both spellings: the published one (`rope_theta`, `rope_scaling`, `torch_dtype`), and
that of transformers 5 (`rope_parameters`, `dtype`). Absent keys have transformers' defaults. A
config.json is exported in the spelling that it was read in.

A family says what it has of its own in a `Dialect`; all else is as in Llama.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fast_llm.config.model import BaseModelConfig, RotaryConfig, TransformerConfig
from fast_llm.dtypes import BY_NAME
from fast_llm.errors import CheckpointError
from fast_llm.models import parameters
from fast_llm.models.family import Family
from fast_llm.models.rope import (
    TYPES,
    Problem,
    rope_problems,
    rope_scaling,
    rotary_of,
    with_length,
    with_rotary,
)

_DROPOUTS = ("attention_dropout", "hidden_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop")


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _no_problems(_: Any) -> list[Problem]:
    return []


@dataclass(frozen=True)
class Dialect:
    """What a family's config.json has that a Llama's has not."""

    model_type: str
    class_name: str  # of transformers
    title: str  # of the family, in messages
    # Values of absent keys, as in transformers, where they are not those below.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # config.json, completed by defaults → the settings of `model.base_model` that it decides.
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    # Settings → keys of a new config.json.
    keys: Callable[[BaseModelConfig], dict[str, Any]] = _nothing
    # A completed config.json → values that cannot be trained with.
    problems: Callable[[Mapping[str, Any]], list[Problem]] = _no_problems
    activation_key: str = "hidden_act"
    activation: str = "silu"
    theta: float = 10000.0
    rope_types: tuple[str, ...] = TYPES
    partial_rotary: bool = False
    quantization: str = "absent: unquantized weights are trained"  # what must be, if it is given
    code_is_outdated: bool = False  # that `auto_map` names: transformers has the family itself
    # Kinds of layers that have rotary parameters of their own.
    rope_layers: tuple[str | None, ...] = (None,)


_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
}
# (attention, MLP) → add_linear_biases
BIASES = {
    (False, False): "nowhere",
    (True, True): "everywhere",
    (True, False): "only_attention",
    (False, True): "only_mlp",
}


def dense_family(dialect: Dialect, **different: Any) -> Family:
    """The row of a family whose model is the decoder by configuration. `different`: its fields."""
    fields = {
        "architecture": partial(architecture, dialect),
        "export_config": partial(export_config, dialect),
        "with_length": partial(with_length, default=_default_length(dialect)),
        "notes": notes,
        "shapes": parameters.shapes,
        "cost": parameters.cost,
        "backward": parameters.backward,
        "tensor_plan": parameters.tensor_plan,
        "embedding": parameters.EMBEDDING,
        "head": parameters.HEAD,
        "is_optional_tensor": parameters.is_optional_tensor,
        "stored_name": parameters.stored_name,
        "title": dialect.title,
        "class_name": dialect.class_name,
        "ties": bool({**_DEFAULTS, **dialect.defaults}["tie_word_embeddings"]),
    }
    return Family(**{**fields, **different})


def _default_length(dialect: Dialect) -> int:
    """The context length, in tokens, of a config.json that names none."""
    length: int = {**_DEFAULTS, **dialect.defaults}["max_position_embeddings"]
    return length


def architecture(dialect: Dialect, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of `model.base_model` for a config.json; `source` names the file in errors.

    Raises CheckpointError for a model that cannot be trained.
    """
    config = {**_DEFAULTS, **dialect.defaults, **config}
    title = dialect.title
    if problems := _problems(dialect, config):
        raise CheckpointError(
            "\n".join(
                f"{source}: {key}: given {json.dumps(given)[:80]}, must be {allowed}"
                for key, given, allowed in problems
            )
        )
    try:
        own = dialect.settings(config)
        transformer = _transformer(dialect, config) | own.pop("transformer", {})
        return {
            "family": dialect.model_type,
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["max_position_embeddings"],
            "tie_word_embeddings": bool(config["tie_word_embeddings"]),
            "embedding_multiplier": 1.0,
            "logits_divisor": 1.0,
            "logits_softcap": None,
            **own,
            "transformer": transformer,
        }
    except KeyError as error:
        raise CheckpointError(
            f"{source}: {error.args[0]} is missing; it is not a {title}'s configuration"
        ) from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(f"{source}: not a {title}'s configuration: {error}") from error


def _transformer(dialect: Dialect, config: Mapping[str, Any]) -> dict[str, Any]:
    """`model.base_model.transformer`, before what the family decides itself."""
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "head_groups": given(config, "num_key_value_heads", lambda: heads),
        "kv_channels": given(config, "head_dim", lambda: config["hidden_size"] // heads),
        "ffn_hidden_size": config["intermediate_size"],
        "gated": True,
        "activation_type": dialect.activation,
        "add_linear_biases": BIASES[bool(config["attention_bias"]), bool(config["mlp_bias"])],
        "normalization": {
            "type": "rms_norm",
            "epsilon": float(config["rms_norm_eps"]),
            "zero_centered": False,
        },
        "norm_placement": "pre",
        "qk_norm": "none",
        "layer_types": None,
        "window_size": None,
        "softmax_scale": None,
        "attention_softcap": None,
        "attention_sinks": False,
        "attention_temperature": None,
        "residual_multiplier": 1.0,
        "num_experts": 1,
        "num_experts_per_token": 1,
        "expert_hidden_size": None,
        "layers_without_experts": [],
        "rotary": rotary_of(config, dialect.rope_layers[0], dialect.theta),
        "sliding_rotary": None,
        "layers_without_rotary": [],
    }


def given(config: Mapping[str, Any], key: str, default: Callable[[], Any]) -> Any:
    """A key's value; null means the default, as if the key were absent."""
    value = config.get(key)
    return default() if value is None else value


def window_and_types(window: int | None, sliding: list[bool]) -> dict[str, Any]:
    """The settings `window_size` and `layer_types` of layers that slide or not."""
    if window is None or not any(sliding):
        return {"window_size": None, "layer_types": None}
    names = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return {"window_size": window, "layer_types": None if all(sliding) else names}


def layer_type_names(transformer: TransformerConfig) -> list[str]:
    """`layer_types` of a new config.json."""
    return [
        "sliding_attention" if transformer.is_sliding(layer) else "full_attention"
        for layer in range(transformer.num_layers)
    ]


def sliding_layers(config: Mapping[str, Any], window: int | None) -> list[bool] | None:
    """Which layers slide, as `layer_types` of a config.json says; None without it.

    Raises ValueError for another kind of layer, another number of them, or a missing window.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    layers = config["num_hidden_layers"]
    if not isinstance(kinds, list) or len(kinds) < layers:
        raise ValueError(f"layer_types must have an entry for each of {layers} layers")
    for kind in kinds[:layers]:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types has {json.dumps(kind)[:40]}, which is not supported")
    return with_window([kind == "sliding_attention" for kind in kinds[:layers]], window)


def periodic_layers(config: Mapping[str, Any], window: int | None, period: int) -> list[bool]:
    """Which layers slide; without `layer_types` all but every `period`-th. Raises ValueError."""
    layers = range(1, config["num_hidden_layers"] + 1)
    sliding = sliding_layers(config, window)
    if sliding is not None:
        return sliding
    return with_window([layer % period != 0 for layer in layers], window)


def with_window(sliding: list[bool], window: int | None) -> list[bool]:
    """`sliding`, which layers slide. Raises ValueError if any does, but there is no window."""
    if any(sliding) and window is None:
        raise ValueError("layers with sliding_attention need sliding_window, which is null")
    return sliding


def _problems(dialect: Dialect, config: Mapping[str, Any]) -> list[Problem]:
    """Unsupported values of a config.json: the key, the value, and the allowed values."""
    problems: list[Problem] = []
    key, activation = dialect.activation_key, dialect.activation
    if given(config, key, lambda: activation) != activation:
        problems.append((key, config[key], json.dumps(activation)))
    for key, allowed in (
        ("quantization_config", dialect.quantization),
        ("quantization", "absent: unquantized weights are trained"),  # MLX's name
        ("auto_map", "absent: no code of a model is run"),
    ):
        if config.get(key) and not (key == "auto_map" and dialect.code_is_outdated):
            problems.append((key, config[key], allowed))
    for layers in dialect.rope_layers:
        for problem in rope_problems(config, layers, dialect.rope_types, dialect.partial_rotary):
            if problem not in problems:
                problems.append(problem)
    return problems + dialect.problems(config)


def notes(config: Mapping[str, Any]) -> list[str]:
    """What of a config.json is not followed in training, in words."""
    found = [
        f"{key}: {config[key]} of the model's config.json is not applied: there is no {what} in"
        " training"
        for what, keys in (("dropout", _DROPOUTS), ("noise", ("router_jitter_noise",)))
        for key in keys
        if isinstance(config.get(key), int | float) and config[key]
    ]
    if config.get("dual_chunk_attention_config"):
        found.append(
            "dual_chunk_attention_config of the model's config.json is not applied: attention is"
            " full, as in transformers; it is the same for sequences within one chunk"
        )
    return found


def export_config(
    dialect: Dialect,
    source: Mapping[str, Any] | None,
    model: BaseModelConfig,
    dtype: str,
    tokens: Mapping[str, int | None],
    sequence_length: int = 0,
    rotary: RotaryConfig | None = None,
) -> dict[str, Any]:
    """config.json of an export.

    It is the source's, with the dtype, context length and tied embeddings of the trained model.
    Without a source, all keys are made from `model`. `tokens`: the ids `bos` and `eos`.
    `sequence_length`: of training, in tokens. `rotary`: positions, if not those of `model`, which
    are the source's.
    """
    tied = {**_DEFAULTS, **dialect.defaults}["tie_word_embeddings"]
    if source is not None:
        # transformers 5's spelling, or the one before.
        default = "dtype" if "rope_parameters" in source else "torch_dtype"
        spellings = [key for key in ("torch_dtype", "dtype") if key in source] or [default]
        changed = {**source, **dict.fromkeys(spellings, BY_NAME[dtype].torch)}
        if bool(source.get("tie_word_embeddings", tied)) != model.tie_word_embeddings:
            changed["tie_word_embeddings"] = model.tie_word_embeddings
        if rotary is not None:
            before, after = (
                _keys_of(dialect, one, dtype, tokens, 0)
                for one in (model, model.with_rotary(rotary))
            )
            changed = with_rotary(changed, before, after)
        return with_length(changed, sequence_length, _default_length(dialect))
    if rotary is not None:
        model = model.with_rotary(rotary)
    return _keys_of(dialect, model, dtype, tokens, sequence_length)


def _keys_of(
    dialect: Dialect,
    model: BaseModelConfig,
    dtype: str,
    tokens: Mapping[str, int | None],
    sequence_length: int,
) -> dict[str, Any]:
    """All keys of a config.json, made from settings."""
    t = model.transformer
    keys = {
        "architectures": [dialect.class_name],
        "attention_dropout": 0.0,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": tokens.get("eos"),
        "head_dim": t.kv_channels,
        dialect.activation_key: dialect.activation,
        "hidden_size": t.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": t.ffn_hidden_size,
        "max_position_embeddings": max(model.max_position_embeddings, sequence_length),
        "model_type": dialect.model_type,
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_layers,
        "num_key_value_heads": t.head_groups,
        "rms_norm_eps": t.normalization.epsilon,
        "rope_scaling": rope_scaling(t.rotary),
        "rope_theta": float(t.rotary.theta),
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": BY_NAME[dtype].torch,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    if dialect.model_type != "llama":  # other families have a default, whose row gets no gradient
        keys["pad_token_id"] = None
    keys |= dialect.keys(model)
    return dict(sorted(keys.items()))
