"""Write checkpoints in the background: copy to host memory (checkpoint/staging.py), then write in a
thread.

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

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint.staging import HostCopy, copied_bytes
from fast_llm.collectives import all_gather_object
from fast_llm.errors import CheckpointError
from fast_llm.planning.disk import format_bytes
from fast_llm.tensors import Stored

logger = logging.getLogger("fast_llm")

_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds between attempts, doubled each time
_LAST_PAUSE, _LAST_ATTEMPTS = 1.0, 3  # when the process is about to end
_MEMORY_FRACTION = 0.9  # of the available memory, at most, for the copy
# How urgently the thread must end: not, a newer checkpoint is due, the process ends.
_NOT, _SUPERSEDED, _LAST = 0, 1, 2

# Writes a folder from tensors that hold no data, and a function that returns this process's part.
Write = Callable[[Mapping[str, Tensor], Callable[[str], Tensor]], Path]


class Saver:
    """Writes the checkpoints and exports of a run, one at a time."""

    def __init__(self, group: dist.ProcessGroup | None, background: bool):
        """`group`: for the saver alone; `background`: train while writing, if memory allows."""
        self.group = group
        self.background = background
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        # The newest step whose checkpoint, or export, is complete or being written.
        self.last_started = {"checkpoint": -1, "export": -1}
        self.started_step = -1  # the newest step of which either was started
        self.last_saved = -1  # the newest step whose checkpoint is complete
        self.host_copy = HostCopy()
        self.copied_step = -1  # the step that `host_copy` is of
        self.copied: set[str] = set()  # the names that it has of this step
        self.allocation: threading.Thread | None = None  # of the memory for the copy
        self.checked: set[str] = set()  # names that there is memory for
        self.thread: threading.Thread | None = None
        self.urgency = _NOT
        self.wake = threading.Event()
        self.errors: dict[str, CheckpointError] = {}  # of the last checkpoint and export
        self.unexpected_error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint or export is being written."""
        return self.thread is not None and self.thread.is_alive()

    def prepare(self, stored: Mapping[str, Stored]) -> None:
        """Allocate memory for the copy in a thread; every process calls it.

        Page-locked memory takes seconds, for which the first checkpoint would stop training.
        """
        self._check_memory(stored)
        if self.background:
            self.allocation = threading.Thread(
                target=self._allocate, args=(stored,), name="checkpoint memory", daemon=True
            )
            self.allocation.start()

    def _allocate(self, stored: Mapping[str, Stored]) -> None:
        try:
            self._use_device()
            self.host_copy.allocate(stored)
        except BaseException as error:
            self.unexpected_error = error

    def _use_device(self) -> None:
        """Make this process's GPU that of the calling thread: a new thread begins with GPU 0."""
        if self.device is not None:
            torch.cuda.set_device(self.device)

    def start(
        self,
        kind: str,
        step: int,
        stored: Mapping[str, Stored],
        write: Write,
        last: bool = False,
    ) -> None:
        """Start to write the checkpoint or export (`kind`) of a step; every process calls it.

        `write`: called in the thread, with tensors that hold no data, and a function that returns
        this process's part of one by its name. `last`: the process is about to end.

        Waits for what is being written of another step. Its failure is logged, and `last_started`
        is -1 then. The device still copies `stored` when this returns: call
        `host_copy.before_update` before its sources change.
        """
        began = time.perf_counter()
        if self.copied_step != step or not stored.keys() <= self.copied:
            self._copy(step, stored)
        background = self.background
        tensors = {name: one.like for name, one in stored.items()}
        stopped = time.perf_counter() - began

        def part_of(name: str) -> Tensor:
            return self.host_copy.part(name, stored[name]) if background else stored[name].part()

        def attempt() -> None:
            self.host_copy.wait()
            path = write(tensors, part_of)
            if kind == "checkpoint":
                self.last_saved = step
            logger.info(
                f"{'Saved' if kind == 'checkpoint' else 'Exported'} {path} in"
                f" {time.perf_counter() - began:.1f} s"
                + (f"; training paused for {stopped:.1f} s." if background else ".")
            )

        self.last_started[kind] = self.started_step = step
        self.urgency = _LAST if last else _NOT if background else _SUPERSEDED
        self.wake.clear()
        self.thread = threading.Thread(
            target=self._write_with_retries,
            args=(kind, attempt, self.thread),
            name="checkpoint",
            daemon=True,
        )
        self.thread.start()
        if not background:
            self._join(self.urgency)

    def _copy(self, step: int, stored: Mapping[str, Stored]) -> None:
        """Start the copy of this step's state, after what is being written of another step."""
        if self.busy:
            kind, other = max(self.last_started.items(), key=lambda item: item[1])
            logger.info(f"Training waits: the {kind} of step {other} is still being written.")
        self._join(_SUPERSEDED)
        if step != self.started_step:  # errors of the same step are raised by `wait`
            self.errors = {}
        self.unexpected_error = None
        self._check_memory(stored)
        if self.background:
            self.host_copy.copy(stored)
            self.copied_step, self.copied = step, set(stored)

    def restored(self, step: int) -> None:
        """The run is at the checkpoint of this step. Later steps, if any, are undone."""
        self.last_started = {"checkpoint": step, "export": -1}
        self.last_saved, self.copied_step = step, -1

    def check(self) -> None:
        """Raise an error of the thread that is not a failed write: a bug, or a lost process."""
        if self.unexpected_error is not None:
            raise self.unexpected_error

    def wait(self) -> None:
        """Wait until the newest checkpoint and export are complete.

        Raises CheckpointError on every process if one cannot be written.
        """
        self._join(_LAST)
        for error in self.errors.values():
            raise error

    def drain(self) -> None:
        """Wait until nothing is being written. A failed write is logged, not raised."""
        self._join(_SUPERSEDED)

    def finish_after_failure(self, seconds: float | None) -> None:
        """Wait for what is being written, at most `seconds`.

        For a run that ends by an error. Other processes may be gone, so failures are logged, not
        raised.
        """
        if self.busy:
            kind, step = max(self.last_started.items(), key=lambda item: item[1])
            logger.info(f"Training has failed; the {kind} of step {step} is being finished.")
            self.urgency = _LAST
            self.wake.set()
            assert self.thread is not None
            self.thread.join(seconds)
            for error in self.errors.values():
                logger.error(f"{error}")

    def _join(self, urgency: int) -> None:
        """Wait for the thread."""
        if self.allocation is not None:
            self.allocation.join()
            self.allocation = None
        if self.thread is not None:
            self.urgency = urgency
            self.wake.set()
            self.thread.join()
            self.thread = None
        for kind in self.errors:
            self.last_started[kind] = -1
        self.check()

    def _check_memory(self, stored: Mapping[str, Stored]) -> None:
        """Turn `background` off if a host lacks memory for copies that were not made before."""
        if not self.background or stored.keys() <= self.checked:
            return
        self.checked.update(stored)
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, free = copied_bytes(stored) * local_processes, available_memory()
        short = [
            one
            for one in all_gather_object((needed, free), self.group)
            if one[0] > _MEMORY_FRACTION * one[1]
        ]
        if short:
            logger.warning(
                "Training waits for each checkpoint and export to be written: a copy in the host's"
                f" memory would need {format_bytes(short[0][0])}, and"
                f" {format_bytes(short[0][1])} are"
                " available."
            )
            self.background = False

    def _write_with_retries(
        self, kind: str, attempt: Callable[[], None], previous: threading.Thread | None
    ) -> None:
        """The thread: retry until a write succeeds, another step's is due, or the run ends.

        `previous`: another thread, which writes the same step and is waited for.
        """
        pause, last_attempts = _PAUSE, 0
        try:
            self._use_device()
            if previous is not None:
                previous.join()
            while True:
                try:
                    attempt()
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
                    logger.warning(f"{problem}. Training continues without this {kind}.")
                    self.errors[kind] = problem
                    return
                if urgency == _LAST:
                    last_attempts += 1
                    if last_attempts == _LAST_ATTEMPTS:
                        self.errors[kind] = CheckpointError(
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
        return "No checkpoint is complete: the same command starts this run from its beginning."
    return f"Checkpoint {newest.name} is complete: the same command continues from it."


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this host, or a container with a limit, has available.

    `cgroup`: the folder of the container's limits, of Linux's cgroup v2.
    """
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError, StopIteration):  # other operating systems, no limit
        limit, used = (
            int((cgroup / name).read_text()) for name in ("memory.max", "memory.current")
        )
        lines = (cgroup / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        available = min(available, limit - used + cached)
    return available
