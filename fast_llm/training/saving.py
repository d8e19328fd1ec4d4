"""Write checkpoints in the background: copy to host memory, then write in a thread.

At most one checkpoint is being written. A failed write is retried from the same copy until a newer
checkpoint is due. The run fails only if its last checkpoint cannot be written. The threads of all
processes agree in a process group of their own. The training threads therefore need no agreement:
each waits for its thread at the same steps (the next save, the end).
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import state
from fast_llm.collectives import all_gather_object
from fast_llm.errors import CheckpointError
from fast_llm.planning.disk import format_bytes
from fast_llm.tensors import distributed_like

logger = logging.getLogger("fast_llm")

_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds between attempts, doubled each time
_LAST_PAUSE, _LAST_ATTEMPTS = 1.0, 3  # when the process is about to end
_MEMORY_FRACTION = 0.9  # of the available memory, at most, for the copy
_CGROUP = Path("/sys/fs/cgroup")
# How urgently the thread must end: not, a newer checkpoint is due, the process ends.
_NOT, _SUPERSEDED, _LAST = 0, 1, 2


class Saver:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(self, group: dist.ProcessGroup | None, background: bool):
        """`group`: for the saver alone; `background`: train while writing, if memory allows."""
        self.group = group
        self.background = background
        self.last_started = -1  # the newest step whose checkpoint is complete or being written
        self.last_saved = -1  # the newest step whose checkpoint is complete
        self.host_copy: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.urgency = _NOT
        self.wake = threading.Event()
        self.error: CheckpointError | None = None
        self.unexpected_error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    def start(
        self,
        root: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        info: Mapping[str, Any],
        on_saved: Callable[[Path], None],
        last: bool = False,
    ) -> None:
        """Start to save a step, as `state.save` does; every process calls it.

        `on_saved`: called with the complete folder, in the thread; `last`: the process is about to
        end. Waits for the previous checkpoint. Its failure is logged, and `last_started` is -1
        then.
        """
        began = time.perf_counter()
        if self.busy:
            logger.info(
                f"Training waits: the checkpoint of step {self.last_started} is still being"
                " written."
            )
        self._join(_SUPERSEDED)
        self._check_memory(tensors)
        parts: Mapping[str, Tensor] | None = None
        if self.background:
            state.stage(tensors, self.host_copy)
            parts = self.host_copy
            # From now on only the copy is needed, and the layout of DTensors.
            tensors = {
                name: distributed_like(t, self.host_copy[name].to("meta"))
                if isinstance(t, DTensor)
                else self.host_copy[name]
                for name, t in tensors.items()
            }
        stopped = time.perf_counter() - began

        def write() -> None:
            path = state.save(root, step, tensors, info, self.group, parts)
            self.last_saved = step
            on_saved(path)
            seconds = time.perf_counter() - began
            logger.info(
                f"Saved {path} in {seconds:.1f} s"
                + (f"; training paused for {stopped:.1f} s." if parts else ".")
            )

        self.last_started, self.error, self.unexpected_error = step, None, None
        self.urgency = _LAST if last else _NOT if self.background else _SUPERSEDED
        self.wake.clear()
        self.thread = threading.Thread(
            target=self._write_with_retries, args=(write,), name="checkpoint", daemon=True
        )
        self.thread.start()
        if not self.background:
            self._join(self.urgency)

    def check(self) -> None:
        """Raise an error of the thread that is not a failed write: a bug, or a lost process."""
        if self.unexpected_error is not None:
            raise self.unexpected_error

    def wait(self) -> None:
        """Wait until the newest checkpoint is complete.

        Raises CheckpointError on every process if it cannot be written.
        """
        self._join(_LAST)
        if self.error is not None:
            raise self.error

    def drain(self) -> None:
        """Wait until nothing is being written. A failed write is logged, not raised."""
        self._join(_SUPERSEDED)

    def finish_after_failure(self, seconds: float | None) -> None:
        """Wait for the checkpoint that is being written, at most `seconds`.

        For a run that ends by an error. Other processes may be gone, so failures are logged, not
        raised.
        """
        if self.busy:
            logger.info(
                f"Training has failed; the checkpoint of step {self.last_started} is being"
                " finished."
            )
            self.urgency = _LAST
            self.wake.set()
            assert self.thread is not None
            self.thread.join(seconds)
            if self.error is not None:
                logger.error(f"{self.error}")

    def _join(self, urgency: int) -> None:
        """Wait for the thread."""
        if self.thread is not None:
            self.urgency = urgency
            self.wake.set()
            self.thread.join()
            self.thread = None
        if self.error is not None:
            self.last_started = -1
        self.check()

    def _check_memory(self, tensors: Mapping[str, Tensor]) -> None:
        """At the first save: turn `background` off if a host lacks memory for the copies."""
        if not self.background or self.host_copy:
            return
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, free = state.staged_bytes(tensors) * local_processes, available_memory()
        short = [
            one
            for one in all_gather_object((needed, free), self.group)
            if one[0] > _MEMORY_FRACTION * one[1]
        ]
        if short:
            logger.warning(
                "Training waits for each checkpoint to be written: a copy in the host's memory"
                f" would need {format_bytes(short[0][0])}, and {format_bytes(short[0][1])} are"
                " available."
            )
            self.background = False

    def _write_with_retries(self, write: Callable[[], None]) -> None:
        """The thread: retry until a write succeeds, a newer checkpoint is due, or the run ends."""
        pause, last_attempts = _PAUSE, 0
        try:
            while True:
                try:
                    write()
                    return
                except CheckpointError as error:
                    problem = error
                if self._max_urgency() == _NOT:
                    logger.warning(
                        f"{problem}. Training continues; the next attempt is in {pause:g} s."
                    )
                    self.wake.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                urgency = self._max_urgency()
                if urgency == _SUPERSEDED:
                    logger.warning(f"{problem}. Training continues without this checkpoint.")
                    self.error = problem
                    return
                if urgency == _LAST:
                    last_attempts += 1
                    if last_attempts == _LAST_ATTEMPTS:
                        self.error = CheckpointError(
                            f"{problem} (at the end, after {last_attempts} attempts)"
                        )
                        return
                    logger.warning(f"{problem}. The next attempt is in {_LAST_PAUSE:g} s.")
                    time.sleep(_LAST_PAUSE)
        except BaseException as error:
            self.unexpected_error = error

    def _max_urgency(self) -> int:
        """The largest urgency of all processes."""
        return max(all_gather_object(self.urgency, self.group))


def describe_saved(folder: Path | None) -> str:
    """Describe what the same command resumes from, after a run has ended."""
    if folder is None:
        return "Nothing was saved: run.experiment_dir is not set."
    try:
        newest = checkpoints.latest(folder / "checkpoint", content=False, quiet=True)
    except (OSError, CheckpointError) as error:
        return f"Whether a checkpoint is complete could not be found out: {error}."
    if newest is None:
        return "No checkpoint is complete: the same command starts from the beginning."
    return f"Checkpoint {newest.name} is complete: the same command continues from it."


def available_memory() -> int:
    """Bytes of memory that this host, or a container with a limit, has available."""
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError, StopIteration):  # other operating systems, no limit
        limit, used = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        available = min(available, limit - used + cached)
    return available
