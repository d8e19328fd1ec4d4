"""Every check before torch is loaded.

`preflight` completes the configuration by the pretrained model's config.json and validates it. It
then compares it with the data, the tokenizer, the headers of the weights, the optional packages,
the disk, and the checkpoint from which the run would resume. All mistakes are collected into one
error. `--validate` prints the resulting `RunSpec` and stops; training continues with it.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import huggingface
from fast_llm.config.checks import check
from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import Document
from fast_llm.config.parameter_rules import rule_problems
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import adding_locations, validate, with_location
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset, Split, open_dataset
from fast_llm.data.fim import make_fim
from fast_llm.errors import ConfigError, DataError, MissingPackage, UserError
from fast_llm.models import contradictions, family_of
from fast_llm.planning import history as histories
from fast_llm.planning.branch import (
    Ancestor,
    as_ancestor,
    branch_point,
    other_origin,
    recorded_ancestors,
)
from fast_llm.planning.disk import disk_problems
from fast_llm.planning.evaluations import (
    evaluation_problems,
    measured_sets,
    missing_for_evaluations,
)
from fast_llm.planning.history import History
from fast_llm.planning.pretrained import (
    PretrainedModel,
    dataset_tokenizer,
    experiment_folder,
    with_pretrained_model,
)
from fast_llm.planning.prompts import encode_prompts
from fast_llm.planning.resume import (
    check_info,
    compare,
    optimizer_state_problems,
    run_identity,
)
from fast_llm.planning.run_spec import RunSpec, SpecialTokens, global_batch_size
from fast_llm.planning.stages import (
    epoch_problems,
    length_problems,
    stage_problems,
    training_cost,
)
from fast_llm.planning.warnings import likely_mistakes

logger = logging.getLogger("fast_llm")

T = TypeVar("T")


def preflight(document: Document, processes: int, weights: bool) -> RunSpec:
    """Read and check everything. `weights`: also fetch those of a model on the Hub.

    Raises UserErrors that name all mistakes that can be found at once.
    """
    folder = experiment_folder(document)
    weights = weights and document.get("pretrained.model_weights", True) is True
    document, pretrained = _complete(document, weights)
    config = validate(TrainConfig, document, REFUSED, RENAMED)
    _check_settings(config, document, processes, pretrained.config)
    problems = _Problems(document)
    batch_size = global_batch_size(config, processes)
    loaded = _load_tokenizer(config, pretrained, problems)
    dataset = _open_dataset(config, problems)
    if dataset is not None:
        _check_dataset(config, dataset, batch_size, loaded, problems)
        _add_fim(config, dataset, loaded, problems)
    for name in config.training.evaluations:
        wrong = problems.attempt(partial(evaluation_problems, config, name, loaded is not None))
        problems.add(wrong or [])
    checkpoint, branches = _starting_point(config, folder, problems)
    if checkpoint is None:
        _check_weights(config, pretrained, weights, problems)
    identity = run_identity(config, batch_size, dataset) if dataset is not None else {}
    resumed = _Resumed()
    if checkpoint is not None:
        resumed = _resume(checkpoint, config, identity, problems, branches)
    costs = training_cost(config)
    if folder is not None:
        problems.add(disk_problems(folder, config, costs.parameters, resumed.completed_steps))
    problems.raise_any()

    assert dataset is not None  # else there was a problem
    extra_files, special_tokens = _model_files(pretrained, dataset, loaded)
    encode_prompts(config, extra_files, special_tokens, dataset)
    if (training := dataset.splits.get("training")) is not None:
        problems.add(length_problems(config, training))
    problems.raise_any()
    history, data_changes = _continue_history(resumed, config, batch_size, dataset)
    if (training := dataset.splits.get("training")) is not None:
        _check_stages(config, training, resumed, history, batch_size, problems)
    problems.raise_any()
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
        manifest=resumed.manifest,
        ancestors=resumed.ancestors,
        completed_steps=resumed.completed_steps,
        consumed_samples=resumed.consumed_samples,
        identity=identity,
        history=history,
        changes=resumed.changes + data_changes,
        warnings=likely_mistakes(document, config, pretrained, costs.parameters, resumed.manifest),
    )


def read_config(document: Document, processes: int) -> TrainConfig:
    """Validate a configuration for this many processes, without data or weights.

    Raises ConfigError with all of its mistakes.
    """
    document, pretrained = with_pretrained_model(document, weights=False)
    config = validate(TrainConfig, document, REFUSED, RENAMED)
    family = _of_family(document, config, pretrained.config)
    if problems := check(config, document, processes) + family:
        raise ConfigError(problems)
    return config


def _of_family(
    document: Document, config: TrainConfig, source: Mapping[str, Any] | None
) -> list[str]:
    """Settings of a new model that its family has not, and patterns of parameter names. `source`:
    config.json of the pretrained model.
    """
    base = config.model.base_model
    patterns = [
        f"{document.where(setting)}: {setting}: {text}"
        for setting, text in rule_problems(config.optimizer, family_of(base).shapes(base))
    ] + _of_stages(document, config, source)
    if isinstance(config.pretrained.path, str):
        return patterns  # its config.json decides about the rest
    return patterns + [
        f"{document.where(path)}: {path}: {text}"
        for name, text in contradictions(config.model.base_model)
        for path in [f"model.base_model.{name}"]
    ]


def _of_stages(
    document: Document, config: TrainConfig, source: Mapping[str, Any] | None
) -> list[str]:
    """Positions of stages that config.json of an export cannot say. `source`: the model's."""
    problems, above, base = list[str](), "transformer.rotary", config.model.base_model
    changed = [number for number, stage in enumerate(config.data.stages) if stage.rotary]
    always = {name for name, _ in contradictions(base)} if changed else set()
    for number in changed:
        inside = config.in_stage(number).model.base_model
        rotary = inside.transformer.rotary
        written = family_of(base).export_config(source, base, "fp32", {}, 0, rotary)
        found = contradictions(inside, written)
        kind = [one for one in found if one[0] == f"{above}.type"]  # other differences follow
        for name, text in kind or found:
            if name in always or not (name == "family" or name.startswith(above)):
                continue
            path = f"data.stages.{number}.rotary{name.removeprefix(above)}".removesuffix("family")
            text = text.replace("choose another model.base_model.family", "leave it out")
            problems.append(f"{document.where(path)}: {path}: {text}")
    return problems


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


