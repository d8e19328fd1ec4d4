"""Rotary positions in config.json: read in both spellings, and written. No torch.

Published files have `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`. Both
name the type `rope_type`, older files `type`. Values have transformers' precedence and defaults
(`RotaryEmbeddingConfigMixin`, `ROPE_INIT_FUNCTIONS`). A file's type may depend on the kind of a
layer: `rope_parameters` then has an object for each of its `layer_types`.
"""

from collections.abc import Container, Mapping
from typing import Any

from fast_llm.config.rotary import RotaryConfig, yarn_magnitude

ORIGINAL = "original_max_position_embeddings"
TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
Problem = tuple[str, Any, str]  # the key, its value, and what is allowed


def rope_of(config: Mapping[str, Any], layer_type: str | None = None) -> tuple[str, Any]:
    """The key that holds the rotary embedding's parameters, and its value.

    As in transformers, `rope_scaling` takes precedence over `rope_parameters`. `layer_type`: the
    kind of layers (`full_attention`), for families that have an object for each. `rope_scaling` is
    then of full attention, and changes single values.
    """
    scaling, rope = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if layer_type is None:
        return ("rope_scaling", scaling) if scaling else ("rope_parameters", rope)
    own = rope.get(layer_type) or {} if isinstance(rope, dict) else rope
    if not scaling or layer_type != "full_attention":
        return f"rope_parameters.{layer_type}", own
    both = isinstance(scaling, dict) and isinstance(own, dict)
    return "rope_scaling", {**own, **scaling} if both else scaling


def _type_of(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def rope_problems(
    config: Mapping[str, Any],
    layer_type: str | None = None,
    types: Container[Any] = TYPES,
    partial: bool = False,
) -> list[Problem]:
    """Values that cannot be trained with: the key, the value, and the allowed values.

    `types`: those that the family knows. `partial`: it can rotate a part of each head.
    """
    problems: list[Problem] = []
    every = config.get("rope_parameters") or {}
    if layer_type is not None and every and not (isinstance(every, dict) and _by_layer(every)):
        # transformers ignores such a file's values.
        return [("rope_parameters", every, "an object of full_attention and sliding_attention")]
    if layer_type is None and isinstance(every, dict) and _by_layer(every):
        return [("rope_parameters", every, "one object for all layers, with rope_type")]
    key, rope = rope_of(config, layer_type)
    if not isinstance(rope, dict):
        return [(key, rope, "an object or null")]
    if not isinstance(kind := _type_of(rope), str) or kind not in types:
        spelling = "type" if "rope_type" not in rope and "type" in rope else "rope_type"
        allowed = [f'"{each}"' for each in TYPES if each in types]
        words = f"{', '.join(allowed[:-1])} or {allowed[-1]}" if allowed[1:] else allowed[0]
        problems.append((f"{key}.{spelling}", kind, words))
    share = _share(config, rope)
    if not partial and share not in (1, None):
        problems.append(("partial_rotary_factor", share, "1"))
    return problems


def _by_layer(rope: Mapping[str, Any]) -> bool:
    """Whether `rope_parameters` has an object for each kind of layers."""
    return "full_attention" in rope or "sliding_attention" in rope


def _share(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Any:
    return rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))


def rotary_of(
    config: Mapping[str, Any],
    layer_type: str | None = None,
    default_theta: float = 10000.0,
    theta_key: str | None = "rope_theta",
) -> dict[str, Any]:
    """The section `rotary` for a config.json without `rope_problems`.

    `theta_key`: the key of config.json that holds the base if the parameters do not.
    Raises KeyError for a missing key, and TypeError or ValueError for a value of another type.
    """
    rope = rope_of(config, layer_type)[1]
    kind = _type_of(rope)
    rotary: dict[str, Any] = {
        "type": kind,
        "theta": float(rope.get("rope_theta", config.get(theta_key or "", default_theta))),
    }
    if (share := _share(config, rope)) not in (1, None):
        rotary["partial_rotary_factor"] = float(share)
    if kind == "default":
        return rotary
    longest = config.get("max_position_embeddings", 2048)
    if kind == "linear":
        return rotary | {"scale_factor": float(rope["factor"])}
    if kind == "dynamic":  # transformers compares with the context length of the file
        return rotary | {"scale_factor": float(rope["factor"]), "original_context_length": longest}
    original = rope.get(ORIGINAL, longest)
    # transformers gives precedence to config.json's own key, where there is one for all layers.
    original = config.get(ORIGINAL, original) if layer_type is None else original
    rotary["original_context_length"] = original
    if kind == "llama3":
        return rotary | {
            "scale_factor": float(rope["factor"]),
            "low_frequency_factor": float(rope["low_freq_factor"]),
            "high_frequency_factor": float(rope["high_freq_factor"]),
        }
    factor = rope.get("factor") if kind == "longrope" else rope["factor"]
    factor = float(longest / original if factor is None else factor)
    rotary |= {"scale_factor": factor, "attention_factor": _attention_factor(rope, kind, factor)}
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            rotary[name] = [float(each) for each in rope[name]]
        return rotary
    return rotary | {
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "truncate": bool(rope.get("truncate", True)),
    }


