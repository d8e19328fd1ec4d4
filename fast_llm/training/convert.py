"""`fast-llm convert`: a checkpoint of any layout → a Hugging Face folder, and back, on one process.

Host memory holds the fp32 weights once. A checkpoint made from a Hugging Face folder has no
moments; use it as `pretrained` with `format: distributed`.
"""

import logging
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
    if source.format == "distributed":
        _export(
            Path(source.path).expanduser(), output, target.data_type, target.parameters_per_file
        )
    elif target.format == "distributed":
        _import(huggingface.fetch(source.path, weights=True), output)
    else:
        _copy(
            huggingface.fetch(source.path, weights=True),
            output,
            target.data_type,
            target.parameters_per_file,
        )
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
        raise CheckpointError(f"{path}: its manifest does not describe a model") from error
    weights = {name: torch.empty(shape) for name, shape in family_of(model).shapes(model).items()}
    state.load(path, {f"weight/{name}": weight for name, weight in weights.items()})
    kept = path.parent.parent / "pretrained"
    small = huggingface.small_files(kept) if kept.is_dir() else {}
    original = huggingface.read_json(kept / "config.json") if "config.json" in small else None
    wanted = dtype or trained_in
    length = settings.get("batch", {}).get("sequence_length", 0)
    tokens = info.get("tokens") or _tokens(kept)
    export_hugging_face(
        output,
        weights,
        config=family_of(model).export_config(original, model, wanted, tokens, length),
        dtype=wanted,
        files=huggingface.export_files(small, length),
        parameters_per_file=parameters_per_file,
        step=info["step"],
    )


def _tokens(folder: Path) -> dict[str, int | None]:
    """Ids of BOS and EOS of a run's tokenizer, for checkpoints whose manifest lacks them."""
    if not (folder / tokenizer.MAIN).is_file():
        return {}
    loaded = tokenizer.load(str(folder))
    return {"bos": loaded.bos, "eos": loaded.eos}


def _read(path: Path) -> tuple[BaseModelConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights of a Hugging Face folder in fp32, which is exact for smaller dtypes."""
    original = huggingface.read_json(path / "config.json")
    place = f"{path}/config.json"
    model = _model(family_of_json(original).architecture(original, place), place)
    if problems := huggingface.check_weights(path, model):
        raise ConfigError(problems)
    weights = {name: torch.empty(shape) for name, shape in family_of(model).shapes(model).items()}
    load_weights(weights, path, family_of(model))
    return model, weights, original


def _import(path: Path, output: Path) -> None:
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
    model, weights, original = _read(path)
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


def _copy(path: Path, output: Path, dtype: str | None, parameters_per_file: int) -> None:
    """A Hugging Face folder → another, with another dtype or file size."""
    model, weights, original = _read(path)
    wanted = dtype or huggingface.stored_dtype(path, original)
    export_hugging_face(
        output,
        weights,
        config=family_of(model).export_config(original, model, wanted, {}),
        dtype=wanted,
        files=huggingface.small_files(path),
        parameters_per_file=parameters_per_file,
        step=0,
    )
