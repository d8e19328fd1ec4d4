"""Restore, save, rewind and export a run: what is due, and how it is done.

A checkpoint holds the fp32 weights and both moments. Its manifest has the counters of `TrainState`,
the loss scale, the settings, the history and identity of the data, and the special tokens. Data
order and learning rate are functions of the counters. Checkpoints are written by a thread
(saving.py); exports by all processes together.
"""

import logging
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import state as tensor_files
from fast_llm.checkpoint.huggingface import export_files
from fast_llm.checkpoint.weights import export_hugging_face, load_weights
from fast_llm.config.train import CallbackConfig, TrainConfig
from fast_llm.model.decoder import init_weights
from fast_llm.models import family_of
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.weights import Weights
from fast_llm.planning.history import History
from fast_llm.planning.preflight import RunSpec
from fast_llm.tensors import distributed_like
from fast_llm.training.corruption import check_state_finite
from fast_llm.training.run import Run
from fast_llm.training.saving import Saver
from fast_llm.training.step import StepResult, TrainStep

logger = logging.getLogger("fast_llm")


@dataclass
class TrainState:
    """The counters of a run, equal on all processes."""

    history: History | None  # of batch sizes and data orders; None without training data
    step: int = 0
    consumed_samples: int = 0  # sequences, those of skipped ranges included
    skipped_ranges: list[dict[str, int]] = field(default_factory=list)  # one for each rewind
    nonfinite_steps: int = 0  # in a row

    def advance(self, result: StepResult, batch_size: int) -> None:
        """Count one step."""
        self.step += 1
        self.consumed_samples += batch_size
        if result.targets:  # a step without target tokens says nothing about training's health
            healthy = result.updated or bool(result.spike)
            self.nonfinite_steps = 0 if healthy else self.nonfinite_steps + 1

    @property
    def consumed_tokens(self) -> int:
        """Tokens of the consumed sequences, whose length may have changed during the run."""
        return self.history.tokens(self.consumed_samples) if self.history is not None else 0


