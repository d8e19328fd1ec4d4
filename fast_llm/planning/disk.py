"""Disk space of a run: sizes and largest number of checkpoints and exports, and whether they fit.

It lists folders and reads the free space of the disk; no file is opened.
"""

import math
import os
import shutil
from pathlib import Path

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.parameter_rules import frozen_names
from fast_llm.config.saving import CheckpointConfig, ExportConfig
from fast_llm.config.train import TrainConfig
from fast_llm.models import family_of


def checkpoint_bytes(config: TrainConfig, parameters: int) -> int:
    """The size of a checkpoint: fp32 weights, averages and two moments; 8-bit ones are bf16 there.

    Moments whose dtype is `auto` count as fp32. Frozen parameters have none.
    """
    base = config.model.base_model
    shapes = family_of(base).shapes(base)
    frozen = sum(math.prod(shapes[name]) for name in frozen_names(config.optimizer, shapes))
    moments = 4 if config.optimizer.moments_dtype in ("bf16", "int8") else 8
    weights = 4 * (1 + len(config.training.averages)) * parameters
    t = base.transformer
    biases = 0 if t.expert_bias_update_rate is None else 4 * t.num_experts * len(t.expert_layers())
    return weights + moments * (parameters - frozen) + biases


def copied_bytes(config: TrainConfig, parameters: int) -> int:
    """Host memory for the copy of a checkpoint's tensors: averages are there already."""
    return checkpoint_bytes(config, parameters) - 4 * len(config.training.averages) * parameters


def export_bytes(config: TrainConfig, parameters: int) -> int:
    """The size of an export's weights."""
    dtype = config.training.export.data_type or config.model.distributed.training_dtype
    return parameters * (4 if dtype == "fp32" else 2)


def export_folders(config: TrainConfig, folder: Path) -> dict[str, Path]:
    """Where a run's exports go: those of the model, named "", and those of each average."""
    exports, family = folder / "export", config.model.base_model.family
    averages = {name: exports / f"{family}-{name}" for name in config.training.averages}
    return {"": exports / family} | averages


def disk_use(
    config: TrainConfig, folder: Path, parameters: int, completed_steps: int
) -> dict[str, tuple[int, int]]:
    """The most that a run adds to the disk.

    For checkpoints and for exports: how many more than now, and the bytes of one.
    """
    training = config.training
    last = training.train_iters
    return {
        "checkpoints": (
            additional_folders(training.checkpoint, folder / "checkpoint", completed_steps, last),
            checkpoint_bytes(config, parameters),
        ),
        "exports": (
            sum(
                additional_folders(training.export, exports, completed_steps, last)
                for exports in export_folders(config, folder).values()
            )
            # One that is being pushed is deleted later.
            + (training.export.keep is not None and training.export.push_to_hub.repo is not None),
            export_bytes(config, parameters),
        ),
    }


def additional_folders(
    saved: CheckpointConfig | ExportConfig, root: Path, completed_steps: int, last: int
) -> int:
    """How many more folders than now `root` has at the fullest moment.

    The oldest is deleted only after the newest is written.
    """
    if saved.interval is None:
        return 0
    present = {step for step, _ in checkpoints.find(root)}
    due = _due_steps(saved.interval, saved.offset, completed_steps, last)
    count = len(due) + (last not in due)
    count -= sum(step in due or step == last for step in present)
    if saved.keep is None or not count:
        return count
    permanent = 0
    if saved.keep_every is not None:
        forever = _due_steps(saved.interval * saved.keep_every, saved.offset, completed_steps, last)
        permanent = len(forever) - sum(step in forever for step in present)
    deletable = sum(not saved.is_permanent(step) for step in present)
    fresh = count - permanent
    kept = min(deletable + fresh, saved.keep)
    # The newest, before the oldest is deleted.
    spare = int(fresh > 0 and deletable + fresh > saved.keep)
    return max(permanent + kept + spare - deletable, 1)


def _due_steps(interval: int, offset: int, completed_steps: int, last: int) -> range:
    """The steps after `completed_steps` up to `last` at which something is due."""
    first = completed_steps + 1 + (offset - completed_steps - 1) % interval
    return range(first, last + 1, interval)


def disk_problems(
    folder: Path, config: TrainConfig, parameters: int, completed_steps: int
) -> list[str]:
    """Problems with writing to the folder, and with room for one more checkpoint and export."""
    existing = _nearest_existing(folder)
    if not os.access(existing, os.W_OK):
        return [f"run.experiment_dir: {existing} cannot be written to"]
    if (folder.exists() and not folder.is_dir()) or not existing.is_dir():
        return [f"run.experiment_dir: {folder} cannot be a folder: {existing} is a file"]
    parts = {
        name: size
        for name, (count, size) in disk_use(config, folder, parameters, completed_steps).items()
        if count
    }
    if sum(parts.values()) > free_bytes(folder):
        what = " and ".join(f"{'an' if name[0] == 'e' else 'a'} {name[:-1]}" for name in parts)
        return [
            f"run.experiment_dir: {what} need{'s' * (len(parts) == 1)}"
            f" {format_bytes(sum(parts.values()))}, but {existing} has"
            f" {format_bytes(free_bytes(folder))} free"
        ]
    return []


def disk_warning(
    folder: Path | None, config: TrainConfig, parameters: int, completed_steps: int
) -> str:
    """A warning if the disk will be full before the run ends, else an empty string."""
    if folder is None:
        return ""
    parts = disk_use(config, folder, parameters, completed_steps)
    total, free = sum(count * size for count, size in parts.values()), free_bytes(folder)
    if total <= free:
        return ""
    what = " and ".join(
        f"{count} more {name} of {format_bytes(size)}"
        for name, (count, size) in parts.items()
        if count
    )
    return (
        f"run.experiment_dir: the disk will be full before this run ends: it keeps {what},"
        f" {format_bytes(total)} at most, and {format_bytes(free)} are free. Lower"
        " training.checkpoint.keep or set training.export.keep, raise the intervals, or make room"
    )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which a folder is, or will be."""
    return shutil.disk_usage(_nearest_existing(folder.absolute())).free


def _nearest_existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def format_bytes(count: float) -> str:
    """A number of bytes with its unit, in three or four digits: 1.75 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
