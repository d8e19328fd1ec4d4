"""How a YAML file becomes a configuration, and how its mistakes are told.

`read` gives a Document: nested values, and where each stands. `validate` turns a Document into a Section,
or raises one ConfigError with every mistake: where, what was given, what is allowed, the nearest name.

YAML has its 1.1 meanings (`100_000` is a number, `yes` is true) with two repairs: `1e-4` is a number too, and
a key that stands twice is refused. Anchors are refused: a file of a kilobyte could unfold to gigabytes.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fast_llm.errors import ConfigError

Values = dict[str, Any]
LARGEST_FILE = 2**20  # bytes


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_means_defaults(cls, values: Any) -> Any:
        return {} if values is None else values


class Interval(Section):
    """Something that happens every so many steps."""

    interval: int | None = Field(default=None, gt=0)
    """Every so many steps; null is never."""
    offset: int = Field(default=0, ge=0)
    """Shifts the steps at which it happens."""

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return self.interval is not None and (step - self.offset) % self.interval == 0

    def within(self, other: "Interval") -> bool:
        """Whether whenever this happens, the other does too."""
        if self.interval is None:
            return True
        if other.interval is None:
            return False
        return self.interval % other.interval == 0 and (self.offset - other.offset) % other.interval == 0


class Document:
    """Nested values and where each of them was written."""

    def __init__(self, values: Values, places: dict[str, str], source: str):
        self.values = values
        self.places = places
        self.source = source

    def where(self, path: str) -> str:
        """`file:line` of a dotted path, or of the nearest section around it."""
        inside = next((place for known, place in self.places.items() if known.startswith(path + ".")), None)
        while path:
            if path in self.places:
                return self.places[path]
            path = path.rpartition(".")[0]
        return inside or self.source

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        value: Any = self.values
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def under(self, values: Values, source: str) -> "Document":
        """With `values` laid underneath: they hold where nothing is written, and may not be contradicted."""
        problems: list[str] = []
        places = dict(self.places)

        def lay(mine: Values, theirs: Values, path: str) -> Values:
            merged = dict(mine)
            for key, value in theirs.items():
                here = f"{path}.{key}" if path else key
                if isinstance(value, dict):
                    below = merged.get(key)
                    if below is not None and not isinstance(below, dict):
                        continue  # validation explains it
                    merged[key] = lay(below or {}, value, here)
                elif merged.get(key) is None:
                    merged[key] = value
                    places[here] = source
                elif merged[key] != value and not _same(key, merged[key], value):
                    problems.append(
                        f"{self.where(here)}: {here}: given {show(merged[key])}, but {source} says {show(value)};"
                        " leave it out, the pretrained model decides"
                    )
            return merged

        document = Document(lay(self.values, values, ""), places, self.source)
        if problems:
            raise ConfigError(problems)
        return document


def _same(key: str, one: Any, other: Any) -> bool:
    """Two spellings of one thing."""
    if key == "add_linear_biases":
        words = {True: "everywhere", False: "nowhere"}
        return bool(words.get(one, one) == words.get(other, other))
    return False


def show(value: Any) -> str:
    """A value as it would stand in YAML, shortened."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    text = text.removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "…"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the two repairs."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _build(
    node: yaml.Node,
    path: str,
    name: str,
    places: dict[str, str],
    problems: list[str],
    loader: _Loader,
    depth: int = 0,
) -> Any:
    line = f"{name}:{node.start_mark.line + 1}"
    if path:
        places[path] = line
    if depth > 50:
        problems.append(f"{line}: more than 50 levels deep")
        return None
    if isinstance(node, yaml.MappingNode):
        values: Values = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            at = f"{name}:{key_node.start_mark.line + 1}"
            if key is None or not isinstance(key, str) or key_node.tag == "tag:yaml.org,2002:merge":
                problems.append(f"{at}: {path or 'the file'}: a setting's name must be a plain word")
                continue
            here = f"{path}.{key}" if path else key
            if key in lines:
                problems.append(f"{at}: {here}: stands twice, first in line {lines[key]}; keep one")
                continue
            lines[key] = key_node.start_mark.line + 1
            values[key] = _build(value_node, here, name, places, problems, loader, depth + 1)
            places[here] = at
        return values
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(item, f"{path}.{i}", name, places, problems, loader, depth + 1) for i, item in enumerate(node.value)
        ]
    try:
        return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, OverflowError):
        problems.append(
            f"{line}: {path or 'the file'}: {str(getattr(node, 'value', ''))[:60]!r} can not be read as a value"
        )
        return None


