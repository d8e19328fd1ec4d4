"""Everything that can be known before torch is loaded: what a run will do, and what stands in its way.

The configuration is completed by the pretrained model's config.json, checked, and compared with the data,
the tokenizer, the headers of the weights, the optional packages, the disk, and the checkpoint the run
would go on from. `--validate` prints the result and ends here; training goes on with it.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import huggingface
from fast_llm.config.batch import BatchSizes, derive_batch_sizes
from fast_llm.config.checks import check
from fast_llm.config.section import (
    Count,
    Document,
    PositiveFloat,
    format_value,
    located,
    locating,
    path_text,
    validate,
)
from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import REFUSED, RENAMED, CheckpointConfig, ExportConfig, TrainConfig
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.errors import CheckpointError, ConfigError, MissingPackage, UserError
from fast_llm.models import llama
from fast_llm.models.flops import Cost
from fast_llm.models.llama import cost
from fast_llm.planning import history as histories
from fast_llm.planning.history import History

logger = logging.getLogger("fast_llm")

# Settings that decide what is trained; the rest may change when a run goes on.
_FIXED = (
    "data.format",
    "data.path",
    "data.split",
    "batch.sequence_length",
    "batch.cross_document_attention",
    "model.distributed.seed",
)
_SHAPE = "model.base_model"
_MOMENTS = {"auto": "fp32 or bf16", "fp32": "fp32", "bf16": "bf16", "int8": "8-bit"}


@dataclass(frozen=True)
class RunSpec:
    """A run that can be started."""

    config: TrainConfig
    processes: int
    batch: BatchSizes
    dataset: Dataset
    cost: Cost
    pretrained_folder: Path | None
    pretrained_config: dict[str, Any] | None  # its config.json
    extra_files: dict[str, bytes]  # copied into exports: tokenizer, generation_config.json
    special_tokens: dict[str, int | None]  # ids of BOS and EOS
    checkpoint: Path | None  # the newest good one, to resume from
    completed_steps: int  # of that checkpoint
    identity: dict[str, Any]  # what may not change on resume
    changes: list[str]  # what did change since the checkpoint
    warnings: list[str]  # what will probably not be as the user expects
    consumed_samples: int  # sequences that the completed steps consumed
    history: History | None  # of batch sizes and data orders; None without training data

    @property
    def folder(self) -> Path | None:
        """The experiment folder."""
        name = self.config.run.experiment_dir
        return None if name is None else Path(name).expanduser()

    def evaluation_steps(self, phase: str, iterations: int) -> int:
        """How many batches of a phase are measured: as many as asked for, of a further set at most all it has."""
        if phase in ("validation", "test"):
            return iterations
        return min(iterations, self.dataset.sequences(phase) // self.batch.batch_size)


def preflight(document: Document, processes: int, weights: bool) -> RunSpec:
    """Read and check everything; `weights`: also fetch those of a model on the Hub.

    Raises UserErrors that name all that is wrong, as far as one look can tell.
    """
    folder = _experiment(document)
    weights = weights and document.get("pretrained.model_weights", True) is True
    document, source, source_config, small = with_pretrained_model(document, weights)
    config = validate(TrainConfig, document, REFUSED, RENAMED)
    problems = check(config, document, processes)
    problems += [located(problem, document, TrainConfig) for problem in _packages(config)]
    if problems:
        raise ConfigError(problems)
    distributed = config.model.distributed
    dealt = distributed.data_parallel(processes)
    batch = derive_batch_sizes(config.batch, dealt, distributed.pipeline_parallel > 1)
    model, training = config.model.base_model, config.training

    def attempt(action: Callable[[], Any], setting: str = "data.path") -> Any:
        """So that a mistake in one thing does not hide those in others. `setting`: what to change, if the mistake names none."""
        try:
            with locating(document, TrainConfig, setting):
                return action()
        except UserError as error:
            problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
            return None

    tokens: dict[str, int | None] = {"bos": None, "eos": None}
    fingerprint, given = None, dict[str, bytes]()
    tokenizer_at = config.data.tokenizer.path or (source if "tokenizer.json" in small else None)
    if tokenizer_at is not None:
        setting = "pretrained.path" if config.data.tokenizer.path is None else "data.tokenizer.path"
        loaded = attempt(lambda: tokenizer.load(str(tokenizer_at)), setting)
        if loaded is not None:
            tokens = {"bos": loaded.bos, "eos": loaded.eos}
            fingerprint = loaded.fingerprint
            given = {name: path.read_bytes() for name, path in loaded.named_files()}
    dataset = attempt(
        lambda: open_dataset(
            config.data,
            config.batch.sequence_length,
            config.model.distributed.seed,
            model.vocab_size,
        )
    )
    if dataset is not None:
        attempt(lambda: dataset.check_vocabulary(model.vocab_size, fingerprint))
        if os.environ.get("RANK", "0") == "0":
            attempt(dataset.check_digests)
        split = config.data.split
        if training.validation.interval is not None and training.validation.iterations is not None:
            name, count = "training.validation.iterations", training.validation.iterations
            attempt(
                lambda: dataset.require_sequences(
                    "validation", count, batch.batch_size, name, split
                )
            )
            for further in dataset.validation_sets:
                attempt(
                    partial(
                        dataset.require_sequences,
                        further,
                        1,
                        batch.batch_size,
                        "batch.batch_size",
                        split,
                    )
                )
        if training.test_iters:
            attempt(
                lambda: dataset.require_sequences(
                    "test", training.test_iters, batch.batch_size, "training.test_iters", split
                )
            )
        if training.train_iters and not dataset.sequences("training"):
            problems.append("data.split: leaves no sequence for training")
        if (
            source is not None
            and not small.keys() & {"tokenizer.json"}
            and not small.keys() & {"tokenizer.model"}
        ):
            small |= _dataset_tokenizer(dataset)
        elif source is None:
            small |= _dataset_tokenizer(dataset) or given
            described: dict[str, Any] = next(iter(dataset.metadata.values()), {})
            ids = described.get("tokenizer", tokens)
            tokens = {name: ids.get(name) for name in ("bos", "eos")}
    checkpoint = checkpoints.latest(folder / "checkpoint") if folder is not None else None
    if (
        folder is not None
        and checkpoint is None
        and (unusable := checkpoints.unusable(folder / "checkpoint"))
    ):
        problems.append(
            f"run.experiment_dir: no checkpoint in {folder / 'checkpoint'} is whole (of {len(unusable)}; `fast-llm verify` says what is"
            " wrong), and the run would begin anew; repair them, move them away, or choose another folder"
        )
    local = (
        config.pretrained.path is not None and Path(config.pretrained.path).expanduser().is_dir()
    )
    from_weights = (
        config.pretrained.model_weights
        and config.pretrained.format == "llama"
        and checkpoint is None
    )
    if source is not None and from_weights and (local or weights):
        wrong = attempt(lambda: huggingface.check_weights(source, model), "pretrained.path") or []
        problems += [
            located(problem, document, TrainConfig, "pretrained.path") for problem in wrong
        ]
    identity = _identity(config, batch, dataset) if dataset is not None else {}
    done, samples, changes = 0, 0, list[str]()
    past: Mapping[str, Any] | None = None
    if checkpoint is not None:
        manifest = checkpoints.read_manifest(checkpoint)
        done = manifest.step
        if attempt(lambda: _check_info(checkpoint, manifest), "run.experiment_dir"):
            past, samples = manifest.info, manifest.info["samples"]
            found, changes = _compare(manifest.info, config, identity, checkpoint)
            problems += found
        if done > training.train_iters:
            problems.append(
                f"training.train_iters: given {training.train_iters}, but {checkpoint} has {done} steps behind it;"
                " raise it, or choose another run.experiment_dir"
            )
    costs = cost(model, config.batch.sequence_length)
    if folder is not None:
        problems += _disk(folder, config, costs.parameters, done)
    if problems:
        raise ConfigError(
            [located(problem, document, TrainConfig, "data.path") for problem in problems]
        )
    history, more = _history(past, folder, config, batch, dataset)
    changes += more
    return RunSpec(
        config,
        processes,
        batch,
        dataset,
        costs,
        source,
        source_config,
        small,
        tokens,
        checkpoint,
        done,
        identity,
        changes,
        _warnings(document, config, source, folder, costs.parameters, done),
        samples,
        history,
    )


def _history(
    past: Mapping[str, Any] | None,
    folder: Path | None,
    config: TrainConfig,
    batch: BatchSizes,
    dataset: Dataset,
) -> tuple[History | None, list[str]]:
    """The history of the run with the settings as they are now, and what changes for its data; the data follows it.

    `past`: what the checkpoint's manifest says.
    """
    phase = dataset.splits.get("training")
    if phase is None:
        return None, []
    if past is None:
        return histories.new_history(config, batch.batch_size, dataset), []
    notes: list[str] = []
    if past.get("history") is not None:
        before = History.model_validate(past["history"])
    else:
        assert folder is not None
        before, notes = histories.reconstruct(
            past, folder, dataset, config.model.base_model.vocab_size
        )
    now = before.with_batches(past["step"], past["samples"], batch.batch_size)
    now = now.with_data(past["samples"], config, phase)
    histories.apply_order(phase, now.orders[-1])
    if len(now.orders) > len(before.orders):
        notes += now.describe_sources(phase)
    return now, notes


def with_pretrained_model(
    document: Document, weights: bool
) -> tuple[Document, Path | None, dict[str, Any] | None, dict[str, bytes]]:
    """The document with the pretrained model's shape under it; that model's folder, config.json and small files."""
    source, source_config, small = _pretrained(document, _experiment(document), weights)
    if source is not None and source_config is not None:
        source_config = _untied(document, source, source_config)
        values = {
            "model": {"base_model": llama.architecture(source_config, f"{source}/config.json")}
        }
        document = document.under(values, f"{source}/config.json")
    return document, source, source_config, small


def describe(spec: RunSpec) -> str:
    """The plan in words and numbers."""
    config, batch, training = spec.config, spec.batch, spec.config.training
    tokens = batch.batch_size * config.batch.sequence_length
    transformer = config.model.base_model.transformer
    stage = config.model.multi_stage.zero_stage or 1
    parameters = spec.cost.parameters
    state = checkpoint_bytes(config, parameters)
    lines = [
        f"Model         {parameters:,} parameters: {transformer.num_layers} layers of {transformer.hidden_size},"
        f" {transformer.num_attention_heads} heads in {transformer.head_groups} groups, vocabulary"
        f" {config.model.base_model.vocab_size:,}",
        f"Start         {_start(spec)}",
        f"Precision     computes in {config.model.distributed.training_dtype}"
        f"{', matrix products of the blocks in fp8' * config.model.distributed.fp8}; fp32 weights and gradients,"
        f" {_MOMENTS[config.optimizer.moments_dtype]} moments",
        f"Processes     {_processes(spec, stage)}",
        f"Batch         {batch.batch_size} sequences of {config.batch.sequence_length:,} tokens ="
        + (
            " micro-batches as memory allows ×"
            if config.batch.micro_batch_size == "auto"
            else f" {batch.micro_batch_size} a micro-batch × {batch.micro_batches} micro-batches ×"
        )
        + f" {config.model.distributed.data_parallel(spec.processes)} processes"
        + (f", with {batch.padding} rows left empty" if batch.padding else ""),
        f"Training      {training.train_iters:,} steps of {tokens:,} tokens = {training.train_iters * tokens:,} tokens,"
        f" {spec.cost.model_flops_per_token * training.train_iters * tokens:.3g} floating-point operations",
    ]
    sequences = (
        spec.consumed_samples + (training.train_iters - spec.completed_steps) * batch.batch_size
    )
    consumed = spec.history.tokens(sequences) if spec.history is not None else 0
    if spec.history is not None and consumed != training.train_iters * tokens:
        lines.append(
            f"              with other batches before, or data that was passed over: {consumed:,} tokens by the end"
        )
    for source, epochs in spec.dataset.epochs("training", sequences):
        lines.append(
            f"Data          {source.name}: {source.tokens:,} tokens to train on, {epochs:.3g} epochs"
        )
    if spec.dataset.documents("training"):
        shares = [
            f"{spec.dataset.documents(phase):,} for {phase} ({spec.dataset.tokens(phase):,} tokens)"
            for phase in ("training", "validation", "test")
        ]
        lines.append(f"Documents     {', '.join(shares)}")
    if training.validation.interval is not None and training.validation.iterations is not None:
        measured = training.validation.iterations * tokens
        lines.append(
            f"Validation    at the start, every {training.validation.interval:,} steps and at the end, on the same"
            f" {measured:,} of {spec.dataset.tokens('validation'):,} tokens"
            + "".join(f"; {name}" for name in spec.dataset.validation_sets)
        )
    if training.checkpoint.interval is not None:
        kept = training.checkpoint.keep
        lines.append(
            f"Checkpoints   every {training.checkpoint.interval:,} steps, {format_bytes(state)} each"
            + (f", {kept} kept" if kept else ", all kept")
            + (", and the permanent ones" if training.checkpoint.keep_every else "")
            + _copied(spec, state)
        )
    if training.export.interval is not None:
        size = export_bytes(config, parameters)
        count = training.train_iters // training.export.interval + bool(
            training.train_iters % training.export.interval
        )
        count = min(count, training.export.keep or count)
        lines.append(
            f"Exports       every {training.export.interval:,} steps, {format_bytes(size)} each, {format_bytes(size * count)} in all"
        )
    if spec.folder is not None:
        use = disk_use(config, spec.folder, parameters, spec.completed_steps)
        more = format_bytes(sum(count * size for count, size in use.values()))
        lines.append(
            f"Disk          {format_bytes(_free(spec.folder))} free at {spec.folder}, this run takes {more} at most"
        )
    return "\n".join(lines + [f"Changed       {change}" for change in spec.changes])


def _copied(spec: RunSpec, state: int) -> str:
    """What it takes to write checkpoints while training goes on."""
    if not spec.config.training.checkpoint.background:
        return "; training waits for them"
    distributed = spec.config.model.distributed
    sharing = distributed.data_parallel(spec.processes) * distributed.sequence_data_parallel
    copies = sharing // min(spec.config.model.multi_stage.shard_size or sharing, sharing)
    return f"; written in the background from {format_bytes(state * copies)} of host memory"


def _processes(spec: RunSpec, stage: int) -> str:
    """How they are arranged."""
    config, count = spec.config, spec.processes
    if count == 1:
        return "1 (nothing is sharded)"
    distributed = config.model.distributed
    words = [f"{count}, zero_stage {stage}"]
    sharing = distributed.data_parallel(count) * distributed.sequence_data_parallel
    group = config.model.multi_stage.shard_size or sharing
    if group < sharing:
        words.append(f"in groups of {group}, each with a copy")
    if distributed.tensor_parallel > 1:
        along = " and the sequence between them" * distributed.sequence_tensor_parallel
        words.append(f"matrices{along} cut over {distributed.tensor_parallel}")
    if distributed.sequence_data_parallel > 1:
        words.append(f"sequences cut over {distributed.sequence_data_parallel}")
    if distributed.pipeline_parallel > 1:
        in_flight = micro_batches_in_flight(config, spec.batch)
        words.append(
            f"layers divided over {distributed.pipeline_parallel} as {stage_sizes(config)}"
            f" ({schedule_name(config, in_flight)}, {in_flight} micro-batches at a time)"
        )
    return ", ".join(words)


def checkpoint_bytes(config: TrainConfig, parameters: int) -> int:
    """The size of a checkpoint: fp32 weights and two moments, those of 8 bits in bf16."""
    return parameters * (8 if config.optimizer.moments_dtype in ("bf16", "int8") else 12)


def export_bytes(config: TrainConfig, parameters: int) -> int:
    """The size of an export's weights."""
    dtype = config.training.export.data_type or config.model.distributed.training_dtype
    return parameters * (4 if dtype == "fp32" else 2)


