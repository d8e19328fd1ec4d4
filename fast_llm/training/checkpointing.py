"""Restore, save, rewind and export a run: what is due, and how it is done.

A checkpoint holds the fp32 weights and both moments. Its manifest has the counters of `TrainState`,
the loss scale, the settings, the history and identity of the data, and the special tokens. Data
order and learning rate are functions of the counters. Checkpoints and exports are written by a
thread, from a copy in host memory (saving.py).
"""

import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import state as tensor_files
from fast_llm.checkpoint.huggingface import export_files
from fast_llm.checkpoint.weights import export_hugging_face, load_weights
from fast_llm.collectives import all_gather_object
from fast_llm.config.model import RotaryConfig
from fast_llm.config.saving import CallbackConfig, CheckpointConfig, ExportConfig
from fast_llm.config.train import TrainConfig
from fast_llm.errors import CheckpointError, TrainingStopped
from fast_llm.model.decoder import init_weights
from fast_llm.models import family_of
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.weights import Weights
from fast_llm.planning.branch import describe_ancestors
from fast_llm.planning.disk import export_folders
from fast_llm.planning.history import History, apply_orders
from fast_llm.planning.resume import has_router_biases
from fast_llm.planning.run_spec import RunSpec
from fast_llm.planning.stages import epoch_problems
from fast_llm.report.records import RunRecords
from fast_llm.tensors import Stored, distributed_like
from fast_llm.training.averages import WeightAverages, prefix
from fast_llm.training.corruption import check_state_finite
from fast_llm.training.model_card import with_trained_card
from fast_llm.training.push import make_pusher
from fast_llm.training.run import Run
from fast_llm.training.saving import Saver, Write
from fast_llm.training.state import TrainState
from fast_llm.training.step import TrainStep

logger = logging.getLogger("fast_llm")

