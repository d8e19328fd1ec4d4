"""Run lm-eval's tasks on a model behind lm-eval's interface: load their data, evaluate, read the
scores.
"""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast_llm.errors import ConfigError
from fast_llm.evaluation.tasks import Wanted, is_file, output_types, quiet, task_manager

_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's defaults
# Resamples of a standard error that has no formula. lm-eval takes 100,000, which takes minutes.
_RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    task: str
    metric: str  # "acc", or "exact_match/strict-match" with the name of a filter
    value: float
    error: float | None  # its standard error
    higher_is_better: bool | None
    examples: int


def load(wanted: Wanted) -> dict[str, Any]:
    """The tasks with their data, as lm-eval's `TaskManager.load` returns them.

    Raises ConfigError if the data of a task cannot be read.
    """
    output_types(wanted)
    manager = task_manager(wanted)
    names = [str(Path(n).expanduser()) if is_file(n) else n for n in wanted.tasks]
    with quiet(), reproducible():
        try:
            loaded: dict[str, Any] = manager.load(names)
        except Exception as error:  # of YAML, Python code of the task, datasets, the network
            raise ConfigError(
                [
                    f"{', '.join(wanted.tasks)}: cannot be loaded: {_first_line(error)}; check the"
                    " task's files, the network, and HF_HOME"
                ]
            ) from error
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if wanted.num_fewshot is not None and default != 0:  # 0 means that the task has no examples
            task.set_config(key="num_fewshot", value=wanted.num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEEDS["fewshot"])
    return loaded


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}: {text.rstrip('. ')}" if len(text) < 30 else text.rstrip(". ")


def run(model: Any, loaded: Mapping[str, Any], limit: int | None) -> list[Score]:
    """Evaluate a model, an `lm_eval.api.model.LM`, on loaded tasks.

    The scores of tasks and of groups, in lm-eval's order. Random states are as they were before.
    """
    from lm_eval import evaluator

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS["fewshot"])  # each run has the same examples
    with quiet(), reproducible(), _one_process():
        results = evaluator.evaluate(
            model,
            dict(loaded),
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
        )
    every = {**results["results"], **results.get("groups", {})}
    return [score for name, values in every.items() for score in _scores(name, values, results)]


def _scores(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Score]:
    examples = results.get("n-samples", {}).get(name, {}).get("effective")
    better = results.get("higher_is_better", {}).get(name) or {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered == "none" else f"{metric}/{filtered}"
        count = examples if examples is not None else values.get("sample_len", 0)
        yield Score(
            name,
            shown,
            float(value),
            float(error) if isinstance(error, int | float) else None,
            better.get(metric),
            int(count or 0),
        )


@contextmanager
def reproducible() -> Iterator[None]:
    """Seed Python, NumPy and torch as lm-eval does, and restore their states afterwards."""
    before = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(_SEEDS["python"])
        np.random.seed(_SEEDS["numpy"])
        torch.manual_seed(_SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def _one_process() -> Iterator[None]:
    """Let lm-eval compute standard errors here: it would fork a process for each core."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
