"""Messages for wrong settings: what was given, what is allowed, and the nearest name.

Pydantic's errors say what is wrong; these messages add the words of the setting (`Allowed`).
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from fast_llm.config.text import format_value, with_space

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
        path, field, inner, section, setting = _locate(kind, detail["loc"])
        if detail["type"] == "extra_forbidden":
            result[path, "name"] = (path, setting, _unknown_setting(kind, section, path))
        elif detail["type"] == "missing":
            for here, wanted in _required(path, field):
                result[here, "missing"] = (here, setting, f"is missing; it must be {wanted}")
        elif detail["type"] == "value_error":
            text = str(detail["ctx"]["error"])
            result[path, text] = (path, setting, text)
        else:
            given = _at(values, path, detail["input"])
            inner_kind = (
                nested_sections(field.annotation)
                if field is not None and not inner and item_annotation(field.annotation) is None
                else []
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
            if inner_kind and isinstance(given, str) and (meant := with_space(given)):
                hint = f"; YAML needs a space after the colon: {meant}"
            if (
                isinstance(given, float)
                and given.is_integer()
                and 0 < given < 10**15
                and "integer" in wanted
            ):
                hint = f"; write {int(given)}"
            result[point, "value"] = (
                point,
                setting,
                f"given {format_value(given)}, must be {wanted}{hint}",
            )
    return list(result.values())


def _at(values: Any, path: str, otherwise: Any) -> Any:
    for key in path.split("."):
        if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, Mapping) and key in values:
            values = values[key]
        else:
            return otherwise
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
) -> tuple[str, FieldInfo | None, tuple[int | str, ...], type[BaseModel], str]:
    """What an error is about: path of the setting, its field, the location inside it, its section,
    and the path of the setting to leave out: the list or mapping that holds it, if one does.
    """
    section, field, path, around = kind, None, "", ""
    for position, part in enumerate(loc):
        item = item_annotation(field.annotation) if field is not None else None
        below = nested_sections(field.annotation) if field is not None else [section]
        if not below:
            return path, field, loc[position:], section, around or path
        section = below[0]
        if item is not None:  # this part is the name or number of an item
            around = around or path
            field = FieldInfo.from_annotation(item)
        else:
            field = section.model_fields.get(str(part)) or _by_other_name(section, str(part))
        path = f"{path}.{part}" if path else str(part)
        if field is None:
            return path, None, (), section, around or path
    return path, field, (), section, around or path


def _by_other_name(section: type[BaseModel], name: str) -> FieldInfo | None:
    """The setting that has this second name."""
    for field in section.model_fields.values():
        names = field.validation_alias
        if isinstance(names, AliasChoices) and name in names.choices:
            return field
    return None


def is_setting(kind: type[BaseModel], path: str) -> bool:
    """Whether a dotted path names a setting or section, also one inside a list or mapping."""
    return field_at(kind, path) is not None


def field_at(kind: type[BaseModel], path: str) -> FieldInfo | None:
    """The setting or section at a dotted path, also one inside a list or mapping."""
    _, field, inside, _, _ = _locate(kind, tuple(path.split(".")))
    return None if inside else field


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
    required = [f"{path}.{n}" for n, field in section.model_fields.items() if field.is_required()]
    if 1 < len(required) == len(section.model_fields):
        return f"; give {', '.join(required[:-1])} and {required[-1]}"
    likely = ("path", "type", "format") if isinstance(given, str) else ("base", "interval")
    name = next((name for name in likely if name in section.model_fields), None)
    return (
        f"; did you mean {path}.{name}?" if name else f" with {_listed(list(section.model_fields))}"
    )


ITEMS = {dict: "NAME", list: "N"}  # what stands in a path for the name or number of an item


def iter_sections(field: FieldInfo, path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a setting at `path` consists of, with their dotted paths, in which NAME or
    N stands for an item of a mapping or list.
    """
    container = _container(field.annotation)
    item = "" if container is None else f".{ITEMS[get_origin(container)]}"
    for section in nested_sections(field.annotation):
        yield path + item, section


def iter_paths(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted paths of all settings and sections."""
    for name, field in kind.model_fields.items():
        here = f"{above}.{name}" if above else name
        yield here
        for path, section in iter_sections(field, here):
            yield from iter_paths(section, path)


def iter_settings(kind: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings that are not sections, with their dotted paths."""
    for name, field in kind.model_fields.items():
        here = f"{above}.{name}" if above else name
        if not nested_sections(field.annotation):
            yield here, field
        for path, section in iter_sections(field, here):
            yield from iter_settings(section, path)


def nested_sections(annotation: Any) -> list[type[BaseModel]]:
    """The Section classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in nested_sections(part)]


def _container(annotation: Any) -> Any:
    """The list or mapping of sections in an annotation; None without one."""
    if get_origin(annotation) in ITEMS:
        return annotation if nested_sections(annotation) else None
    return next(filter(None, map(_container, get_args(annotation))), None)


def item_annotation(annotation: Any) -> Any:
    """What an item of a list or mapping of sections may be; None for other annotations."""
    found = _container(annotation)
    return None if found is None else get_args(found)[-1]


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
    if len(longer := [one for one in siblings if one.startswith(f"{name}_")]) == 1:
        return f"{above}.{longer[0]}" if above else longer[0]
    namesakes = [other for other in known if other.rpartition(".")[2] == name]
    if namesakes:
        return max(namesakes, key=lambda other: _similarity(path, other))
    if len(longer := [one for one in known if one.rpartition(".")[2].startswith(f"{name}_")]) == 1:
        return longer[0]
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
