"""`fast-llm convert`: a checkpoint of any layout → a Hugging Face folder, and back, on one process.

Host memory holds the fp32 weights once. A checkpoint made from a Hugging Face folder has no
moments; use it as `pretrained` with `format: distributed`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface, state
from fast_llm.checkpoint.weights import export_hugging_face, load_weights
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.prepare import ConvertConfig
from fast_llm.config.validate import validate
from fast_llm.data import tokenizer
from fast_llm.errors import CheckpointError, ConfigError
from fast_llm.models import family_of, family_of_json
from fast_llm.planning.pretrained import in_force
from fast_llm.report.records import RunRecords
from fast_llm.training.averages import prefix
from fast_llm.training.model_card import losses_at, trained_card, with_card
from fast_llm.training.process import quiet_torch_distributed

logger = logging.getLogger("fast_llm")


def convert(config: ConvertConfig) -> None:
    """Write `output.path`. Raises CheckpointError if the input is damaged or the output exists."""
    quiet_torch_distributed()
    source, target = config.input, config.output
    output = Path(target.path).expanduser()
    if output.exists() and (config.exist_ok and folders.is_complete(output)):
        logger.info(f"{output} exists already.")
        return
    if output.exists():
        raise CheckpointError(
            f"{output}: exists already; choose another output.path (or exist_ok=yes to keep it)"
        )
    path = Path(source.path).expanduser()
    if source.format == "distributed" or (source.format == "auto" and folders.is_checkpoint(path)):
        if target.format == "distributed":
            raise CheckpointError(f"{path}: is already in distributed format; copy the folder")
        _export(path, output, config)
        logger.info(f"Wrote {output}.")
        return
    if source.average is not None:
        raise CheckpointError(
            f"input.average: given {source.average}, but {path} is no checkpoint, and only"
            " checkpoints hold averages; leave it out, or give a checkpoint"
        )
    path = huggingface.fetch(source.path, weights=True)
    if target.format == "distributed":
        _import(path, output, config)
    else:
        _copy(path, output, config)
    logger.info(f"Wrote {output}.")


def _model(values: dict[str, Any], source: str) -> BaseModelConfig:
    return validate(BaseModelConfig, Document(values, {}, source))


def _check_family(config: ConvertConfig, name: str, path: Path, family: str) -> None:
    """Raise CheckpointError if `input.format` or `output.format` names another family."""
    asked = getattr(config, name).format
    if asked not in ("auto", "distributed", family):
        raise CheckpointError(
            f"{name}.format: given {asked}, but the model of {path} is {family}; use auto"
        )


@dataclass(frozen=True)
class CheckpointModel:
    """What a checkpoint and its run say about the model, without the weights."""

    model: BaseModelConfig  # with the rotary positions of the stage
    base: BaseModelConfig  # as in the settings of the run
    dtype: str  # that it trained in
    step: int
    length: int  # tokens in a sequence of training, in the stage; 0 if unknown
    tokens: Mapping[str, int | None]  # ids of BOS and EOS
    small: Mapping[str, bytes]  # the small files of the pretrained model
    original: Mapping[str, Any] | None  # its config.json
    info: Mapping[str, Any]  # of its manifest

    @property
    def files(self) -> dict[str, bytes]:
        """The small files of an export."""
        return huggingface.export_files(self.small, self.length)

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json of an export with weights in a dtype."""
        family = family_of(self.model)
        ours = self.model.transformer.rotary
        rotary = None if ours == self.base.transformer.rotary else ours
        given = self.original, self.base, dtype, self.tokens, self.length
        return family.export_config(*given, rotary)