def _experiment(document: Document) -> Path | None:
    name = document.get("run.experiment_dir")
    try:
        return Path(path_text(name)).expanduser() if isinstance(name, str) else None
    except ValueError:  # which validation tells
        return None


def _pretrained(
    document: Document, folder: Path | None, weights: bool
) -> tuple[Path | None, dict[str, Any] | None, dict[str, bytes]]:
    """The pretrained model's folder, its config.json, and its small files."""
    path = document.get("pretrained.path")
    if not isinstance(path, str):
        return None, None, {}
    try:
        path_text(path)
    except ValueError as error:
        raise ConfigError(
            [f"{document.where('pretrained.path')}: pretrained.path: {error}"]
        ) from error
    if document.get("pretrained.format", "llama") == "distributed":
        source = Path(path).expanduser()
        kept = source.parent.parent / "pretrained"  # beside the checkpoint's folder
        config = (
            huggingface.read_json(kept / "config.json") if (kept / "config.json").exists() else None
        )
        with locating(document, TrainConfig, "pretrained.path"):
            info = checkpoints.verify(source).info
        small = huggingface.small_files(kept) if kept.is_dir() else {}
        return source, None if config is None else _as_trained(config, info), small
    copy = folder / "pretrained" if folder is not None else None
    gone = not Path(path).expanduser().exists()
    if (
        gone
        and copy is not None
        and (copy / "config.json").exists()
        and checkpoints.find(copy.parent / "checkpoint")
    ):
        # The run has its own weights by now; the model it came from may be gone.
        return copy, huggingface.read_json(copy / "config.json"), huggingface.small_files(copy)
    try:
        source = huggingface.fetch(path, weights)
        return (
            source,
            huggingface.read_json(source / "config.json"),
            huggingface.small_files(source),
        )
    except UserError as error:
        raise ConfigError(
            [f"{document.where('pretrained.path')}: pretrained.path: {error}"]
        ) from error