class CheckpointManager:
    """Restores, saves, rewinds and exports a run. Every process calls each method."""

    def __init__(
        self,
        spec: RunSpec,
        mesh: Mesh,
        run: Run,
        weights: Weights,
        train_step: TrainStep,
        heartbeat: Callable[..., None],
    ):
        """`heartbeat`: called at the start of each phase, as `Watchdog.heartbeat`."""
        self.spec = spec
        self.config: TrainConfig = spec.config
        self.mesh = mesh
        self.run = run
        self.weights = weights
        self.train_step = train_step
        self.heartbeat = heartbeat
        self.state = TrainState(spec.history)
        self.saver = Saver(mesh.checkpoint_group, spec.config.training.checkpoint.background)

    # What is due.

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step: at the interval, and after the last step."""
        settings, training = self.config.training.checkpoint, self.config.training
        return settings.due(step) or (
            settings.interval is not None and step >= training.train_iters
        )

    def export_due(self, step: int) -> bool:
        """Whether an export is due after a step: at the interval, and after the last step."""
        settings, training = self.config.training.export, self.config.training
        at_end = settings.interval is not None and step >= training.train_iters
        return at_end or (step > 0 and settings.due(step))

    # Restore.

    def restore(self) -> None:
        """Resume from the newest checkpoint, or start from the pretrained or random weights."""
        self.heartbeat("reading weights", slow=True)
        with self.weights.masters(changed=True) as tensors:
            self.init_or_load(tensors)
        self.weights.sync_model_weights()
        if self.run.is_main and self.run.folder is not None:
            # Also a start that saves nothing removes the unfinished folders of a killed run.
            folders.clean(self.run.folder / "checkpoint")
            folders.clean(self.run.folder / "export" / self.config.training.export.format)
        self.mesh.barrier()

    def init_or_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the weights their first values."""
        checkpoint, pretrained = self.spec.checkpoint, self.config.pretrained
        source = self.spec.pretrained_folder if pretrained.model_weights else None
        if checkpoint is not None:
            self.restore_state(checkpoint, tensors)
            logger.info(f"Resuming from {checkpoint}, after step {self.state.step}.")
            return
        if source is None:
            init_weights(tensors, self.config.model.base_model, self.config.model.distributed.seed)
            logger.info("Starting from random weights.")
            return
        if pretrained.format != "distributed":
            family = family_of(self.config.model.base_model)
            load_weights(tensors, source, family, self.mesh.slow_group)
        elif pretrained.optimizer_state:
            self._load_tensors(source, tensors)
            self.train_step.optimizer.updates = folders.read_manifest(source).info["updates"]
        else:
            tensor_files.load(source, _named(tensors), self.mesh.slow_group)
        logger.info(f"Starting from the weights of {source}.")

    def restore_state(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Load weights, moments and counters of a checkpoint."""
        info, state = folders.read_manifest(path).info, self.state
        self._load_tensors(path, tensors)
        state.step, state.consumed_samples = info["step"], info["samples"]
        state.skipped_ranges = info.get("passed_over", [])
        state.nonfinite_steps = info["skipped"]
        self.train_step.optimizer.updates = info["updates"]
        self.train_step.loss_scale.load(info["loss_scale"])
        self.train_step.spikes.load_state_dict(info.get("spikes", {}))
        self.saver.last_started = self.saver.last_saved = state.step

    def _load_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        with self.train_step.optimizer.moments(changed=True) as moments:
            tensor_files.load(path, _named(tensors, *moments), self.mesh.slow_group)

    # Rewind.

    def newest(self) -> Path | None:
        """The newest complete checkpoint, after waiting for the one that is being written."""
        assert self.run.folder is not None
        self.heartbeat("saving", step=self.state.step, slow=True)
        self.saver.drain()
        found = folders.latest(self.run.folder / "checkpoint") if self.run.is_main else None
        path: Path | None = self.mesh.broadcast(found)
        return path

    def rewind_to(self, path: Path) -> None:
        """Return to a checkpoint, and continue with the data after the current step's.

        `consumed_samples` is kept, so the data since the checkpoint is not repeated.
        """
        self.heartbeat("reading weights", slow=True)
        state = self.state
        spike, until, ranges = state.step, state.consumed_samples, state.skipped_ranges
        with self.weights.masters(changed=True) as tensors:
            self.restore_state(path, tensors)
        self.weights.sync_model_weights()
        # Ranges after later steps are undone. Those after this step are newer than the checkpoint.
        ranges = [one for one in ranges if one["after"] <= state.step]
        since = state.consumed_samples + sum(
            one["sequences"] for one in ranges if one["after"] == state.step
        )
        skipped = {"after": state.step, "spike": spike, "sequences": until - since}
        state.skipped_ranges = [*ranges, skipped]
        if state.history is not None:
            # The checkpoint may precede the one of this start, and have another batch size.
            state.history = state.history.with_batches(
                state.step, state.consumed_samples, self.spec.batch.batch_size
            )
        state.consumed_samples = until
        if self.run.is_main and self.run.folder is not None:
            exports = self.run.folder / "export" / self.config.training.export.format
            for step, folder in folders.find(exports):
                if step > state.step:
                    folders.delete(folder)  # its step is undone
        self.mesh.barrier()

    # Save and export.

    def save(self, last: bool = False) -> None:
        """Start to write a checkpoint, unless this step has one.

        `last`: the process is about to end. Raises TrainingStopped if weights or moments are not
        finite.
        """
        step = self.state.step
        if self.saver.last_started == step:
            return
        assert self.run.folder is not None
        self.heartbeat("saving", step=step, slow=True)
        check_state_finite(self.train_step, self.mesh, step, "It was not saved. ")
        settings = self.config.training.checkpoint
        root = self.run.folder / "checkpoint"

        def on_saved(path: Path) -> None:
            if self.run.is_main:
                folders.prune(root, settings.keep, settings.is_permanent)
                _start_callback(settings.callback, path)

        with self.weights.masters() as tensors, self.train_step.optimizer.moments() as moments:
            self.saver.start(root, step, _named(tensors, *moments), self._info(), on_saved, last)

    def _info(self) -> dict[str, Any]:
        """A checkpoint's manifest; the names are those of its file format."""
        state, step = self.state, self.train_step
        return {
            "step": state.step,
            "samples": state.consumed_samples,
            "updates": step.optimizer.updates,
            "loss_scale": step.loss_scale.state(),
            "skipped": state.nonfinite_steps,
            "spikes": step.spikes.state_dict(),
            "passed_over": list(state.skipped_ranges),
            "history": state.history.model_dump(mode="json") if state.history is not None else None,
            "tokens": self.spec.special_tokens,
            "identity": self.spec.identity,
            "settings": self.config.model_dump(mode="json"),
        }

    def export(self) -> None:
        """Write a Hugging Face folder, unless this step has one.

        Raises TrainingStopped if weights or moments are not finite.
        """
        step = self.state.step
        assert self.run.folder is not None
        self.heartbeat("exporting", step=step, slow=True)
        settings, length = self.config.training.export, self.config.batch.sequence_length
        path = self.run.folder / "export" / settings.format / str(step)
        if self.mesh.broadcast(folders.is_complete(path)):
            return
        started = time.perf_counter()
        dtype = settings.data_type or self.config.model.distributed.training_dtype
        check_state_finite(self.train_step, self.mesh, step, "It was not exported. ")
        model, tokens = self.config.model.base_model, self.spec.special_tokens
        export_config = family_of(model).export_config
        with self.weights.masters() as tensors:
            export_hugging_face(
                path,
                tensors,
                config=export_config(self.spec.pretrained_config, model, dtype, tokens, length),
                dtype=dtype,
                files=export_files(self.spec.extra_files, length),
                parameters_per_file=settings.parameters_per_file,
                step=step,
                group=self.mesh.slow_group,
            )
        if self.run.is_main:
            folders.prune(path.parent, settings.keep, settings.is_permanent)
            _start_callback(settings.callback, path)
        self.mesh.barrier()
        logger.info(f"Exported {path} in {time.perf_counter() - started:.1f} s.")


def _named(tensors: Mapping[str, Tensor], *moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by their names in it.

    Moments are local; they are sharded as their weights are.
    """
    return {f"weight/{name}": tensor for name, tensor in tensors.items()} | {
        f"{moment}/{name}": distributed_like(tensors[name], local)
        for moment, locals_ in zip(("exp_avg", "exp_avg_sq"), moments, strict=False)
        for name, local in locals_.items()
    }


def _start_callback(config: CallbackConfig, path: Path) -> None:
    """Start the user's script for a new checkpoint or export, without waiting for it."""
    if config.script is None:
        return
    command = shlex.split(config.script) if isinstance(config.script, str) else list(config.script)
    environment = os.environ | config.environment | {"FAST_LLM_SAVED": str(path)}
    try:
        subprocess.Popen(command, env=environment)
    except OSError as error:
        logger.warning(f"The callback {shlex.join(command)} could not be started: {error}")
