"""Every check before torch is loaded.

`preflight` completes the configuration by the pretrained model's config.json and validates it. It
then compares it with the data, the tokenizer, the headers of the weights, the optional packages,
the disk, and the checkpoint from which the run would resume. All mistakes are collected into one
error. `--validate` prints the resulting `RunSpec` and stops; training continues with it.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import huggingface
from fast_llm.config.batch import BatchSizes, derive_batch_sizes
from fast_llm.config.checks import check
from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import Document
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import adding_locations, validate, with_location
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.errors import ConfigError, MissingPackage, UserError
from fast_llm.models import family_of
from fast_llm.models.flops import Cost
from fast_llm.planning import history as histories
from fast_llm.planning.disk import disk_problems, disk_warning
from fast_llm.planning.history import History
from fast_llm.planning.pretrained import (
    PretrainedModel,
    dataset_tokenizer,
    experiment_folder,
    with_pretrained_model,
)
from fast_llm.planning.resume import check_info, compare, run_identity

T = TypeVar("T")
SpecialTokens = dict[str, int | None]  # bos and eos → id


@dataclass(frozen=True)
class RunSpec:
    """A run that can be started."""

    config: TrainConfig
    processes: int
    dataset: Dataset
    cost: Cost
    pretrained_folder: Path | None
    pretrained_config: dict[str, Any] | None  # its config.json
    extra_files: dict[str, bytes]  # copied into exports: tokenizer, generation_config.json
    special_tokens: SpecialTokens
    checkpoint: Path | None  # the newest good one, to resume from
    completed_steps: int  # of that checkpoint
    consumed_samples: int  # sequences that the completed steps consumed
    identity: dict[str, Any]  # settings and data that may not change on resume
    history: History | None  # of batch sizes and data orders; None without training data
    changes: list[str]  # settings that changed since the checkpoint
    warnings: list[str]  # about settings that are allowed and probably not intended

    @property
    def folder(self) -> Path | None:
        """The experiment folder."""
        name = self.config.run.experiment_dir
        return None if name is None else Path(name).expanduser()

    @property
    def batch_size(self) -> int:
        """Sequences a step, over all processes."""
        return global_batch_size(self.config, self.processes)

    @cached_property
    def batch(self) -> BatchSizes:
        """The sizes of a batch; `resolve_auto` comes first."""
        return _batch_sizes(self.config, self.processes)

    def evaluation_steps(self, split: str, iterations: int) -> int:
        """The batches of a split to evaluate: at most all that an additional set has."""
        if split in ("validation", "test"):
            return iterations
        return min(iterations, self.dataset.sequences(split) // self.batch_size)


def _batch_sizes(config: TrainConfig, processes: int) -> BatchSizes:
    distributed = config.model.distributed
    data_parallel = distributed.data_parallel(processes)
    return derive_batch_sizes(config.batch, data_parallel, distributed.pipeline_parallel > 1)


def global_batch_size(config: TrainConfig, processes: int) -> int:
    """Sequences a step over all processes: as given, or derived from the other sizes."""
    return config.batch.batch_size or _batch_sizes(config, processes).batch_size


def preflight(document: Document, processes: int, weights: bool) -> RunSpec:
    """Read and check everything. `weights`: also fetch those of a model on the Hub.

    Raises UserErrors that name all mistakes that can be found at once.
    """
    folder = experiment_folder(document)
    weights = weights and document.get("pretrained.model_weights", True) is True
    document, pretrained = _complete(document, weights)
    config = validate(TrainConfig, document, REFUSED, RENAMED)
    missing = [
        with_location(problem, document, TrainConfig) for problem in _missing_packages(config)
    ]
    if wrong := check(config, document, processes) + missing:
        raise ConfigError(wrong)

    problems = _Problems(document)
    batch_size = global_batch_size(config, processes)
    loaded = _load_tokenizer(config, pretrained, problems)
    dataset = _open_dataset(config, problems)
    if dataset is not None:
        _check_dataset(config, dataset, batch_size, loaded, problems)
    checkpoint = _find_checkpoint(folder, problems)
    if checkpoint is None:
        _check_weights(config, pretrained, weights, problems)
    identity = run_identity(config, batch_size, dataset) if dataset is not None else {}
    resumed = _Resumed()
    if checkpoint is not None:
        resumed = _resume(checkpoint, config, identity, problems)
    base = config.model.base_model
    costs = family_of(base).cost(base, config.batch.sequence_length)
    if folder is not None:
        problems.add(disk_problems(folder, config, costs.parameters, resumed.completed_steps))
    problems.raise_any()

    assert dataset is not None  # else there was a problem
    extra_files, special_tokens = _model_files(pretrained, dataset, loaded)
    history, data_changes = _continue_history(resumed.info, folder, config, batch_size, dataset)
    return RunSpec(
        config=config,
        processes=processes,
        dataset=dataset,
        cost=costs,
        pretrained_folder=pretrained.folder,
        pretrained_config=pretrained.config,
        extra_files=extra_files,
        special_tokens=special_tokens,
        checkpoint=checkpoint,
        completed_steps=resumed.completed_steps,
        consumed_samples=resumed.consumed_samples,
        identity=identity,
        history=history,
        changes=resumed.changes + data_changes,
        warnings=_warnings(document, config, pretrained, costs.parameters, resumed),
    )


def _complete(document: Document, weights: bool) -> tuple[Document, PretrainedModel]:
    """The document with the pretrained model's settings, and the model.

    Raises ConfigError. A mistake in a setting is found before weights are fetched, and is reported
    together with what is wrong with the model.
    """
    mistakes: list[str] = []
    try:
        validate(TrainConfig, document, REFUSED, RENAMED)
    except ConfigError as error:
        mistakes = error.problems
    try:
        return with_pretrained_model(document, weights and not mistakes)
    except UserError as error:
        if not mistakes:
            raise
        found = error.problems if isinstance(error, ConfigError) else [str(error)]
        if any("pretrained.path: " in mistake for mistake in mistakes):
            found = []  # the same mistake
        raise ConfigError(mistakes + found) from error


class _Problems:
    """Mistakes that were found so far, so that one does not hide the others."""

    def __init__(self, document: Document):
        self.document = document
        self.found: list[str] = []

    def attempt(self, action: Callable[[], T], setting: str = "data.path") -> T | None:
        """Return the action's result, or None after a UserError.

        `setting`: the one at fault if the error names none.
        """
        try:
            with adding_locations(self.document, TrainConfig, setting):
                return action()
        except UserError as error:
            self.found.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
            return None

    def add(self, problems: list[str], setting: str = "data.path") -> None:
        """Add problems; `setting`: for those that name none."""
        self.found += [
            with_location(problem, self.document, TrainConfig, setting) for problem in problems
        ]

    def raise_any(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.found:
            raise ConfigError(self.found)


def _missing_packages(config: TrainConfig) -> list[str]:
    wanted = [
        ("tensorboard", "training.tensorboard: yes", config.training.tensorboard),
        ("wandb", "training.wandb", config.training.wandb is not None),
    ]
    return [
        str(MissingPackage(package, setting))
        for package, setting, used in wanted
        if used and importlib.util.find_spec(package) is None
    ]


# Data and tokenizer.


def _load_tokenizer(
    config: TrainConfig, pretrained: PretrainedModel, problems: _Problems
) -> tokenizer.Loaded | None:
    """The tokenizer that the configuration names, else the pretrained model's."""
    named = config.data.tokenizer.path
    path = named or (pretrained.folder if "tokenizer.json" in pretrained.files else None)
    if path is None:
        return None
    setting = "pretrained.path" if named is None else "data.tokenizer.path"
    return problems.attempt(lambda: tokenizer.load(str(path)), setting)


