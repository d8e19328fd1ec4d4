"""`training.evaluations` before the start: packages, names of tasks, and what a run measures."""

import os
from collections.abc import Iterator

from fast_llm.config.evaluation import EvaluationConfig
from fast_llm.config.train import TrainConfig
from fast_llm.errors import ConfigError, MissingPackage
from fast_llm.evaluation.tasks import GENERATES, PACKAGES, Wanted, missing_packages, output_types


def _with_tasks(config: TrainConfig) -> Iterator[tuple[str, EvaluationConfig]]:
    for name, evaluation in config.training.evaluations.items():
        if evaluation.tasks and evaluation.interval is not None:
            yield name, evaluation


def wanted(evaluation: EvaluationConfig) -> Wanted:
    """The tasks of an evaluation."""
    limits = evaluation.num_fewshot, evaluation.limit
    return Wanted(tuple(evaluation.tasks), evaluation.include_path, *limits)


def missing_for_evaluations(config: TrainConfig) -> list[str]:
    """One message for all packages of the extra `evaluate` that are not installed."""
    missing = missing_packages(PACKAGES) if dict(_with_tasks(config)) else []
    rest = [name for name in PACKAGES if name not in missing]
    why = "training.evaluations (the extra `evaluate`)"
    return [str(MissingPackage(" ".join([*missing, *rest]), why))] if missing else []


def measured_sets(config: TrainConfig) -> list[str]:
    """The validation sets that evaluations measure on intervals of their own."""
    every = config.training.evaluations.values()
    return [name for one in every if one.interval is not None for name in one.validation_sets]


def evaluation_problems(config: TrainConfig, name: str, has_tokenizer: bool) -> list[str]:
    """What is wrong with the tasks of an evaluation. Reads YAML files, no data of tasks.

    `has_tokenizer`: whether the run knows the model's.
    """
    evaluation = dict(_with_tasks(config)).get(name)
    if evaluation is None:
        return []
    setting, problems = f"training.evaluations.{name}.tasks", []
    if not has_tokenizer:
        problems.append(
            f"{setting}: need a tokenizer: set data.tokenizer.path, or a pretrained.path that has"
            " one"
        )
    if os.environ.get("RANK", "0") != "0":  # one process looks: lm-eval has 14,000 files
        return problems
    try:
        kinds = output_types(wanted(evaluation))
    except ConfigError as error:
        place = f"{evaluation.include_path}: "
        return problems + [
            f"{setting.removesuffix('tasks')}include_path: {text}"
            if text.startswith(place)
            else f"{setting}: {text}"
            for text in error.problems
        ]
    generating = [task for task, kind in kinds.items() if kind == GENERATES]
    if generating:
        more = f" and {len(generating) - 3} more" if len(generating) > 3 else ""
        problems.append(
            f"{setting}: {', '.join(generating[:3])}{more} generate text, which is not done during"
            " training; leave them out, and run them on an export: fast-llm evaluate EXPORT"
            f" --tasks {generating[0]}"
        )
    return problems
