"""Metrics: average the results of steps, and write records and log lines.

Every record goes to the log and metrics.jsonl and, if enabled, to TensorBoard and Weights & Biases,
under the same names. Speed covers training alone: validation, saving and exporting are excluded.
With best-fit packing, padding is no token: each step counts it, and speed and `consumed_tokens`
leave it out.
Model FLOP/s count the causal half of attention. MFU divides them by the device's dense bf16 peak,
and is left out where the peak is not known.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import psutil
import torch

from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import TrainConfig
from fast_llm.data.fim import FIM_COUNTS
from fast_llm.models.flops import Cost, peak_flops
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.run_spec import StageSettings
from fast_llm.report import LiveReport
from fast_llm.terminal import short_duration
from fast_llm.training.charts import TensorBoard, Wandb
from fast_llm.training.experts import RouterMonitor
from fast_llm.training.log_lines import evaluation_lines, score_lines, training_line
from fast_llm.training.machines import SpeedMonitor
from fast_llm.training.run import Run
from fast_llm.training.source_losses import SourceMonitor
from fast_llm.training.step import PADDING, StepResult

logger = logging.getLogger("fast_llm")

Z_LOSS = "z_loss"  # its name in metrics.jsonl, and in `TrainStep.sums` and `StepResult.sums`


class Metrics:
    """Gathers the results of steps and writes them when due."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        mesh: Mesh,
        batch: BatchSizes,
        cost: Cost,
        first: int,
        sources: SourceMonitor,
        routers: RouterMonitor | None = None,
        machines: SpeedMonitor | None = None,
    ):
        """`first`: the step from which this start of the run continues."""
        self.config = config
        self.run = run
        self.mesh = mesh
        self.batch = batch
        self.cost = cost
        self.sources, self.routers, self.machines = sources, routers, machines
        self.length = config.batch.sequence_length
        self.inputs = batch.batch_size * self.length  # of a step, in all stages
        self.tokens = 0  # of the steps since this start, without padding
        self.device_name = torch.cuda.get_device_name() if mesh.device.type == "cuda" else None
        self.start_step = first
        # Time of steps since this start, now and at the last record.
        self.train_seconds = self.train_seconds_at_last = 0.0
        self.data_seconds_at_last = 0.0
        self.average_step_seconds = 0.0  # over the steps of the last record; 0 before it
        self._since = time.perf_counter()
        self._steps: list[StepResult] = []
        self._costs: list[Cost] = []  # of the tokens of these steps
        self.steps_without_targets = 0  # since this start
        self.global_max_reserved = 0.0
        self.tensorboard: TensorBoard | None = None
        self.wandb: Wandb | None = None
        if run.is_main and config.training.tensorboard and run.folder is not None:
            self.tensorboard = TensorBoard(run.folder / "tensorboard", first)
        self.report = LiveReport(run.folder) if run.is_main and run.folder is not None else None
        if run.is_main and config.training.wandb is not None:
            self.wandb = Wandb(config.training.wandb, config, run)

    def begin_stage(self, stage: StageSettings) -> None:
        """Count the coming steps by the settings of a stage."""
        self.batch, self.cost, self.length = stage.batch, stage.cost, stage.length

    def is_logged(self, phase: str, step: int, evaluation: str | None = None) -> bool:
        """Whether metrics.jsonl has a record of a phase at a step. Every process calls it.

        `evaluation`: its name in `training.evaluations`, for that phase.
        """
        found = any(
            record.get("phase") == phase
            and record.get("step") == step
            and record.get("evaluation") == evaluation
            for record in self.run.recorded()
        )
        logged: bool = self.mesh.broadcast(found)
        return logged

    @contextmanager
    def exclude_from_speed(self) -> Iterator[None]:
        """Exclude the time spent inside from the time of steps."""
        self.train_seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    @contextmanager
    def count_as_average_step(self) -> Iterator[None]:
        """Count the step inside, which profiling slows down, as an average step.

        The average is over the steps since the last record, else over those of the last record. The
        first step of a start counts with its own time.
        """
        with self.exclude_from_speed():
            before, began = self.train_seconds, time.perf_counter()
            since = len(self._steps)
            usual = (
                (before - self.train_seconds_at_last) / since
                if since
                else self.average_step_seconds
            )
            yield
            self.train_seconds = before + (usual or time.perf_counter() - began)

    def add(self, step: int, result: StepResult) -> None:
        """Add the result of one step."""
        self._steps.append(result)
        self._costs.append(self.cost)
        self.tokens += self.inputs - _padding(result)
        if not result.targets:
            self._warn_no_targets(step)
        if self.run.progress is not None:
            elapsed = self.train_seconds + time.perf_counter() - self._since
            rate = self.tokens / elapsed
            left = elapsed / (step - self.start_step) * (self.config.training.train_iters - step)
            self.run.progress.show(
                step,
                self.config.training.train_iters,
                f"loss {result.loss:.4f}  {rate:,.0f} tokens/s  {short_duration(left)} left",
            )

    def _warn_no_targets(self, step: int) -> None:
        """Warn at the 1st, 2nd, 4th, 8th … step without target tokens."""
        self.steps_without_targets += 1
        if self.steps_without_targets & (self.steps_without_targets - 1) == 0:
            logger.warning(
                f"Step {step} has no target tokens: its documents have one token each, which has no"
                " token before it. There is no loss, and the update was skipped (step"
                f" {self.steps_without_targets} of this kind since the start)."
                f" `fast-llm why {self.run.folder or '<experiment_dir>'} {step}` shows the"
                " documents."
            )

    def rewind(self, step: int, record: dict[str, Any]) -> None:
        """Continue from an earlier step; `record`: the skipped range, for metrics.jsonl."""
        self.run.record({"run": self.run.number, "step": step, "phase": "rewind", **record})
        self.start_step, self.tokens = step, 0
        self.train_seconds = self.train_seconds_at_last = self.data_seconds_at_last = 0.0
        self._since = time.perf_counter()
        self._steps.clear()
        self._costs.clear()
        if self.routers is not None:
            self.routers.discard()
        if self.machines is not None:
            self.machines.discard()
        if self.tensorboard is not None:
            self.tensorboard.rewind(step)

    def write(
        self,
        step: int,
        consumed_samples: int,
        consumed_tokens: int,
        padding: Sequence[int],
        data_seconds: float,
    ) -> None:
        """Write a training record for the steps since the last one.

        `consumed_samples`, `consumed_tokens`: by the run; `padding`: in these samples, of each
        source; `data_seconds`: waited for data since this start.
        """
        now = time.perf_counter()
        self.train_seconds += now - self._since
        self._since = now
        steps, self._steps = self._steps, []
        costs, self._costs = self._costs, []
        if not steps:
            return
        step_seconds = (self.train_seconds - self.train_seconds_at_last) / len(steps)
        waited = (data_seconds - self.data_seconds_at_last) / len(steps)
        values = {
            **self._header(step, "training"),
            "batch_size": self.batch.batch_size,
            **({"sequence_length": self.length} if self.config.stages_change_model else {}),
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_tokens,
            **_results(steps),
            **_mean_z_loss(steps),
            **self.sources.training(steps, consumed_samples, padding),
            **(self.routers.summary() if self.routers is not None else {}),
            **self._speed(step, steps, costs, step_seconds, waited),
            **(self.machines.summary(step_seconds, waited) if self.machines is not None else {}),
            **self._progress(step),
            **self._memory(),
        }
        self.train_seconds_at_last, self.data_seconds_at_last = self.train_seconds, data_seconds
        self.average_step_seconds = step_seconds
        self._send(step, "Training", values)
        logger.info(training_line(values, self.mesh.size))

    def _header(self, step: int, phase: str) -> dict[str, Any]:
        return {
            "run": self.run.number,
            "step": step,
            "phase": phase,
            "iteration": step,
            "train_iters": self.config.training.train_iters,
        }

    def _speed(
        self,
        step: int,
        steps: list[StepResult],
        costs: list[Cost],
        step_seconds: float,
        data_seconds: float,
    ) -> dict[str, Any]:
        """Times of a step, and throughput per process. `costs`: of a token, of each step."""
        padding = sum(map(_padding, steps)) / (len(steps) * self.inputs)
        rate = self.inputs * (1 - padding) / step_seconds / self.mesh.size
        model_flops = rate * sum(one.model_flops_per_token for one in costs) / len(steps)
        hardware_flops = self.inputs / step_seconds / self.mesh.size
        hardware_flops *= sum(one.hardware_flops_per_token for one in costs) / len(steps)
        peak = peak_flops(self.device_name) if self.device_name else None
        return {
            "step_time_ms": step_seconds * 1e3,
            "step_time_average_ms": self.train_seconds / (step - self.start_step) * 1e3,
            "data_wait_ms": data_seconds * 1e3,
            **({PADDING: padding} if PADDING in steps[0].sums else {}),
            "tokens_per_sec_per_gpu": rate,
            "model_tflops": model_flops / 1e12,
            "hardware_tflops": hardware_flops / 1e12,
            "mfu": model_flops / peak if peak else None,
        }

    def _progress(self, step: int) -> dict[str, Any]:
        train_iters = self.config.training.train_iters
        remaining = self.train_seconds / (step - self.start_step) * (train_iters - step)
        completion = datetime.now().astimezone() + timedelta(seconds=remaining)
        return {
            "remaining_time": remaining,
            "completion_time": completion.isoformat(timespec="seconds"),
            "percent_done": 100 * step / train_iters,
        }

    def write_evaluation(
        self,
        step: int,
        phase: str,
        losses: dict[str, float | None],
        by_source: Sequence[float],
        tokens: int,
        seconds: float,
    ) -> None:
        """Write the losses of a `validation` or `test`.

        `losses`: `language_model_loss`, and one for each further set; None for a set without target
        tokens. `by_source`: the sums of `SourceLosses` over the sequences of the former.
        """
        values = {
            **self._header(step, phase),
            **losses,
            **self.sources.evaluation(losses, by_source),
            "tokens": tokens,
            "seconds": seconds,
        }
        self._send(step, phase.capitalize(), values)
        for line in evaluation_lines(values, losses):
            logger.info(line)
        if self.report is not None:
            self.report.write()

    def write_scores(
        self, step: int, evaluation: str, tasks: dict[str, dict[str, Any]], seconds: float
    ) -> None:
        """Write the scores of an evaluation's tasks: task → metric → value."""
        values = {
            **self._header(step, "evaluation"),
            "evaluation": evaluation,
            "tasks": tasks,
            "seconds": seconds,
        }
        self._send(step, "Evaluation", values)
        for line in score_lines(values):
            logger.info(line)
        if self.report is not None:
            self.report.write()

    def close(self, status: str) -> None:
        """Flush everything; `status` (ended, crashed) is for an alert of Weights & Biases."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.report is not None:
            self.report.write(wait=True)
        if self.wandb is not None:
            self.wandb.finish(status)

    def _send(self, step: int, phase: str, values: dict[str, Any]) -> None:
        self.run.record(values)
        of_sources = {
            f"sources/{source}/{name}": value
            for source, fields in values.get("sources", {}).items()
            for name, value in fields.items()
        }
        of_tasks = {
            f"{values['evaluation']}/{task}/{name}": value
            for task, fields in values.get("tasks", {}).items()
            for name, value in (fields | _flat_contamination(fields)).items()
        }
        numbers = {
            name: value
            for name, value in (values | of_sources | of_tasks).items()
            if isinstance(value, int | float) and name not in ("step", "iteration", "run")
        }
        if self.tensorboard is not None:
            self.tensorboard.send(phase, step, numbers)
        if self.wandb is not None:
            self.wandb.send(phase, step, numbers)

    def _memory(self) -> dict[str, float]:
        mebibyte = 2**20
        if self.mesh.device.type != "cuda":
            return {"resident": psutil.Process().memory_info().rss / mebibyte}
        values = {
            "allocated": torch.cuda.memory_allocated() / mebibyte,
            "max_allocated": torch.cuda.max_memory_allocated() / mebibyte,
            "reserved": torch.cuda.memory_reserved() / mebibyte,
            "max_reserved": torch.cuda.max_memory_reserved() / mebibyte,
        }
        torch.cuda.reset_peak_memory_stats()
        self.global_max_reserved = max(self.global_max_reserved, values["max_reserved"])
        return values | {"global_max_reserved": self.global_max_reserved}


def _flat_contamination(fields: dict[str, Any]) -> dict[str, int]:
    """How many examples of a task the training data holds, for charts."""
    return {f"contamination_{k}": v for k, v in fields.get("contamination", {}).items()}


def _padding(result: StepResult) -> int:
    """Inputs of a step that hold no token."""
    return int(sum(result.sums.get(PADDING, ())))


def _mean_z_loss(steps: list[StepResult]) -> dict[str, float]:
    """The mean of (log Σ exp)² over the target tokens of each step, and then over steps.

    Without the coefficient; nothing if there is no z-loss.
    """
    if Z_LOSS not in steps[0].sums:
        return {}
    used = [result for result in steps if result.updated or result.spike]
    means = [result.sums[Z_LOSS][0] / result.targets for result in used]
    return {Z_LOSS: sum(means) / len(means) if means else math.nan}


def _results(steps: list[StepResult]) -> dict[str, Any]:
    """What the steps computed: means, sums, and the last step's norm, rate and loss scale."""
    losses = [result.loss for result in steps if result.updated or result.spike]
    return {
        "language_model_loss": sum(losses) / len(losses) if losses else math.nan,
        "grad_norm": steps[-1].gradient_norm,  # NaN (null in metrics.jsonl) without target tokens
        "learning_rate": steps[-1].learning_rate,
        "loss_scale": steps[-1].loss_scale,
        "skipped_iters": sum(not result.updated for result in steps),
        "nan_iters": sum(result.targets > 0 and not math.isfinite(result.loss) for result in steps),
        "spikes": sum(bool(result.spike) for result in steps),
        "target_tokens": sum(result.targets for result in steps),
        **_fim(steps),
    }


def _fim(steps: list[StepResult]) -> dict[str, int]:
    """Counts of fill-in-the-middle, if the run has it."""
    counts = [result.sums["fim"] for result in steps if "fim" in result.sums]
    sums = (int(sum(values)) for values in zip(*counts, strict=True))
    return dict(zip(FIM_COUNTS, sums, strict=True)) if counts else {}
