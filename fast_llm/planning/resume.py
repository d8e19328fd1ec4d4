"""Resuming: whether a checkpoint was written by training, and which settings changed since.

Settings that determine training may change only by consent (`run.accept_changes`), the model's
shape never. All other changes are listed. It reads one manifest, no tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.parameter_rules import frozen_names
from fast_llm.config.text import format_value
from fast_llm.config.train import FimConfig, TrainConfig
from fast_llm.config.types import Count, PositiveFloat
from fast_llm.data.dataset import Dataset
from fast_llm.errors import CheckpointError
from fast_llm.models import family_of
from fast_llm.planning.branch import Ancestor
from fast_llm.planning.history import History

# Settings that determine training; all others may change when a run resumes.
_FIXED = (
    "data.format",
    "data.path",
    "data.split",
    "data.packing",
    "batch.sequence_length",
    "batch.cross_document_attention",
    "model.distributed.seed",
)
_FIM = "data.fim."  # its settings are recorded if it is used
_MIXTURE = ("data.sources", "data.stages")  # recorded with `format: mixture`
_FIM_DEFAULTS = FimConfig().model_dump(mode="json")
_FROZEN = "optimizer.learning_rate_scales (frozen parameters)"  # recorded if there are any
_MODEL = "model.base_model"
BIAS_RATE = f"{_MODEL}.transformer.expert_bias_update_rate"
_BASE_MODEL = BaseModelConfig().model_dump(mode="json")


def run_identity(config: TrainConfig, batch_size: int, dataset: Dataset) -> dict[str, Any]:
    """All that determines training: fixed settings, the data's content, the model's shape."""
    values = config.model_dump(mode="json")
    identity = {name: _value_at(values, name) for name in _FIXED}
    identity["batch.batch_size"] = batch_size
    identity["data (its content)"] = dataset.fingerprint()
    if config.data.fim.rate:
        identity |= {_FIM + name: value for name, value in values["data"]["fim"].items()}
    for setting in _MIXTURE:
        given = _flatten({setting: _value_at(values, setting)})
        identity |= {
            name: value
            for name, value in given.items()
            if value not in (None, {}, []) and not name.endswith(".max_epochs")
        }
    shapes = family_of(config.model.base_model).shapes(config.model.base_model)
    if frozen := frozen_names(config.optimizer, shapes):
        identity[_FROZEN] = frozen
    base = dict(values["model"]["base_model"])
    transformer = {
        name: value
        for name, value in base.pop("transformer").items()
        if not name.startswith("init_method")
        and name not in ("use_flash_attention", "mlp_recompute_level")
        and not (name.startswith("expert_") and name.endswith(("_coefficient", "_update_rate")))
    }
    base = {
        name: value
        for name, value in base.items()
        if not name.startswith(("init_method", "cross_entropy", "z_loss"))
    }
    return (
        identity
        | {f"{_MODEL}.{name}": value for name, value in base.items()}
        | {f"{_MODEL}.transformer.{name}": value for name, value in transformer.items()}
    )


def _value_at(values: Any, path: str) -> Any:
    """The value at a dotted path; None for an item that a list or mapping lacks."""
    for key in path.split("."):
        if isinstance(values, list):
            values = dict(enumerate(values)).get(int(key))
        else:
            values = None if values is None else values.get(key)
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
    padding: dict[str, Count] = {}
    history: History | None = None
    ancestors: list[Ancestor] = []
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
    info: Mapping[str, Any],
    config: TrainConfig,
    identity: Mapping[str, Any],
    checkpoint: Path,
    branches: bool = False,
) -> tuple[list[str], list[str]]:
    """Compare a run's settings with those in a checkpoint's manifest.

    Returns problems, which are changes without consent, and all changes. `branches`: a new run
    begins with the checkpoint of another one, so all but the model may change.
    """
    problems, changes, shape = list[str](), list[str](), list[str]()
    together: dict[str, list[str]] = {setting: [] for setting in _MIXTURE}
    values = config.model_dump(mode="json")
    optional = (_FIM, *(f"{setting}." for setting in _MIXTURE))
    used = {name: _value_at(values, name) for name in info["identity"] if name.startswith(optional)}
    used |= identity
    problems += _frozen_problems(info["identity"], identity, checkpoint)
    problems += _bias_problems(info, config, checkpoint)
    for name, value in used.items():
        if name == _FROZEN:
            continue  # its patterns are compared below
        before = _with_defaults(info["identity"].get(name), name)
        if before == value:
            continue
        given, trained = format_value(value), format_value(before)
        changes.append(f"{name}: {trained} → {given}")
        wrong = f"{name}: given {given}, but {checkpoint} was trained with {trained}"
        if branches and name.startswith(_MODEL):
            shape.append(f"{name} {trained}, given {given}")
        elif branches:
            continue
        elif name.startswith(_MODEL):
            problems.append(f"{wrong}; a model cannot change its shape")
        elif not _is_accepted(name, config.run.accept_changes):
            setting = _setting(name)
            if setting in together:
                together[setting].append(f"{name}: given {given}, trained with {trained}")
            mixture = config.data.format == "mixture"
            consent = {"data": "data.sources" if mixture else "data.path"}.get(setting, setting)
            problems.append(
                f"{wrong}; set it back, choose another run.experiment_dir, or consent with"
                f" run.accept_changes=[{consent}]"
            )
    problems = _without_repeats(problems, together, checkpoint)
    if shape:
        problems.append(
            f"run.branch_from: {checkpoint} has {'; '.join(shape)}; a model cannot change its"
            " shape: set back what differs"
        )
    now, then = _flatten(config.model_dump(mode="json")), _flatten(info["settings"])
    for name in sorted(now.keys() | then.keys()):
        # Checkpoints lack settings that are newer than they are.
        new, old = now.get(name), then.get(name, _DEFAULTS.get(name))
        known = name in used or name in _MIXTURE
        if new in ("auto", old) or known or name.startswith(("run.", _MODEL, _FIM)):
            continue  # `auto` is not resolved yet
        changes.append(f"{name}: {format_value(old)} → {format_value(new)}")
    return problems, changes


def _without_repeats(
    problems: Sequence[str], together: Mapping[str, list[str]], checkpoint: Path
) -> list[str]:
    """One problem for each setting of `together` that has several differences."""
    kept = list(problems)
    for setting, found in together.items():
        if len(found) < 2:
            continue
        first = next(i for i, one in enumerate(kept) if one.startswith(f"{setting}."))
        kept = [one for one in kept if not one.startswith(f"{setting}.")]
        more = f"; and {len(found) - 2} more" if len(found) > 2 else ""
        kept.insert(
            first,
            f"{setting}: differs from {checkpoint} ({'; '.join(found[:2])}{more}); set it back,"
            f" choose another run.experiment_dir, or consent with run.accept_changes=[{setting}]",
        )
    return kept


def optimizer_state_problems(config: TrainConfig, folder: Path) -> list[str]:
    """A problem if the checkpoint in `folder` has moments of other parameters than are trained."""
    shapes = family_of(config.model.base_model).shapes(config.model.base_model)
    manifest = checkpoints.read_manifest(folder)
    was = set(manifest.info.get("identity", {}).get(_FROZEN, ()))
    changed = sorted(was ^ set(frozen_names(config.optimizer, shapes)))
    if not changed:
        return []
    return [
        f"pretrained.optimizer_state: given yes, but {_setting(_FROZEN)} freezes other parameters"
        f" than {folder} ({changed[0]} and {len(changed) - 1} more), and moments exist of trained"
        " ones alone; freeze the same, or leave it out"
    ]


def _frozen_problems(
    before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path
) -> list[str]:
    """A problem if other parameters are frozen than were: moments exist of trained ones alone."""
    was, is_now = set(before.get(_FROZEN, ())), set(now.get(_FROZEN, ()))
    if was == is_now:
        return []
    changed = sorted(was ^ is_now)
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    verb = "freezes" if changed[0] in is_now else "trains"
    return [
        f"{_setting(_FROZEN)}: {verb} {changed[0]}{more}, unlike {checkpoint}; set it back, or"
        " start a new run, in another run.experiment_dir, from an export (pretrained.path)"
    ]


def has_router_biases(info: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this manifest holds biases of routers."""
    return _value_at(info.get("settings"), BIAS_RATE) is not None


