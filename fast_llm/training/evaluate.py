"""Validation and test losses.

Each evaluation uses the same sequences: of the validation or test split, and of each of
`data.validation_sets`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from fast_llm.data.loader import Loader
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.run_spec import RunSpec
from fast_llm.training.interrupt import Interrupt
from fast_llm.training.metrics import Metrics
from fast_llm.training.source_losses import SUMS
from fast_llm.training.step import TrainStep

logger = logging.getLogger("fast_llm")


# (split, first sequence, steps) → this process's micro-batches of each step. Micro-batch m of
# process r of P holds the b sequences from (m·P + r)·b on of the step.
MakeLoader = Callable[[str, int, int], Loader]


@dataclass(eq=False)
class Evaluator:
    """Measures losses without training. Every process calls each method."""

    spec: RunSpec
    mesh: Mesh
    train_step: TrainStep
    loader: MakeLoader
    metrics: Metrics
    interrupt: Interrupt
    heartbeat: Callable[..., None]  # tells the watchdog which phase begins

    def __post_init__(self) -> None:
        self.config = self.spec.config.training

    def validation_due(self, step: int) -> bool:
        """Whether validation is due: before the first step, at the interval, and at the end."""
        settings = self.config.validation
        at_ends = step == 0 or step >= self.config.train_iters
        return settings.interval is not None and (at_ends or settings.due(step))

    def validate(self, step: int) -> bool:
        """Measure and log the validation losses. Returns False if a signal interrupted it."""
        names = {f"{name}_loss": name for name in self.spec.dataset.validation_sets}
        iterations = self.config.validation.iterations or 1
        return self._evaluate(
            "validation", step, {"language_model_loss": "validation", **names}, iterations
        )

    def test(self, step: int) -> bool:
        """Measure and log the test loss. Returns False if a signal interrupted it."""
        return self._evaluate("test", step, {"language_model_loss": "test"}, self.config.test_iters)

    def _evaluate(self, phase: str, step: int, splits: dict[str, str], iterations: int) -> bool:
        """`splits`: the split of each metric."""
        started = time.perf_counter()
        losses: dict[str, float | None] = {}
        by_source: list[float] = []
        tokens = 0
        for metric, split in splits.items():
            found = self._loss(phase, step, split, iterations)
            if found is None:
                logger.info(f"{phase.capitalize()} at step {step} was interrupted by a signal.")
                return False
            total, targets, sums = found
            if metric == "language_model_loss":
                by_source = sums
            losses[metric] = total / targets if targets else None
            if not targets:
                logger.warning(
                    f"{phase.capitalize()} at step {step}: {split} has no target tokens, so there"
                    " is no loss: each of its documents has one token."
                )
            tokens += int(targets)
        seconds = time.perf_counter() - started
        self.metrics.write_evaluation(step, phase, losses, by_source, tokens, seconds)
        return True

    def _loss(
        self, phase: str, step: int, split: str, iterations: int
    ) -> tuple[float, float, list[float]] | None:
        """Summed loss and number of target tokens over all processes, and the sums by source; None
        if interrupted.
        """
        total = targets = 0.0
        by_source: list[float] = []
        with self.loader(split, 0, self.spec.evaluation_steps(split, iterations)) as loader:
            self.heartbeat("data", step=step)
            for micro_batches in loader:
                self.heartbeat(phase)
                own_loss, own_targets = self.train_step.evaluate(micro_batches)
                loss, count, stops, *summed = self.mesh.all_reduce_sum(
                    own_loss,
                    own_targets,
                    float(self.interrupt.signal != 0),
                    further=self.train_step.own_sums(),
                )
                total, targets = total + loss, targets + count
                sums = self.train_step.sums_by_name(summed).get(SUMS, [])
                zeros = [0.0] * len(sums)
                by_source = [a + b for a, b in zip(by_source or zeros, sums, strict=True)]
                if stops:
                    return None
                self.heartbeat("data")
        return total, targets, by_source