def _as_trained(config: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json beside a checkpoint, with what the checkpoint itself says of its head and its sequences."""
    settings = info.get("settings") or {}
    with suppress(KeyError, TypeError):
        config = config | {
            "tie_word_embeddings": bool(settings["model"]["base_model"]["tie_word_embeddings"])
        }
    with suppress(KeyError, TypeError):
        config = llama.with_length(config, int(settings["batch"]["sequence_length"]))
    return config


def _untied(document: Document, source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The pretrained config.json, without tied embeddings if the user asks for the separate head that the weights have."""
    asked = document.get("model.base_model.tie_word_embeddings") is False
    if (
        not asked
        or not config.get("tie_word_embeddings")
        or document.get("pretrained.format") == "distributed"
    ):
        return config
    try:
        there = llama.HEAD in huggingface.weight_files(source)
    except CheckpointError:  # of a model on the Hub, before its weights are fetched
        there = True
    return config | {"tie_word_embeddings": False} if there else config


def _dataset_tokenizer(dataset: Dataset) -> dict[str, bytes]:
    """The tokenizer that travels with the data, for a model that has none."""
    for path, described in dataset.metadata.items():
        place = described.get("tokenizer", {}).get("path")
        if (
            isinstance(place, str)
            and not Path(place).is_absolute()
            and ".." not in Path(place).parts
        ):
            found = huggingface.small_files(Path(path).parent / place)
            return {
                k: v
                for k, v in found.items()
                if k in tokenizer.FILES or k.startswith(tokenizer.TEMPLATES)
            }
    return {}


def _packages(config: TrainConfig) -> list[str]:
    wanted = [
        ("tensorboard", "training.tensorboard: yes", config.training.tensorboard),
        ("wandb", "training.wandb", config.training.wandb is not None),
    ]
    return [
        str(MissingPackage(package, why))
        for package, why, needed in wanted
        if needed and importlib.util.find_spec(package) is None
    ]


def _identity(config: TrainConfig, batch: BatchSizes, dataset: Dataset) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    found = {name: _at(values, name) for name in _FIXED}
    found["batch.batch_size"] = batch.batch_size
    found["data (its content)"] = dataset.fingerprint()
    shape = dict(values["model"]["base_model"])
    transformer = {
        name: value
        for name, value in shape.pop("transformer").items()
        if not name.startswith("init_method")
        and name not in ("use_flash_attention", "mlp_recompute_level")
    }
    shape = {k: v for k, v in shape.items() if not k.startswith(("init_method", "cross_entropy"))}
    return (
        found
        | {f"{_SHAPE}.{k}": v for k, v in shape.items()}
        | {f"{_SHAPE}.transformer.{k}": v for k, v in transformer.items()}
    )


def _at(values: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


class _LossScale(BaseModel):
    value: PositiveFloat
    clean_updates: Count
    failures_left: int


class _Settings(BaseModel):
    optimizer: dict[str, Any]


class _Info(BaseModel):
    """What a checkpoint of training must say in its manifest."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: Count
    samples: Count
    updates: Count
    skipped: Count
    loss_scale: _LossScale
    spikes: dict[str, list[float]] = {}
    passed_over: list[dict[str, Count]] = []
    history: History | None = None
    identity: dict[str, Any]
    settings: _Settings


def _check_info(path: Path, manifest: checkpoints.Manifest) -> bool:
    """A manifest's digest is no secret: raises CheckpointError for one that training did not write."""
    try:
        info = _Info.model_validate(manifest.info)
        problem = (
            f"info.step: given {info.step}, but step is {manifest.step}"
            if info.step != manifest.step
            else ""
        )
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, ('info', *first['loc'])))}: {first['msg'].lower()}"
    if problem:
        raise CheckpointError(
            f"{path / checkpoints.MANIFEST}: {problem}; training did not write this: delete {path}, or take another"
        )
    return True


