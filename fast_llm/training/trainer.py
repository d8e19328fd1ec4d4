"""The loop, top to bottom: what happens at a step is written here and nowhere else.

step → log → validation → checkpoint → export → stop. All that a run needs to go on is in a checkpoint: the
fp32 weights, both moments, and a few numbers. Data and learning rate are functions of these numbers.
"""

import logging
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import state
from fast_llm.checkpoint.huggingface import export_files
from fast_llm.checkpoint.weights import all_gather_object, export_hugging_face, load_weights
from fast_llm.config.train import CallbackConfig, TrainConfig
from fast_llm.data.loader import Loader
from fast_llm.errors import TrainingStopped
from fast_llm.model.batch import Batch
from fast_llm.model.llama import init_weights
from fast_llm.models.llama import export_config
from fast_llm.parallel.context import shard_batch
from fast_llm.parallel.fsdp import ShardedWeights, like
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.single import SingleWeights
from fast_llm.planning.preflight import RunSpec
from fast_llm.training.corruption import CorruptionCheck, find_nonfinite_state
from fast_llm.training.interrupt import Interrupt
from fast_llm.training.metrics import Metrics
from fast_llm.training.profile import Profile
from fast_llm.training.run import Run
from fast_llm.training.saving import Saver, describe_saved
from fast_llm.training.step import StepResult, TrainStep

logger = logging.getLogger("fast_llm")

# What is done first when the run is asked to stop, by the part that it is in.
_ON_SIGNAL = {
    "start": "the run ends before its next step; there is nothing new to save",
    "steps": "the current step is finished and saved, then the run ends",
    "end": "the run ends; the same command does the rest of what is due at its end",
}


