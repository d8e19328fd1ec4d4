"""`fast-llm inspect`: what a path is, and what is shown of it.

This module never imports torch.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from fast_llm.config.checks import violations
from fast_llm.config.compat import PREPARE_REFUSED, REFUSED, RENAMED
from fast_llm.config.document import Document, read
from fast_llm.config.prepare import PrepareConfig
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import adding_locations, validate
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.documents import open_documents
from fast_llm.data.files import find
from fast_llm.data.fim import make_fim
from fast_llm.data.inspect import contents, pieces, raw, text
from fast_llm.data.inspect.dataset import describe, describe_run, open_data
from fast_llm.data.inspect.page import page
from fast_llm.data.metadata import FORMAT
from fast_llm.data.tokenizer import Loaded
from fast_llm.errors import ConfigError, DataError, UserError
from fast_llm.planning.history import apply_orders, new_history
from fast_llm.planning.pretrained import with_pretrained_model
from fast_llm.planning.stages import last_sequence, remaining_stages
from fast_llm.storage import write_atomically

_PAGE_DOCUMENTS, _PAGE_SEQUENCES = 10, 3  # that a page shows besides statistics


def inspect(parsed: Namespace) -> Iterator[str]:
    """What is printed, line by line. Raises UserErrors."""
    path, settings = _words(parsed)
    kind, place = _kind(path, parsed)
    if kind == "tokenizer":
        content = pieces.describe(tokenizer.load(place), _text(parsed))
    elif kind == "raw":
        content = _raw(parsed, place, settings)
    else:
        content = _prepared(parsed, place, settings)
    if parsed.html is not None:
        yield _write_page(parsed.html, content)
        return
    if parsed.json:
        yield json.dumps(content, ensure_ascii=False)
        return
    complete = parsed.document is not None or parsed.sequence is not None
    yield from text.lines(content, sys.stdout, complete)


def _write_page(path: str, content: dict[str, Any]) -> str:
    """Write the page. Raises DataError if the disk refuses it."""
    try:
        write_atomically(Path(path).expanduser(), page(content))
    except OSError as error:
        raise DataError(f"--html: {path}: cannot be written: {error.strerror}") from error
    return f"{path}: written; open it in a browser"


def _words(parsed: Namespace) -> tuple[str | None, list[str]]:
    """PATH and the settings. A YAML file as PATH is taken for --config."""
    settings = list(parsed.settings)
    if not settings or "=" in settings[0]:
        return None, settings
    path = settings.pop(0)
    if parsed.config is None and path.endswith((".yaml", ".yml")):
        parsed.config = path
        return None, settings
    return path, settings


def _kind(path: str | None, parsed: Namespace) -> tuple[str, str]:
    """What PATH is: dataset, raw or tokenizer; and its path, which for the folder of a dataset is
    its dataset.json.
    """
    if path is None:
        if parsed.config is None:
            raise ConfigError(["nothing to inspect: give PATH, or a YAML file as --config FILE"])
        is_raw = read(parsed.config, []).get("dataset") is not None
        return "raw" if is_raw else "dataset", ""
    place = Path(path).expanduser()
    _refuse_run(path, place)
    described = place.with_name(place.name + ".json") if place.name else place
    if place.is_dir() and any(place.glob("shard_*_0.idx")) and _is_metadata(described):
        return "dataset", str(described)
    is_tokens = place.with_name(place.name + ".idx").is_file() or place.suffix == ".ds"
    if _is_metadata(place) or is_tokens:
        return "dataset", path
    has_tokenizer = any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if has_tokenizer or place.name == "tokenizer.json" or _has_text(parsed):
        return "tokenizer", path
    is_missing_dataset = place.suffix == ".json" and not place.exists()
    return "dataset" if is_missing_dataset or parsed.config is not None else "raw", path


def _refuse_run(path: str, place: Path) -> None:
    """Raise ConfigError for a run or one of its checkpoints: `inspect` shows data."""
    run = place
    with suppress(OSError, ValueError):  # reported where the path is read
        if folders.is_checkpoint(place):
            run = place.parent.parent
        elif not folders.find(place / "checkpoint") and not all(
            (place / name).is_file() for name in ("config.yaml", "metrics.jsonl")
        ):
            return
        what = "a checkpoint" if run is not place else "the folder of a run"
        raise ConfigError(
            [
                f"{path}: {what}, not data; `fast-llm report {run}` shows the run,"
                f" `fast-llm why {run} STEP` the documents of a step"
            ]
        )


def _is_metadata(path: Path) -> bool:
    """Whether a file is a dataset.json, also a damaged one."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(2**12)
    return FORMAT.encode() in head or b'"datasets"' in head