def _compare(
    info: Mapping[str, Any], config: TrainConfig, identity: Mapping[str, Any], checkpoint: Path
) -> tuple[list[str], list[str]]:
    """What changed since the checkpoint: without consent, and all of it."""
    problems, changes = [], []
    for name, value in identity.items():
        before = info["identity"].get(name)
        if before == value:
            continue
        changes.append(f"{name}: {format_value(before)} → {format_value(value)}")
        place = name.partition(" ")[0]
        if name.startswith(_SHAPE):
            problems.append(
                f"{name}: given {format_value(value)}, but {checkpoint} was trained with"
                f" {format_value(before)}; a model can not change its shape"
            )
        elif place not in config.run.accept_changes and not (
            place == "data"
            and any(accepted.startswith("data") for accepted in config.run.accept_changes)
        ):
            consent = "data.path" if place == "data" else place
            problems.append(
                f"{name}: given {format_value(value)}, but {checkpoint} was trained with {format_value(before)}; set it back, choose"
                f" another run.experiment_dir, or consent with run.accept_changes=[{consent}]"
            )
    now, then = _flat(config.model_dump(mode="json")), _flat(info["settings"])
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) == "auto":  # decided later
            continue
        if (
            now.get(name) != then.get(name)
            and name not in identity
            and not name.startswith(("run.", _SHAPE))
        ):
            changes.append(
                f"{name}: {format_value(then.get(name))} → {format_value(now.get(name))}"
            )
    return problems, changes


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def _warnings(
    document: Document,
    config: TrainConfig,
    source: Path | None,
    folder: Path | None,
    parameters: int,
    done: int,
) -> list[str]:
    """What is allowed and probably not meant, a line each."""
    about = (_too_long(config, source), _too_full(config, folder, parameters, done))
    placed = [located(warning, document, TrainConfig) for warning in about if warning]
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
        return "No checkpoints: a run that crashes begins anew. Set training.checkpoint.interval to save its state"
    return ""