class Trainer:
    """Trains until `train_iters`, from wherever the run stands."""

    def __init__(
        self,
        spec: RunSpec,
        mesh: Mesh,
        run: Run,
        weights: SingleWeights | ShardedWeights,
        step: TrainStep,
        interrupt: Interrupt,
        heartbeat: Callable[..., None],
    ):
        """`mark`: is told what comes next, as `Watchdog.mark`."""
        self.spec = spec
        self.config: TrainConfig = spec.config
        self.mesh = mesh
        self.run = run
        self.weights = weights
        self.train_step = step
        self.interrupt = interrupt
        self.heartbeat = heartbeat
        self.step = 0  # steps
        self.consumed_samples = 0  # sequences that these consumed, and those that were passed over
        self.skipped_ranges: list[dict[str, int]] = []  # each time that the run went back
        self.history = spec.history
        self.saver = Saver(mesh.checkpoint_group, spec.config.training.checkpoint.background)
        self.corruption_check = CorruptionCheck(step, mesh)
        self.stopping = False
        self.lifecycle = "start"  # of _AFTER
        self.steps_without_targets = 0  # steps since this start
        self.metrics = Metrics(spec.config, run, mesh, spec.batch, spec.cost, spec.completed_steps)

    def fit(self) -> None:
        """Train, from the newest checkpoint if there is one, until what was saved is on disk."""
        try:
            end = self.steps()
            self.heartbeat("saving", step=self.step, slow=True)
            self.saver.wait()
            logger.info(end)
        except BaseException as error:
            self.on_failure(error)
            if isinstance(error, TrainingStopped) and error.resumable:
                raise TrainingStopped(f"{error} {describe_saved(self.run.folder)}") from error
            raise

    def on_signal(self) -> tuple[str, str]:
        """What follows a signal to stop that comes now, and what else a second one does; for the user, from another thread."""
        effect = _ON_SIGNAL[self.lifecycle]
        if self.run.folder is None:
            return (
                "the run ends after the current step. Nothing is saved: run.experiment_dir is not set",
                "",
            )
        if self.lifecycle == "start":
            return effect, ""
        saved, done = self.saver.last_saved, self.step
        if saved < 0:
            return effect, " and loses all steps: no checkpoint is complete yet"
        return (
            effect,
            f" and loses the steps after checkpoint {saved}"
            if saved < done or self.lifecycle == "steps"
            else "",
        )

    def on_failure(self, error: BaseException) -> None:
        """Training ends by an error: have the checkpoint finished that is being written, if that can be."""
        self.mesh.failures.failing = True
        seconds = None  # as long as it takes
        if self.mesh.size > 1 and not isinstance(error, TrainingStopped):
            # Others know nothing of it, or are gone: they wait for this process only so long, or this one for them in vain.
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                return
            seconds = self.config.model.distributed.timeout / 2
        if self.saver.busy:
            self.heartbeat("saving", slow=True)
            self.saver.finish_after_failure(seconds)

    def steps(self) -> str:
        """Every step, and what is due at the end; why it is the end."""
        with self.metrics.exclude_from_speed():
            if not self.should_stop():
                self.restore()
            if not self.should_stop():
                self.run_pending()
        if self.stopping:
            return f"Stopped by a signal before the first step of this start{self.resume_hint}."
        self.lifecycle = "steps"
        while (end := self.train_steps()) is None:
            pass  # a spike: on from a checkpoint
        self.lifecycle = "end"
        return end or self.finish()

    @property
    def resume_hint(self) -> str:
        """How a line about the end ends."""
        if self.run.folder is None:
            return "; nothing was saved, because run.experiment_dir is not set"
        if self.saver.last_started < 0:
            return "; no checkpoint is complete, so the same command starts from the beginning"
        return "; the same command continues"

    def should_stop(self) -> bool:
        """Whether any process was asked to stop; all of them ask at the same time."""
        self.stopping |= any(all_gather_object(self.interrupt.signal != 0, self.mesh.slow_group))
        return self.stopping

    def run_pending(self) -> None:
        """What is due before the first step, or was due at the one that this start goes on from and was broken off."""
        training, step = self.config.training, self.step
        if training.validation.interval is not None and (
            step == 0
            or (training.validation.due(step) and ("validation", step) not in self.logged_phases())
        ):
            self.validate(step)
        if step > 0 and training.export.due(step) and not self.stopping:
            self.export(step)

    def train_steps(self) -> str | None:
        """Steps until the last, "", or until something else ends the run: what; None if it went back instead."""
        training = self.config.training
        with self.loader(
            "training", self.consumed_samples, training.train_iters - self.step
        ) as batches:
            self.heartbeat("data", step=self.step + 1)
            for step, batch in enumerate(batches, start=self.step + 1):
                check = (
                    partial(self.check_corruption, step)
                    if training.double_check.due(step)
                    else None
                )
                with self.profiled(step) if training.profiling.due(step) else nullcontext():
                    result = self.train_step(
                        batch, stop=lambda: self.interrupt.signal != 0, check=check
                    )
                self.step, self.consumed_samples = (
                    step,
                    self.consumed_samples + self.spec.batch.batch_size,
                )
                self.stopping |= result.stop
                self.heartbeat("log")
                self.metrics.add(step, result)
                if not result.targets:
                    self.warn_no_targets(step)
                if training.logs.due(step) or step == training.train_iters:
                    self.metrics.write(
                        step, self.consumed_samples, self.tokens, batches.wait_seconds
                    )
                self.check_finite(step)
                self.saver.check()
                if result.spike and self.handle_spike(step, result, batches):
                    if self.stopping:  # the state is that of the checkpoint, which is there
                        break
                    return None
                shutdown = training.shutdown.due(step) and step < training.train_iters
                with self.metrics.exclude_from_speed():
                    if training.validation.due(step) and not self.stopping:
                        self.validate(step)
                    if training.checkpoint.due(step) or (
                        self.stopping and self.run.folder is not None
                    ):
                        self.save(step, last=self.stopping or shutdown)
                    if training.export.due(step) and not self.stopping:
                        self.export(step)
                if shutdown:
                    return (
                        f"Stopping after step {step}, as training.shutdown asks{self.resume_hint}."
                    )
                if self.stopping:
                    break
                self.heartbeat("data", step=step + 1)
        if self.stopping:
            return f"Stopped by a signal after step {self.step}{self.resume_hint}."
        return ""

    @property
    def tokens(self) -> int:
        """Tokens of the sequences that were consumed, of whatever length they were."""
        return self.history.tokens(self.consumed_samples) if self.history is not None else 0

    def warn_no_targets(self, step: int) -> None:
        """The first time, and then ever more seldom: at the 2nd, 4th, 8th … step without target tokens."""
        self.steps_without_targets += 1
        if self.steps_without_targets & (self.steps_without_targets - 1) == 0:
            logger.warning(
                f"Step {step} has no target tokens: its documents have one token each, and nothing precedes that. There is"
                f" no loss, and the update was skipped (step {self.steps_without_targets} of this kind since the start)."
                f" `fast-llm why {self.spec.folder or '<experiment_dir>'} {step}` shows the documents."
            )

    def logged_phases(self) -> set[tuple[str, int]]:
        """Phase and step of all that metrics.jsonl holds."""
        found = {(record.get("phase"), record.get("step")) for record in self.run.recorded()}
        shared: set[tuple[str, int]] = self.mesh.broadcast(found)
        return shared

    def finish(self) -> str:
        """What is due at the end and not there yet; a finished run that is started again comes here at once. Why it is the
        end."""
        training, step = self.config.training, self.step
        self.heartbeat("what is due at the end", step=step, slow=True)
        recorded = self.logged_phases()
        if training.validation.interval is not None and ("validation", step) not in recorded:
            self.validate(step)
        if training.test_iters and ("test", step) not in recorded and not self.stopping:
            self.validate(step, phase="test", iterations=training.test_iters)
        if training.checkpoint.interval is not None:
            self.save(step, last=True)
        if training.export.interval is not None and not self.should_stop():
            self.export(step)
        if self.stopping:
            return (
                f"Stopped by a signal before all was done that is due at the end{self.resume_hint}."
            )
        return f"Training is complete: {self.step} steps."

    def handle_spike(self, step: int, result: StepResult, batches: Loader) -> bool:
        """What training.spikes asks for at a spike, whose update was not applied; whether the run is back at a checkpoint."""
        policy = self.config.training.spikes
        told = f"Step {step} is a spike: {result.spike} (median and deviations of {policy.window} steps)"
        if policy.policy == "stop":
            raise TrainingStopped(
                f"{told}. Its update was not applied. Look at the step's data with `fast-llm why`, lower"
                " optimizer.learning_rate.base, or choose another training.spikes.policy.",
                resumable=True,
            )
        if policy.policy == "rewind":
            self.heartbeat("saving", step=step, slow=True)
            self.saver.drain()
            assert self.run.folder is not None
            found = checkpoints.latest(self.run.folder / "checkpoint") if self.run.is_main else None
            path = self.mesh.broadcast(found)
            if path is not None:
                if len(self.skipped_ranges) == policy.max_rewinds:
                    raise TrainingStopped(
                        f"{told}. The run went back {policy.max_rewinds} times already (training.spikes.max_rewinds). Look at the"
                        " data of these steps with `fast-llm why`, or lower optimizer.learning_rate.base.",
                        resumable=True,
                    )
                self.metrics.write(step, self.consumed_samples, self.tokens, batches.wait_seconds)
                self.rewind_to(step, path)
                logger.warning(
                    f"{told}: back to step {self.step}, and on with the data after the spike's."
                )
                return True
            told += "; there is no checkpoint to go back to"
        logger.warning(f"{told}: its update was skipped.")
        return False

    def rewind_to(self, step: int, path: Path) -> None:
        """From a checkpoint on with the sequences after this step's."""
        self.heartbeat("reading weights", slow=True)
        until, skipped_ranges = self.consumed_samples, self.skipped_ranges
        with self.weights.masters(changed=True) as tensors:
            self.restore_state(path, tensors)
        self.weights.sync_model_weights()
        # Those of later steps are undone, those from this one are not in the checkpoint, which was there before.
        skipped_ranges = [one for one in skipped_ranges if one["after"] <= self.step]
        since = self.consumed_samples + sum(
            one["sequences"] for one in skipped_ranges if one["after"] == self.step
        )
        self.skipped_ranges = [
            *skipped_ranges,
            {"after": self.step, "spike": step, "sequences": until - since},
        ]
        if self.history is not None:
            # The checkpoint may be an earlier one than that which this start continued from, with other batches.
            self.history = self.history.with_batches(
                self.step, self.consumed_samples, self.spec.batch.batch_size
            )
        self.consumed_samples = until
        self.metrics.rewind(self.step, self.skipped_ranges[-1])
        if self.run.is_main and self.run.folder is not None:
            for exported, folder in checkpoints.find(
                self.run.folder / "export" / self.config.training.export.format
            ):
                if exported > self.step:
                    checkpoints.delete(folder)  # of steps that did not happen
        self.mesh.barrier()

    def validate(self, step: int, phase: str = "validation", iterations: int | None = None) -> None:
        """The loss on the same sequences every time, and on each of `data.validation_sets`."""
        started = time.perf_counter()
        iterations = iterations or self.config.training.validation.iterations or 1
        losses: dict[str, float | None] = {}
        tokens = 0
        sets = {"language_model_loss": phase}
        if phase == "validation":
            sets |= {f"{name}_loss": name for name in self.spec.dataset.validation_sets}
        for metric, name in sets.items():
            total = [0.0, 0.0]
            with self.loader(name, 0, self.spec.evaluation_steps(name, iterations)) as batches:
                self.heartbeat("data", step=step)
                for batch in batches:
                    self.heartbeat(phase)
                    loss, targets = self.train_step.evaluate(batch)
                    *sums, stops = self.mesh.all_reduce_sum(
                        loss, targets, float(self.interrupt.signal != 0)
                    )
                    total = [total[0] + sums[0], total[1] + sums[1]]
                    if stops:
                        self.stopping = True
                        logger.info(
                            f"{phase.capitalize()} at step {step} was broken off by a signal."
                        )
                        return
                    self.heartbeat("data")
            losses[metric] = total[0] / total[1] if total[1] else None
            if not total[1]:
                logger.warning(
                    f"{phase.capitalize()} at step {step}: {name} has no target tokens, so there is no loss: each of its"
                    " documents has one token."
                )
            tokens += int(total[1])
        self.metrics.write_evaluation(step, phase, losses, tokens, time.perf_counter() - started)

    def restore(self) -> None:
        """Go on from the newest complete checkpoint, else start from the pretrained model or from noise."""
        self.heartbeat("reading weights", slow=True)
        with self.weights.masters(changed=True) as tensors:
            self.init_or_load(tensors)
        self.weights.sync_model_weights()
        if self.run.is_main and self.run.folder is not None:
            # A start that has nothing to save would leave what a kill left.
            checkpoints.clean(self.run.folder / "checkpoint")
            checkpoints.clean(self.run.folder / "export" / self.config.training.export.format)
        self.mesh.barrier()

    def init_or_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the weights their values."""
        path, pretrained = self.spec.checkpoint, self.config.pretrained
        if path is not None:
            self.restore_state(path, tensors)
            logger.info(f"Going on from {path}, after step {self.step}.")
        elif (
            self.spec.pretrained_folder is not None
            and pretrained.model_weights
            and pretrained.format == "distributed"
        ):
            if pretrained.optimizer_state:
                self.load_tensors(self.spec.pretrained_folder, tensors)
                self.train_step.optimizer.updates = checkpoints.read_manifest(
                    self.spec.pretrained_folder
                ).info["updates"]
            else:
                state.load(
                    self.spec.pretrained_folder,
                    self.checkpoint_tensors(tensors),
                    self.mesh.slow_group,
                )
            logger.info(f"Starting from the weights of {self.spec.pretrained_folder}.")
        elif self.spec.pretrained_folder is not None and pretrained.model_weights:
            load_weights(tensors, self.spec.pretrained_folder, self.mesh.slow_group)
            logger.info(f"Starting from the weights of {self.spec.pretrained_folder}.")
        else:
            init_weights(tensors, self.config.model.base_model, self.config.model.distributed.seed)
            logger.info("Starting from random weights.")

    def restore_state(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of a checkpoint."""
        info = checkpoints.read_manifest(path).info
        self.load_tensors(path, tensors)
        self.step, self.consumed_samples = info["step"], info["samples"]
        self.skipped_ranges = info.get("passed_over", [])
        self.metrics.skipped_in_a_row = info["skipped"]
        self.train_step.optimizer.updates = info["updates"]
        self.train_step.loss_scale.load(info["loss_scale"])
        self.train_step.spikes.load_state_dict(info.get("spikes", {}))
        self.saver.last_started = self.saver.last_saved = self.step

    def load_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Weights and moments of a checkpoint."""
        with self.train_step.optimizer.moments(changed=True) as moments:
            state.load(path, self.checkpoint_tensors(tensors, *moments), self.mesh.slow_group)

    def checkpoint_tensors(
        self, tensors: Mapping[str, Tensor], *moments: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, with these weights and moments."""
        return {f"weight/{name}": tensor for name, tensor in tensors.items()} | {
            f"{part}/{name}": like(tensors[name], local)
            for part, locals_ in zip(("exp_avg", "exp_avg_sq"), moments, strict=False)
            for name, local in locals_.items()
        }

    def save(self, step: int, last: bool = False) -> None:
        """Begin to write a checkpoint, unless this step has one; then delete those that are not kept. `last`: the process is
        about to end."""
        if self.saver.last_started == step:
            return
        assert self.run.folder is not None
        self.heartbeat("saving", step=step, slow=True)
        self.check_state_finite(step, "It was not saved. ")
        settings = self.config.training.checkpoint
        root = self.run.folder / "checkpoint"
        info: dict[str, Any] = {
            "step": step,
            "samples": self.consumed_samples,
            "updates": self.train_step.optimizer.updates,
            "loss_scale": self.train_step.loss_scale.state(),
            "skipped": self.metrics.skipped_in_a_row,
            "spikes": self.train_step.spikes.state_dict(),
            "passed_over": list(self.skipped_ranges),
            "history": self.history.model_dump(mode="json") if self.history is not None else None,
            "tokens": self.spec.special_tokens,
            "identity": self.spec.identity,
            "settings": self.config.model_dump(mode="json"),
        }

        def then(path: Path) -> None:
            if self.run.is_main:
                checkpoints.prune(root, settings.keep, settings.is_permanent)
                self.start_callback(settings.callback, path)

        with self.weights.masters() as tensors, self.train_step.optimizer.moments() as moments:
            self.saver.start(
                root, step, self.checkpoint_tensors(tensors, *moments), info, then, last
            )

    def export(self, step: int) -> None:
        """Write a Hugging Face folder, unless this step has one."""
        assert self.run.folder is not None
        self.heartbeat("exporting", step=step, slow=True)
        settings = self.config.training.export
        path = self.run.folder / "export" / settings.format / str(step)
        if self.mesh.broadcast(checkpoints.is_complete(path)):
            return
        started = time.perf_counter()
        dtype = settings.data_type or self.config.model.distributed.training_dtype
        self.check_state_finite(step, "It was not exported. ")
        length = self.config.batch.sequence_length
        with self.weights.masters() as tensors:
            export_hugging_face(
                path,
                tensors,
                config=export_config(
                    self.spec.pretrained_config,
                    self.config.model.base_model,
                    dtype,
                    self.spec.special_tokens,
                    length,
                ),
                dtype=dtype,
                files=export_files(self.spec.extra_files, length),
                parameters_per_file=settings.parameters_per_file,
                step=step,
                group=self.mesh.slow_group,
            )
        if self.run.is_main:
            checkpoints.prune(path.parent, settings.keep, settings.is_permanent)
            self.start_callback(settings.callback, path)
        self.mesh.barrier()
        logger.info(f"Exported {path} in {time.perf_counter() - started:.1f} s.")

    def start_callback(self, config: CallbackConfig, path: Path) -> None:
        """Start the user's script with what was just written, and do not wait for it."""
        if config.script is None:
            return
        words = (
            shlex.split(config.script) if isinstance(config.script, str) else list(config.script)
        )
        environment = os.environ | config.environment | {"FAST_LLM_SAVED": str(path)}
        try:
            subprocess.Popen(words, env=environment)
        except OSError as error:
            logger.warning(f"The callback {shlex.join(words)} could not be started: {error}")

    @contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """The step inside is profiled on the processes that are asked for; the others wait for them."""
        assert self.run.folder is not None
        chosen = self.mesh.rank in self.config.training.profiling.ranks
        with self.metrics.count_as_average_step():
            self.heartbeat("profiling", slow=True)
            with Profile(step, self.run.folder / "profile", self.mesh) if chosen else nullcontext():
                yield
                self.heartbeat("profiling", slow=True)
            self.mesh.barrier()

    def check_corruption(self, step: int, batches: Sequence[Batch]) -> None:
        """Look for silent corruption, before the update."""
        with self.metrics.exclude_from_speed():
            self.corruption_check(
                step,
                batches,
                {
                    "the number of steps": self.step,
                    "the number of sequences": self.consumed_samples,
                    "the number of updates": self.train_step.optimizer.updates,
                    "the loss scale": self.train_step.loss_scale.state(),
                    "the number of steps skipped": self.metrics.skipped_in_a_row,
                    "the window of spikes": self.train_step.spikes.state_dict(),
                    "the data passed over": self.skipped_ranges,
                    "the seed": self.config.model.distributed.seed,
                },
            )

    def check_finite(self, step: int) -> None:
        """Give up after several steps in a row whose loss or gradients are not finite."""
        limit = self.config.optimizer.max_nonfinite_steps
        if self.metrics.skipped_in_a_row >= limit and self.train_step.loss_scale.exhausted:
            self.check_state_finite(step)
            raise TrainingStopped(
                f"step {step}: loss or gradients were not finite {limit} times in a row"
                " (optimizer.max_nonfinite_steps). The weights were not touched by these steps. Look at the data of these"
                " steps, lower optimizer.learning_rate.base, or continue from an earlier checkpoint.",
                resumable=True,
            )

    def check_state_finite(self, step: int, told: str = "") -> None:
        """Stop, on every process, if weights or moments of any hold what no update makes: that would be saved and be no use."""
        reports = all_gather_object(
            (socket.gethostname(), find_nonfinite_state(self.train_step)), self.mesh.slow_group
        )
        found = [
            f"rank {rank} on {host}: {one}"
            for rank, (host, wrong) in enumerate(reports)
            for one in wrong
        ]
        if not found:
            return
        for one in found:
            logger.error(f"Step {step}: {one}")
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise TrainingStopped(
            f"step {step}: {found[0]}{more}. {told}No update makes such numbers, unless optimizer.learning_rate.base is far too"
            " large: a chip or its memory computes or remembers wrongly.",
            resumable=True,
        )

    def loader(self, phase: str, first_sample: int, steps: int) -> Loader:
        """This process's micro-batches of `steps` steps from sequence `first_sample` of a phase on."""
        config = self.config
        return Loader(
            self.spec.dataset,
            phase,
            self.spec.batch,
            rank=self.mesh.data.rank,
            processes=self.mesh.data.size,
            vocab_size=config.model.base_model.vocab_size,
            first_sample=first_sample,
            steps=steps,
            isolate=not config.batch.cross_document_attention,
            workers=config.training.num_workers,
            prefetch=config.training.prefetch_factor or 2,
            cut=partial(shard_batch, rank=self.mesh.context.rank, size=self.mesh.context.size),
            pin=self.mesh.device.type == "cuda",
            warn_ms=config.data.data_sample_warn_time_ms,
        )
