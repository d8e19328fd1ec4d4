"""The pretrained model that a run starts from: its folder, its config.json, and its small files.

Its config.json is laid under the configuration, so that settings of the model need not be repeated.
A folder, a model on the Hugging Face Hub and a checkpoint of another run can be named; a resumed
run may have lost the first two and then uses the copy in its experiment folder.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import huggingface
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig, RotaryConfig
from fast_llm.config.train import TrainConfig
from fast_llm.config.types import path_text
from fast_llm.config.validate import adding_locations, validate
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset
from fast_llm.errors import CheckpointError, ConfigError, UserError
from fast_llm.models import FAMILIES, family_of_json

_AUXILIARY = "model.base_model.transformer.expert_auxiliary_loss_coefficient"


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model before its weights are read; empty if the run has none."""

    folder: Path | None = None
    config: dict[str, Any] | None = None  # config.json
    files: dict[str, bytes] = field(default_factory=dict)  # tokenizer, generation_config.json
    # `model.base_model` of the run that wrote a checkpoint, if that run has no config.json.
    settings: dict[str, Any] | None = None


def experiment_folder(document: Document) -> Path | None:
    """The experiment folder, if the document names a valid one."""
    return _folder(document, "run.experiment_dir")


def _folder(document: Document, setting: str) -> Path | None:
    name = document.get(setting)
    try:
        return Path(path_text(name)).expanduser() if isinstance(name, str) else None
    except ValueError:  # reported by validation
        return None


def with_pretrained_model(document: Document, weights: bool) -> tuple[Document, PretrainedModel]:
    """Complete the document by the settings of the pretrained model's config.json.

    Returns both the document and the model.

    `weights`: also fetch those of a model on the Hub. Raises ConfigError.
    """
    document = _with_format(document)
    model = _find(document, experiment_folder(document), weights)
    if model.settings is not None:
        given = {"model": {"base_model": _architecture(model.settings)}}
        return document.with_defaults(given, str(model.folder)), model
    if model.folder is None or model.config is None:
        return document, model
    place = f"{model.folder}/config.json"
    family = family_of_json(model.config, place)
    model = replace(model, config=_with_untied_head(document, model.folder, model.config))
    assert model.config is not None
    asked, kind = document.get("pretrained.format"), model.config["model_type"]
    if isinstance(asked, str) and asked in FAMILIES and asked != kind:
        raise ConfigError(
            [
                f"{document.where('pretrained.format')}: pretrained.format: given {asked}, but"
                f" {place} says model_type {kind}; use auto"
            ]
        )
    base = family.architecture(model.config, place)
    if document.get(_AUXILIARY) is not None:  # how to train, not what the model is
        base["transformer"].pop("expert_auxiliary_loss_coefficient", None)
    values: dict[str, Any] = {"model": {"base_model": base}}
    if asked is None:
        values["pretrained"] = {"format": kind}
    return document.with_defaults(values, place), model


def _with_format(document: Document) -> Document:
    """The document without `pretrained.format: auto`.

    Checkpoints of this project are `distributed`; config.json decides all else.
    """
    path, asked = document.get("pretrained.path"), document.get("pretrained.format")
    if not isinstance(path, str) or asked not in ("auto", None):
        return document
    own = False
    with suppress(OSError, ValueError, RuntimeError):  # reported where the folder is read
        own = checkpoints.is_checkpoint(Path(path).expanduser())
    return document.with_value("pretrained.format", "distributed" if own else None)


def _find(document: Document, experiment: Path | None, weights: bool) -> PretrainedModel:
    path = document.get("pretrained.path")
    if not isinstance(path, str):
        return PretrainedModel()
    try:
        path_text(path)
    except ValueError as error:
        raise _path_error(document, error) from error
    if document.get("pretrained.format") == "distributed":
        return _of_checkpoint(document, Path(path).expanduser())
    if not Path(path).expanduser().exists():
        for folder in filter(None, (experiment, _folder(document, "run.branch_from.run"))):
            copy = folder / "pretrained"
            if (copy / "config.json").exists() and checkpoints.find(folder / "checkpoint"):
                # The run has its own weights by now; the model it came from may be gone.
                return _read(copy)
    try:
        return _read(huggingface.fetch(path, weights))
    except UserError as error:
        raise _path_error(document, error) from error