def describe_checkpoint(path: Path) -> CheckpointModel:
    """What a checkpoint says about its model. Raises CheckpointError if any file is damaged."""
    info = folders.verify(path).info
    try:
        settings = info["settings"]
        base = _model(settings["model"]["base_model"], str(path))
        length, rotary = in_force(info)
        trained_in = settings["model"]["distributed"]["training_dtype"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its manifest does not describe a model") from error
    if base.transformer.expert_bias_update_rate is not None:
        logger.warning(
            f"{path}: the biases of its routers are left out, because {base.family} models have"
            " none: the model chooses other experts for some tokens."
        )
    kept = path.parent.parent / "pretrained"
    small = huggingface.small_files(kept) if kept.is_dir() else {}
    return CheckpointModel(
        base if rotary is None else base.with_rotary(rotary),
        base,
        trained_in,
        info["step"],
        length,
        info.get("tokens") or _tokens(kept),
        small,
        huggingface.read_json(kept / "config.json") if "config.json" in small else None,
        info,
    )


def _export(path: Path, output: Path, config: ConvertConfig) -> None:
    """A checkpoint → a Hugging Face folder."""
    found = describe_checkpoint(path)
    family = family_of(found.model)
    _check_family(config, "output", path, found.model.family)
    before = _prefix(path, found, config.input.average)
    weights = {name: torch.empty(shape) for name, shape in family.shapes(found.model).items()}
    state.load(path, {before + name: weight for name, weight in weights.items()})
    wanted, files = config.output.data_type or found.dtype, found.files
    records = RunRecords(path.parent.parent, ("validation",))
    losses = losses_at(records, found.step)
    card = trained_card(found.info, files, wanted, losses, config.input.average)
    export_hugging_face(
        output,
        weights,
        config=found.config(wanted),
        dtype=wanted,
        files=with_card(files, card),
        parameters_per_file=config.output.parameters_per_file,
        step=found.step,
        family=family,
    )


def _prefix(path: Path, found: CheckpointModel, average: str | None) -> str:
    """What precedes the names of the wanted weights in a checkpoint.

    Raises CheckpointError for an average that it does not hold.
    """
    if average is None:
        return "weight/"
    counts = found.info.get("averages", {})
    if counts.get(average):
        return prefix(average)
    held = ", ".join(name for name, updates in counts.items() if updates) or "none"
    empty = average in counts
    raise CheckpointError(
        f"input.average: given {average}, which {path}"
        f" {'holds without any update' if empty else 'does not hold'}; it holds {held}"
    )


def _tokens(folder: Path) -> dict[str, int | None]:
    """Ids of BOS and EOS of a run's tokenizer, for checkpoints whose manifest lacks them."""
    if not (folder / tokenizer.MAIN).is_file():
        return {}
    loaded = tokenizer.load(str(folder))
    return {"bos": loaded.bos, "eos": loaded.eos}


def _read(
    path: Path, config: ConvertConfig
) -> tuple[BaseModelConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights of a Hugging Face folder in fp32, which is exact for smaller dtypes."""
    original = huggingface.read_json(path / "config.json")
    place = f"{path}/config.json"
    model = _model(family_of_json(original, place).architecture(original, place), place)
    for name in ("input", "output"):
        _check_family(config, name, path, model.family)
    if problems := huggingface.check_weights(path, model):
        raise ConfigError(problems)
    weights = {name: torch.empty(shape) for name, shape in family_of(model).shapes(model).items()}
    load_weights(weights, path, family_of(model))
    return model, weights, original


def _import(path: Path, output: Path, config: ConvertConfig) -> None:
    """A Hugging Face folder → a checkpoint without moments, and its small files in `pretrained`."""
    huggingface.read_json(path / "config.json")
    small = huggingface.small_files(path)
    kept = output.parent.parent / "pretrained"
    if (kept / "config.json").exists() and (kept / "config.json").read_bytes() != small[
        "config.json"
    ]:
        raise CheckpointError(
            f"{kept}: has the files of another model, which this one's would replace; choose an"
            " output.path in a folder of its own, as in <folder>/checkpoint/0"
        )
    model, weights, original = _read(path, config)
    dtype = huggingface.stored_dtype(path, original)
    info = {
        "step": 0,
        "settings": {
            "model": {
                "base_model": model.model_dump(mode="json"),
                "distributed": {"training_dtype": dtype},
            }
        },
    }
    written = state.save(
        output.parent, 0, {f"weight/{name}": weight for name, weight in weights.items()}, info
    )
    if written != output:
        written.rename(output)
    for name, data in small.items():
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_bytes(data)


def _copy(path: Path, output: Path, config: ConvertConfig) -> None:
    """A Hugging Face folder → another, with another dtype or file size."""
    model, weights, original = _read(path, config)
    wanted = config.output.data_type or huggingface.stored_dtype(path, original)
    export_hugging_face(
        output,
        weights,
        config=family_of(model).export_config(original, model, wanted, {}),
        dtype=wanted,
        files=huggingface.small_files(path),
        parameters_per_file=config.output.parameters_per_file,
        step=0,
        family=family_of(model),
    )