def _bias_problems(info: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> list[str]:
    """A problem if biases of routers, by which the model chose experts, would be dropped."""
    t = config.model.base_model.transformer
    if t.expert_bias_update_rate is not None or not has_router_biases(info):
        return []
    return [
        f"{BIAS_RATE}: given null, but {checkpoint} has biases of routers; set it: 0 keeps them as"
        " they are"
    ]


def _with_defaults(before: Any, name: str) -> Any:
    """A setting's value in a checkpoint. Checkpoints lack settings that are newer than they are."""
    if name.startswith(_FIM) and before is None:
        return _FIM_DEFAULTS[name.removeprefix(_FIM)]
    if name == "data.packing" and before is None:
        return "concatenate"
    if not name.startswith(_MODEL):
        return before
    default = _value_at({"model": {"base_model": _BASE_MODEL}}, name)
    if before is None:
        return default
    return {**default, **before} if isinstance(default, dict) else before


def _setting(name: str) -> str:
    """The setting of an entry of the identity: `data (its content)` belongs to `data`, and what is
    inside of `data.sources` to it.
    """
    name = name.partition(" ")[0]
    return next((one for one in _MIXTURE if name.startswith(f"{one}.")), name)


def _is_accepted(name: str, accepted: list[str]) -> bool:
    setting = _setting(name)
    any_data = any(path.startswith("data") for path in accepted)
    return setting in accepted or (setting == "data" and any_data)


def _flatten(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            found |= _flatten(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


_DEFAULTS = _flatten(TrainConfig().model_dump(mode="json"))
