"""One step: forward and backward over the micro-batches, then one update.

The loss is the mean over all the target tokens of the step, over all processes and micro-batches. How
many there are is known only when every process has counted its own, so gradients are made as if every
token were a target, and one factor puts that right: it is multiplied into the update together with
clipping and the loss scale, at no cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fast_llm.config.train import OptimizerConfig
from fast_llm.data.loader import Batch
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer, clip_factor, squared_norm
from fast_llm.optim.schedule import learning_rate
from fast_llm.parallel.fsdp import ShardedWeights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.single import SingleWeights


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every process."""

    loss: float  # mean over the target tokens, in nats
    gradient_norm: float  # before clipping
    learning_rate: float
    loss_scale: float  # that the gradients were made with
    targets: int
    updated: bool  # whether the weights moved: not if anything was infinite or NaN
    stop: bool  # whether any process was asked to stop


class Step:
    """The parts that a step needs, put together once."""

    def __init__(
        self,
        model: nn.Module,
        weights: SingleWeights | ShardedWeights,
        optimizer: Optimizer,
        loss_scale: LossScale,
        mesh: Mesh,
        config: OptimizerConfig,
    ):
        self.model = model
        self.weights = weights
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.mesh = mesh
        self.config = config

    def __call__(self, batches: Sequence[Batch], stop: bool = False) -> StepResult:
        """Train on this process's micro-batches of one step; `stop`: this process was asked to."""
        tokens = len(batches) * batches[0].tokens.numel() * self.mesh.size
        # Reduction over the processes averages; their number undoes that.
        seed = self.loss_scale.value * self.mesh.size / tokens
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        targets = 0
        for number, batch in enumerate(batches):
            self.weights.before_micro_batch(first=number == 0, last=number == len(batches) - 1)
            batch = batch.to(self.mesh.device)
            loss = self.model(batch.tokens, batch.positions, batch.documents, batch.labels)
            (loss * seed).backward()
            loss_sum += loss.detach()
            targets += batch.targets
        gradients = self.weights.local_gradients()
        total_loss, total_targets, square, stops = self.mesh.sum(
            loss_sum, targets, squared_norm(gradients.values()) / self.mesh.copies, float(stop)
        )
        correction = tokens / (max(total_targets, 1) * self.loss_scale.value)
        norm = math.sqrt(square) * correction if square >= 0 else math.nan
        loss_mean = total_loss / max(total_targets, 1)
        finite = math.isfinite(norm) and math.isfinite(loss_mean)
        rate = learning_rate(self.optimizer.updates + 1, self.config.learning_rate)
        if finite:
            factor = correction * clip_factor(norm, self.config.gradient_norm_clipping)
            self.optimizer.step(gradients, rate, factor)
            self.weights.publish()
        scale = self.loss_scale.value
        self.loss_scale.update(finite)
        return StepResult(loss_mean, norm, rate, scale, int(total_targets), finite, stops > 0)


def evaluate(model: nn.Module, batches: Sequence[Batch], mesh: Mesh) -> tuple[float, int]:
    """This process's sum of losses over the micro-batches of one validation batch, and its target tokens."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
    targets = 0
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(mesh.device)
            loss_sum += model(batch.tokens, batch.positions, batch.documents, batch.labels)
            targets += batch.targets
    return loss_sum.item(), targets