def _attention_factor(rope: Mapping[str, Any], kind: str, factor: float) -> float | None:
    """The factor of rotated queries and keys; None for the default of `RotaryConfig`."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if kind == "yarn" and one and all_dims:  # DeepSeek's names
        return yarn_magnitude(factor, one) / yarn_magnitude(factor, all_dims)
    return None


def rope_scaling(rotary: RotaryConfig) -> dict[str, Any] | None:
    """`rope_scaling` of a config.json that is made from settings; None where nothing is scaled."""
    if rotary.type in ("none", "default"):
        return None
    scaling: dict[str, Any] = {"factor": rotary.scale_factor}
    if rotary.type == "llama3":
        scaling["low_freq_factor"] = rotary.low_frequency_factor
        scaling["high_freq_factor"] = rotary.high_frequency_factor
    if rotary.type not in ("linear", "dynamic"):
        scaling[ORIGINAL] = rotary.original_context_length
    if rotary.type in ("yarn", "longrope") and rotary.attention_factor is not None:
        scaling["attention_factor"] = rotary.attention_factor
    if rotary.type == "yarn":
        scaling |= {
            "beta_fast": rotary.beta_fast,
            "beta_slow": rotary.beta_slow,
            "truncate": rotary.truncate,
        }
    if rotary.type == "longrope":
        scaling["short_factor"] = list(rotary.short_factor or ())
        scaling["long_factor"] = list(rotary.long_factor or ())
    return scaling | {"rope_type": rotary.type}


def with_length(
    config: Mapping[str, Any], sequence_length: int, default: int = 2048
) -> dict[str, Any]:
    """A config.json with at least this context length, in tokens. Rotary angles do not change.

    `default`: the family's context length where config.json names none. With the type `dynamic`
    the context length stays: angles depend on it.
    """
    before = config.get("max_position_embeddings") or default
    if sequence_length <= before:
        return dict(config)
    changed = {**config, "max_position_embeddings": sequence_length}
    for spelling in ("rope_scaling", "rope_parameters"):
        rope = config.get(spelling) or {}
        layer_types = [key for key, value in rope.items() if isinstance(value, dict)]
        parts = [rope[key] for key in layer_types] or [rope]
        if any(_type_of(part) == "dynamic" for part in parts):
            return dict(config)
        original = None if layer_types else config.get(ORIGINAL)
        kept = [_with_lengths(part, before, original) for part in parts]
        if kept != parts:
            changed[spelling] = (
                {**rope, **dict(zip(layer_types, kept, strict=True))} if layer_types else kept[0]
            )
    return changed


def with_rotary(
    config: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json with other rotary positions, in its own spelling.

    `before`, `after`: all keys of config.json for the old and the new positions, made from
    settings.
    """
    keys = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    changed = {**config, **{key: after.get(key) for key in keys}}
    given, scaling = config.get("rope_parameters") or {}, after.get("rope_scaling")
    if "rope_parameters" in after:  # which rope_scaling would take precedence over
        return changed | {"rope_scaling": None} if config.get("rope_scaling") else changed
    if not given:  # its theta may be inside of rope_scaling, which takes precedence
        return changed | {"rope_theta": after["rope_theta"], "rope_scaling": scaling}
    rope = {"rope_type": "default", "rope_theta": after["rope_theta"], **(scaling or {})}
    if (share := after.get("partial_rotary_factor")) not in (1, None):
        rope["partial_rotary_factor"] = share
    layers = {"full_attention": rope} if _by_layer(given) else None
    changed["rope_parameters"] = rope if layers is None else {**given, **layers}
    for spelling in ("rope_theta", "rope_scaling"):
        changed.pop(spelling, None)
    return changed


def _with_lengths(rope: dict[str, Any], before: int, original: int | None) -> dict[str, Any]:
    """Parameters that name what they otherwise derive from max_position_embeddings, `before`."""
    kind = _type_of(rope)
    if kind not in ("yarn", "llama3", "longrope"):
        return rope
    named = dict(rope)
    if ORIGINAL not in rope:
        named[ORIGINAL] = original or before
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        named["factor"] = before / (original or named[ORIGINAL])
    return named
