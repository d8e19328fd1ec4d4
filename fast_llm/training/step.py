"""One step: forward and backward over the micro-batches, then one update.

The loss is the mean over all the target tokens of the step, over all processes and micro-batches. How
many there are is known only when every process has counted its own, so gradients are made as if every
token were a target, and one factor puts that right: it is multiplied into the update together with
clipping and the loss scale, at no cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast_llm.config.train import OptimizerConfig, SpikesConfig
from fast_llm.model.batch import Batch
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer, clip_factor, squared_norm
from fast_llm.optim.schedule import learning_rate
from fast_llm.parallel.fsdp import ShardedWeights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.pipeline import TIED_WEIGHT, Pipeline
from fast_llm.parallel.single import SingleWeights
from fast_llm.training.spikes import SpikeDetector

# Gradients of a larger norm count as not finite: fp32 does not hold their squares, and an infinite average of squares would
# freeze its weight for good.
_LARGEST_NORM = 2.0**63


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every process."""

    loss: float  # mean over the target tokens, in nats; NaN without any
    gradient_norm: float  # before clipping; NaN without target tokens
    learning_rate: float
    loss_scale: float  # that the gradients were made with
    targets: int
    updated: bool  # whether the weights moved: not if anything was infinite or NaN, a spike, or nothing a target
    stop: bool  # whether any process was asked to stop
    spike: str = ""  # what stood out


class TrainStep:
    """The parts that a step needs, put together once."""

    def __init__(
        self,
        model: nn.Module,
        weights: SingleWeights | ShardedWeights,
        optimizer: Optimizer,
        loss_scale: LossScale,
        mesh: Mesh,
        config: OptimizerConfig,
        pipeline: Pipeline | None = None,
        heartbeat: Callable[[str], None] = lambda phase: None,
        spikes: SpikeDetector | None = None,
    ):
        """`mark`: is told what comes next."""
        self.model = model
        self.weights = weights
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.mesh = mesh
        self.config = config
        self.spikes = spikes or SpikeDetector(SpikesConfig())
        self.pipeline = pipeline
        self.heartbeat = heartbeat
        self.replication_factor = weights.replication_factor()
        if pipeline is not None and pipeline.tied_peer_rank is not None:
            self.replication_factor[TIED_WEIGHT] *= 2
        # Of this process's first micro-batch in the last step, float64; with a pipeline of all of them.
        self.first_loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
        # Of the processes that see the same tokens, whether this one's numbers count in sums over all.
        self.contributes = mesh.tensor.rank == 0 and (pipeline is None or pipeline.has_loss)

    def __call__(
        self,
        batches: Sequence[Batch],
        stop: Callable[[], bool] = lambda: False,
        check: Callable[[Sequence[Batch]], None] | None = None,
    ) -> StepResult:
        """Train on this process's micro-batches of one step; `stop`: whether this process was asked to by the time that all of
        them agree; `check`: before the update."""
        # Reduction over data and context averages; their number undoes that.
        reduction_size = self.mesh.data.size * self.mesh.context.size
        tokens = len(batches) * batches[0].tokens.numel() * reduction_size
        gradient_scale = self.loss_scale.value * reduction_size / tokens
        loss_sum = self.forward_backward(batches, gradient_scale)
        targets = sum(batch.targets for batch in batches)
        gradients = (
            self.weights.local_gradients()
        )  # taken now: PyTorch's pipelines drop them in a pass without gradients
        if check is not None:
            check(batches)
        self.heartbeat("sum over processes")
        total_loss, total_targets, square, stops = self.mesh.all_reduce_sum(
            loss_sum * self.contributes,
            targets * self.contributes,
            squared_norm(gradients, self.replication_factor),
            float(stop()),
        )
        self.heartbeat("update")
        scale, rate = (
            self.loss_scale.value,
            learning_rate(self.optimizer.updates + 1, self.config.learning_rate),
        )
        if not total_targets:  # an update would be nothing but decay of weights and moments
            return StepResult(math.nan, math.nan, rate, scale, 0, False, stops > 0)
        correction = tokens / (total_targets * scale)
        norm = math.sqrt(square) * correction if square >= 0 else math.nan
        loss_mean = total_loss / total_targets
        finite = norm <= _LARGEST_NORM and math.isfinite(loss_mean)
        spike = self.spikes.detect(loss_mean, norm) if finite else ""
        updated = finite and not spike
        if updated:
            factor = correction * clip_factor(norm, self.config.gradient_norm_clipping)
            self.optimizer.step(gradients, rate, factor)
            self.weights.sync_model_weights()
        self.loss_scale.update(finite)
        rate *= self.config.default_learning_rate_scale  # as the optimizer does
        return StepResult(
            loss_mean, norm, rate, scale, int(total_targets), updated, stops > 0, spike
        )

    def forward_backward(self, batches: Sequence[Batch], gradient_scale: float) -> Tensor:
        """The micro-batches' summed loss, float64; the gradients are those of `seed` times it."""
        if self.pipeline is not None:
            self.heartbeat("forward and backward")
            self.weights.before_micro_batch(first=True, last=True)
            loss_sum = self.pipeline.forward_backward(batches, gradient_scale)
            if self.pipeline.tied_peer_rank is not None:
                self.pipeline.add_tied_gradient(self.weights.local_gradients()[TIED_WEIGHT])
            self.first_loss = loss_sum
            return loss_sum
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number, batch in enumerate(batches):
            self.heartbeat("forward and backward")
            self.weights.before_micro_batch(first=number == 0, last=number == len(batches) - 1)
            batch = batch.to(self.mesh.device)
            loss = self.model(batch.tokens, batch.positions, batch.documents, batch.labels)
            (loss * gradient_scale).backward()
            loss_sum += loss.detach()
            if number == 0:
                self.first_loss = loss_sum.clone()
        return loss_sum

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """The micro-batches' summed loss, float64, without gradients."""
        if self.pipeline is not None:
            return self.pipeline.forward(batches)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            batch = batch.to(self.mesh.device)
            loss_sum += self.model(batch.tokens, batch.positions, batch.documents, batch.labels)
        return loss_sum

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """What this process adds to the sum of losses of one validation batch, and to its target tokens."""
        return self.loss(batches).item() * self.contributes, sum(
            batch.targets for batch in batches
        ) * self.contributes