def _open_dataset(config: TrainConfig, problems: _Problems) -> Dataset | None:
    return problems.attempt(
        lambda: open_dataset(
            config.data,
            config.batch.sequence_length,
            config.model.distributed.seed,
            config.model.base_model.vocab_size,
        )
    )


def _check_dataset(
    config: TrainConfig,
    dataset: Dataset,
    batch_size: int,
    loaded: tokenizer.Loaded | None,
    problems: _Problems,
) -> None:
    """Check the data's vocabulary and tokenizer, and that each split has enough sequences."""
    training = config.training
    fingerprint = None if loaded is None else loaded.fingerprint
    vocabulary = config.model.base_model.vocab_size
    problems.attempt(lambda: dataset.check_vocabulary(vocabulary, fingerprint))
    if os.environ.get("RANK", "0") == "0":
        problems.attempt(dataset.check_digests)

    def require(split: str, batches: int, setting: str) -> None:
        problems.attempt(
            partial(
                dataset.require_sequences, split, batches, batch_size, setting, config.data.split
            )
        )

    iterations = training.validation.iterations
    if training.validation.interval is not None and iterations is not None:
        require("validation", iterations, "training.validation.iterations")
        for name in dataset.validation_sets:
            require(name, 1, "batch.batch_size")
    if training.test_iters:
        require("test", training.test_iters, "training.test_iters")
    if training.train_iters and not dataset.sequences("training"):
        problems.add(["data.split: leaves no sequence for training"])


