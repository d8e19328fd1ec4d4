"""Detect silent data corruption (`training.double_check`).

It is caused by chips or memory that compute or store wrong values without an error.

At an interval, before the update, two things must be equal to the bit: the loss of a micro-batch
and its recomputation; and every value that several processes hold. The layout determines the
latter: copies of shards, norms under tensor parallelism, tied embeddings at both ends of a
pipeline, gathered weights, and all counters. Names and shards of DTensors say which values are
copies. The process that differs is named; of two processes it is not known which one is wrong.

A pass without gradients may use other kernels than training, for example under the compiler. Then
two passes without gradients are compared. Nondeterministic kernels would look like corruption; no
forward pass here has any.

Cost: the forward pass of one micro-batch (with a pipeline, of all), and one read of the copies.

Independently, `check_state_finite` checks weights and moments before each save or export.
"""

import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fast_llm.collectives import all_gather_object
from fast_llm.errors import TrainingStopped
from fast_llm.kernels.rounding import INFINITE_LEVEL
from fast_llm.model.batch import Batch
from fast_llm.parallel.mesh import Mesh
from fast_llm.tensors import local_part
from fast_llm.training.step import TrainStep

logger = logging.getLogger("fast_llm")

_CHUNK = 2**22  # elements digested at a time
_INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.int8}  # by element size in bytes


@dataclass(frozen=True)
class Report:
    """The findings of one process, and its copies of replicated values."""

    host: str
    faults: list[str]  # that it found alone
    replicated: dict[str, Any]  # digests and numbers; equal names must have equal values


class CorruptionCheck:
    """Checks a step before its update."""

    def __init__(self, step: TrainStep, mesh: Mesh):
        self.step = step
        self.mesh = mesh
        self.last_good = 0  # the last step of this start whose check passed
        # Whether passes with and without gradients give equal bits; None until known.
        self.comparable: bool | None = None

    def __call__(
        self, number: int, micro_batches: Sequence[Batch], counters: Mapping[str, Any]
    ) -> None:
        """Check step `number` after its backward pass; every process calls it.

        `counters`: values that must be equal on all processes. Raises TrainingStopped on every
        process.
        """
        started = time.perf_counter()
        faults = self._check_loss(micro_batches) + self._check_rounding()
        replicated = dict(counters) | self._replicated_state() | self._gathered_weights()
        reports = all_gather_object(
            Report(socket.gethostname(), faults, replicated), self.mesh.slow_group
        )
        self.step.weights.sync_model_weights()
        found = find_differences(reports)
        if not found:
            self.last_good = number
            seconds = time.perf_counter() - started
            logger.info(
                f"Corruption check at step {number}: {len(replicated)} values are consistent"
                f" ({seconds:.1f} s)."
            )
            return
        others = f"; and {len(found) - 1} more differences" if len(found) > 1 else ""
        since = f"after step {self.last_good}" if self.last_good else "by this start of the run"
        for one in found:
            logger.error(f"Corruption check at step {number}: {one}")
        raise TrainingStopped(
            f"step {number}: {found[0]}{others} (training.double_check). A chip or its memory"
            " computes or remembers wrongly: take it out of the run. The update was not applied."
            f" Checkpoints that were saved {since} may hold corrupted values: move them away to"
            " resume from an earlier one."
        )

    def _check_loss(self, micro_batches: Sequence[Batch]) -> list[str]:
        again = self._recompute(micro_batches)
        first = self.step.first_loss.item()
        (differ,) = self.mesh.all_reduce_sum(float(not _equal(first, again)))
        if not differ:
            self.comparable = True
            return []
        # Other kernels or corruption? Every process takes part in another pass.
        third = self._recompute(micro_batches)
        if not _equal(again, third):
            return [
                f"the loss of the same micro-batch was computed twice and is {again!r} and"
                f" {third!r}"
            ]
        if self.comparable:
            return (
                []
                if _equal(first, again)
                else [f"the loss of a micro-batch was {first!r}, and computed again {again!r}"]
            )
        if self.comparable is None:
            logger.info(
                "Corruption check: passes with and without gradients differ in their bits; only"
                " the latter are compared."
            )
        self.comparable = False
        return []

    def _recompute(self, micro_batches: Sequence[Batch]) -> float:
        self.step.heartbeat("corruption check")
        return self.step.loss(
            micro_batches if self.step.pipeline is not None else micro_batches[:1]
        ).item()

    def _check_rounding(self) -> list[str]:
        """On one device: check that the model's weights are the rounded fp32 weights."""
        return [
            f"{name} is not the rounded fp32 weight"
            for name, weight, master in self.step.weights.working_copies()
            if digest(master.to(weight.dtype)) != digest(weight)
        ]

    def _replicated_state(self) -> dict[str, Any]:
        """Digests of the weights and moments of which other processes hold copies."""
        step, tensors = self.step, self.step.weights.tensors
        biases = step.routers.biases if step.routers is not None else {}
        found: dict[str, Any] = {
            f"bias of router {layer}": digest(bias) for layer, bias in biases.items()
        }
        for name, count in step.replication_factor.items():
            if count > 1:
                parts = {"weight": local_part(tensors[name])}
                if name in step.optimizer.weights:  # frozen weights have no moments
                    parts["exp_avg"] = step.optimizer.exp_avg[name]
                    parts["exp_avg_sq"] = step.optimizer.exp_avg_sq[name]
                parts |= zip(
                    ("tops of exp_avg", "tops of exp_avg_sq"),
                    step.optimizer.block_absmax.get(name, ()),
                    strict=False,
                )
                found |= {
                    f"{part} of {name}{_shard_label(tensors[name])}": digest(local)
                    for part, local in parts.items()
                }
        return found

    def _gathered_weights(self) -> dict[str, Any]:
        """Digests of the weights that the last pass gathered; ZeRO 3 keeps few of them."""
        return {
            f"gathered {name}{_shard_label(weight)}": digest(local_part(weight))
            for name, weight in self.step.weights.gathered().items()
        }


