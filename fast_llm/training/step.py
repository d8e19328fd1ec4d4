"""One step: forward and backward over the micro-batches, then one update.

The loss is the mean over all target tokens of the step, over all processes and micro-batches. Their
number is known only after a sum over the processes. So gradients are computed as if every token
were a target, and one factor corrects that. It is multiplied into the update together with clipping
and the loss scale, at no cost.

One reduction of four numbers is the only synchronization with the device in a step: the loss, the
target tokens, the squared gradient norm, and whether to stop. Further sums for the log go with it
(`TrainStep.sums`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.train import SpikesConfig
from fast_llm.model.batch import Batch
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer, clip_factor, squared_norm
from fast_llm.optim.schedule import learning_rate
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.pipeline import Pipeline
from fast_llm.parallel.weights import Weights
from fast_llm.training.experts import RouterMonitor
from fast_llm.training.spikes import SpikeDetector

# Gradients with a larger norm count as not finite: fp32 does not hold their squares, and an
# infinite second moment would freeze its weight.
_LARGEST_NORM = 2.0**63

PADDING = "padding"  # in `TrainStep.sums`: inputs without a token, of each source


@dataclass(frozen=True)
class StepResult:
    """The result of a step, equal on every process."""

    loss: float  # mean over the target tokens, in nats; NaN without any
    gradient_norm: float  # before clipping; NaN without target tokens
    learning_rate: float
    loss_scale: float  # of the gradients
    targets: int
    updated: (
        bool  # False if loss or gradients were not finite, for a spike, and without target tokens
    )
    stop: bool  # whether any process received a signal to stop
    spike: str = ""  # its description
    sums: dict[str, list[float]] = field(default_factory=dict)  # of TrainStep.sums, flattened


class TrainStep:
    """Trains on one batch. Holds the parts that a step needs."""

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        optimizer: Optimizer,
        loss_scale: LossScale,
        mesh: Mesh,
        config: OptimizerConfig,
        pipeline: Pipeline | None = None,
        heartbeat: Callable[[str], None] = lambda phase: None,
        spikes: SpikeDetector | None = None,
        routers: RouterMonitor | None = None,
    ):
        """`heartbeat`: called at the start of each phase, as `Watchdog.heartbeat`.

        `routers`: of a model with experts.
        """
        self.model = model
        self.weights = weights
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.mesh = mesh
        self.config = config
        self.spikes = spikes or SpikeDetector(SpikesConfig())
        self.pipeline = pipeline
        self.routers = routers
        self.heartbeat = heartbeat
        # Called before each update, while a checkpoint's copy of the state may be under way.
        self.before_update: Callable[[], None] = lambda: None
        self.replication_factor = weights.replication_factor()
        if pipeline is not None and pipeline.tied_peer_rank is not None:
            self.replication_factor[pipeline.tied_weight] *= 2
        # Loss of this process's first micro-batch in the last step, float64; of all micro-batches
        # with a pipeline.
        self.first_loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
        # Whether this process's losses enter sums over all processes: of several with the same
        # tokens, one does.
        self.contributes = mesh.tensor.rank == 0 and (pipeline is None or pipeline.has_loss)
        # Further sums of a step, by name: tensors on the device to which the forward passes add,
        # with the same names and shapes on every process. The step sets them to 0, and sums them
        # over the processes that contribute. "fim" and PADDING are added up here, from the batches.
        self.sums: dict[str, Tensor] = {}

    def __call__(
        self,
        micro_batches: Sequence[Batch],
        stop: Callable[[], bool] = lambda: False,
        check: Callable[[Sequence[Batch]], None] | None = None,
    ) -> StepResult:
        """Train on this process's micro-batches of one step.

        `stop`: whether this process received a signal to stop, asked as late as possible; `check`:
        called before the update.
        """
        # Gradients are averaged over data and context; this factor makes them sums.
        reduction_size = self.mesh.data.size * self.mesh.context.size
        tokens = len(micro_batches) * micro_batches[0].tokens.numel() * reduction_size
        gradient_scale = self.loss_scale.value * reduction_size / tokens
        targets = sum(batch.targets for batch in micro_batches)
        if self.routers is not None:
            self.routers.begin_step(len(micro_batches), targets * self.contributes, gradient_scale)
        loss_sum = self.forward_backward(micro_batches, gradient_scale)
        # `check` computes losses again, which add to the sums.
        further = self.own_sums()
        if self.routers is not None:
            self.routers.end_step()
        # Taken before `check`: PyTorch's pipelines drop gradients in a pass without them.
        gradients = self.weights.local_gradients()
        if check is not None:
            check(micro_batches)
        self.heartbeat("sum over processes")
        total_loss, total_targets, square, stops, *summed = self.mesh.all_reduce_sum(
            loss_sum * self.contributes,
            targets * self.contributes,
            squared_norm(gradients, self.replication_factor),
            float(stop()),
            further=further,
        )
        sums = self.sums_by_name(summed)
        self.heartbeat("update")
        scale = self.loss_scale.value
        rate = learning_rate(self.optimizer.updates + 1, self.config.learning_rate)
        if not total_targets:  # an update would only decay weights and moments
            return StepResult(math.nan, math.nan, rate, scale, 0, False, stops > 0, sums=sums)
        correction = tokens / (total_targets * scale)
        norm = math.sqrt(square) * correction if square >= 0 else math.nan
        loss_mean = total_loss / total_targets
        finite = norm <= _LARGEST_NORM and math.isfinite(loss_mean)
        spike = self.spikes.detect(loss_mean, norm) if finite else ""
        updated = finite and not spike
        if updated:
            factor = correction * clip_factor(norm, self.config.gradient_norm_clipping)
            self.before_update()
            self.optimizer.step(gradients, rate, factor)
            self.weights.sync_model_weights()
            if self.routers is not None:
                self.routers.update_biases()
        self.loss_scale.update(finite)
        rate *= self.config.default_learning_rate_scale  # as the optimizer does
        return StepResult(
            loss_mean, norm, rate, scale, int(total_targets), updated, stops > 0, spike, sums
        )

    def _reset_sums(self, micro_batches: Sequence[Batch]) -> None:
        for each in self.sums.values():
            each.zero_()
        # Processes of a context group have parts of the same sequences.
        for name in ("fim", PADDING):
            if name in self.sums and self.mesh.context.rank == 0:
                counts = [getattr(batch, name) for batch in micro_batches]
                total = torch.tensor(counts, dtype=torch.float64).sum(0)
                self.sums[name] += total.to(self.mesh.device, non_blocking=True)

    def own_sums(self) -> list[Tensor]:
        """What this process contributes to `sums`, as copies."""
        return [each * self.contributes for each in self.sums.values()]

    def sums_by_name(self, summed: Sequence[float]) -> dict[str, list[float]]:
        """The elements of `sums` after the reduction, by name."""
        remaining = iter(summed)
        return {name: list(islice(remaining, each.numel())) for name, each in self.sums.items()}

    def forward_backward(self, micro_batches: Sequence[Batch], gradient_scale: float) -> Tensor:
        """Return the summed loss of the micro-batches, float64.

        Gradients are those of the loss times `gradient_scale`. `sums` are those of this pass.
        """
        self._reset_sums(micro_batches)
        if self.pipeline is not None:
            self.heartbeat("forward and backward")
            self.weights.before_micro_batch(first=True, last=True)
            loss_sum = self.pipeline.forward_backward(micro_batches, gradient_scale)
            tied = self.pipeline.tied_weight
            if self.pipeline.tied_peer_rank is not None and tied in self.optimizer.weights:
                gradients = self.weights.local_gradients()
                self.pipeline.add_tied_gradient(gradients[tied])
            self.first_loss = loss_sum
            return loss_sum
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number, batch in enumerate(micro_batches):
            self.heartbeat("forward and backward")
            self.weights.before_micro_batch(
                first=number == 0, last=number == len(micro_batches) - 1
            )
            batch = batch.to(self.mesh.device)
            loss = self.model(
                batch.tokens, batch.positions, batch.documents, batch.labels, batch.sources
            )
            (loss * gradient_scale).backward()
            loss_sum += loss.detach()
            if number == 0:
                self.first_loss = loss_sum.clone()
        return loss_sum

    @torch.no_grad()
    def loss(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Return the summed loss of the micro-batches, float64, without gradients.

        `sums` are those of this pass.
        """
        self._reset_sums(micro_batches)
        if self.pipeline is not None:
            return self.pipeline.forward(micro_batches)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in micro_batches:
            batch = batch.to(self.mesh.device)
            loss_sum += self.model(
                batch.tokens, batch.positions, batch.documents, batch.labels, batch.sources
            )
        return loss_sum

    def evaluate(self, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """Return this process's summed loss and number of target tokens, for validation."""
        return self.loss(micro_batches).item() * self.contributes, sum(
            batch.targets for batch in micro_batches
        ) * self.contributes