def _model_files(
    pretrained: PretrainedModel, dataset: Dataset, loaded: tokenizer.Loaded | None
) -> tuple[dict[str, bytes], SpecialTokens]:
    """The files that exports get, and the ids of BOS and EOS.

    They are the pretrained model's, else those of the prepared data.
    """
    tokens: SpecialTokens = {"bos": None, "eos": None}
    own: dict[str, bytes] = {}
    if loaded is not None:
        tokens = {"bos": loaded.bos, "eos": loaded.eos}
        own = {name: path.read_bytes() for name, path in loaded.named_files()}
    if pretrained.folder is None:
        metadata: dict[str, Any] = next(iter(dataset.metadata.values()), {})
        ids = metadata.get("tokenizer", tokens)
        tokens = {name: ids.get(name) for name in ("bos", "eos")}
        return pretrained.files | (dataset_tokenizer(dataset) or own), tokens
    if pretrained.files.keys() & {"tokenizer.json", "tokenizer.model"}:
        return pretrained.files, tokens
    return pretrained.files | dataset_tokenizer(dataset), tokens


# Weights and checkpoints.


def _find_checkpoint(folder: Path | None, problems: _Problems) -> Path | None:
    """The newest good checkpoint of the experiment folder."""
    if folder is None:
        return None
    root = folder / "checkpoint"
    checkpoint = checkpoints.latest(root)
    if checkpoint is None and (unusable := checkpoints.unusable(root)):
        problems.add(
            [
                f"run.experiment_dir: no checkpoint in {root} is usable (of {len(unusable)};"
                " `fast-llm verify` says why), so the run would start over; repair them, move them"
                " away, or choose another folder"
            ]
        )
    return checkpoint


def _check_weights(
    config: TrainConfig, pretrained: PretrainedModel, fetched: bool, problems: _Problems
) -> None:
    """Compare the headers of the weights with the model's shape, if the weights are here."""
    path, folder = config.pretrained.path, pretrained.folder
    local = path is not None and Path(path).expanduser().is_dir()
    used = config.pretrained.model_weights and config.pretrained.format == "llama"
    if folder is not None and used and (local or fetched):
        model = config.model.base_model
        wrong = problems.attempt(
            lambda: huggingface.check_weights(folder, model), "pretrained.path"
        )
        problems.add(wrong or [], "pretrained.path")