_WEIGHT = "weight/"  # before the name of a weight in a checkpoint
_AVERAGE = "average."


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
        self.state = TrainState(spec.history, spec.in_stage(None))
        self.restored_step = -1  # of the checkpoint that this start resumed from
        self.saver = Saver(mesh.checkpoint_group, spec.config.training.checkpoint.background)
        self.pusher = make_pusher(spec.config, run)
        # For model cards; read by the thread that exports.
        self.validations = RunRecords(run.folder or Path(), ("validation",))
        self.averages = WeightAverages(
            spec.config.training.averages, weights, mesh, lambda: self.saver.busy
        )
        train_step.before_update = self._before_update

    def _before_update(self) -> None:
        """Let the device finish the copies of the state before it changes."""
        self.saver.host_copy.before_update()
        self.averages.host_copy.before_update()

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

    @property
    def rewinds(self) -> int:
        """How often this run was rewound. Rewinds before the step of a branch are its parent's."""
        branch = self.config.run.branch_from
        first = branch.step if branch is not None else 0
        return sum(skipped["after"] >= first for skipped in self.state.skipped_ranges)

    # Restore.

    def restore(self) -> None:
        """Resume from the newest checkpoint, or start from the pretrained or random weights."""
        self.heartbeat("reading weights", slow=True)
        self.averages.begin()
        with self.weights.masters(changed=True) as tensors:
            self.init_or_load(tensors)
        self.weights.sync_model_weights()
        if self.run.is_main and self.run.folder is not None:
            # Also a start that saves nothing removes the unfinished folders of a killed run.
            folders.clean(self.run.folder / "checkpoint")
            for exports in export_folders(self.config, self.run.folder).values():
                folders.clean(exports)
            if self.pusher is not None:
                self.pusher.begin(self.state.step)
        self.mesh.barrier()
        training, stored = self.config.training, self._stored()
        if training.checkpoint.interval is None:  # exports alone
            stored = {n: one for n, one in stored.items() if n.startswith((_WEIGHT, _AVERAGE))}
        if self.run.folder is not None and (
            training.checkpoint.interval is not None or training.export.interval is not None
        ):
            self.saver.prepare(stored)

    def init_or_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the weights their first values."""
        checkpoint, pretrained = self.spec.checkpoint, self.config.pretrained
        source = self.spec.pretrained_folder if pretrained.model_weights else None
        if checkpoint is not None and self.spec.branches:
            self._branch(checkpoint, tensors)
            return
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
        else:
            info = folders.read_manifest(source).info
            if pretrained.optimizer_state:
                self._load_tensors(source, tensors)
                self.train_step.optimizer.updates = info["updates"]
            else:
                tensor_files.load(source, _named(tensors), self.mesh.slow_group)
            self._load_biases(source, info)
        logger.info(f"Starting from the weights of {source}.")

    def _branch(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        """Begin with a checkpoint of another run, which may delete or replace it meanwhile."""
        remedy = "; start again, with a checkpoint that the other run keeps"
        assert self.spec.manifest is not None
        try:
            self.restore_state(checkpoint, tensors, self.spec.manifest.info)
        except CheckpointError as error:  # on all processes
            if (checkpoint / folders.MANIFEST).exists():
                raise
            raise CheckpointError(
                f"{checkpoint}: the other run deleted it while it was read{remedy}"
            ) from error
        # The first process alone looks again, so that all come to the same result.
        # Preflights of other machines may have read the checkpoint before it was replaced.
        read = all_gather_object(self.spec.manifest.info, self.mesh.slow_group)
        same = all(one == read[0] for one in read)
        changed = self.mesh.broadcast(self._changed(checkpoint) if self.run.is_main else "")
        if changed or not same:
            changed = changed or "replaced"
            raise CheckpointError(
                f"{checkpoint}: the other run {changed} it while it was read{remedy}"
            )
        logger.info(
            f"Branching from {checkpoint}, after step {self.state.step}:"
            f" {describe_ancestors(self.spec.ancestors)}."
        )

    def _changed(self, checkpoint: Path) -> str:
        """What another run has done to its checkpoint since the preflight; nothing: ""."""
        try:
            return "" if folders.read_manifest(checkpoint) == self.spec.manifest else "replaced"
        except CheckpointError:
            return "deleted"

    def restore_state(
        self, path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
    ) -> None:
        """Load weights, moments and counters of a checkpoint. `info`: its manifest's, if known."""
        info, state = info or folders.read_manifest(path).info, self.state
        self._load_tensors(path, tensors)
        self._load_biases(path, info)
        for name in self.averages.load(path, info.get("averages", {})):
            logger.info(f"training.averages.{name} begins here: {path} does not hold it.")
        state.step, state.consumed_samples = info["step"], info["samples"]
        if state.history is not None and self.config.stages_change_model:
            number = state.history.stage_of(
                state.step, state.consumed_samples, self.config, self.spec.batch_size
            )
            state.stage = self.spec.in_stage(number)
        state.skipped_ranges = info.get("passed_over", [])
        state.nonfinite_steps = info["skipped"]
        state.padding = {int(key): count for key, count in info.get("padding", {}).items()}
        if "padding" not in info and state.history is not None:  # an earlier version wrote it
            expected = state.history.expected_padding(state.consumed_samples)
            state.padding = {key: round(count) for key, count in expected.items()}
        self.train_step.optimizer.updates = info["updates"]
        self.train_step.loss_scale.load(info["loss_scale"])
        self.train_step.spikes.load_state_dict(info.get("spikes", {}))
        self.saver.restored(state.step)
        self.restored_step = state.step

    def _load_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        with self.train_step.optimizer.moments(changed=True) as moments:
            tensor_files.load(path, _named(tensors, *moments), self.mesh.slow_group)

    def _load_biases(self, path: Path, info: Mapping[str, Any]) -> None:
        if self.train_step.routers is not None:
            self.train_step.routers.load_biases(path, has_router_biases(info))

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
        padding = state.padding
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
            size, samples = self.spec.batch.batch_size, state.consumed_samples
            if self.config.data.stages:  # their borders move by the skipped sequences
                split = self.spec.dataset.splits["training"]
                state.history = state.history.continued(
                    state.step, samples, self.config, split, size, until - samples
                )
                apply_orders(split, state.history, until)
            else:
                state.history = state.history.with_batches(state.step, samples, size)
            for problem in self._exceeded_epochs(until, state.history):
                logger.warning(f"{problem}. A resume is refused until then.")
        state.consumed_samples, state.padding = until, padding
        if self.run.is_main and self.run.folder is not None:
            for exports in export_folders(self.config, self.run.folder).values():
                for step, folder in folders.find(exports):
                    if step > state.step:
                        folders.delete(folder)  # its step is undone
        self.mesh.barrier()

    def _exceeded_epochs(self, samples: int, history: History) -> list[str]:
        """Sources of which the run takes more than `max_epochs` because of skipped data."""
        split, size = self.spec.dataset.splits["training"], self.spec.batch.batch_size
        tokens = history.inputs(samples)
        return epoch_problems(self.config, split, self.state.step, samples, tokens, size)

    # Save and export.

    def save(self, last: bool = False) -> None:
        """Start to write a checkpoint, unless this step has one.

        `last`: the process is about to end. Raises TrainingStopped if weights or moments are not
        finite.
        """
        step = self.state.step
        if self.saver.last_started["checkpoint"] == step:
            return
        assert self.run.folder is not None
        self.heartbeat("saving", step=step, slow=True)
        check_state_finite(self.train_step, self.mesh, step, "It was not saved. ")
        settings = self.config.training.checkpoint
        root = self.run.folder / "checkpoint"

        info, group = self._info(), self.mesh.checkpoint_group

        def write(tensors: Mapping[str, Tensor], part_of: Callable[[str], Tensor]) -> Path:
            path = tensor_files.save(root, step, tensors, info, group, part_of)
            self._on_written(path, settings, step)
            return path

        self.saver.start("checkpoint", step, self._stored(), write, last)

    def _on_written(self, path: Path, settings: CheckpointConfig | ExportConfig, step: int) -> None:
        """Delete what `keep` no longer keeps, and start the callback."""
        if not self.run.is_main:
            return
        if self.pusher is not None:
            self.pusher.push(step, path)

        def stays(step: int) -> bool:
            pushing = self.pusher is not None and step == self.pusher.pushing_step
            return settings.is_permanent(step) or pushing

        folders.prune(path.parent, settings.keep, stays, current=step)
        _start_callback(settings.callback, path)

    def _stored(self) -> dict[str, Stored]:
        """A checkpoint's tensors by their names in it."""
        weights = self.weights.stored()
        parts = {"weight": weights} | self.train_step.optimizer.stored(weights)
        parts |= {f"average.{name}": self.averages.stored(name) for name in self.averages.averages}
        routers = self.train_step.routers
        return (routers.stored() if routers is not None else {}) | {
            f"{part}/{name}": one for part, named in parts.items() for name, one in named.items()
        }

    def counters(self) -> dict[str, Any]:
        """Everything else that a step depends on, by its description; equal on all processes."""
        state, step = self.state, self.train_step
        return {
            "the number of steps": state.step,
            "the number of sequences": state.consumed_samples,
            "the number of updates": step.optimizer.updates,
            "the loss scale": step.loss_scale.state(),
            "the number of steps skipped": state.nonfinite_steps,
            "the window of spikes": step.spikes.state_dict(),
            "the skipped data": state.skipped_ranges,
            "the seed": self.config.model.distributed.seed,
        }

    def _info(self) -> dict[str, Any]:
        """A checkpoint's manifest; the names are those of its file format."""
        state, step, ancestors = self.state, self.train_step, self.spec.ancestors
        further: dict[str, Any] = {}
        if ancestors:
            further["ancestors"] = [one.model_dump() for one in ancestors]
        if state.history is not None and any(order.best_fit for order in state.history.orders):
            further["padding"] = {str(key): count for key, count in state.padding.items()}
        if self.config.stages_change_model:
            further["stage"] = {"sequence_length": state.stage.length}
            if (rotary := self._changed_rotary()) is not None:
                further["stage"]["rotary"] = rotary.model_dump(mode="json")
        return further | {
            "step": state.step,
            "samples": state.consumed_samples,
            "updates": step.optimizer.updates,
            "loss_scale": step.loss_scale.state(),
            "skipped": state.nonfinite_steps,
            "spikes": step.spikes.state_dict(),
            "passed_over": list(state.skipped_ranges),
            "history": state.history.model_dump(mode="json") if state.history is not None else None,
            "averages": self.averages.counts(),
            "tokens": self.spec.special_tokens,
            "identity": self.spec.identity,
            "settings": self.config.model_dump(mode="json"),
        }

    def export(self, last: bool = False) -> None:
        """Start to write Hugging Face folders of the model and its averages, unless they are there.

        Those of a step after the checkpoint that this start resumed from are replaced: an earlier
        attempt wrote them, maybe with other settings. `last`: the process is about to end. Raises
        TrainingStopped if weights or moments are not finite.
        """
        step = self.state.step
        assert self.run.folder is not None
        self.heartbeat("exporting", step=step, slow=True)
        if self.saver.last_started["export"] == step:
            return
        missing, counts = [], self.averages.counts()
        for name, root in export_folders(self.config, self.run.folder).items():
            own = step <= self.restored_step and folders.is_complete(root / str(step))
            empty = name and not counts[name]
            if not self.mesh.broadcast(own) and not empty:
                missing.append((name, root / str(step)))
        if missing:
            check_state_finite(self.train_step, self.mesh, step, "It was not exported. ")
        for name, path in missing:
            stored = self.averages.stored(name) if name else self.weights.stored()
            before = prefix(name) if name else _WEIGHT
            named = {before + weight: one for weight, one in stored.items()}
            write = self._export_writer(path, step, name, before)
            self.saver.start("export", step, named, write, last)

    def _export_writer(self, path: Path, step: int, average: str, before: str) -> Write:
        """What writes an export of the weights or of an average.

        `before`: what precedes the names of weights in the copy.
        """
        settings, length = self.config.training.export, self.state.stage.length
        dtype = settings.data_type or self.config.model.distributed.training_dtype
        model, tokens = self.config.model.base_model, self.spec.special_tokens
        family = family_of(model)
        source, rotary = self.spec.pretrained_config, self._changed_rotary()
        config = family.export_config(source, model, dtype, tokens, length, rotary)
        group, info = self.mesh.checkpoint_group, self._info()

        def write(tensors: Mapping[str, Tensor], part_of: Callable[[str], Tensor]) -> Path:
            files = export_files(self.spec.extra_files, length)
            if self.run.is_main:  # the others write no small files
                files = with_trained_card(info, files, dtype, self.validations, average or None)
            export_hugging_face(
                path,
                {name.removeprefix(before): tensor for name, tensor in tensors.items()},
                config=config,
                dtype=dtype,
                files=files,
                parameters_per_file=settings.parameters_per_file,
                step=step,
                group=group,
                part_of=lambda name: part_of(before + name),
                family=family,
            )
            self._on_written(path, settings, step)
            return path

        return write

    def _changed_rotary(self) -> RotaryConfig | None:
        """The rotary positions in force, if they are not the model's own."""
        ours, now = (
            one.model.base_model.transformer.rotary
            for one in (self.config, self.state.stage.config)
        )
        return None if ours == now else now

    # The end of a run.

    @property
    def resume_hint(self) -> str:
        """What the same command does after this run has stopped: the end of a sentence."""
        if self.run.folder is None:
            return "; nothing was saved, because run.experiment_dir is not set"
        if self.saver.last_started["checkpoint"] < 0:  # none saved or restored; also if one failed
            start = "the same command starts this run from its beginning"
            return f"; no checkpoint is complete, so {start}"
        return "; the same command continues"

    def on_failure(self, error: BaseException) -> None:
        """Finish the checkpoint that is being written, if other processes can still take part."""
        self.mesh.failures.failing = True  # so another process's failure does not end this one
        seconds = None  # no limit
        if self.mesh.size > 1 and not isinstance(error, TrainingStopped):
            # After a timeout other processes do not answer. Collectives raise a plain RuntimeError.
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                return
            seconds = self.config.model.distributed.timeout / 2  # others wait `timeout`
        if self.saver.busy:
            self.heartbeat("saving", slow=True)
            self.saver.finish_after_failure(seconds)


def _named(tensors: Mapping[str, Tensor], *moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by their names in it.

    Moments are local; they are sharded as their weights are.
    """
    return {_WEIGHT + name: tensor for name, tensor in tensors.items()} | {
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
