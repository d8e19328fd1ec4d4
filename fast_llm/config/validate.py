"""Sections of a configuration, and how a document becomes one.

`read` gives a Document: nested values, and where each stands. `validate` turns a Document into a Section,
or raises one ConfigError with every mistake: where, what was given, what is allowed, the nearest name.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from fast_llm.config.mistakes import (
    MAX_PROBLEMS,
    Allowed,
    explain,
    iter_paths,
    iter_settings,
    nested_sections,
)
from fast_llm.config.text import UNREADABLE, Dumper, YamlReader
from fast_llm.config.text import (
    format_value as format_value,
)  # here for those who tell mistakes of their own
from fast_llm.errors import ConfigError, UserError

Values = dict[str, Any]
LARGEST_FILE = 2**20  # bytes
LARGEST_NUMBER = 10**15  # no count of anything here comes near; larger ones would overflow later on


def _text(value: str) -> str:
    if not value:
        raise ValueError("given nothing between the quotes; write null, or leave it out, for none")
    return value


def path_text(value: str) -> str:
    """Text that can name a file or folder. Raises ValueError."""
    if (
        any(len(part) > 255 for part in os.fsencode(value).split(b"/"))
        or len(os.fsencode(value)) >= 4096
    ):
        raise ValueError(
            f"given {format_value(value)}, which is too long for the name of a file or folder"
        )
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise ValueError(
            f"given {format_value(value)}, but there is no user {value.partition('/')[0][1:]}"
        )
    return value


Positive = Annotated[int, Field(gt=0, le=LARGEST_NUMBER), Allowed("an integer above 0")]
Count = Annotated[int, Field(ge=0, le=LARGEST_NUMBER), Allowed("an integer of 0 or more")]
PositiveFloat = Annotated[float, Field(gt=0), Allowed("a number above 0")]
NonNegativeFloat = Annotated[float, Field(ge=0), Allowed("a number of 0 or more")]
Text = Annotated[str, AfterValidator(_text)]
PathText = Annotated[Text, AfterValidator(path_text)]


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_defaults(cls, values: Any) -> Any:
        """An empty section is all defaults; null for a value that follows from others leaves it to them."""
        if values is None:
            return {}
        if not isinstance(values, dict):
            return values
        derived = {
            name for name, field in cls.model_fields.items() if field.default_factory is not None
        }
        return {
            key: value for key, value in values.items() if value is not None or key not in derived
        }


class Interval(Section):
    """Something that happens every so many steps."""

    interval: Positive | None = None
    """Every so many steps; null is never."""
    offset: Count = 0
    """Shifts the steps at which it happens: those whose number minus this is a multiple of the interval."""

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return self.interval is not None and (step - self.offset) % self.interval == 0

    def within(self, other: "Interval") -> bool:
        """Whether whenever this happens, the other does too."""
        if self.interval is None:
            return True
        if other.interval is None:
            return False
        return (
            self.interval % other.interval == 0
            and (self.offset - other.offset) % other.interval == 0
        )


# Values and where they were written.


class Document:
    """Nested values, where each of them was written, and what is wrong with them so far."""

    def __init__(
        self,
        values: Values,
        places: dict[str, str],
        source: str,
        problems: Sequence[str] = (),
        broken: Iterable[str] = (),
    ):
        """`problems` are told by `validate` together with its own; `broken` are the paths of values that could not
        be read and are not in `values`."""
        self.values = values
        self.places = places
        self.source = source
        self.problems = tuple(problems)
        self.broken = frozenset(broken)

    def where(self, path: str) -> str:
        """`file:line` of a dotted path, or of the nearest section around it, or of the first setting inside."""
        around = path
        while around:
            if around in self.places:
                return self.places[around]
            around = around.rpartition(".")[0]
        inside = (place for known, place in self.places.items() if known.startswith(path + "."))
        return next(inside, self.source)

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        value: Any = self.values
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def under(self, values: Values, source: str) -> "Document":
        """With `values` laid underneath: they hold where nothing is written.

        What is written differently is a problem that `validate` tells, naming both places.
        """
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
                elif not _same(key, merged[key], value):
                    problems.append(
                        f"{self.where(here)}: {here}: given {format_value(merged[key])}, but {source} says {format_value(value)};"
                        " leave it out, the pretrained model decides"
                    )
            return merged

        laid = lay(self.values, values, "")
        return Document(laid, places, self.source, (*self.problems, *problems), self.broken)


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether two spellings mean one thing."""
    if key == "add_linear_biases":
        words = {True: "everywhere", False: "nowhere"}
        one, other = words.get(one, one), words.get(other, other)
    return bool(one == other)