def _has_text(parsed: Namespace) -> bool:
    return parsed.text is not None or parsed.text_file is not None


def _text(parsed: Namespace) -> str | None:
    """The text to tokenize. Raises DataError for a file that cannot be read."""
    if parsed.text_file is None:
        given: str | None = parsed.text
        return given
    try:
        if parsed.text_file == "-":
            return sys.stdin.buffer.read().decode()
        return Path(parsed.text_file).expanduser().read_bytes().decode()
    except OSError as error:
        raise DataError(f"--text-file: {parsed.text_file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--text-file: {parsed.text_file}: not UTF-8") from error


def _raw(parsed: Namespace, path: str, settings: list[str]) -> dict[str, Any]:
    """Documents that are not prepared: PATH, or the dataset of a YAML file of `prepare`."""
    if path:
        settings = [f"dataset.path={json.dumps(path)}", *settings]
    document = read(parsed.config, settings, PrepareConfig)
    for name, value in (("output_path", "unused"), ("tokenizer", {"path": "unused"})):
        if document.get(name) is None:
            document = document.with_defaults({name: value}, "inspect")
    config = validate(PrepareConfig, document, PREPARE_REFUSED)
    with nullcontext() if path else adding_locations(document, PrepareConfig):
        dataset = config.dataset
        if not dataset.max_bad_lines:  # to look at files that are not clean yet
            dataset = dataset.model_copy(update={"max_bad_lines": raw.BAD_LINES})
        found = find(dataset)
        corpus = open_documents(found, config.loading_workers)
        return raw.describe(found, corpus, parsed.sample or raw.SHOWN)


def _prepared(parsed: Namespace, path: str, settings: list[str]) -> dict[str, Any]:
    """Token files, with the settings of a training YAML if one is given."""
    document = _document(parsed, path, settings)
    with nullcontext() if path else adding_locations(document, TrainConfig):
        config = _config(document)
        if config.data.format == "random":
            raise ConfigError(["data.format: random has no documents to inspect"])
        data = open_data(config.data)
        loaded = data.tokenizer() or _model_tokenizer(config)
        content: dict[str, Any] = {"kind": "dataset", "paths": data.paths}
        if parsed.document is not None or parsed.sample is not None:
            numbers = [parsed.document]
            if parsed.sample is not None:
                numbers = contents.evenly_spread(data.documents, parsed.sample)
            return content | {"shown_documents": contents.documents(data.files, numbers, loaded)}
        if parsed.sequence is not None or parsed.step is not None:
            return content | {"sequences": _sequences(parsed, config, loaded)}
        has_length = parsed.config is not None or parsed.sequence_length is not None
        length = config.batch.sequence_length if has_length else None
        content |= describe(data, length, parsed.duplicates)
        if parsed.html is not None:
            numbers = contents.evenly_spread(data.documents, _PAGE_DOCUMENTS)
            content["shown_documents"] = contents.documents(data.files, numbers, loaded)
        if has_length:
            dataset = _open(config)
            steps = config.training.train_iters if parsed.config is not None else None
            size = config.batch.batch_size
            sequences = (steps or 0) * (size or 0)
            if config.data.stages and steps and size:
                sequences = last_sequence(config, remaining_stages(config, 0, 0, 0, size))
            content |= describe_run(dataset, steps, size, sequences)
            if config.data.stages and "run" in content:
                given = zip(content["sources"], content["run"]["epochs"], strict=True)
                for source, taken in given:
                    source["share"] = taken["share"]
            if parsed.html is not None and "training" in dataset.splits:
                isolate = not config.batch.cross_document_attention
                some = range(min(_PAGE_SEQUENCES, dataset.sequences("training")))
                content["sequences"] = contents.sequences(
                    dataset, "training", some, isolate, loaded
                )
        return content


