"""Messages for wrong settings: what was given, what is allowed, and the nearest name.

Pydantic's errors say what is wrong; these messages add the words of the setting (`Allowed`).
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from fast_llm.config.text import format_value

MAX_PROBLEMS = 100  # reported for one file; finding the nearest name takes milliseconds each


@dataclass(frozen=True)
class Allowed:
    """In an annotation: what is allowed, in words, for error messages and docs/settings.md."""

    text: str


@dataclass(frozen=True, eq=False)  # annotations must be hashable, which the dictionary is not
class _Unsupported:
    sentences: Mapping[Any, str]

    def __call__(self, value: Any) -> Any:
        for refused, sentence in self.sentences.items():
            if type(value) is type(refused) and value == refused:
                raise ValueError(f"given {format_value(value)}, which is not supported: {sentence}")
        return value


def unsupported(sentences: Mapping[Any, str]) -> BeforeValidator:
    """In an annotation: single values that are refused. `advice`: value → what to do instead."""
    return BeforeValidator(_Unsupported(sentences))


def explain(
    kind: type[BaseModel], values: Mapping[str, Any], error: ValidationError
) -> list[tuple[str, str, str]]:
    """Each mistake as (path to point at, path of the setting, what is wrong)."""
    result: dict[tuple[str, str], tuple[str, str, str]] = {}
    for detail in error.errors(include_url=False)[:MAX_PROBLEMS]:
        if detail["type"] == "default_factory_not_called":
            continue  # a consequence of another mistake
        path, field, inner, section = _locate(kind, detail["loc"])
        if detail["type"] == "extra_forbidden":
            result[path, "name"] = (path, path, _unknown_setting(kind, section, path))
        elif detail["type"] == "missing":
            for here, wanted in _required(path, field):
                result[here, "missing"] = (here, path, f"is missing; it must be {wanted}")
        elif detail["type"] == "value_error":
            result[path, str(detail["ctx"]["error"])] = (path, path, str(detail["ctx"]["error"]))
        else:
            given = _at(values, path, detail["input"])
            inner_kind = (
                nested_sections(field.annotation) if field is not None and not inner else []
            )
            point, wanted = (
                path,
                describe_allowed(field) if field is not None else "a section of settings",
            )
            if (
                isinstance(given, dict)
                and field is not None
                and get_origin(field.annotation) is dict
                and inner
            ):
                # an entry of a dictionary, whose name the user chose
                point, wanted = f"{path}.{inner[0]}", _describe_dict_value(field.annotation)
                given = given.get(str(inner[0]), detail["input"])
            hint = _hint_inside(inner_kind[0], path, given) if inner_kind else ""
            if (
                isinstance(given, float)
                and given.is_integer()
                and 0 < given < 10**15
                and "integer" in wanted
            ):
                hint = f"; write {int(given)}"
            result[point, "value"] = (
                point,
                path,
                f"given {format_value(given)}, must be {wanted}{hint}",
            )
    return list(result.values())


def _at(values: Any, path: str, otherwise: Any) -> Any:
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return otherwise
        values = values[key]
    return values


def _required(path: str, field: FieldInfo | None) -> Iterator[tuple[str, str]]:
    """A missing setting, or the required ones of a missing section; and what each must be."""
    inside = nested_sections(field.annotation) if field is not None else []
    if not inside:
        yield path, describe_allowed(field)
    for section in inside:
        for name, below in section.model_fields.items():
            if below.is_required():
                yield from _required(f"{path}.{name}", below)


def _locate(
    kind: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[str, FieldInfo | None, tuple[int | str, ...], type[BaseModel]]:
    """What an error is about: path of the setting, its field, the location inside it, its
    section.
    """
    section, field, path = kind, None, ""
    for position, part in enumerate(loc):
        below = nested_sections(field.annotation) if field is not None else [section]
        if not below:
            return path, field, loc[position:], section
        section = below[0]
        path = f"{path}.{part}" if path else str(part)
        field = section.model_fields.get(str(part))
        if field is None:
            return path, None, (), section
    return path, field, (), section


def describe_allowed(field: FieldInfo | None) -> str:
    """What a setting may be, in words."""
    if field is None:
        return "something else"
    marked = next((item.text for item in field.metadata if isinstance(item, Allowed)), None)
    return marked or _describe_annotation(field.annotation)


def refused_values(field: FieldInfo) -> dict[str, str]:
    """The refused values of a setting, as written in YAML: value → what to do instead."""
    found: dict[str, str] = {}
    for item in _metadata(field.annotation, field.metadata):
        if isinstance(item, BeforeValidator) and isinstance(item.func, _Unsupported):
            found |= {
                format_value(value).strip('"'): sentence
                for value, sentence in item.func.sentences.items()
            }
    return found


def _metadata(annotation: Any, metadata: Iterable[Any]) -> Iterator[Any]:
    yield from metadata
    for part in get_args(annotation):
        if get_origin(part) is Annotated:
            yield from get_args(part)[1:]


def _describe_annotation(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marked = next((item.text for item in arguments[1:] if isinstance(item, Allowed)), None)
        return marked or _describe_annotation(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(
            "null" if part is type(None) else _describe_annotation(part) for part in arguments
        )
    if origin is Literal:
        names = [part if isinstance(part, str) else format_value(part) for part in arguments]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if origin is list:
        return f"a list, each item {_describe_annotation(arguments[0])}"
    if origin is dict:
        return f"a mapping from names to {_describe_annotation(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section of settings"
    plain = {
        bool: "yes or no",
        int: "an integer",
        float: "a number",
        str: "text (numbers and dates in quotes)",
    }
    return plain.get(annotation, "a value")


def _describe_dict_value(annotation: Any) -> str:
    """What the values of a dictionary may be, in words."""
    arguments = get_args(annotation)
    return (
        _describe_annotation(arguments[1])
        if get_origin(annotation) is dict
        else _describe_annotation(annotation)
    )


def _hint_inside(section: type[BaseModel], path: str, given: Any) -> str:
    """The setting that was probably meant when a section was given a plain value."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return ""
    likely = ("path", "type", "format") if isinstance(given, str) else ("base", "interval")
    name = next((name for name in likely if name in section.model_fields), None)
    return (
        f"; did you mean {path}.{name}?" if name else f" with {_listed(list(section.model_fields))}"
    )