def _too_long(config: TrainConfig, source: Path | None) -> str:
    length, most = config.batch.sequence_length, config.model.base_model.max_position_embeddings
    if length <= most:
        return ""
    where = (
        "model.base_model.max_position_embeddings"
        if source is None
        else f"max_position_embeddings of {source}/config.json"
    )
    return (
        f"batch.sequence_length: given {length}, above {where}, {most}: positions from {most} on are new to the model,"
        " and other programs may refuse them. Lower it, or raise the other"
    )


def _too_full(config: TrainConfig, folder: Path | None, parameters: int, done: int) -> str:
    if folder is None:
        return ""
    parts = disk_use(config, folder, parameters, done)
    needed, free = sum(count * size for count, size in parts.values()), _free(folder)
    if needed <= free:
        return ""
    what = " and ".join(
        f"{count} more {name} of {format_bytes(size)}"
        for name, (count, size) in parts.items()
        if count
    )
    return (
        f"run.experiment_dir: the disk will be full before this run ends: it keeps {what}, {format_bytes(needed)} at"
        f" most, and {format_bytes(free)} are free. Lower training.checkpoint.keep or set training.export.keep, raise the"
        " intervals, or make room"
    )


def disk_use(
    config: TrainConfig, folder: Path, parameters: int, done: int
) -> dict[str, tuple[int, int]]:
    """What a run takes on disk from the step `done` on, at its peak: of checkpoints and exports how many more than are
    there, and the bytes of one."""
    training = config.training
    return {
        "checkpoints": (
            _more(training.checkpoint, folder / "checkpoint", done, training.train_iters),
            checkpoint_bytes(config, parameters),
        ),
        "exports": (
            _more(
                training.export,
                folder / "export" / training.export.format,
                done,
                training.train_iters,
            ),
            export_bytes(config, parameters),
        ),
    }