def find_differences(reports: Sequence[Report]) -> list[str]:
    """Describe each fault, and each replicated value that differs between processes."""
    found = [
        f"{_format_ranks([rank], reports)}: {fault}"
        for rank, report in enumerate(reports)
        for fault in report.faults
    ]
    for name in dict.fromkeys(name for report in reports for name in report.replicated):
        replicated = {
            rank: report.replicated[name]
            for rank, report in enumerate(reports)
            if name in report.replicated
        }
        (value, most), *others = Counter(map(repr, replicated.values())).most_common()
        if not others:
            continue
        if most > others[0][1]:
            different = [rank for rank, one in replicated.items() if repr(one) != value]
            found.append(
                f"{_format_ranks(different, reports)}: {name} is not what the {most} other"
                " processes hold"
            )
        else:
            found.append(f"{name} is not the same on {_format_ranks(replicated, reports)}")
    return found


def _format_ranks(ranks: Iterable[int], reports: Sequence[Report]) -> str:
    ranks = list(ranks)
    named = ", ".join(f"rank {rank} on {reports[rank].host}" for rank in ranks[:8])
    return named + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


@torch.no_grad()
def find_nonfinite_state(step: TrainStep) -> list[str]:
    """Describe weights and moments of this process with NaN, infinities or negative second moments.

    No update makes such numbers. One pass without copies: 10 ms for 20 million fp32 numbers on two
    cores.
    """
    optimizer = step.optimizer
    parts = {
        "weight": step.weights.local(),
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
    }
    for number, part in enumerate(("exp_avg", "exp_avg_sq")):
        if (
            optimizer.block_absmax
        ):  # 8 bits say nothing of NaN and infinities, the tops of their blocks do
            parts[part] = {name: one[number] for name, one in optimizer.block_absmax.items()}
    here = {
        (part, name): one
        for part, every in parts.items()
        for name, one in every.items()
        if one.numel()
    }
    if not here:
        return []
    extremes = torch.stack(
        [torch.stack(torch.aminmax(one)).float() for one in here.values()]
    )  # both NaN if one is
    wrong = []
    for (part, name), (least, most) in zip(here, extremes.tolist(), strict=True):
        if not (math.isfinite(least) and math.isfinite(most)) or (
            optimizer.block_absmax and part != "weight" and most >= INFINITE_LEVEL
        ):
            wrong.append(f"{part} of {name} holds NaN or infinities")
        elif part == "exp_avg_sq" and least < 0:
            wrong.append(f"{part} of {name}, averages of squares, holds numbers below zero")
    return wrong


def check_state_finite(step: TrainStep, mesh: Mesh, number: int, consequence: str = "") -> None:
    """Raise TrainingStopped on every process if any has non-finite weights or moments.

    `consequence`: a sentence for the message.
    """
    reports = all_gather_object((socket.gethostname(), find_nonfinite_state(step)), mesh.slow_group)
    found = [
        f"rank {rank} on {host}: {one}"
        for rank, (host, wrong) in enumerate(reports)
        for one in wrong
    ]
    if not found:
        return
    for one in found:
        logger.error(f"Step {number}: {one}")
    more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
    raise TrainingStopped(
        f"step {number}: {found[0]}{more}. {consequence}No update makes such numbers, unless"
        " optimizer.learning_rate.base is far too large: a chip or its memory computes or"
        " remembers wrongly.",
        resumable=True,
    )


@torch.no_grad()
def digest(tensor: Tensor) -> int:
    """Compute a checksum, Σ bits · (2i + 1) modulo 2^64, which any one changed element changes."""
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for begin in range(0, len(bits), _CHUNK):
        chunk = bits[begin : begin + _CHUNK].long()
        total += (
            chunk * torch.arange(2 * begin + 1, 2 * (begin + len(chunk)) + 1, 2, device=bits.device)
        ).sum()
    return int(total.item())


def _equal(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def _shard_label(tensor: Tensor) -> str:
    """The coordinates of a DTensor's local shard along the mesh axes that shard it."""
    if not isinstance(tensor, DTensor):
        return ""
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    cuts = [
        str(at)
        for at, placement in zip(place, tensor.placements, strict=True)
        if not placement.is_replicate()
    ]
    return f" (part {', '.join(cuts)})" if cuts else ""
