"""What is logged: how it is averaged, what it is called, where it goes.

Every record goes to the log, to metrics.jsonl and, if they are asked for, to TensorBoard and Weights &
Biases, under the same names. Speed counts training alone: time spent in validation, saving and exporting is
left out. Rates: model FLOP/s counts the causal half of attention; MFU divides it by the device's peak for
dense bf16 products and is left out where that is not known.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import psutil
import torch

from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import TrainConfig
from fast_llm.model.cost import Cost
from fast_llm.parallel.mesh import Mesh
from fast_llm.training.charts import TensorBoard, Wandb
from fast_llm.training.run import Run
from fast_llm.training.step import StepResult

logger = logging.getLogger("fast_llm")


class Metrics:
    """Gathers the results of steps and writes them when due."""

    def __init__(
        self, config: TrainConfig, run: Run, mesh: Mesh, batch: BatchSizes, cost: Cost, first: int
    ):
        """`first`: the step from which this start of the run goes on."""
        self.config = config
        self.run = run
        self.mesh = mesh
        self.batch = batch
        self.cost = cost
        self.device_name = torch.cuda.get_device_name() if mesh.device.type == "cuda" else None
        self.start_step = self.last_written = first
        self.train_seconds = self.train_seconds_at_last = (
            0.0  # of training, since this start and at the last record
        )
        self.data_seconds_at_last = 0.0
        self.average_step_seconds = (
            0.0  # seconds of a step, on average of the last record's; 0 before it
        )
        self._since = time.perf_counter()
        self._steps: list[StepResult] = []
        self.skipped_in_a_row = 0
        self.global_max_reserved = 0.0
        self.tensorboard: TensorBoard | None = None
        self.wandb: Wandb | None = None
        if run.is_main and config.training.tensorboard and run.folder is not None:
            self.tensorboard = TensorBoard(run.folder / "tensorboard", first)
        if run.is_main and config.training.wandb is not None:
            self.wandb = Wandb(config.training.wandb, config, run)

    @contextmanager
    def exclude_from_speed(self) -> Iterator[None]:
        """Time spent inside does not count as time of steps."""
        self.train_seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    @contextmanager
    def count_as_average_step(self) -> Iterator[None]:
        """The step inside, which something slows down, counts as long as the others since the last record took on average, else as
        those before it; the first of a start as it is."""
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
        """Take note of one step."""
        self._steps.append(result)
        if result.targets:  # steps without any say nothing about whether training is healthy
            self.skipped_in_a_row = (
                0 if result.updated or result.spike else self.skipped_in_a_row + 1
            )
        if self.run.progress is not None:
            elapsed = self.train_seconds + time.perf_counter() - self._since
            rate = (
                (step - self.start_step)
                * self.batch.batch_size
                * self.config.batch.sequence_length
                / elapsed
            )
            left = elapsed / (step - self.start_step) * (self.config.training.train_iters - step)
            self.run.progress.show(
                step,
                self.config.training.train_iters,
                f"loss {result.loss:.4f}  {rate:,.0f} tokens/s  {_duration(left)} left",
            )

    def rewind(self, step: int, record: dict[str, Any]) -> None:
        """Go on counting from an earlier step; `record`: what happened, for metrics.jsonl."""
        self.run.record({"run": self.run.number, "step": step, "phase": "rewind", **record})
        self.start_step = self.last_written = step
        self.train_seconds = self.train_seconds_at_last = self.data_seconds_at_last = 0.0
        self._since = time.perf_counter()
        self._steps.clear()
        if self.tensorboard is not None:
            self.tensorboard.rewind(step)

    def write(self, step: int, samples: int, consumed: int, waited: float) -> None:
        """Write a training record for the steps since the last one.

        `samples`: sequences consumed by the run; `consumed`: their tokens; `waited`: seconds for data since this start.
        """
        now = time.perf_counter()
        self.train_seconds += now - self._since
        self._since = now
        steps, self._steps = self._steps, []
        if not steps:
            return
        good = [result for result in steps if result.updated or result.spike]
        train_iters = self.config.training.train_iters
        tokens = self.batch.batch_size * self.config.batch.sequence_length
        step_time = (self.train_seconds - self.train_seconds_at_last) / len(steps)
        average = self.train_seconds / (step - self.start_step)
        remaining = average * (train_iters - step)
        model_flops = self.cost.model_flops_per_token * tokens / step_time / self.mesh.size
        peak = self.cost.peak_flops(self.device_name) if self.device_name else None
        values: dict[str, Any] = {
            "run": self.run.number,
            "step": step,
            "phase": "training",
            "iteration": step,
            "train_iters": train_iters,
            "batch_size": self.batch.batch_size,
            "consumed_samples": samples,
            "consumed_tokens": consumed,
            "language_model_loss": sum(r.loss for r in good) / len(good) if good else math.nan,
            "grad_norm": steps[-1].gradient_norm,  # NaN, null in metrics.jsonl, where there is none
            "learning_rate": steps[-1].learning_rate,
            "loss_scale": steps[-1].loss_scale,
            "skipped_iters": sum(not r.updated for r in steps),
            "nan_iters": sum(r.targets > 0 and not math.isfinite(r.loss) for r in steps),
            "spikes": sum(bool(r.spike) for r in steps),
            "target_tokens": sum(r.targets for r in steps),
            "step_time_ms": step_time * 1e3,
            "step_time_average_ms": average * 1e3,
            "data_wait_ms": (waited - self.data_seconds_at_last) / len(steps) * 1e3,
            "tokens_per_sec_per_gpu": tokens / step_time / self.mesh.size,
            "model_tflops": model_flops / 1e12,
            "hardware_tflops": self.cost.hardware_flops_per_token
            * tokens
            / step_time
            / self.mesh.size
            / 1e12,
            "mfu": model_flops / peak if peak else None,
            "remaining_time": remaining,
            "completion_time": (
                datetime.now().astimezone() + timedelta(seconds=remaining)
            ).isoformat(timespec="seconds"),
            "percent_done": 100 * step / train_iters,
            **self._memory(),
        }
        self.train_seconds_at_last, self.data_seconds_at_last, self.last_written = (
            self.train_seconds,
            waited,
            step,
        )
        self.average_step_seconds = step_time
        self._send(step, "Training", values)
        memory = " | ".join(
            f"{name.replace('_', ' ')} {values[name]:,.2f} MiB" for name in self._memory_names()
        )
        mfu = f" ({100 * values['mfu']:.1f} % MFU)" if values["mfu"] else ""
        logger.info(
            f"Training @ iteration {step:{len(str(train_iters))}d}/{train_iters}"
            f" | consumed samples: {values['consumed_samples']:,} | consumed tokens: {values['consumed_tokens']:,}"
            f" | batch size: {self.batch.batch_size}"
            f" | step time: {values['step_time_ms']:.2f} ms"
            f" | throughput: {values['model_tflops']:.2f} tflop/s (model) | {values['hardware_tflops']:.2f} tflop/s"
            f" (hardware){mfu} | {values['tokens_per_sec_per_gpu']:.2f} tokens/s/gpu"
            f" | waited for data: {values['data_wait_ms']:.2f} ms"
            f" | Memory {memory}"
            f" | learning rate: {values['learning_rate']:.3e} | loss scale: {values['loss_scale']:g}"
            f" | grad norm: {values['grad_norm']:.4f}"
            f" | skipped iterations: {values['skipped_iters']} | nan iterations: {values['nan_iters']}"
            + (
                f" | spikes: {values['spikes']}"
                if self.config.training.spikes.policy != "none"
                else ""
            )
            + f" | average step time {values['step_time_average_ms']:.2f} ms"
            f" | remaining {_duration(remaining)}"
            f" | completion {values['completion_time'][:19].replace('T', ' ')} ({values['percent_done']:.2f} %)"
            f" | language model loss: {values['language_model_loss']:.5f} | run: {self.run.number}"
        )

    def write_evaluation(
        self, step: int, phase: str, losses: dict[str, float | None], tokens: int, seconds: float
    ) -> None:
        """Write the losses of a `validation` or `test`: `language_model_loss` and one per further set; None is of a set
        without target tokens."""
        values: dict[str, Any] = {
            "run": self.run.number,
            "step": step,
            "phase": phase,
            "iteration": step,
            "train_iters": self.config.training.train_iters,
            **losses,
            "tokens": tokens,
            "seconds": seconds,
        }
        self._send(step, phase.capitalize(), values)
        text = " | ".join(
            f"{name.replace('_', ' ')}: "
            + (
                "no target tokens"
                if loss is None
                else f"{loss:.5f} (perplexity {math.exp(min(loss, 700)):.2f})"
            )
            for name, loss in losses.items()
        )
        logger.info(
            f"{phase.capitalize()} @ iteration {step}/{self.config.training.train_iters} | {text}"
            f" | {tokens:,} tokens in {seconds:.1f} s | run: {self.run.number}"
        )

    def close(self, status: str) -> None:
        """Flush everything; `status` ends up in W&B's alert, if these are wanted."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(status)

    def _send(self, step: int, phase: str, values: dict[str, Any]) -> None:
        self.run.record(values)
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and name not in ("step", "iteration", "run")
        }
        if self.tensorboard is not None:
            self.tensorboard.send(phase, step, numbers)
        if self.wandb is not None:
            self.wandb.send(phase, step, numbers)

    def _memory_names(self) -> list[str]:
        if self.mesh.device.type == "cuda":
            return ["allocated", "max_allocated", "reserved", "max_reserved", "global_max_reserved"]
        return ["resident"]

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


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
