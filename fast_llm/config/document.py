"""A YAML file with overrides, read into nested values that know where they were written.

Reading 100 KiB of YAML takes two seconds; the files meant here have one or two.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from fast_llm.config.mistakes import field_at, item_annotation, nested_sections
from fast_llm.config.section import Section
from fast_llm.config.text import UNREADABLE, YamlReader, format_value
from fast_llm.errors import ConfigError

Values = dict[str, Any]
_LARGEST_FILE = 2**20  # bytes


class Document:
    """Nested values, where each was written, and the mistakes found so far."""

    def __init__(
        self,
        values: Values,
        places: dict[str, str],
        source: str,
        problems: Sequence[str] = (),
        broken: Iterable[str] = (),
    ):
        """`places`: dotted path → where it was written. `source`: the name of the file. `problems`:
        mistakes, which `validate` reports with its own. `broken`: paths of values that could not be
        read and are not in `values`.
        """
        self.values = values
        self.places = places
        self.source = source
        self.problems = tuple(problems)
        self.broken = frozenset(broken)

    def where(self, path: str) -> str:
        """`file:line` of a dotted path, or of the first setting inside it, or of the nearest
        section around it.
        """
        if path not in self.places:
            inside = (place for known, place in self.places.items() if known.startswith(path + "."))
            if (place := next(inside, None)) is not None:
                return place
        around = path
        while around:
            if around in self.places:
                return self.places[around]
            around = around.rpartition(".")[0]
        return self.source

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        value: Any = self.values
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def with_defaults(self, values: Values, source: str) -> "Document":
        """This document on top of other values, which apply where nothing is written.

        A value that is written differently becomes a problem that names both places.
        """
        problems: list[str] = []
        places = dict(self.places)

        def merge(above: Values, below: Values, path: str) -> Values:
            merged = dict(above)
            for key, value in below.items():
                here = f"{path}.{key}" if path else key
                if isinstance(value, dict):
                    inner = merged.get(key)
                    if inner is not None and not isinstance(inner, dict):
                        continue  # validation reports it
                    merged[key] = merge(inner or {}, value, here)
                elif merged.get(key) is None:
                    merged[key] = value
                    places[here] = source
                elif not _same(key, merged[key], value):
                    problems.append(
                        f"{self.where(here)}: {here}: given {format_value(merged[key])}, but"
                        f" {source} says {format_value(value)}; leave it out, the pretrained model"
                        " decides"
                    )
            return merged

        merged = merge(self.values, values, "")
        return Document(merged, places, self.source, (*self.problems, *problems), self.broken)

    def with_value(self, path: str, value: Any) -> "Document":
        """This document with another value of a setting; None removes it."""

        def changed(here: Values, keys: list[str]) -> Values:
            rest = {key: old for key, old in here.items() if key != keys[0]}
            if len(keys) > 1:
                inner = here.get(keys[0])
                return rest | {keys[0]: changed(inner if isinstance(inner, dict) else {}, keys[1:])}
            return rest if value is None else rest | {keys[0]: value}

        values = changed(self.values, path.split("."))
        return Document(values, self.places, self.source, self.problems, self.broken)


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether two spellings mean the same."""
    if key == "add_linear_biases":
        spellings = {True: "everywhere", False: "nowhere"}
        one, other = spellings.get(one, one), spellings.get(other, other)
    return bool(one == other)


def read(
    path: str | Path | None, overrides: Sequence[str] = (), kind: type[Section] | None = None
) -> Document:
    """Read a YAML file (or none) and apply overrides `a.b=c`; the last override of a path wins.

    Overrides are YAML, made easier for the command line: text that YAML refuses (`*.jsonl`, `@x`)
    is text, `#` begins no comment, and `2024` is text where `kind` wants text.

    Raises ConfigError for a file that cannot be read. Smaller mistakes stay in the document, and
    `validate` reports them with all others.
    """
    document = _read_file(path)
    values, places = document.values, document.places
    problems, broken = list(document.problems), set(document.broken)
    for override in overrides:
        name, sign, text = override.partition("=")
        keys = name.split(".")
        readable = override.isprintable() and len(override) < 100
        here = f"override {override if readable else format_value(override)}"
        if not sign or not all(re.fullmatch(r"[^\s.=]+", key) for key in keys):
            problems.append(
                f"{here}: must have the form section.setting=value, e.g. training.train_iters=1000"
            )
            continue
        if not text.strip():
            problems.append(f"{here}: gives no value; write {name}=null for none")
            continue
        reader = YamlReader(here, numbered=False)
        value = reader.override(text, name)
        if (
            kind is not None
            and text.strip()[0] not in "[{\"'"
            and _wants_text(kind, keys, value, text.strip())
        ):
            value = text.strip()
        problems += reader.problems
        broken |= reader.broken
        if value is UNREADABLE:
            broken.add(name)
        elif (problem := _set(values, keys, value, places, here, kind)) is not None:
            problems.append(problem)
            broken.add(name)
        else:
            for known in [p for p in places if p == name or p.startswith(name + ".")]:
                del places[known]
            places |= reader.places | {name: here}
    return Document(values, places, document.source, problems, broken)