def _parse(text: str, name: str, path: str = "") -> tuple[Any, dict[str, str], list[str]]:
    """Values, places and problems of a YAML text."""
    places: dict[str, str] = {}
    problems: list[str] = []
    try:
        loader = _Loader(text)
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                return (
                    None,
                    places,
                    [
                        f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}: anchors (&) and aliases (*) are not supported; write it out"
                    ],
                )
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
        value = None if node is None else _build(node, path, name, places, problems, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        return None, places, [f"{name}{line}: not YAML: {error.problem or error.context}"]
    except yaml.YAMLError as error:
        return None, places, [f"{name}: not YAML: {str(error).splitlines()[0]}"]
    except RecursionError:
        return None, places, [f"{name}: more than 50 levels deep"]
    return value, places, problems


def read(path: str | Path | None, overrides: Sequence[str] = ()) -> Document:
    """A YAML file (or none) with overrides `a.b=c` laid over it; the last of a path wins.

    Raises ConfigError with every mistake of file and overrides.
    """
    problems: list[str] = []
    values: Any = {}
    places: dict[str, str] = {}
    if path is not None:
        text = _text(Path(path))
        values, places, problems = _parse(text, str(path))
        if values is None:
            values = {}
        if not isinstance(values, dict):
            problems.append(f"{path}: must hold settings (name: value), not {show(values)}")
            values = {}
    for override in overrides:
        name, sign, text = override.partition("=")
        keys = name.split(".")
        if not sign or not all(keys):
            problems.append(f"override {override}: must have the form section.setting=value")
            continue
        value, inner, found = _parse(text, f"override {override}", name)
        problems += [re.sub(r"^(override .*?):1: ", r"\1: ", problem) for problem in found]
        if found:
            continue
        place: Any = values
        for position, key in enumerate(keys[:-1]):
            below = place.get(key)
            if below is None:
                below = place[key] = {}
            if not isinstance(below, dict):
                above = ".".join(keys[: position + 1])
                problems.append(f"override {override}: {above} is {show(below)}, which has no settings inside")
                break
            place = below
        else:
            place[keys[-1]] = value
            for known in [known for known in places if known == name or known.startswith(name + ".")]:
                del places[known]
            places |= dict.fromkeys(inner, f"override {override}") | {name: f"override {override}"}
    if problems:
        raise ConfigError(problems)
    return Document(values, places, str(path) if path is not None else "the command line")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError([f"{path}: larger than 1 MiB; is this a configuration?"])
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from error
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError([f"{path}: no such file{hint}"]) from error
    except IsADirectoryError as error:
        raise ConfigError([f"{path}: a folder; give the YAML file in it"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: can not be read: {error.strerror}"]) from error


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


Kind = TypeVar("Kind", bound=Section)


def validate(
    kind: type[Kind],
    document: Document,
    refused: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Kind:
    """The Section that a Document describes.

    `refused`: dotted path → what to use instead. `renamed`: old dotted path → new one, in the same section.
    Raises ConfigError with every mistake.
    """
    refused = refused or {}
    problems: list[str] = []
    document = _with_new_names(document, renamed or {}, problems)
    values = _without_refused(document, refused, problems)
    try:
        section = kind.model_validate(values)
    except ValidationError as error:
        problems += _explain(kind, document, error)
        section = None
    if problems or section is None:
        raise ConfigError(problems)
    return section


def dump(section: Section) -> str:
    """A resolved configuration as YAML, itself valid input."""
    values = section.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose lists of plain values stand in one line."""


def _one_line(dumper: _Dumper, value: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, list | dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=plain)


_Dumper.add_representer(list, _one_line)


def _with_new_names(document: Document, renamed: Mapping[str, str], problems: list[str]) -> Document:
    values, places = document.values, dict(document.places)
    for old, new in renamed.items():
        if document.get(old, _ABSENT) is _ABSENT:
            continue
        if document.get(new, _ABSENT) is not _ABSENT:
            problems.append(f"{document.where(old)}: {old}: an older name of {new}, which is given too; keep that one")
        values = _moved(values, old.split("."), new.rpartition(".")[2])
        places[new] = document.where(old)
    return Document(values, places, document.source)


_ABSENT = object()


def _moved(values: Values, keys: list[str], name: str) -> Values:
    if len(keys) == 1:
        rest = {key: value for key, value in values.items() if key != keys[0]}
        return {**rest, name: rest.get(name, values[keys[0]])}
    return {**values, keys[0]: _moved(values[keys[0]], keys[1:], name)}


def _without_refused(document: Document, refused: Mapping[str, str], problems: list[str]) -> Values:
    def walk(values: Values, path: str) -> Values:
        kept: Values = {}
        for key, value in values.items():
            here = f"{path}.{key}" if path else key
            if here in refused:
                problems.append(f"{document.where(here)}: {here}: not offered: {refused[here]}")
            elif isinstance(value, dict) and any(name.startswith(here + ".") for name in refused):
                kept[key] = walk(value, here)
            else:
                kept[key] = value
        return kept

    return walk(document.values, "")


def _explain(kind: type[Section], document: Document, error: ValidationError) -> list[str]:
    """One line for each mistake, in the file's order of appearance."""
    known = list(paths(kind))
    lines: dict[str, list[str]] = {}
    givens: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"] if _is_key(part, document, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            lines.setdefault(path, []).append("no such setting" + _nearest(path, known))
            continue
        if detail["type"] == "value_error":
            text = str(detail["ctx"]["error"])
        elif detail["type"] == "missing":
            text = "is required"
        else:
            text = _allowed(detail)
            givens[path] = detail["input"]
        lines.setdefault(path, []).append(text)
    result = []
    for path, texts in lines.items():
        given = f"given {show(document.get(path, givens[path]))}, " if path in givens else ""
        unique = list(dict.fromkeys(texts))
        must = "must be " if path in givens else ""
        result.append(f"{document.where(path)}: {path or 'the file'}: {given}{must}{' or '.join(unique)}")
    return result


def _is_key(part: Any, document: Document, loc: tuple[Any, ...]) -> bool:
    """Pydantic puts the tried types of a union into the path; they are no keys."""
    return isinstance(part, int) or (bool(re.fullmatch(r"[^\[\]()]+", str(part))) and str(part) not in _TYPE_NAMES)


_TYPE_NAMES = {
    "int",
    "float",
    "str",
    "bool",
    "none",
    "list",
    "tuple",
    "dict",
    "constrained-int",
    "constrained-str",
    "constrained-float",
}


def _allowed(detail: Any) -> str:
    """What a mistaken value must be."""
    context = detail.get("ctx", {})
    kind = detail["type"]
    bounds = {
        "greater_than": "above {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}",
        "less_than_equal": "at most {le}",
        "multiple_of": "a multiple of {multiple_of}",
        "literal_error": "{expected}",
        "too_short": "at least {min_length} long",
        "too_long": "at most {max_length} long",
        "string_too_short": "not empty",
    }
    if kind in bounds:
        return bounds[kind].format(**context).replace("'", "").replace("True", "yes").replace("False", "no")
    names = {
        "int": "an integer",
        "float": "a number",
        "finite_number": "a finite number",
        "bool": "yes or no",
        "string": "text",
        "list": "a list",
        "tuple": "a list",
        "dict": "settings (name: value)",
        "model": "settings (name: value)",
        "is_instance": "settings (name: value)",
        "none_required": "null",
    }
    for word, text in names.items():
        if kind.startswith(word):
            return text
    return "something else"


def paths(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every dotted path of a configuration, sections included."""
    for name, field in kind.model_fields.items():
        here = f"{above}.{name}" if above else name
        yield here
        for inner in sections(field.annotation):
            yield from paths(inner, here)


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The Sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in sections(part)]


# What other trainers call it.
_COMMON = {
    "lr": "optimizer.learning_rate.base",
    "min_lr": "optimizer.learning_rate.minimum",
    "warmup_steps": "optimizer.learning_rate.warmup_iterations",
    "max_steps": "training.train_iters",
    "steps": "training.train_iters",
    "seq_len": "batch.sequence_length",
    "seq_length": "batch.sequence_length",
    "max_seq_len": "batch.sequence_length",
    "global_batch_size": "batch.batch_size",
    "grad_clip": "optimizer.gradient_norm_clipping",
    "max_grad_norm": "optimizer.gradient_norm_clipping",
    "gradient_accumulation_steps": "batch.depth_first_micro_batches",
    "seed": "model.distributed.seed",
    "dtype": "model.distributed.training_dtype",
    "precision": "model.distributed.training_dtype",
    "output_dir": "run.experiment_dir",
}


def _nearest(path: str, known: list[str]) -> str:
    above, _, name = path.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == above]
    near = [_COMMON[name]] if name in _COMMON and _COMMON[name] in known else []
    near = near or difflib.get_close_matches(path, siblings, n=1, cutoff=0.75)
    if not near:
        flat = {other.replace(".", "_").replace("s_", "_"): other for other in known}
        near = [
            flat[key]
            for key in difflib.get_close_matches(path.replace(".", "_").replace("s_", "_"), flat, n=1, cutoff=0.85)
        ]
    if not near:
        near = [other for other in known if other.rpartition(".")[2] == name][:1]
    if not near:
        last = {other.rpartition(".")[2]: other for other in reversed(known)}
        near = [last[key] for key in difflib.get_close_matches(name, last, n=1, cutoff=0.8)]
    hint = f"; did you mean {near[0]}?" if near else ""
    names = ", ".join(other.rpartition(".")[2] for other in siblings)
    return hint + (f" (here are: {names})" if siblings else "")
