"""Branching: a new run that begins with a checkpoint of another run (`run.branch_from`).

The other run is only read. It may be running, and save and delete checkpoints meanwhile: a folder
is used only if it is complete, and its manifest is compared again after its tensors were read
(training/checkpointing.py). Finding one reads all of its files once, for their digests.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.train import BranchConfig
from fast_llm.config.types import Count
from fast_llm.errors import CheckpointError, ConfigError
from fast_llm.storage import similar

_ATTEMPTS = 3  # the other run may replace a checkpoint while it is read
_SHOWN = 20  # steps in a message


class Ancestor(BaseModel):
    """A run from which a run, or its ancestor, branched after a step."""

    model_config = ConfigDict(strict=True)

    run: str  # its experiment folder, absolute
    step: Count


def branch_point(branch: BranchConfig, content: bool = True) -> Path:
    """The checkpoint with which a branch begins. Every file is compared with its digest if
    `content`.

    Raises ConfigError if the other run has none of this step, CheckpointError if it is damaged.
    """
    run = Path(branch.run).expanduser()
    problem: CheckpointError | None = None
    for _ in range(_ATTEMPTS):
        found = checkpoints.find(run / "checkpoint", "checkpoint")
        at_step = [path for step, path in found if step == branch.step]
        if not at_step:
            raise ConfigError([_no_checkpoint(run, branch.step, [step for step, _ in found])])
        for path in reversed(at_step):
            try:
                (checkpoints.verify if content else checkpoints.read_manifest)(path)
                return path
            except CheckpointError as error:
                problem = error
    assert problem is not None
    raise problem


def _no_checkpoint(run: Path, step: int, steps: list[int]) -> str:
    if not steps and not run.is_dir():
        return f"run.branch_from.run: given {run}: no such folder{similar(run, folders=True)}"
    if not steps and checkpoints.is_complete(run):
        own = checkpoints.read_manifest(run).step
        return (
            f"run.branch_from.run: given {run}, which is a checkpoint; give"
            f" run.branch_from.run={run.parent.parent} and run.branch_from.step={own}"
        )
    if not steps:
        return (
            f"run.branch_from.run: given {run}, but {run / 'checkpoint'} has no complete"
            " checkpoint; give the experiment folder of a run that has one"
        )
    near = sorted(sorted(set(steps), key=lambda other: abs(other - step))[:_SHOWN])
    more = "the nearest are" if len(near) < len(set(steps)) else "it has"
    return (
        f"run.branch_from.step: given {step}, but {run} has no checkpoint of this step; {more}"
        f" {', '.join(map(str, near))}"
    )


def as_ancestor(branch: BranchConfig) -> Ancestor:
    """What the manifests of a branch record of the run it began with."""
    return Ancestor(run=str(Path(branch.run).expanduser().resolve()), step=branch.step)


def recorded_ancestors(info: Mapping[str, Any]) -> list[Ancestor]:
    """The ancestors in a checkpoint's manifest, the oldest first; none for most runs."""
    return [Ancestor.model_validate(one) for one in info.get("ancestors", [])]


def other_origin(branch: BranchConfig, ancestors: list[Ancestor], checkpoint: Path) -> str:
    """The problem of a branch whose own `checkpoint` belongs to another one; empty if none."""
    wanted = as_ancestor(branch)
    if ancestors and ancestors[-1] == wanted:
        return ""
    began = (
        f"began at step {ancestors[-1].step} of {ancestors[-1].run}"
        if ancestors
        else "is not a branch"
    )
    return (
        f"run.branch_from: given step {wanted.step} of {wanted.run}, but the run of {checkpoint}"
        f" {began}; choose another run.experiment_dir, or leave run.branch_from out to continue"
        " that run"
    )


def describe_ancestors(ancestors: list[Ancestor]) -> str:
    """The family tree of a run, in words, the oldest run first."""
    return ", ".join(f"{one.run} to step {one.step:,}" for one in ancestors) + ", then this run"
