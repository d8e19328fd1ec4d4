"""What AdamW does to each parameter: weight decay, factor on the learning rate, frozen or not.

`optimizer.no_weight_decay` and `optimizer.learning_rate_scales` name parameters by patterns, as a
shell does: `*` is any text, dots included, `?` is one character, `[0-3]` one of several. A pattern
must match the name from its beginning to its end. A parameter has one name; the head of a model
with tied embeddings is the embedding.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.text import format_value

_DECAY, _SCALES = "optimizer.no_weight_decay", "optimizer.learning_rate_scales"
_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ParameterRule:
    """What AdamW does to a parameter."""

    weight_decay: float
    learning_rate_scale: float
    frozen: bool


def rule_of(config: OptimizerConfig, name: str, dimensions: int) -> ParameterRule:
    """The rule of a parameter. Without patterns, only matrices decay and nothing is frozen."""
    # Biases of experts have two dimensions.
    matrix = dimensions > 1 and not name.endswith(".bias")
    decays = matrix and not any(fnmatchcase(name, pattern) for pattern in config.no_weight_decay)
    scale = _scale_of(config, name)
    return ParameterRule(
        config.weight_decay if decays else 0.0,
        config.default_learning_rate_scale if scale is None else scale,
        frozen=scale == 0,
    )


def is_frozen(config: OptimizerConfig, name: str) -> bool:
    """Whether the last pattern that matches this name has a scale of 0."""
    return _scale_of(config, name) == 0


def frozen_names(config: OptimizerConfig, names: Iterable[str]) -> list[str]:
    """The frozen parameters among `names`, in their order."""
    if not config.learning_rate_scales:
        return []
    return [name for name in names if is_frozen(config, name)]


def _scale_of(config: OptimizerConfig, name: str) -> float | None:
    place = _deciding(config, name)
    return None if place is None else config.scaled_patterns[place][0]


def _deciding(config: OptimizerConfig, name: str) -> int | None:
    """The place of the last pattern of a learning rate scale that matches."""
    places = [
        place
        for place, (_, pattern) in enumerate(config.scaled_patterns)
        if fnmatchcase(name, pattern)
    ]
    return places[-1] if places else None


def covered(config: OptimizerConfig, names: Iterable[str]) -> list[tuple[str, str, list[str]]]:
    """Each pattern, its effect in words, and the parameters whose treatment it decides."""
    names = list(names)
    found = [
        (pattern, "no weight decay", [name for name in names if fnmatchcase(name, pattern)])
        for pattern in config.no_weight_decay
    ]
    for place, (scale, pattern) in enumerate(config.scaled_patterns):
        effect = f"learning rate × {scale:g}" if scale else "frozen"
        decided = [name for name in names if _deciding(config, name) == place]
        found.append((pattern, effect, decided))
    return found


def rule_problems(
    config: OptimizerConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str]]:
    """Each mistake in the patterns, as its setting and what is wrong."""
    problems: list[tuple[str, str]] = []
    for setting, patterns in (
        (_DECAY, config.no_weight_decay),
        (_SCALES, [pattern for _, pattern in config.scaled_patterns]),
    ):
        for place, pattern in enumerate(patterns):
            matching = [name for name in shapes if fnmatchcase(name, pattern)]
            if not matching:
                problems.append((setting, _unmatched(pattern, shapes)))
            elif setting == _SCALES and all(
                any(fnmatchcase(name, later) for later in patterns[place + 1 :])
                for name in matching
            ):
                problems.append(
                    (
                        setting,
                        f"{format_value(pattern)} has no effect: later patterns match all of its"
                        " parameters, and the last that matches decides; write it after them",
                    )
                )
    if config.learning_rate_scales and len(frozen_names(config, shapes)) == len(shapes):
        problems.append(
            (
                _SCALES,
                "freezes every parameter of the model; at least one must have a scale above 0 (to"
                " measure losses only, set training.train_iters: 0)",
            )
        )
    return problems


def _unmatched(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    start = f"{format_value(pattern)} matches no parameter of the model"
    if _TIED_HEAD not in shapes and fnmatchcase(_TIED_HEAD, pattern):
        return (
            f"{start}: with tie_word_embeddings the head is the embedding; write"
            " model.embed_tokens.weight"
        )
    # Layers are alike: their numbers are left out.
    names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in shapes)
    wanted = re.sub(r"\.(\d+|\[[^]]*\]|\*)\.", ".*.", pattern)
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0)
    return f"{start}; the nearest are {', '.join(near)} (a pattern matches whole names)"
