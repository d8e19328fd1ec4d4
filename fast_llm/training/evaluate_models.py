"""`fast-llm evaluate`: the scores of several models on tasks of lm-eval, beside each other.

Models are computed by lm-eval's own `hf` model, with transformers, in one process. A checkpoint is
exported to a temporary folder first. Log-probabilities are in fp32 whatever the weights' dtype is
(lm-eval's own default rounds them to that dtype).
"""

import gc
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface
from fast_llm.config.prepare import ConvertConfig
from fast_llm.data import tokenizer
from fast_llm.data.entries import Metadata, open_path
from fast_llm.data.metadata import resolve_prefix
from fast_llm.data.tokenfile import TokenFile
from fast_llm.errors import CheckpointError, ConfigError, UserError
from fast_llm.evaluation import harness
from fast_llm.evaluation.contamination import Overlap, scan
from fast_llm.evaluation.harness import Score
from fast_llm.evaluation.tasks import Wanted, output_types, quiet, require_packages
from fast_llm.evaluation.texts import ngrams_of
from fast_llm.storage import write_atomically
from fast_llm.terminal import table
from fast_llm.training.convert import convert

logger = logging.getLogger("fast_llm")

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def evaluate(
    models: Sequence[str],
    wanted: Wanted,
    *,
    data: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Evaluate models: checkpoints, Hugging Face folders or models on the Hub.

    `data`: datasets in which the tasks' texts are looked for. `max_length`: tokens of context; by
    default the model's. `dtype`: of the weights; by default that of their files. `output`: a file
    for the result. Returns the result for JSON. Raises UserError for models, tasks or data that
    cannot be read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(["runs in one process; start it without torchrun"])
    require_packages("`fast-llm evaluate`")
    place = None if output is None else Path(output).expanduser()
    if place is not None and (not place.parent.is_dir() or place.is_dir()):
        raise ConfigError([f"--output: {place}: cannot be a file; its folder must exist"])
    _name_option(lambda: output_types(wanted), wanted)
    with ExitStack() as stack:
        datasets = [_open_data(path) for path in data]
        opened = [(model, stack.enter_context(_as_folder(model))) for model in models]
        loaded = _name_option(lambda: harness.load(wanted), wanted)
        found = _contamination(loaded, wanted.limit, datasets, opened[0][1])
        scores = [
            (name, _evaluate(name, folder, loaded, wanted.limit, batch_size, max_length, dtype))
            for name, folder in opened
        ]
    result = _as_json(scores, found, wanted)
    if place is not None:
        write_atomically(place, json.dumps(result, indent=1) + "\n")
    return result


def _name_option(action: Any, wanted: Wanted) -> Any:
    """Call `action`, whose errors are about --tasks or --include-path."""
    try:
        return action()
    except ConfigError as error:
        raise ConfigError(
            [
                f"{'--include-path' if p.startswith(f'{wanted.include_path}: ') else '--tasks'}:"
                f" {p}"
                for p in error.problems
            ]
        ) from error


@contextmanager
def _as_folder(model: str) -> Iterator[Path]:
    """The Hugging Face folder of a model; that of a checkpoint is temporary."""
    path = Path(model).expanduser()
    if not folders.is_checkpoint(path):
        yield huggingface.fetch(model, weights=True)
        return
    with tempfile.TemporaryDirectory(prefix="fast-llm-evaluate-") as temporary:
        folder = Path(temporary) / "model"
        convert(
            ConvertConfig.model_validate(
                {"input": {"path": str(path)}, "output": {"path": str(folder)}}
            )
        )
        yield folder


def _evaluate(
    name: str,
    folder: Path,
    loaded: Mapping[str, Any],
    limit: int | None,
    batch_size: int,
    max_length: int | None,
    dtype: str | None,
) -> list[Score]:
    """The scores of one model."""
    from lm_eval.models.huggingface import HFLM

    logger.info(f"Evaluating {name} on {', '.join(loaded['tasks'])}.")
    with quiet():
        try:
            model = HFLM(
                pretrained=str(folder),
                dtype="auto" if dtype is None else _DTYPES[dtype],
                softmax_dtype="float32",
                batch_size=batch_size,
                max_length=max_length,
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
        except Exception as error:  # transformers and the tokenizer each raise their own
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{name}: transformers cannot load it: {first.rstrip('. ')}"
            ) from error
    try:
        return harness.run(model, loaded, limit)
    except (ValueError, AssertionError) as error:  # lm-eval's refusals
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError([f"--tasks: {name}: lm-eval: {first.rstrip('. ')}"]) from error
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# Contamination.


def _open_data(path: str) -> tuple[str, list[TokenFile], Path | None]:
    """A dataset: its path, its token files, and the folder of its tokenizer."""
    metadata: Metadata = {}
    _, files = open_path(path, False, metadata, "--data")
    (place, content), *_ = metadata.items()
    copy = content.get("tokenizer", {}).get("path")
    folder = resolve_prefix(Path(place), copy) if isinstance(copy, str) else None
    return path, files, folder if folder is not None and folder.is_dir() else None


def _contamination(
    loaded: Mapping[str, Any],
    limit: int | None,
    datasets: Sequence[tuple[str, list[TokenFile], Path | None]],
    model: Path,
) -> dict[str, dict[str, Overlap]]:
    """Of each dataset and task, how many examples the dataset holds."""
    found = {}
    for path, files, folder in datasets:
        try:
            loaded_tokenizer = tokenizer.load(str(folder or model)).tokenizer
        except UserError as error:
            raise ConfigError([f"--data: {path}: no tokenizer for it: {error}"]) from error
        ngrams = ngrams_of(loaded, limit, loaded_tokenizer)
        total = sum(file.tokens for file in files)
        logger.info(f"Looking for {len(ngrams.tokens):,} n-grams in {total:,} tokens of {path}.")
        seen = scan(ngrams.tokens, files)
        assert seen is not None
        found[path] = ngrams.overlaps(seen)
    return found


# Results.


def _as_json(
    scores: Sequence[tuple[str, Sequence[Score]]],
    found: Mapping[str, Mapping[str, Overlap]],
    wanted: Wanted,
) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "lm_eval": version("lm_eval"),
        "limit": wanted.limit,
        "num_fewshot": wanted.num_fewshot,
        "models": [
            {
                "model": name,
                "scores": [
                    {
                        "task": one.task,
                        "metric": one.metric,
                        "value": one.value,
                        "standard_error": one.error,
                        "higher_is_better": one.higher_is_better,
                        "examples": one.examples,
                    }
                    for one in every
                ],
            }
            for name, every in scores
        ],
        "contamination": {
            path: {task: overlap.as_dict() for task, overlap in tasks.items()}
            for path, tasks in found.items()
        },
    }