def _check_settings(
    config: TrainConfig, document: Document, processes: int, source: Mapping[str, Any] | None
) -> None:
    """Raise ConfigError for settings that contradict each other, and for missing packages."""
    missing = [
        with_location(problem, document, TrainConfig) for problem in _missing_packages(config)
    ]
    family = _of_family(document, config, source)
    if wrong := check(config, document, processes) + missing + family:
        raise ConfigError(wrong)


def _missing_packages(config: TrainConfig) -> list[str]:
    pushed = config.training.export.push_to_hub.repo
    wanted = [
        ("tensorboard", "training.tensorboard: yes", config.training.tensorboard),
        ("wandb", "training.wandb", config.training.wandb is not None),
        ("huggingface_hub", "training.export.push_to_hub", pushed is not None),
    ]
    return [
        str(MissingPackage(package, setting))
        for package, setting, used in wanted
        if used and importlib.util.find_spec(package) is None
    ] + missing_for_evaluations(config)


# Data and tokenizer.


def _load_tokenizer(
    config: TrainConfig, pretrained: PretrainedModel, problems: _Problems
) -> tokenizer.Loaded | None:
    """The tokenizer that the configuration names, else the pretrained model's."""
    named = config.data.tokenizer.path
    path = named or (pretrained.folder if tokenizer.is_tokenizer(pretrained.files) else None)
    if path is None:
        return None
    if named is None and tokenizer.MAIN not in pretrained.files:
        try:
            return tokenizer.load(str(path))
        except DataError as error:  # training itself needs no tokenizer
            logger.warning(f"{error}. The data's tokenizer is not compared with the model's.")
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