def _path_error(document: Document, error: Exception) -> ConfigError:
    return ConfigError([f"{document.where('pretrained.path')}: pretrained.path: {error}"])


def _read(folder: Path) -> PretrainedModel:
    return PretrainedModel(
        folder, huggingface.read_json(folder / "config.json"), huggingface.small_files(folder)
    )


def _of_checkpoint(document: Document, checkpoint: Path) -> PretrainedModel:
    """A checkpoint as pretrained model, with config.json and small files of its run's folder."""
    kept = checkpoint.parent.parent / "pretrained"
    config = (
        huggingface.read_json(kept / "config.json") if (kept / "config.json").exists() else None
    )
    with adding_locations(document, TrainConfig, "pretrained.path"):
        info = checkpoints.verify(checkpoint).info
    files = huggingface.small_files(kept) if kept.is_dir() else {}
    if config is not None:
        config = _as_trained(config, info)
    settings = None
    if config is None:
        with suppress(KeyError, TypeError):  # a checkpoint of an early version
            settings = dict(info["settings"]["model"]["base_model"])
            if (rotary := in_force(info)[1]) is not None:
                positions = {"rotary": rotary.model_dump(mode="json")}
                settings["transformer"] = settings["transformer"] | positions
    return PretrainedModel(checkpoint, config, files, settings)


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's `model.base_model`, what its weights depend on."""
    found = _without_ways(settings)
    found.pop("max_position_embeddings", None)  # of exports; it changes no result
    found["transformer"] = _without_ways(settings["transformer"])
    return found


def _without_ways(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings but those of how weights begin and how results are computed."""
    ways = (
        "init_method",
        "cross_entropy",
        "z_loss",
        "use_flash_attention",
        "mlp_recompute_level",
        "expert_",
    )
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith(ways) or name == "expert_hidden_size"
    }


def in_force(info: Mapping[str, Any]) -> tuple[int, RotaryConfig | None]:
    """The sequence length of a checkpoint's stage, and its rotary positions if they are not the
    model's. `info`: of its manifest, where runs whose stages change these record them.

    0 for a length that an early version did not record.
    """
    stage = info.get("stage")
    if stage is None:
        return info.get("settings", {}).get("batch", {}).get("sequence_length", 0), None
    rotary = stage.get("rotary")
    length: int = stage["sequence_length"]
    return length, None if rotary is None else RotaryConfig.model_validate(rotary)


def _as_trained(config: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config.json with the head, sequence length and positions that a checkpoint
    records.
    """
    settings, place = info.get("settings") or {}, "config.json"
    with suppress(KeyError, TypeError):
        config = config | {
            "tie_word_embeddings": bool(settings["model"]["base_model"]["tie_word_embeddings"])
        }
    with suppress(KeyError, TypeError):
        length, rotary = in_force(info)
        family = family_of_json(config, place)
        if rotary is not None:
            document = Document(family.architecture(config, place), {}, place)
            dtype = settings["model"]["distributed"]["training_dtype"]
            base = validate(BaseModelConfig, document)
            config = family.export_config(config, base, dtype, {}, 0, rotary)
        config = family.with_length(config, length)
    return config


def _with_untied_head(document: Document, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json, untied if the user asks for the separate head that the weights have."""
    asked = document.get("model.base_model.tie_word_embeddings") is False
    family = family_of_json(config, "config.json")
    tied = config.get("tie_word_embeddings", family.ties)
    if not asked or not tied or document.get("pretrained.format") == "distributed":
        return config
    try:
        has_head = family.head in huggingface.weight_files(folder)
    except CheckpointError:  # a model on the Hub, before its weights are fetched
        has_head = True
    return config | {"tie_word_embeddings": False} if has_head else config


def dataset_tokenizer(dataset: Dataset) -> dict[str, bytes]:
    """The tokenizer's files that prepared data come with, for a model that has none."""
    for path, described in dataset.metadata.items():
        place = described.get("tokenizer", {}).get("path")
        if not isinstance(place, str) or Path(place).is_absolute() or ".." in Path(place).parts:
            continue
        return {
            name: content
            for name, content in huggingface.small_files(Path(path).parent / place).items()
            if name in tokenizer.FILES or name.startswith(tokenizer.TEMPLATES)
        }
    return {}
