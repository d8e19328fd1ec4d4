"""From a Document to a Section: `validate` reports every mistake at once.

Each mistake says where it is, what was given, what is allowed, and the nearest name. Validation is
repeated without the settings that are wrong, so that constraints across the other settings are
checked too.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fast_llm.config.document import Document, Values
from fast_llm.config.mistakes import (
    MAX_PROBLEMS,
    explain,
    is_setting,
    iter_settings,
)
from fast_llm.config.section import Section
from fast_llm.errors import ConfigError, UserError

Kind = TypeVar("Kind", bound=Section)
# A violated constraint across settings: the dotted paths that it concerns (the one to point at
# first), and what is wrong.
Violation = tuple[tuple[str, ...], str]


def validate(
    kind: type[Kind],
    document: Document,
    refused: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
    constraints: Callable[[Kind], Iterable[Violation]] | None = None,
) -> Kind:
    """The Section that a Document describes.

    `refused`: dotted path → what to use instead. `renamed`: older dotted path → current one.
    `constraints`: the violations across settings; those that concern a setting that is wrong itself
    are not reported. Raises ConfigError with every mistake, in the order of the file.
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
                # A wrong value was reported and removed; it is not missing.
                if not text.startswith("is missing")
                or not any(_related(path, wrong) for wrong in broken)
            ]
            if len(problems) >= MAX_PROBLEMS:
                break  # too many mistakes for a configuration
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


def with_location(problem: str, document: Document, kind: type[Section], default: str = "") -> str:
    """A problem that was found after validation, preceded by its place and setting as those of
    `validate` are.

    The setting is the one that the problem begins with, else the one whose file or folder it begins
    with, else `default`.
    """
    if problem.startswith(("override ", f"{document.source}:")):
        return problem
    every = dict(iter_settings(kind))
    head = re.match(r"[\w.]+(?=[ :])", problem)
    if head is not None and (head[0] in every or ("." in head[0] and is_setting(kind, head[0]))):
        return f"{document.where(head[0])}: {problem}"
    around = "" if head is None else head[0].rpartition(".")[0]
    if head is not None and (
        (around in every and document.get(head[0]) is not None)
        or ("." in around and around not in every and is_setting(kind, around))
    ):
        return f"{document.where(head[0])}: {problem}"  # an entry whose name the user chose
    names: dict[str, str] = {}  # value → the setting that names this file or folder
    for path in filter(_PATHS.fullmatch, every):
        around, is_item, key = path.partition(".NAME.")  # an item may be given as its path alone
        given = document.get(around)
        inside = (
            given.items()
            if isinstance(given, dict)
            else [("", one) for one in (given if isinstance(given, list) else [given])]
        )
        for name, value in inside:
            here = f"{around}.{name}" if name else path
            if is_item and isinstance(value, dict):
                here, value = f"{here}.{key}", value.get(key)
            if isinstance(value, str) and value:
                names |= {value: here, str(Path(value).expanduser()): here}
    found = max((value for value in names if problem.startswith(value)), key=len, default=None)
    default = default if found is None else names[found]
    return f"{document.where(default)}: {default}: {problem}" if default else problem


@contextmanager
def adding_locations(document: Document, kind: type[Section], default: str = "") -> Iterator[None]:
    """UserErrors raised in the block are preceded by the place of their setting."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            [with_location(problem, document, kind, default) for problem in error.problems]
        ) from error
    except UserError as error:
        if not error.args or error.exit_code != UserError.exit_code:
            raise
        error.args = (with_location(str(error), document, kind, default),)
        raise


def _line(problem: str) -> tuple[bool, int]:
    found = re.match(r"(?!override )[^:]*:(\d+): ", problem)
    return (found is None, int(found[1]) if found else 0)


def _related(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


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
                f"{present.where(old)}: {old}: an older name of {new}, which is given too"
                f" ({present.where(new)}); keep that one"
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
        return values  # validation reports it
    return {**values, keys[0]: _with(below or {}, keys[1:], value)}


def _without(values: Values, paths: Iterable[str]) -> Values:
    """The values without those at some dotted paths. A list with one of them is left out."""
    paths = set(paths)
    kept: Values = {}
    for key, value in values.items():
        if key in paths:
            continue
        inner = {path[len(key) + 1 :] for path in paths if path.startswith(key + ".")}
        if inner and isinstance(value, list):
            continue
        kept[key] = _without(value, inner) if inner and isinstance(value, dict) else value
    return kept


def _without_refused(document: Document, refused: Mapping[str, str], problems: list[str]) -> Values:
    """The values without refused settings, one problem for each. A section's advice serves settings
    in it without their own.
    """
    found: set[str] = set()

    def look(value: Any, path: str, advice: str | None) -> None:
        advice = refused.get(path, advice)
        if isinstance(value, dict) and value:
            for key, below in value.items():
                look(below, f"{path}.{key}", advice)
        elif advice is not None:
            problems.append(f"{document.where(path)}: {path}: not supported: {advice}")
        if path in refused:
            found.add(path)

    for key, value in document.values.items():
        look(value, key, None)
    return _without(document.values, found)