def read(
    path: str | Path | None, overrides: Sequence[str] = (), kind: type[Section] | None = None
) -> Document:
    """A YAML file (or none) with overrides `a.b=c` laid over it; the last of a path wins.

    Overrides are YAML, with what a command line needs: `*.jsonl` or `@x`, which YAML refuses, is the text that it is,
    `#` begins no comment, and where `kind` wants text, `2024` is text.

    Raises ConfigError for a file that cannot be read at all; smaller mistakes travel in the document, so that
    `validate` tells them with all the others.
    """
    values: Any = {}
    reading = YamlReader(str(path), numbered=True)
    if path is not None:
        values = reading.values(_read_text(path))
        if values is None:
            raise ConfigError(
                [f"{path}: holds no settings; leave it out if all of them are given as a.b=c"]
            )
        if not isinstance(values, dict):
            problem = f"{path}: must hold settings (name: value), not {format_value(values) if values is not UNREADABLE else 'this'}"
            raise ConfigError(reading.problems or [problem])
    places, problems, broken = reading.places, reading.problems, reading.broken
    for override in overrides:
        name, sign, text = override.partition("=")
        keys = name.split(".")
        here = f"override {override if override.isprintable() and len(override) < 100 else format_value(override)}"
        if not sign or not all(re.fullmatch(r"[^\s.=]+", key) for key in keys):
            problems.append(
                f"{here}: must have the form section.setting=value, e.g. training.train_iters=1000"
            )
            continue
        if not text.strip():
            problems.append(f"{here}: gives no value; write {name}=null for none")
            continue
        inner = YamlReader(here, numbered=False)
        value = inner.override(text, name)
        if (
            kind is not None
            and text.strip()[0] not in "[{\"'"
            and _wants_text(kind, keys, value, text.strip())
        ):
            value = text.strip()
        problems += inner.problems
        broken |= inner.broken
        if value is UNREADABLE:
            broken.add(name)
            continue
        place: Any = values
        for position, key in enumerate(keys[:-1]):
            below = place.get(key)
            if below is None:
                below = place[key] = {}
            if not isinstance(below, dict):
                above = ".".join(keys[: position + 1])
                what = (
                    "a list; give all of it"
                    if isinstance(below, list)
                    else "a value, which has no settings inside"
                )
                problems.append(
                    f"{here}: {above} is {format_value(below)} ({places.get(above, here)}), {what}"
                )
                broken.add(name)
                break
            place = below
        else:
            place[keys[-1]] = value
            for known in [
                known for known in places if known == name or known.startswith(name + ".")
            ]:
                del places[known]
            places |= inner.places | {name: here}
    return Document(
        values, places, str(path) if path is not None else "the command line", problems, broken
    )


def _wants_text(kind: type[Section], keys: Sequence[str], value: Any, text: str) -> bool:
    """Whether what YAML takes for a number, yes, no or a mapping is meant as text."""
    if isinstance(value, str) or value is None or value is UNREADABLE:
        return False
    section: type[BaseModel] = kind
    for key in keys[:-1]:
        field = section.model_fields.get(key)
        below = nested_sections(field.annotation) if field is not None else []
        if not below:
            return False
        section = below[0]
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
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
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


# From values to a configuration.

Kind = TypeVar("Kind", bound=Section)
# A violation of a constraint across settings: the dotted paths that it concerns, the one to point at first; what is wrong.
Violation = tuple[tuple[str, ...], str]


def validate(
    kind: type[Kind],
    document: Document,
    refused: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
    constraints: Callable[[Kind], Iterable[Violation]] | None = None,
) -> Kind:
    """The Section that a Document describes.

    `refused`: dotted path → what to use instead. `renamed`: old dotted path → new one. `constraints`: what must hold
    across settings; it is asked even when single settings are wrong, about those that are right.
    Raises ConfigError with every mistake, in the order of the file.
    """
    problems = list(document.problems)
    broken = set(document.broken)
    document = _with_new_names(document, renamed or {}, problems, broken)
    values = _without_refused(document, refused or {}, problems)
    section: Kind | None = None
    while section is None:
        try:
            section = kind.model_validate(values)
        except ValidationError as error:
            found = explain(kind, values, error)
            problems += [
                f"{document.where(path)}: {path or 'the file'}: {text}"
                for path, _, text in found
                # What is given but wrong was told already and taken out; it is not missing.
                if not text.startswith("is missing")
                or not any(_related(path, wrong) for wrong in broken)
            ]
            if len(problems) >= MAX_PROBLEMS:
                break  # this is no configuration at all
            wrong = {field for _, field, _ in found}
            smaller = _without(values, wrong)
            broken |= wrong
            if smaller == values:
                break  # something required is missing
            values = smaller
    if constraints is not None and section is not None:
        for concerned, text in constraints(section):
            if not any(_related(path, wrong) for path in concerned for wrong in broken):
                problems.append(f"{document.where(concerned[0])}: {concerned[0]}: {text}")
    if problems or section is None:
        problems = sorted(dict.fromkeys(problems), key=_line)
        raise ConfigError(
            problems[:MAX_PROBLEMS]
            + [f"… and {len(problems) - MAX_PROBLEMS} more"] * (len(problems) > MAX_PROBLEMS)
        )
    return section


