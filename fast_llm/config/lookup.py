"""`fast-llm settings`: the reference in a terminal, from the source of docs/settings.md."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from fast_llm.config.compat import (
    CONVERT_REFUSED,
    DIFFERENT,
    PREPARE_REFUSED,
    REFUSED,
    RENAMED,
)
from fast_llm.config.mistakes import (
    describe_allowed,
    iter_paths,
    iter_sections,
    iter_settings,
    nearest_setting,
)
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.reference import default_text, doc_text, meaning, plain, section_of
from fast_llm.config.schema import schema
from fast_llm.config.train import TrainConfig
from fast_llm.errors import ConfigError
from fast_llm.terminal import BOLD, fields, style, wrap

_COMMANDS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "convert": ConvertConfig,
}


def describe(path: str, columns: int, stream: Any) -> str:
    """Describe a section or a setting, by its dotted path or the end of it; or list all settings.

    Raises ConfigError, with the nearest name, if there is no such section or setting.
    """
    if not path:
        return "\n\n".join(_listing(command, kind, stream) for command, kind in _COMMANDS.items())
    if path in _COMMANDS:
        return _listing(path, _COMMANDS[path], stream)
    found = [(kind, path) for kind in _COMMANDS.values() if path in set(iter_paths(kind))]
    found = found or [
        (kind, known)
        for kind in _COMMANDS.values()
        for known in iter_paths(kind)
        if known.endswith(f".{path}")
    ]
    if not found:
        raise ConfigError([f"{path}: {_unknown(path)}"])
    return "\n\n".join(
        block for kind, known in found for block in _blocks(kind, known, columns, stream)
    )


def describe_for_editors(command: str) -> str:
    """The JSON schema of a command's YAML file. Raises ConfigError for another name."""
    if command not in _COMMANDS:
        raise ConfigError(
            [f"--schema: given {command or 'no file'}, must be one of {', '.join(_COMMANDS)}"]
        )
    return schema(_COMMANDS[command])


def _listing(command: str, kind: type[BaseModel], stream: Any) -> str:
    label = 2 + max(len(path) for path, _ in iter_settings(kind))
    lines = [style(f"{command}: {doc_text(kind)}", stream, BOLD)]
    for path, _ in iter_settings(kind):
        section, name = section_of(kind, path)
        lines.append(f"  {path:<{label}}{plain(default_text(section, name))}")
    return "\n".join(lines)


def _blocks(kind: type[BaseModel], path: str, columns: int, stream: Any) -> Iterator[str]:
    section, name = section_of(kind, path)
    inside = dict(iter_sections(section.model_fields[name], path))
    if not inside:
        yield _setting(section, name, path, columns, stream)
    for here, below in inside.items():
        yield "\n".join(
            [style(path, stream, BOLD), wrap(plain(doc_text(below)), columns, "  ", "  ")]
        )
        for inner in below.model_fields:
            yield from _blocks(kind, f"{here}.{inner}", columns, stream)


def _setting(section: type[BaseModel], name: str, path: str, columns: int, stream: Any) -> str:
    field = section.model_fields[name]
    rows = [
        ("  default", plain(default_text(section, name))),
        ("  allowed", describe_allowed(field)),
        ("  meaning", plain(" ".join(meaning(section, name).split()))),
    ]
    if path in DIFFERENT:
        before, why = DIFFERENT[path]
        rows.append(("  Fast-LLM 0.2", plain(f"{before}. {why}")))
    label = 2 + max(len(row) for row, _ in rows)
    return "\n".join([style(path, stream, BOLD), fields(rows, label, columns, stream)])


def _unknown(path: str) -> str:
    if path in RENAMED:
        return f"an older name; see `fast-llm settings {RENAMED[path]}`"
    for refused in (REFUSED, PREPARE_REFUSED, CONVERT_REFUSED):
        if path in refused:
            return f"not supported: {refused[path]}"
    above, _, name = path.rpartition(".")
    for kind in _COMMANDS.values():
        known = list(iter_paths(kind))
        siblings = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == above]
        if near := nearest_setting(path, name, above, siblings, known):
            return f"no such setting; did you mean {near}?"
    return "no such setting; `fast-llm settings` lists all"
