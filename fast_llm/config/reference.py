"""Generates docs/settings.md from the configuration: `python -m fast_llm.config.reference >
docs/settings.md`.

A setting's text is its docstring in train.py, model.py and prepare.py; what Fast-LLM 0.2 had is in
compat.py. A test compares the page with what this generates.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fast_llm.config.compat import (
    CONVERT_REFUSED,
    DIFFERENT,
    PREPARE_REFUSED,
    REFUSED,
    RENAMED,
)
from fast_llm.config.mistakes import (
    ITEMS,
    describe_allowed,
    iter_sections,
    nested_sections,
    refused_values,
)
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.text import format_value
from fast_llm.config.train import TrainConfig

_IN_QUOTES = " (numbers and dates in quotes)"  # helps in error messages only

_INTRODUCTION = """# Settings

Generated from the source by `python -m fast_llm.config.reference`; do not edit.

## How to give settings

Give settings in the YAML file, or on the command line as `section.setting=value`, which takes
precedence. All settings are optional unless their default is *required*. Each item below lists a
setting, what is allowed, its default, and what it does.

YAML is version 1.1, so `100_000` is a number and `yes` is true; `1e-4` is a number too. On the
command line, text is taken literally (`dataset.data_files=*.jsonl`) and `#` begins no comment.
Unknown settings, settings given twice and values that are not allowed are errors; all errors of a
file are reported at once.

Editors complete and check settings with the file that `fast-llm settings train --schema` prints,
if the first line of the YAML file names it: `# yaml-language-server: $schema=train.schema.json`.

One setting turns off a feature, whatever else the file says about it:

- `training.validation.interval=null`: no validation.
- `training.checkpoint.interval=null`: no shutdown, and no checkpoints but the one that is saved
  when a signal stops training.
- `training.export.interval=null`: no exports.
- `run.experiment_dir=null`: nothing is written.
- `model.distributed.pipeline_parallel=1`: no pipeline parallelism.
- `pretrained.path=null`: no pretrained model.
- `training.wandb=null`: no Weights & Biases.

Contents:

1. [train](#train)
2. [prepare](#prepare)
3. [convert](#convert)
4. [What differs from Fast-LLM 0.2](#what-differs-from-fast-llm-02)
5. [What is refused, and what to use instead](#what-is-refused-and-what-to-use-instead)
6. [Older names](#older-names)
"""


def page() -> str:
    """The page, in Markdown."""
    blocks = [_INTRODUCTION.rstrip()]
    for title, kind in (
        ("train", TrainConfig),
        ("prepare", PrepareConfig),
        ("convert", ConvertConfig),
    ):
        blocks += [f"## {title}", _fill(doc_text(kind))]
        for path, section in _sections(kind, ""):
            blocks += _section(path, section)
    blocks += [
        "## What differs from Fast-LLM 0.2",
        _list(
            f"**`{path}`** (default {_default_at(TrainConfig, path)}). Fast-LLM 0.2: {before}."
            f" Here: {here}"
            for path, (before, here) in DIFFERENT.items()
        ),
        "## What is refused, and what to use instead",
    ]
    for title, kind, refused in (
        ("train", TrainConfig, REFUSED),
        ("prepare", PrepareConfig, PREPARE_REFUSED),
        ("convert", ConvertConfig, CONVERT_REFUSED),
    ):
        items = _refused(kind, refused)
        blocks += [f"### In `{title}`", _list(f"{names}: {advice}" for names, advice in items)]
    blocks += ["## Older names", _list(f"`{old}` is now `{new}`" for old, new in RENAMED.items())]
    return "\n\n".join(blocks) + "\n"


def _sections(kind: type[BaseModel], above: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield above, kind
    for name, field in kind.model_fields.items():
        for path, section in iter_sections(field, f"{above}.{name}" if above else name):
            yield from _sections(section, path)


def _section(path: str, section: type[BaseModel]) -> list[str]:
    """The heading, text and settings of a section. The file itself has no heading."""
    items = []
    for name, field in section.model_fields.items():
        if nested_sections(field.annotation):
            continue
        allowed = describe_allowed(field).replace(_IN_QUOTES, "")
        default = default_text(section, name)
        shown = default if default == "*required*" else f"default {default}"
        full = f"{path}.{name}" if path else name
        items.append(f"**`{full}`** ({allowed}; {shown}). {meaning(section, name)}")
    heading = [f"### `{path}`", _fill(doc_text(section))] if path else []
    return heading + ([_list(items)] if items else [])


def default_text(section: type[BaseModel], name: str) -> str:
    """The default of a setting, in Markdown."""
    field = section.model_fields[name]
    if field.default_factory is not None:
        extra = field.json_schema_extra
        return str(extra["default"]) if isinstance(extra, dict) else "derived from others"
    return (
        "*required*" if field.default is PydanticUndefined else f"`{format_value(field.default)}`"
    )


def _default_at(kind: type[BaseModel], path: str) -> str:
    return default_text(*section_of(kind, path))


def section_of(kind: type[BaseModel], path: str) -> tuple[type[BaseModel], str]:
    """The section that a dotted path is in, and its name there."""
    *above, name = path.split(".")
    for part in above:
        if part not in ITEMS.values():
            kind = nested_sections(kind.model_fields[part].annotation)[0]
    return kind, name


def _refused(kind: type[BaseModel], refused: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Refused settings, then refused values, each with its advice. One item for all of a section
    with the same advice.
    """
    items: dict[tuple[str, str], list[str]] = {}
    for path, advice in refused.items():
        items.setdefault((path.rpartition(".")[0], advice), []).append(f"`{path}`")
    for above, section in _sections(kind, ""):
        for name, field in section.model_fields.items():
            full = f"{above}.{name}" if above else name
            for value, advice in refused_values(field).items():
                items.setdefault((above, advice), []).append(f"`{full}: {value}`")
    for (_, advice), names in sorted(items.items(), key=lambda item: item[0][0]):
        yield ", ".join(names), advice


def doc_text(section: type[BaseModel]) -> str:
    """The description of a section, on one line."""
    return " ".join((section.__doc__ or "").split())


def meaning(section: type[BaseModel], name: str) -> str:
    """The docstring of a setting. Read from the source here: pydantic would take 40 ms at each
    start.
    """
    for kind in section.__mro__[: section.__mro__.index(BaseModel)]:
        found = _docstrings(kind.__module__).get(kind.__name__, {})
        if name in found:
            return found[name]
    return ""


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class → setting → the string below its definition."""
    classes = ast.parse(inspect.getsource(sys.modules[module])).body
    return {
        kind.name: {
            setting.target.id: inspect.cleandoc(text.value.value)
            for setting, text in pairwise(kind.body)
            if isinstance(setting, ast.AnnAssign)
            and isinstance(setting.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for kind in classes
        if isinstance(kind, ast.ClassDef)
    }


def plain(text: str) -> str:
    """Text of the reference without the marks of Markdown around code and emphasis."""
    return re.sub(r"[`*]([^`*]+)[`*]", r"\1", text)


def _fill(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width=100,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list(items: Iterator[str] | list[str]) -> str:
    return "\n".join(_fill(item, "- ", "  ") for item in items)


if __name__ == "__main__":
    print(page(), end="")
