"""Validation and test losses.

Each evaluation uses the same sequences: of the validation or test split, and of each of
`data.validation_sets`. The sets that `training.evaluations` names are measured on its intervals;
all that is due at a step is one record. task_evaluation.py runs tasks of lm-eval.
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
from fast_llm.training.task_evaluation import TaskEvaluator

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
    tasks: TaskEvaluator
    finished: int = -1  # the last step after which `run` did everything

    def __post_init__(self) -> None:
        self.config = self.spec.config.training

    def run(self, step: int, again: bool = True) -> bool:
        """Everything that is due after a step. Returns False if a signal interrupted it.

        `again`: also what was done after this step already, by this start or as metrics.jsonl says.
        """
        if not again and self.finished == step:  # without an experiment folder nothing is logged
            return True
        if splits := self._due_splits(step):
            logged = not again and self.metrics.is_logged("validation", step)
            if not logged and not self._evaluate("validation", step, splits):
                return False
        for name, evaluation in self.config.evaluations.items():
            if not evaluation.tasks or not evaluation.due_at(step, self.config.train_iters):
                continue
            logged = not again and self.metrics.is_logged("evaluation", step, name)
            if not logged and not self.tasks.run(name, step):
                return False
        self.finished = step
        return True

    def _due_splits(self, step: int) -> dict[str, tuple[str, int]]:
        """The splits that are measured after a step: name of the loss → split and batches.

        Before the first step, at the interval, and at the end.
        """
        last, settings = self.config.train_iters, self.config.validation
        found: dict[str, tuple[str, int]] = {}
        owned = {
            name: one for one in self.config.evaluations.values() for name in one.validation_sets
        }
        at_ends = step == 0 or step >= last
        if settings.interval is not None and (at_ends or settings.due(step)):
            iterations = settings.iterations or 1
            found["language_model_loss"] = "validation", iterations
            found |= {
                f"{name}_loss": (name, iterations)
                for name in self.spec.dataset.validation_sets
                if name not in owned
            }
        return found | {
            f"{name}_loss": (name, one.iterations or 1)
            for name, one in owned.items()
            if one.due_at(step, last)
        }

    def test(self, step: int) -> bool:
        """Measure and log the test loss. Returns False if a signal interrupted it."""
        splits = {"language_model_loss": ("test", self.config.test_iters)}
        return self._evaluate("test", step, splits)

    def _evaluate(self, phase: str, step: int, splits: dict[str, tuple[str, int]]) -> bool:
        """`splits`: the split of each metric, and its batches."""
        started = time.perf_counter()
        losses: dict[str, float | None] = {}
        by_source: list[float] = []
        tokens = 0
        for metric, (split, iterations) in splits.items():
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
