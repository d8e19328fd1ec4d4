"""Resuming: whether a checkpoint was written by training, and which settings changed since.

Settings that determine training may change only by consent (`run.accept_changes`), the model's
shape never. All other changes are listed. It reads one manifest, no tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.text import format_value
from fast_llm.config.train import TrainConfig
from fast_llm.config.types import Count, PositiveFloat
from fast_llm.data.dataset import Dataset
from fast_llm.errors import CheckpointError
from fast_llm.planning.history import History

# Settings that determine training; all others may change when a run resumes.
_FIXED = (
    "data.format",
    "data.path",
    "data.split",
    "batch.sequence_length",
    "batch.cross_document_attention",
    "model.distributed.seed",
)
_MODEL = "model.base_model"


def run_identity(config: TrainConfig, batch_size: int, dataset: Dataset) -> dict[str, Any]:
    """All that determines training: fixed settings, the data's content, the model's shape."""
    values = config.model_dump(mode="json")
    identity = {name: _value_at(values, name) for name in _FIXED}
    identity["batch.batch_size"] = batch_size
    identity["data (its content)"] = dataset.fingerprint()
    base = dict(values["model"]["base_model"])
    transformer = {
        name: value
        for name, value in base.pop("transformer").items()
        if not name.startswith("init_method")
        and name not in ("use_flash_attention", "mlp_recompute_level")
    }
    base = {
        name: value
        for name, value in base.items()
        if not name.startswith(("init_method", "cross_entropy"))
    }
    return (
        identity
        | {f"{_MODEL}.{name}": value for name, value in base.items()}
        | {f"{_MODEL}.transformer.{name}": value for name, value in transformer.items()}
    )


def _value_at(values: Mapping[str, Any], path: str) -> Any:
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
    """The required content of a training checkpoint's manifest."""

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


def check_info(path: Path, manifest: checkpoints.Manifest) -> bool:
    """Raise CheckpointError if training did not write this manifest.

    A valid digest alone does not prove that.
    """
    try:
        info = _Info.model_validate(manifest.info)
        problem = ""
        if info.step != manifest.step:
            problem = f"info.step: given {info.step}, but step is {manifest.step}"
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, ('info', *first['loc'])))}: {first['msg'].lower()}"
    if problem:
        raise CheckpointError(
            f"{path / checkpoints.MANIFEST}: {problem}; training did not write this: delete {path},"
            " or take another"
        )
    return True


def compare(
    info: Mapping[str, Any], config: TrainConfig, identity: Mapping[str, Any], checkpoint: Path
) -> tuple[list[str], list[str]]:
    """Compare a run's settings with those in a checkpoint's manifest.

    Returns problems, which are changes without consent, and all changes.
    """
    problems, changes = [], []
    for name, value in identity.items():
        before = info["identity"].get(name)
        if before == value:
            continue
        given, trained = format_value(value), format_value(before)
        changes.append(f"{name}: {trained} → {given}")
        wrong = f"{name}: given {given}, but {checkpoint} was trained with {trained}"
        if name.startswith(_MODEL):
            problems.append(f"{wrong}; a model cannot change its shape")
        elif not _is_accepted(name, config.run.accept_changes):
            setting = _setting(name)
            consent = "data.path" if setting == "data" else setting
            problems.append(
                f"{wrong}; set it back, choose another run.experiment_dir, or consent with"
                f" run.accept_changes=[{consent}]"
            )
    now, then = _flatten(config.model_dump(mode="json")), _flatten(info["settings"])
    for name in sorted(now.keys() | then.keys()):
        new, old = now.get(name), then.get(name)
        if new in ("auto", old) or name in identity or name.startswith(("run.", _MODEL)):
            continue  # `auto` is not resolved yet
        changes.append(f"{name}: {format_value(old)} → {format_value(new)}")
    return problems, changes


def _setting(name: str) -> str:
    """The setting of an entry of the identity: `data (its content)` belongs to `data`."""
    return name.partition(" ")[0]


def _is_accepted(name: str, accepted: list[str]) -> bool:
    setting = _setting(name)
    any_data = any(path.startswith("data") for path in accepted)
    return setting in accepted or (setting == "data" and any_data)


def _flatten(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flatten(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found