def _more(saved: CheckpointConfig | ExportConfig, root: Path, done: int, last: int) -> int:
    """How many more folders than now lie under `root` at the fullest moment: one is deleted when a newer one is there."""
    if saved.interval is None:
        return 0
    there = {step for step, _ in checkpoints.find(root)}
    due = _multiples(saved.interval, saved.offset, done, last)
    count = len(due) + (last not in due) - sum(step in due or step == last for step in there)
    if saved.keep is None or not count:
        return count
    permanent = 0
    if saved.keep_every is not None:
        forever = _multiples(saved.interval * saved.keep_every, saved.offset, done, last)
        permanent = len(forever) - sum(step in forever for step in there)
    passing = sum(not saved.is_permanent(step) for step in there)  # they are deleted one by one
    fresh = count - permanent
    kept = min(passing + fresh, saved.keep)
    spare = int(
        fresh > 0 and passing + fresh > saved.keep
    )  # the newest, before the oldest is deleted
    return max(permanent + kept + spare - passing, 1)


def _multiples(interval: int, offset: int, done: int, last: int) -> range:
    """The steps after `done` up to `last` that are due."""
    first = done + 1 + (offset - done - 1) % interval
    return range(first, last + 1, interval)


def _disk(folder: Path, config: TrainConfig, parameters: int, done: int) -> list[str]:
    """Whether the folder can be written to and holds one more checkpoint and export, next to those that they replace."""
    there = _existing(folder)
    if not os.access(there, os.W_OK):
        return [f"run.experiment_dir: {there} can not be written to"]
    if (folder.exists() and not folder.is_dir()) or not there.is_dir():
        return [f"run.experiment_dir: {folder} can not be a folder: {there} is a file"]
    parts = {
        name: size
        for name, (count, size) in disk_use(config, folder, parameters, done).items()
        if count
    }
    if sum(parts.values()) > _free(folder):
        what = " and ".join(f"{'an' if name[0] == 'e' else 'a'} {name[:-1]}" for name in parts)
        return [
            f"run.experiment_dir: {what} need{'s' * (len(parts) == 1)} {format_bytes(sum(parts.values()))}, but {there}"
            f" has {format_bytes(_free(folder))} free"
        ]
    return []


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder.absolute())).free


def format_bytes(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _start(spec: RunSpec) -> str:
    if spec.checkpoint is not None:
        return f"goes on from {spec.checkpoint}, after step {spec.completed_steps}"
    if spec.pretrained_folder is not None and spec.config.pretrained.model_weights:
        return f"the weights of {spec.pretrained_folder}"
    return "random weights" + (
        f" in the shape of {spec.pretrained_folder}" if spec.pretrained_folder is not None else ""
    )
