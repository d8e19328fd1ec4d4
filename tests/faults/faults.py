"""Faults of numbers in loss, gradients, weights, moments or data, and the expected decisions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fast_llm.data.dataset import Dataset
from fast_llm.data.loader import Loader
from fast_llm.data.source import PackedSample
from fast_llm.model.batch import Batch
from fast_llm.tensors import distributed_like
from fast_llm.training.step import StepResult
from fast_llm.training.trainer import Trainer

STEPS, INTERVAL, WINDOW, BATCH, VOCABULARY = 24, 4, 4, 8, 128
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
HUGE = (1e30, 3e38)  # a gradient whose square exceeds fp32 counts as not finite
SPIKE = 1e6
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fault:
    """The value that is wrong at the step with this batch (counted from 1).

    After a kill the step is recognized by its batch.
    """

    batch: int
    place: str  # loss, gradient, weight, exp_avg, exp_avg_sq
    value: float
    rank: int | None  # None: all ranks
    chosen: int  # tensor and element


@dataclass
class Course:
    """The expected steps of a run under its policy: each step's batch, and the skipped updates."""

    batch_of: dict[int, int] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    spikes: set[int] = field(default_factory=set)  # of the skipped updates
    skipped_ranges: list[dict[str, int]] = field(default_factory=list)


def course(faults: Sequence[Fault], policy: str) -> Course:
    """The expected course of a run, computed independently."""
    bad = {fault.batch for fault in faults if fault.value != SPIKE}
    spikes = {
        fault.batch for fault in faults if fault.value == SPIKE and policy in ("skip", "rewind")
    } - bad
    found = Course()
    # `since`: the batch after which the run resumed from the checkpoint of step `saved`.
    step = batch = saved = since = 0
    while step < STEPS:
        step, batch = step + 1, batch + 1
        if batch in spikes and policy == "rewind":
            found.skipped_ranges.append(
                {"after": saved, "spike": step, "sequences": (batch - since) * BATCH}
            )
            step, since = saved, batch
            continue
        found.batch_of[step] = batch
        if step % INTERVAL == 0:
            saved, since = step, batch
    found.spikes = spikes & {*found.batch_of.values()}
    found.left_out = (bad | spikes) & {*found.batch_of.values()}
    return found


def spoil(tensors: Mapping[str, Tensor], fault: Fault) -> None:
    """Write the fault's value to one element."""
    names = sorted(name for name, tensor in tensors.items() if tensor.numel())
    tensor = tensors[names[fault.chosen % len(names)]]
    tensor.detach()[np.unravel_index(fault.chosen // 64 % tensor.numel(), tensor.shape)] = (
        fault.value
    )


def disturb(
    rank: int, faults: Sequence[Fault], notes: Path | None, reference: Course | None = None
) -> None:
    """Have the faults happen, and note what this process decides at each step, and what it holds at
    the end. `reference`: no fault happens, but updates are undone and batches given as this says.
    """
    start = Trainer.train

    def train(self: Trainer) -> None:
        step, add = self.train_step, self.metrics.add
        parts = {"exp_avg": step.optimizer.exp_avg, "exp_avg_sq": step.optimizer.exp_avg_sq}
        forward_backward = step.forward_backward

        def disturbed(batches: Sequence[Batch], seed: float) -> Tensor:
            batch = self.state.consumed_samples // self.spec.batch.batch_size + 1
            now = [fault for fault in faults if fault.batch == batch]
            mine = [fault for fault in now if fault.rank in (None, rank)]
            for fault in mine:
                if fault.place in ("weight", *parts):
                    spoil(parts.get(fault.place) or step.weights.local(), fault)
            if any(fault.place in ("weight", *parts) for fault in now):
                step.weights.sync_model_weights()  # on all: else some would gather what others have
            loss = forward_backward(batches, seed)
            for fault in mine:
                if fault.place == "loss":
                    loss = loss + fault.value
                elif fault.place == "gradient":
                    spoil(step.weights.local_gradients(), fault)
            return loss

        def noting(number: int, result: StepResult) -> None:
            add(number, result)
            decision = [
                self.state.consumed_samples // BATCH,
                number,
                result.updated,
                result.spike,
                result.loss,
                result.gradient_norm,
            ]
            assert notes is not None
            with (notes / f"decisions_{rank}").open("a") as file:
                file.write(json.dumps(decision) + "\n")

        step.forward_backward = disturbed  # type: ignore[method-assign, assignment]
        if notes is not None:
            self.metrics.add = noting  # type: ignore
        if reference is not None:
            _guide(self, reference)
        start(self)
        if notes is not None:
            _note_state(self, notes / f"state_{rank}")

    Trainer.train = train  # type: ignore[method-assign]


def _guide(trainer: Trainer, reference: Course) -> None:
    """Apply every update, undo those that are to be skipped, and give each step its batch."""
    step, loader = trainer.train_step, trainer.loader
    update, optimizer = step.optimizer.step, step.optimizer

    def undone(*arguments: Any) -> None:
        local = [
            step.weights.local(),
            step.weights.master_low_bits,
            optimizer.exp_avg,
            optimizer.exp_avg_sq,
        ]
        before = [{name: tensor.clone() for name, tensor in part.items()} for part in local]
        update(*arguments)
        if reference.batch_of[trainer.state.step + 1] in reference.left_out:
            optimizer.updates -= 1
            for part, old in zip(local, before, strict=True):
                for name, tensor in part.items():
                    tensor.copy_(old[name])

    def guided(phase: str, first_sample: int, steps: int, *stage: Any) -> Loader:
        made = loader(phase, first_sample, steps, *stage)
        give, first = made.step, first_sample // BATCH
        if phase == "training":
            made.step = lambda number: give(reference.batch_of[first + number + 1] - first - 1)  # type: ignore[method-assign, assignment]
        return made

    optimizer.step, trainer.loader = undone, guided  # type: ignore[method-assign, assignment]


def _note_state(trainer: Trainer, path: Path) -> None:
    """Digests of all tensors of this process, by name and part."""
    step = trainer.train_step
    found = {}
    with step.weights.masters() as masters:
        for name, whole in masters.items():
            for part, tensor in (
                ("weight", whole),
                *((m, distributed_like(whole, getattr(step.optimizer, m)[name])) for m in MOMENTS),
            ):
                place = ""
                if isinstance(tensor, DTensor):
                    at: Sequence[int] = tensor.device_mesh.get_coordinate() or []
                    place = str(
                        [
                            p
                            for p, how in zip(at, tensor.placements, strict=True)
                            if not how.is_replicate()
                        ]
                    )
                    tensor = tensor.to_local()
                data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
                found[f"{part} of {name} {place}"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(found))


def misread(rank: int, sequence: int, place: int, token: int) -> None:
    """Make reads of this sequence return a token outside the vocabulary."""
    read = Dataset.read

    def wrong(self: Dataset, split: str, index: int) -> PackedSample:
        packed = read(self, split, index)
        if split == "training" and index == sequence:
            packed.tokens[place % len(packed.tokens)] = token
        return packed

    Dataset.read = wrong  # type: ignore[method-assign]
