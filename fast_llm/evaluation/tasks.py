"""Names of tasks of lm-eval, the optional package `lm_eval` (Gao et al., "The Language Model
Evaluation Harness").

A task is a YAML file: one of the package's own, or one below `include_path`. Names of groups and
tags stand for their tasks. This reads YAML files alone; harness.py loads tasks with their data.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from fast_llm.errors import ConfigError, MissingPackage
from fast_llm.terminal import nearest

PACKAGES = ("lm_eval", "accelerate", "transformers")
GENERATES = "generate_until"  # the output type of tasks whose model generates text


@dataclass(frozen=True)
class Wanted:
    """Which tasks to evaluate, and how."""

    tasks: tuple[str, ...]  # names of tasks, groups or tags, or YAML files
    include_path: str | None = None  # a folder with more tasks
    num_fewshot: int | None = None  # examples before each question; None: as the task says
    limit: int | None = None  # examples of each task


def missing_packages(packages: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require_packages(wanted_by: str) -> None:
    """Raise MissingPackage for the extra `evaluate`."""
    if missing := missing_packages(PACKAGES):
        rest = [name for name in PACKAGES if name not in missing]
        raise MissingPackage(" ".join([*missing, *rest]), f"{wanted_by} (the extra `evaluate`)")


def output_types(wanted: Wanted) -> dict[str, str]:
    """The name and output type of each single task. Reads no data.

    Raises ConfigError for an unknown name, without a prefix, and for a folder that is not there.
    """
    _check_folder(wanted)
    index = task_manager(wanted).task_index
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in wanted.tasks:
        if name not in index and name.endswith((".yaml", ".yml")) and not is_file(name):
            unknown.append(f"{name}: no such file")
        elif name not in index and not is_file(name):
            hint = nearest(name, index)
            where = f", nor in {wanted.include_path}" if wanted.include_path else ""
            unknown.append(
                f"{name}: no task of lm-eval has this name{where}{hint}; `lm-eval ls tasks` lists"
                " all"
            )
        else:
            found |= dict(_leaves(name, index, {}))
    if unknown:
        raise ConfigError(unknown)
    return found


def _check_folder(wanted: Wanted) -> None:
    place = wanted.include_path
    if place is not None and not Path(place).expanduser().is_dir():
        raise ConfigError([f"{place}: no such folder; it must hold the YAML files of tasks"])


def is_file(name: str) -> bool:
    """Whether a name is that of a task's YAML file."""
    return name.endswith((".yaml", ".yml")) and Path(name).expanduser().is_file()


def _leaves(
    name: str, index: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The single tasks of a name, with their output types."""
    if name in index:
        entry = index[name]
        config = {**(entry.cfg or {}), **overrides}
        if entry.kind.name == "TAG":
            for tagged in sorted(entry.tags):
                yield from _leaves(tagged, index, overrides)
            return
    elif is_file(name):
        from lm_eval.tasks._yaml_loader import load_yaml

        config = load_yaml(Path(name).expanduser(), resolve_func=False)
    else:
        config = dict(overrides)  # a task that a group defines
    members = config.get("task")
    if isinstance(members, list):
        further = {"output_type": config["output_type"]} if "output_type" in config else {}
        for member in members:
            if isinstance(member, str):
                yield from _leaves(member, index, further)
            else:
                inner = member.get("group", member.get("task"))
                inner = inner if isinstance(inner, str) else "inline"
                own = {k: v for k, v in member.items() if k == "output_type" or k == "task"}
                own = {k: v for k, v in own.items() if not isinstance(v, str) or k != "task"}
                yield from _leaves(inner, index, {**further, **own})
        return
    if "class" in config:  # written in Python, which is not run here
        yield name, str(config.get("output_type", "unknown"))
        return
    yield str(config.get("task", name)), str(config.get("output_type", GENERATES))


@cache
def _all_tasks(include_path: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    place = None if include_path is None else str(Path(include_path).expanduser())
    with quiet():
        return TaskManager(include_path=place, include_defaults=defaults)


def task_manager(wanted: Wanted) -> Any:
    """lm-eval's TaskManager: without the package's own tasks, which take 7 s to list, if those of
    `include_path` are enough.
    """
    own = _all_tasks(wanted.include_path, False)
    known = {name for name in wanted.tasks if name in own.task_index or is_file(name)}
    if known == set(wanted.tasks):
        names = [name for each in known for name, _ in _leaves(each, own.task_index, {})]
        groups = [
            n for n in known if n in own.task_index and own.task_index[n].kind.name == "GROUP"
        ]
        if not groups or all(name in own.task_index for name in names):
            return own
    return _all_tasks(wanted.include_path, True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' progress bars, prints and log lines below errors."""
    names = ("lm_eval", "datasets", "evaluate", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