_PATHS = re.compile(r"(.*\.)?(path|experiment_dir|output_path|validation_sets)")


def located(problem: str, document: Document, kind: type[Section], default: str = "") -> str:
    """A problem that was found later, with its place and its setting in front as those of `validate` have them.

    The setting is the one that the problem begins with; else the one whose file or folder it begins with; else `default`.
    """
    if problem.startswith(("override ", f"{document.source}:")):
        return problem
    every = dict(iter_settings(kind))
    head = re.match(r"[\w.]+(?=[ :])", problem)
    if head is not None and (
        head[0] in every or ("." in head[0] and head[0] in set(iter_paths(kind)))
    ):
        return f"{document.where(head[0])}: {problem}"
    if (
        head is not None
        and head[0].rpartition(".")[0] in every
        and document.get(head[0]) is not None
    ):
        return f"{document.where(head[0])}: {problem}"  # an entry of names that are the user's
    names: dict[str, str] = {}  # the values of settings that name files, and these settings
    for path in filter(_PATHS.fullmatch, every):
        given = document.get(path)
        inside = (
            given.items()
            if isinstance(given, dict)
            else [("", one) for one in (given if isinstance(given, list) else [given])]
        )
        for name, value in inside:
            if isinstance(value, str) and value:
                here = f"{path}.{name}" if name else path
                names |= {value: here, str(Path(value).expanduser()): here}
    found = max((value for value in names if problem.startswith(value)), key=len, default=None)
    default = default if found is None else names[found]
    return f"{document.where(default)}: {default}: {problem}" if default else problem


@contextmanager
def locating(document: Document, kind: type[Section], default: str = "") -> Iterator[None]:
    """UserErrors from inside have the place of their setting in front."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            [located(problem, document, kind, default) for problem in error.problems]
        ) from error
    except UserError as error:
        if not error.args or error.exit_code != UserError.exit_code:
            raise
        error.args = (located(str(error), document, kind, default),)
        raise


def _line(problem: str) -> tuple[bool, int]:
    found = re.match(r"(?!override )[^:]*:(\d+): ", problem)
    return (found is None, int(found[1]) if found else 0)


def _related(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def dump(section: Section) -> str:
    """A resolved configuration as YAML, itself valid input."""
    values = section.model_dump(mode="json")
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


_ABSENT = object()


def _with_new_names(
    document: Document, renamed: Mapping[str, str], problems: list[str], broken: set[str]
) -> Document:
    values, places = document.values, dict(document.places)
    for old, new in renamed.items():
        present = Document(values, places, document.source)
        given = present.get(old, _ABSENT)
        if given is _ABSENT:
            continue
        values = _without(values, {old})
        if present.get(new, _ABSENT) is not _ABSENT:
            problems.append(
                f"{present.where(old)}: {old}: an older name of {new}, which is given too ({present.where(new)});"
                " keep that one"
            )
            broken.add(new)
        else:
            places[new] = present.where(old)
            values = _with(values, new.split("."), given)
    return Document(values, places, document.source)


def _with(values: Values, keys: list[str], value: Any) -> Values:
    if len(keys) == 1:
        return {**values, keys[0]: value}
    below = values.get(keys[0])
    if below is not None and not isinstance(below, dict):
        return values  # validation explains it
    return {**values, keys[0]: _with(below or {}, keys[1:], value)}


def _without(values: Values, paths: Iterable[str]) -> Values:
    """The values without those at some dotted paths."""
    paths = set(paths)
    kept: Values = {}
    for key, value in values.items():
        if key in paths:
            continue
        inner = {path[len(key) + 1 :] for path in paths if path.startswith(key + ".")}
        kept[key] = _without(value, inner) if inner and isinstance(value, dict) else value
    return kept


def _without_refused(document: Document, refused: Mapping[str, str], problems: list[str]) -> Values:
    """The values without those refused by name, one problem for each; a section's own sentence serves names inside
    that have none."""
    found: set[str] = set()

    def look(value: Any, path: str, sentence: str | None) -> None:
        sentence = refused.get(path, sentence)
        if isinstance(value, dict) and value:
            for key, below in value.items():
                look(below, f"{path}.{key}", sentence)
        elif sentence is not None:
            problems.append(f"{document.where(path)}: {path}: not offered: {sentence}")
        if path in refused:
            found.add(path)

    for key, value in document.values.items():
        look(value, key, None)
    return _without(document.values, found)