def _add_fim(
    config: TrainConfig, dataset: Dataset, loaded: tokenizer.Loaded | None, problems: _Problems
) -> None:
    if config.data.fim.rate:
        seed, vocabulary = config.model.distributed.seed, config.model.base_model.vocab_size
        masked = dataset.all_masked
        dataset.fim = problems.attempt(
            lambda: make_fim(config.data.fim, loaded, seed, vocabulary, masked), "data.fim"
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
    vocabulary = config.model.base_model.vocab_size
    problems.attempt(lambda: dataset.check_vocabulary(vocabulary, loaded))
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
    if training.validation.interval is None:  # else all sets were checked
        for name in measured_sets(config):
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
        own = loaded.contents()
    if pretrained.folder is None:
        metadata: dict[str, Any] = next(iter(dataset.metadata.values()), {})
        ids = metadata.get("tokenizer", tokens)
        tokens = {name: ids.get(name) for name in ("bos", "eos")}
        return pretrained.files | (dataset_tokenizer(dataset) or own), tokens
    if tokenizer.is_tokenizer(pretrained.files):
        converted = loaded is not None and loaded.path.parent == pretrained.folder
        return (own if converted else {}) | pretrained.files, tokens
    return pretrained.files | dataset_tokenizer(dataset), tokens


# Weights and checkpoints.


def _starting_point(
    config: TrainConfig, folder: Path | None, problems: _Problems
) -> tuple[Path | None, bool]:
    """The checkpoint from which the run continues, and whether it is another run's."""
    branch, own = config.run.branch_from, folder is not None and folder.resolve()
    if branch is not None and Path(branch.run).expanduser().resolve() == own:
        problems.add(
            [
                f"run.branch_from.run: given {branch.run}, which is run.experiment_dir; choose"
                " another folder for the branch"
            ]
        )
        return None, False
    checkpoint = _find_checkpoint(folder, problems)
    if branch is None or checkpoint is not None:
        return checkpoint, False
    point = problems.attempt(lambda: branch_point(branch), "run.branch_from")
    return point, point is not None


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
    used = config.pretrained.model_weights and config.pretrained.format != "distributed"
    if folder is not None and used and (local or fetched):
        model = config.model.base_model
        wrong = problems.attempt(
            lambda: huggingface.check_weights(folder, model), "pretrained.path"
        )
        problems.add(wrong or [], "pretrained.path")
    if folder is not None and config.pretrained.optimizer_state:
        states = problems.attempt(lambda: optimizer_state_problems(config, folder))
        problems.add(states or [])


@dataclass
class _Resumed:
    """Contents of a checkpoint's manifest; empty for a new run."""

    info: Mapping[str, Any] | None = None
    completed_steps: int = 0
    consumed_samples: int = 0
    changes: list[str] = field(default_factory=list)
    folder: Path | None = None  # of the run that wrote the checkpoint
    manifest: checkpoints.Manifest | None = None
    ancestors: list[Ancestor] = field(default_factory=list)


def _resume(
    checkpoint: Path,
    config: TrainConfig,
    identity: Mapping[str, Any],
    problems: _Problems,
    branches: bool,
) -> _Resumed:
    """Read the checkpoint's manifest, and compare its settings with the configuration.

    `branches`: it is that of `run.branch_from`.
    """
    manifest, branch = checkpoints.read_manifest(checkpoint), config.run.branch_from
    resumed = _Resumed(
        completed_steps=manifest.step, folder=checkpoint.parent.parent, manifest=manifest
    )
    setting = "run.branch_from" if branches else "run.experiment_dir"
    if problems.attempt(lambda: check_info(checkpoint, manifest), setting):
        resumed.info, resumed.consumed_samples = manifest.info, manifest.info["samples"]
        wrong, resumed.changes = compare(manifest.info, config, identity, checkpoint, branches)
        problems.add(wrong)
        resumed.ancestors = recorded_ancestors(manifest.info)
        if branches and branch is not None:
            resumed.ancestors.append(as_ancestor(branch))
        elif branch is not None:
            wrong_origin = other_origin(branch, resumed.ancestors, checkpoint)
            problems.add([wrong_origin] if wrong_origin else [])
    if manifest.step > config.training.train_iters:
        remedy = "branch from an earlier step" if branches else "choose another run.experiment_dir"
        problems.add(
            [
                f"training.train_iters: given {config.training.train_iters}, but {checkpoint} has"
                f" {manifest.step} steps; raise it, or {remedy}"
            ]
        )
    return resumed


def _check_stages(
    config: TrainConfig,
    training: Split,
    resumed: _Resumed,
    history: History | None,
    batch_size: int,
    problems: "_Problems",
) -> None:
    """Check the stages that are left, and the epochs that the run takes of each source."""
    now = resumed.completed_steps, resumed.consumed_samples
    tokens = history.inputs(now[1]) if history is not None else 0
    problems.add(stage_problems(config, *now, tokens, batch_size))
    problems.add(epoch_problems(config, training, *now, tokens, batch_size))


def _continue_history(
    resumed: _Resumed, config: TrainConfig, batch_size: int, dataset: Dataset
) -> tuple[History | None, list[str]]:
    """Bring the history up to the current settings, and apply it to the data.

    Returns it with descriptions of the changes to the data.
    """
    info, folder = resumed.info, resumed.folder
    split = dataset.splits.get("training")
    if split is None:
        return None, []
    if info is None:
        new = histories.new_history(config, batch_size, dataset)
        histories.apply_orders(split, new, 0)
        return new, []
    notes: list[str] = []
    if info.get("history") is not None:
        before = History.model_validate(info["history"])
    else:
        assert folder is not None
        before, notes = histories.reconstruct(
            info, folder, dataset, config.model.base_model.vocab_size
        )
    now = before.continued(info["step"], info["samples"], config, split, batch_size)
    histories.apply_orders(split, now, info["samples"])
    return now, notes + now.describe_sources(before, info["samples"], split)
