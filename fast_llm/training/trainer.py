"""The training loop: load, then step, log, validate, save, export, stop.

What happens at a step is written here and nowhere else. How it is done: step.py, metrics.py,
evaluate.py, checkpointing.py, spikes.py. job.py calls build.py, which makes the Trainer.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from fast_llm.collectives import all_gather_object
from fast_llm.data.loader import Loader
from fast_llm.errors import TrainingStopped
from fast_llm.model.batch import Batch
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.run_spec import RunSpec, StageSettings
from fast_llm.planning.stages import describe_stage, remaining_stages
from fast_llm.training.checkpointing import CheckpointManager
from fast_llm.training.corruption import CorruptionCheck, check_state_finite
from fast_llm.training.evaluate import Evaluator
from fast_llm.training.interrupt import Interrupt, describe_stop
from fast_llm.training.metrics import Metrics
from fast_llm.training.profile import profiled
from fast_llm.training.push import wait_for_push
from fast_llm.training.run import Run
from fast_llm.training.samples import PHASE as SAMPLES
from fast_llm.training.samples import Sampler
from fast_llm.training.saving import describe_saved
from fast_llm.training.spikes import handle_spike
from fast_llm.training.step import StepResult, TrainStep

logger = logging.getLogger("fast_llm")


@dataclass(eq=False)
class Trainer:
    """Trains until `train_iters`, from the newest checkpoint. Every process calls each method."""

    spec: RunSpec
    mesh: Mesh
    run: Run
    train_step: TrainStep
    checkpoints: CheckpointManager
    evaluator: Evaluator
    sampler: Sampler
    loader: Callable[..., Loader]  # of build.py
    metrics: Metrics
    interrupt: Interrupt
    heartbeat: Callable[..., None]  # tells the watchdog which phase begins
    apply_stage: Callable[[StageSettings], None]  # gives the model its rotary positions
    stopping: bool = False
    lifecycle: str = "start"  # then "steps" and "end"

    def __post_init__(self) -> None:
        self.config = self.spec.config.training
        self.state = self.checkpoints.state
        self.corruption_check = CorruptionCheck(self.train_step, self.mesh)

    def train(self) -> None:
        """Train until everything is on disk. An error is raised after a running save is complete.

        Returns after a signal too: job.py chooses the exit code (SIGTERM 143, SIGUSR1 0).
        """
        try:
            stopped = self.load() or self.train_steps() or self.finish()
            ending = (
                f"{stopped}{self.checkpoints.resume_hint}."
                if stopped
                else f"Training is complete: {self.state.step} steps."
            )
            self.heartbeat("saving", step=self.state.step, slow=True)
            self.checkpoints.saver.wait()
            self.evaluator.tasks.close()
            if self.config.export.push_to_hub.repo is not None:
                wait_for_push(
                    self.checkpoints.pusher,
                    self.mesh,
                    bool(stopped),
                    self.should_stop,
                    self.heartbeat,
                )
            logger.info(ending)
        except BaseException as error:
            self.checkpoints.on_failure(error)
            if isinstance(error, TrainingStopped) and error.resumable:
                raise TrainingStopped(f"{error} {describe_saved(self.run.folder)}") from error
            raise

    # The loop. Each part returns why the run stops there, or nothing.

    def load(self) -> str:
        """Restore the run, then do what an interrupted start left undone at its last step."""
        with self.metrics.exclude_from_speed():
            if not self.should_stop():
                self.evaluator.tasks.load()
                self.checkpoints.restore()
                self.apply_stage(self.state.stage)
            if not self.should_stop():
                self.run_pending()
        if self.stopping:
            return "Stopped by a signal before the first step of this start"
        return ""

    def train_steps(self) -> str:
        """Every step until the last, and what is due after each."""
        self.lifecycle = "steps"
        state, train_iters = self.state, self.config.train_iters
        while state.step < train_iters and not self.stopping:
            steps_left = self.begin_stage() - state.step
            first, stage = state.consumed_samples, state.stage
            with self.loader("training", first, steps_left, stage) as loader:
                self.heartbeat("data", step=state.step + 1)
                for micro_batches in loader:
                    result = self.run_step(state.step + 1, micro_batches)
                    self.log(result, loader)
                    self.check_finite(state.step)
                    self.checkpoints.saver.check()
                    if result.spike and self.rewind(result, loader):
                        break  # rewind_to keeps consumed_samples: no data is repeated
                    shutdown = self.config.shutdown.due(state.step) and state.step < train_iters
                    with self.metrics.exclude_from_speed():
                        self.run_due(state.step, shutdown)
                    if shutdown:
                        return f"Stopping after step {state.step}, as training.shutdown asks"
                    if self.stopping:
                        break
                    self.heartbeat("data", step=state.step + 1)
        if self.stopping:
            return f"Stopped by a signal after step {state.step}"
        return ""

    def begin_stage(self) -> int:
        """Let the lengths and positions of the next step's stage be in force. Returns the last step
        for which they are.
        """
        state, spec, train_iters = self.state, self.spec, self.config.train_iters
        if state.history is None or not spec.config.stages_change_model:
            return train_iters
        step, samples = state.step, state.consumed_samples
        tokens = state.history.inputs(samples)
        span, *_ = remaining_stages(spec.config, step, samples, tokens, spec.batch.batch_size)
        if span.number != state.stage.number:
            state.stage = spec.in_stage(span.number)
            epochs = spec.dataset.epochs("training", samples)
            logger.info(
                f"Stage {span.number + 1} of the data begins after step {step}:"
                f" {describe_stage(spec.config, span.number)}; epochs until here:"
                f" {', '.join(f'{source.name} {done:.3g}' for source, done in epochs)}."
            )
        self.apply_stage(state.stage)
        self.metrics.begin_stage(state.stage)
        return min(train_iters, span.last or train_iters)

    def run_step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Train on one batch. TrainStep (step.py): forward and backward, one reduction, AdamW."""
        if self.metrics.machines is not None:
            self.metrics.machines.before_step()
        check = partial(self.check_corruption, step) if self.config.double_check.due(step) else None
        with ExitStack() as around:
            if self.config.profiling.due(step):
                assert self.run.folder is not None
                folder = self.run.folder / "profile"
                around.enter_context(self.metrics.count_as_average_step())
                around.enter_context(
                    profiled(step, self.config.profiling, folder, self.mesh, self.heartbeat)
                )
            result = self.train_step(
                micro_batches, stop=lambda: self.interrupt.signal != 0, check=check
            )
        self.state.advance(result)
        self.checkpoints.averages.update(step)
        self.stopping |= result.stop
        return result

    def log(self, result: StepResult, loader: Loader) -> None:
        """Add the step to the metrics, and write a record if one is due."""
        step = self.state.step
        self.heartbeat("log")
        self.metrics.add(step, result)
        if self.config.logs.due(step) or step == self.config.train_iters:
            self.write_metrics(loader)

    def write_metrics(self, loader: Loader) -> None:
        """Write a record of the steps since the last one."""
        state = self.state
        self.metrics.write(
            state.step,
            state.consumed_samples,
            state.consumed_tokens,
            state.padding_by_source,
            loader.wait_seconds,
        )

    def run_due(self, step: int, shutdown: bool) -> None:
        """Validate, save and export, as due after a step. A run that is stopping only saves."""
        if not self.stopping:
            self.stopping |= not self.evaluator.run(step)
        self.sample(step)
        saves = self.run.folder is not None
        # At a shutdown a checkpoint is due too: config/checks.py demands it.
        if self.checkpoints.save_due(step) or (self.stopping and saves):
            last = self.stopping or shutdown or step == self.config.train_iters
            self.checkpoints.save(last)
        if self.checkpoints.export_due(step) and not self.stopping:
            self.checkpoints.export(last=shutdown or step == self.config.train_iters)

    def run_pending(self) -> None:
        """Do what is due at the step that is resumed from, and validate before the first step."""
        step = self.state.step
        if step > 0 and step >= self.config.train_iters:
            return  # finish does it
        if self.spec.branches:
            return  # the other run did it
        self.stopping |= not self.evaluator.run(step, again=step == 0)
        self.sample(step)
        if self.checkpoints.export_due(step) and not self.stopping:
            self.checkpoints.export()

    def sample(self, step: int) -> None:
        """Continue the prompts of `training.samples`, if that is due and was not done."""
        if not self.sampler.due(step) or self.stopping:
            return
        # After a step of this start, a record is of an attempt that was undone.
        if self.lifecycle == "steps" or not self.metrics.is_logged(SAMPLES, step):
            self.sampler.sample(step)

    def finish(self) -> str:
        """Do what is due after the last step. A finished run that is restarted begins here."""
        self.lifecycle = "end"
        step = self.state.step
        self.heartbeat("end of training", step=step, slow=True)
        self.stopping |= not self.evaluator.run(step, again=False)
        self.sample(step)
        tested = not self.config.test_iters or self.metrics.is_logged("test", step)
        if not tested and not self.stopping:
            self.stopping |= not self.evaluator.test(step)
        if self.checkpoints.save_due(step):
            self.checkpoints.save(last=True)  # like `export`, nothing if this step has one
        if self.checkpoints.export_due(step) and not self.should_stop():
            self.checkpoints.export(last=True)
        if self.stopping:
            return "Stopped by a signal before the final evaluation and export"
        return ""

    # Decisions that all processes make alike.

    def should_stop(self) -> bool:
        """Whether any process received a signal to stop. A collective; updates `stopping`."""
        # slow_group waits training.timeout: other processes may still read weights or export.
        received = all_gather_object(self.interrupt.signal != 0, self.mesh.slow_group)
        self.stopping |= any(received)
        return self.stopping

    def rewind(self, result: StepResult, loader: Loader) -> bool:
        """Apply `training.spikes` to a spike; whether the run is at an earlier checkpoint now."""
        state, config = self.state, self.config.spikes
        rewinds = self.checkpoints.rewinds
        path = handle_spike(config, state.step, result.spike, rewinds, self.checkpoints.newest)
        if path is None:  # `skip`, or no checkpoint yet; `stop` has raised
            return False
        self.write_metrics(loader)
        self.checkpoints.rewind_to(path)
        self.metrics.rewind(state.step, state.skipped_ranges[-1])
        return True

    def check_finite(self, step: int) -> None:
        """Raise TrainingStopped after `max_nonfinite_steps` in a row at the smallest loss scale."""
        limit = self.spec.config.optimizer.max_nonfinite_steps
        if self.state.nonfinite_steps >= limit and self.train_step.loss_scale.exhausted:
            # These steps changed nothing, but an older fault may be in the weights: reported first.
            check_state_finite(self.train_step, self.mesh, step)
            raise TrainingStopped(
                f"step {step}: loss or gradients were not finite {limit} times in a row"
                " (optimizer.max_nonfinite_steps). The weights were not touched by these steps."
                " Look at the data of these steps, lower optimizer.learning_rate.base, or"
                " continue from an earlier checkpoint.",
                resumable=True,
            )

    def check_corruption(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Check for silent data corruption, before the update."""
        with self.metrics.exclude_from_speed():
            self.corruption_check(step, micro_batches, self.checkpoints.counters())

    # Signals.

    def on_signal(self) -> tuple[str, str]:
        """Describe what a signal to stop does now. Called from another thread."""
        saves, saved = self.run.folder is not None, self.checkpoints.saver.last_saved
        return describe_stop(self.lifecycle, self.state.step, saves, saved)
