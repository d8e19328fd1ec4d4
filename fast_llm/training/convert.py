"""`convert`: a checkpoint of any layout → a Hugging Face folder, and the reverse, on one process.

Host memory holds the fp32 weights once. A checkpoint made from a Hugging Face folder has no moments; it serves
as `pretrained` with `format: distributed`.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import llama, state
from fast_llm.checkpoint.weights import DTYPES, export_llama, load_weights
from fast_llm.config.prepare import ConvertConfig
from fast_llm.config.section import Document, validate
from fast_llm.config.train import BaseModelConfig
from fast_llm.errors import CheckpointError, ConfigError
from fast_llm.model.cost import shapes

logger = logging.getLogger("fast_llm")


def convert(config: ConvertConfig) -> None:
    """Write `output.path`. Raises CheckpointError for what can not be read or is there already."""
    source, target = config.input, config.output
    output = Path(target.path).expanduser()
    if output.exists() and (config.exist_ok and folders.is_complete(output)):
        logger.info(f"{output} is there already.")
        return
    if output.exists():
        raise CheckpointError(f"{output}: is there already; choose another output.path (or exist_ok=yes to keep it)")
    if source.format == "distributed":
        _export(Path(source.path).expanduser(), output, target.data_type, target.parameters_per_file)
    elif target.format == "distributed":
        _import(llama.fetch(source.path, weights=True), output)
    else:
        _copy(llama.fetch(source.path, weights=True), output, target.data_type, target.parameters_per_file)
    logger.info(f"Wrote {output}.")


def _model(values: dict[str, Any], source: str) -> BaseModelConfig:
    return validate(BaseModelConfig, Document(values, {}, source))


def _export(path: Path, output: Path, dtype: str | None, parameters_per_file: int) -> None:
    """A checkpoint → a Hugging Face folder."""
    info = folders.verify(path).info
    try:
        settings = info["settings"]
        model = _model(settings["model"]["base_model"], str(path))
        trained_in = settings["model"]["distributed"]["training_dtype"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its manifest does not say which model it is of") from error
    weights = {name: torch.empty(shape) for name, shape in shapes(model).items()}
    state.load(path, {f"weight/{name}": weight for name, weight in weights.items()})
    beside = path.parent.parent / "pretrained"
    small = _small(beside)
    original = llama.read_json(beside / "config.json") if "config.json" in small else None
    wanted = dtype or trained_in
    export_llama(
        output,
        weights,
        config=llama.export_config(original, model, wanted, info.get("tokens", {})),
        dtype=wanted,
        files={name: data for name, data in small.items() if name != "config.json"},
        parameters_per_file=parameters_per_file,
        step=info["step"],
    )


def _read(path: Path) -> tuple[BaseModelConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a Hugging Face folder in fp32, which holds every smaller dtype exactly."""
    original = llama.read_json(path / "config.json")
    model = _model(llama.architecture(original, f"{path}/config.json"), f"{path}/config.json")
    if problems := llama.check_weights(path, model):
        raise ConfigError(problems)
    weights = {name: torch.empty(shape) for name, shape in shapes(model).items()}
    load_weights(weights, path)
    return model, weights, original


def _import(path: Path, output: Path) -> None:
    """A Hugging Face folder → a checkpoint without moments, its small files beside it."""
    model, weights, _ = _read(path)
    info = {
        "step": 0,
        "settings": {"model": {"base_model": model.model_dump(mode="json"), "distributed": {"training_dtype": "bf16"}}},
    }
    written = state.save(output.parent, 0, {f"weight/{name}": weight for name, weight in weights.items()}, info)
    if written != output:
        written.rename(output)
    beside = output.parent.parent / "pretrained"
    beside.mkdir(exist_ok=True)
    for name, data in _small(path).items():
        (beside / name).write_bytes(data)


def _copy(path: Path, output: Path, dtype: str | None, parameters_per_file: int) -> None:
    """A Hugging Face folder → another, in another dtype or cut into other files."""
    model, weights, original = _read(path)
    stated = str(original.get("torch_dtype", original.get("dtype", "float32")))
    wanted = dtype or next((name for name, kind in DTYPES.items() if str(kind) == f"torch.{stated}"), "fp32")
    export_llama(
        output,
        weights,
        config=llama.export_config(original, model, wanted, {}),
        dtype=wanted,
        files={name: data for name, data in _small(path).items() if name != "config.json"},
        parameters_per_file=parameters_per_file,
        step=0,
    )


def _small(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in llama.SMALL_FILES if (folder / name).is_file()}