def describe(result: Mapping[str, Any]) -> str:
    """The result as tables: a column for each model, differences to the first one behind it."""
    models = result["models"]
    first = {(one["task"], one["metric"]): one for one in models[0]["scores"]}
    columns = [{(one["task"], one["metric"]): one for one in model["scores"]} for model in models]
    rows = []
    for key, one in first.items():
        cells = [_cell(column[key]) for column in columns]
        cells[1:] = [
            f"{cell} ({column[key]['value'] - one['value']:+.4f})"
            for cell, column in zip(cells[1:], columns[1:], strict=True)
        ]
        arrow = {True: "↑", False: "↓", None: ""}[one["higher_is_better"]]
        rows.append([key[0], f"{key[1]} {arrow}".strip(), f"{one['examples']:,}", *cells])
    heads = ["task", "metric", "examples", *(model["model"] for model in models)]
    parts = [table(heads, rows, range(2, len(heads)))]
    for path, tasks in result["contamination"].items():
        lines = [
            [
                task,
                f"{one['found']:,} of {one['examples']:,}",
                f"{one['mostly']:,}",
                f"{one['short']:,}",
            ]
            for task, one in tasks.items()
        ]
        titles = ["task", "examples found", "mostly", "too short"]
        parts.append(f"Texts of the tasks in {path}:\n" + table(titles, lines, range(1, 4)))
    return "\n\n".join(parts)


def _cell(score: Mapping[str, Any]) -> str:
    error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.4f}"
    return f"{score['value']:.4f}{error}"