def read_arguments(
    path: str | None, arguments: Sequence[str], kind: type[Section], word: str, example: str
) -> Document:
    """Read the file and the settings of a command line.

    `word`: may precede the settings (`gpt`); `example`: a command for the message. Raises
    ConfigError if neither file nor settings are given.
    """
    settings = list(arguments)
    if settings and "=" not in settings[0]:
        given = settings.pop(0)
        if given != word:
            is_file = given.endswith((".yaml", ".yml"))
            hint = f"; a file is given as --config {given}" if is_file else ""
            if "." in given and not is_file:
                hint = f"; write {given}={settings[0] if settings else 'VALUE'}"
            raise ConfigError([f"{given}: must be {word} or a setting a.b=c{hint}"])
    if path is None and not settings:
        raise ConfigError(
            [f"no settings: give --config FILE, or section.setting=value; for example `{example}`"]
        )
    return read(path, settings, kind)


def _set(
    values: Values,
    keys: Sequence[str],
    value: Any,
    places: Mapping[str, str],
    here: str,
    kind: type[Section] | None,
) -> str | None:
    """Set a value at a path; the problem if there is a plain value on the way.

    Text that stands for a section of `kind` (a path alone) becomes this section.
    """
    section: Any = values
    for position, key in enumerate(keys[:-1]):
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if isinstance(inner, str) and kind is not None:
            inner = section[key] = _as_section(kind, keys[: position + 1], inner)
        if not isinstance(inner, dict):
            above = ".".join(keys[: position + 1])
            what = (
                "a list; give all of it"
                if isinstance(inner, list)
                else "a value, which has no settings inside"
            )
            return f"{here}: {above} is {format_value(inner)} ({places.get(above, here)}), {what}"
        section = inner
    section[keys[-1]] = value
    return None


def _as_section(kind: type[Section], keys: Sequence[str], text: str) -> Any:
    """The settings of the section that a text at a path stands for; else the text."""
    field = field_at(kind, ".".join(keys))
    if field is None:
        return text
    allowed = TypeAdapter[Any](Annotated[field.annotation, *(field.metadata or [None])])  # type: ignore[arg-type]
    try:
        found = allowed.validate_python(text)
    except ValidationError:
        return text
    return found.model_dump(exclude_unset=True) if isinstance(found, BaseModel) else text


def _read_file(path: str | Path | None) -> Document:
    if path is None:
        return Document({}, {}, "the command line")
    reader = YamlReader(str(path), numbered=True)
    values = reader.values(_read_text(path))
    if values is None:
        raise ConfigError(
            [f"{path}: holds no settings; leave it out if all of them are given as a.b=c"]
        )
    if not isinstance(values, dict):
        given = format_value(values) if values is not UNREADABLE else "this"
        raise ConfigError(
            reader.problems or [f"{path}: must hold settings (name: value), not {given}"]
        )
    return Document(values, reader.places, str(path), reader.problems, reader.broken)


def _wants_text(kind: type[Section], keys: Sequence[str], value: Any, text: str) -> bool:
    """Whether a value that YAML reads as a number, a boolean or a mapping is meant as text."""
    if isinstance(value, str) or value is None or value is UNREADABLE:
        return False
    section: type[BaseModel] = kind
    is_item = False  # whether the key is the name of an item of a mapping of sections
    for key in keys[:-1]:
        if is_item:
            is_item = False
            continue
        field = section.model_fields.get(key)
        inner = nested_sections(field.annotation) if field is not None else []
        if field is None or not inner:
            return False
        section, is_item = inner[0], item_annotation(field.annotation) is not None
    field = section.model_fields.get(keys[-1])
    if field is None:
        return False
    allowed = TypeAdapter[Any](Annotated[field.annotation, *(field.metadata or [None])])  # type: ignore[arg-type]
    return not _allows(allowed, value) and _allows(allowed, text)


def _allows(allowed: TypeAdapter[Any], value: Any) -> bool:
    try:
        allowed.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _read_text(path: str | Path) -> str:
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ConfigError([f"{path}: larger than 1 MiB; is this a configuration?"])
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from error
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError([f"{path}: no such file{hint}"]) from error
    except IsADirectoryError as error:
        raise ConfigError([f"{path}: a folder; give the YAML file in it"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"{str(path)!r}: not the name of a file"]) from error


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