@dataclass
class _Resumed:
    """Contents of a checkpoint's manifest; empty for a new run."""

    info: Mapping[str, Any] | None = None
    completed_steps: int = 0
    consumed_samples: int = 0
    changes: list[str] = field(default_factory=list)


def _resume(
    checkpoint: Path, config: TrainConfig, identity: Mapping[str, Any], problems: _Problems
) -> _Resumed:
    """Read the checkpoint's manifest, and compare its settings with the configuration."""
    manifest = checkpoints.read_manifest(checkpoint)
    resumed = _Resumed(completed_steps=manifest.step)
    if problems.attempt(lambda: check_info(checkpoint, manifest), "run.experiment_dir"):
        resumed.info, resumed.consumed_samples = manifest.info, manifest.info["samples"]
        wrong, resumed.changes = compare(manifest.info, config, identity, checkpoint)
        problems.add(wrong)
    if manifest.step > config.training.train_iters:
        problems.add(
            [
                f"training.train_iters: given {config.training.train_iters}, but {checkpoint} has"
                f" {manifest.step} steps; raise it, or choose another run.experiment_dir"
            ]
        )
    return resumed


def _continue_history(
    info: Mapping[str, Any] | None,
    folder: Path | None,
    config: TrainConfig,
    batch_size: int,
    dataset: Dataset,
) -> tuple[History | None, list[str]]:
    """Bring the history up to the current settings, and apply it to the data.

    Returns it with descriptions of the changes to the data.

    `info`: of the checkpoint's manifest.
    """
    split = dataset.splits.get("training")
    if split is None:
        return None, []
    if info is None:
        return histories.new_history(config, batch_size, dataset), []
    notes: list[str] = []
    if info.get("history") is not None:
        before = History.model_validate(info["history"])
    else:
        assert folder is not None
        before, notes = histories.reconstruct(
            info, folder, dataset, config.model.base_model.vocab_size
        )
    now = before.with_batches(info["step"], info["samples"], batch_size)
    now = now.with_data(info["samples"], config, split)
    histories.apply_order(split, now.orders[-1])
    if len(now.orders) > len(before.orders):
        notes += now.describe_sources(split)
    return now, notes


# Warnings.


def _warnings(
    document: Document,
    config: TrainConfig,
    pretrained: PretrainedModel,
    parameters: int,
    resumed: _Resumed,
) -> list[str]:
    """Warnings about settings that are allowed and probably not intended, one line each."""
    folder = experiment_folder(document)
    about_settings = (
        _long_sequences(config, pretrained.folder),
        disk_warning(folder, config, parameters, resumed.completed_steps),
    )
    placed = [
        with_location(warning, document, TrainConfig) for warning in about_settings if warning
    ]
    return [*filter(None, [_nothing_saved(config)]), *placed]


def _nothing_saved(config: TrainConfig) -> str:
    training = config.training
    if not training.train_iters:
        return ""
    model = "training.export.interval (a Hugging Face model, also after the last step)"
    state = "training.checkpoint.interval (training state, also after the last step)"
    if config.run.experiment_dir is None:
        return f"Nothing will be saved: set run.experiment_dir, and {state} or {model}"
    if training.checkpoint.interval is None and training.export.interval is None:
        return f"Nothing that is trained will be saved: set {state} or {model}"
    if training.checkpoint.interval is None:
        return (
            "No checkpoints: a run that crashes starts over. Set training.checkpoint.interval to"
            " save its state"
        )
    return ""


def _long_sequences(config: TrainConfig, pretrained_folder: Path | None) -> str:
    length, most = config.batch.sequence_length, config.model.base_model.max_position_embeddings
    if length <= most:
        return ""
    where = "model.base_model.max_position_embeddings"
    if pretrained_folder is not None:
        where = f"max_position_embeddings of {pretrained_folder}/config.json"
    return (
        f"batch.sequence_length: given {length}, above {where}, {most}: positions from {most} on"
        " are new to the model, and other programs may refuse them. Lower it, or raise the other"
    )