def iter_paths(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted paths of all settings and sections."""
    for name, field in kind.model_fields.items():
        here = f"{above}.{name}" if above else name
        yield here
        for inner in nested_sections(field.annotation):
            yield from iter_paths(inner, here)


def iter_settings(kind: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """All settings that are not sections, with their dotted paths."""
    for name, field in kind.model_fields.items():
        inner = nested_sections(field.annotation)
        if not inner:
            yield name, field
        for section in inner:
            yield from ((f"{name}.{below}", found) for below, found in iter_settings(section))


def nested_sections(annotation: Any) -> list[type[BaseModel]]:
    """The Section classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in nested_sections(part)]


# Names that other trainers use.
_OTHER_TRAINERS = {
    "lr": "optimizer.learning_rate.base",
    "learning_rate": "optimizer.learning_rate.base",
    "max_lr": "optimizer.learning_rate.base",
    "min_lr": "optimizer.learning_rate.minimum",
    "lr_scheduler_type": "optimizer.learning_rate.decay_style",
    "lr_decay_iters": "optimizer.learning_rate.decay_iterations",
    "warmup_steps": "optimizer.learning_rate.warmup_iterations",
    "warmup_iters": "optimizer.learning_rate.warmup_iterations",
    "max_steps": "training.train_iters",
    "num_steps": "training.train_iters",
    "steps": "training.train_iters",
    "iterations": "training.train_iters",
    "eval_interval": "training.validation.interval",
    "eval_iters": "training.validation.iterations",
    "save_interval": "training.checkpoint.interval",
    "save_steps": "training.checkpoint.interval",
    "save_total_limit": "training.checkpoint.keep",
    "log_interval": "training.logs.interval",
    "logging_steps": "training.logs.interval",
    "seq_len": "batch.sequence_length",
    "seq_length": "batch.sequence_length",
    "max_seq_len": "batch.sequence_length",
    "max_seq_length": "batch.sequence_length",
    "block_size": "batch.sequence_length",
    "global_batch_size": "batch.batch_size",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.depth_first_micro_batches",
    "grad_clip": "optimizer.gradient_norm_clipping",
    "max_grad_norm": "optimizer.gradient_norm_clipping",
    "seed": "model.distributed.seed",
    "dtype": "model.distributed.training_dtype",
    "precision": "model.distributed.training_dtype",
    "compute_dtype": "model.distributed.training_dtype",
    "output_dir": "run.experiment_dir",
    "model_name_or_path": "pretrained.path",
}


def _unknown_setting(kind: type[BaseModel], section: type[BaseModel], path: str) -> str:
    """The message for an unknown setting: the nearest one, and those that exist."""
    known = list(iter_paths(kind))
    above, _, name = path.rpartition(".")
    siblings = list(section.model_fields)
    near = nearest_setting(path, name, above, siblings, known)
    hint = f"; did you mean {near}?" if near else ""
    allowed = siblings
    if len(siblings) > 15:
        allowed = [
            *difflib.get_close_matches(name, siblings, n=8, cutoff=0.3),
            "…, all in docs/settings.md",
        ]
    return f"no such setting{hint} (allowed: {', '.join(allowed)})"


def nearest_setting(
    path: str, name: str, above: str, siblings: list[str], known: list[str]
) -> str | None:
    """The setting that was probably meant: one with a similar name in the section, one with this
    name elsewhere, or one whose path is similar.
    """
    sibling = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    if sibling:
        return f"{above}.{sibling[0]}" if above else sibling[0]
    if _OTHER_TRAINERS.get(name) in known:
        return _OTHER_TRAINERS[name]
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    if namesakes:
        return max(namesakes, key=lambda other: _similarity(path, other))
    return max(
        (other for other in known if _similarity(path, other) >= 0.8),
        key=lambda other: _similarity(path, other),
        default=None,
    )


def _similarity(one: str, other: str) -> float:
    """Similarity of two dotted paths, from 0 to 1: of the complete paths, or (weighing a little
    less) of their last names.
    """

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    complete = ratio(one.replace(".", "_"), other.replace(".", "_"))
    return max(complete, 0.95 * ratio(one.rpartition(".")[2], other.rpartition(".")[2]))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else names[0]