def _open(config: TrainConfig) -> Dataset:
    """The dataset of a run, with sequences as training reads them."""
    seed, vocabulary = config.model.distributed.seed, config.model.base_model.vocab_size
    dataset = open_dataset(config.data, config.batch.sequence_length, seed, vocabulary)
    if config.data.stages and "training" in dataset.splits:
        if (size := config.batch.batch_size) is None:
            raise ConfigError(
                [
                    "batch.batch_size: missing: data.stages needs the number of sequences in a"
                    " step; give it as batch.batch_size=N"
                ]
            )
        apply_orders(dataset.splits["training"], new_history(config, size, dataset), 0)
    if config.data.fim.rate:
        named = config.data.tokenizer.path
        loaded = _model_tokenizer(config) if named is None else tokenizer.load(named)
        masked = dataset.all_masked
        dataset.fim = make_fim(config.data.fim, loaded, seed, vocabulary, masked)
    return dataset


def _document(parsed: Namespace, path: str, settings: list[str]) -> Document:
    """The training YAML, with PATH in the place of its data.path if that is given."""
    if path:
        settings = [f"data.path={json.dumps([path])}", "data.format=list", *settings]
    if parsed.sequence_length is not None:
        settings = [*settings, f"batch.sequence_length={parsed.sequence_length}"]
    return read(parsed.config, settings, TrainConfig)


def _config(document: Document) -> TrainConfig:
    completed = with_pretrained_model(document, weights=False)[0]
    config = validate(TrainConfig, completed, REFUSED, RENAMED)
    if wrong := [
        f"{completed.where(paths[0])}: {paths[0]}: {text}"
        for paths, text in violations(config, 1)
        if paths[0].startswith(("data.path", "data.sources", "data.stages"))
    ]:
        raise ConfigError(wrong)
    return config


def _model_tokenizer(config: TrainConfig) -> Loaded | None:
    """The tokenizer of the pretrained model, for token files that come without one."""
    path = config.pretrained.path
    if path is None or not Path(path).expanduser().is_dir():
        return None
    try:
        return tokenizer.load(path)
    except UserError:  # a model without a tokenizer; ids are shown
        return None


def _sequences(
    parsed: Namespace, config: TrainConfig, loaded: Loaded | None
) -> list[dict[str, Any]]:
    """The sequences that --sequence or --step asks for."""
    if parsed.config is None and parsed.sequence_length is None:
        raise ConfigError(
            [
                "--sequence and --step need a training YAML (--config train.yaml), or"
                " --sequence-length N for its default seed and data.split"
            ]
        )
    if config.run.branch_from is not None:
        raise ConfigError(
            [
                "run.branch_from: --sequence and --step show runs that begin with step 1; use"
                " `fast-llm why RUN STEP` once the branch has begun, or give run.branch_from=null"
            ]
        )
    size, steps = config.batch.batch_size, config.training.train_iters
    dataset, numbers = _open(config), [parsed.sequence]
    if parsed.step is not None:
        if size is None:
            raise ConfigError(
                [
                    "batch.batch_size: missing: --step needs the number of sequences in a step;"
                    " give it as batch.batch_size=N"
                ]
            )
        if parsed.config is not None and parsed.step > steps:
            raise DataError(
                f"--step: given {parsed.step}, must be from 1 to {steps} (training.train_iters)"
            )
        numbers = list(range((parsed.step - 1) * size, parsed.step * size))
        if config.data.stages and "training" in dataset.splits:
            history = new_history(config, size, dataset)
            first = history.first_sequence(parsed.step, ())
            numbers = list(range(first, first + history.batch_entry_at(parsed.step).batch_size))
    isolate = not config.batch.cross_document_attention
    return contents.sequences(dataset, parsed.split, numbers, isolate, loaded)
