"""Charts in TensorBoard and Weights & Biases. A failure of either does not affect training.

A run that resumes or rewinds logs some steps twice. TensorBoard drops the old points after the step
where a curve continues (`purge_step`). Weights & Biases gets every record, with `iteration` as its
axis.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fast_llm.config.train import TrainConfig, WandbConfig
from fast_llm.errors import MissingPackage
from fast_llm.storage import write_atomically
from fast_llm.training.run import Run

logger = logging.getLogger("fast_llm")

Numbers = dict[str, int | float]


class TensorBoard:
    """Event files in `<experiment_dir>/tensorboard`."""

    def __init__(self, folder: Path, first: int):
        """`first`: the step from which this start of the run continues."""
        self.folder = folder
        self.broken = False
        self.writer: Any = None
        threading.excepthook = partial(_ignore_tensorboard_threads, threading.excepthook)
        self._open(first + 1 if first else 0)

    def _open(self, purge_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackage("tensorboard", "training.tensorboard: yes") from error
        try:
            self.writer = SummaryWriter(log_dir=str(self.folder), purge_step=purge_step)
        except OSError as error:
            self._failed(error)

    def send(self, phase: str, step: int, numbers: Numbers) -> None:
        """Add a point to each curve."""
        if self.broken:
            return
        try:
            for name, value in numbers.items():
                self.writer.add_scalar(f"{phase}/{name}", value, step)
        except OSError as error:
            self._failed(error)

    def rewind(self, step: int) -> None:
        """Continue the curves from an earlier step."""
        self.close()
        if not self.broken:
            self._open(step + 1)

    def close(self) -> None:
        """Write what is still in memory."""
        if self.writer is None or self.broken:
            return
        try:
            self.writer.close()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self.broken:
            return
        self.broken = True
        logger.warning(
            f"TensorBoard's files in {self.folder} cannot be written: {error.strerror or error}."
            " They end here until the next start; metrics.jsonl has everything."
        )


def _ignore_tensorboard_threads(default: Callable[[Any], Any], failure: Any) -> None:
    """Suppress the traceback of TensorBoard's thread: the next point raises its error."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        default(failure)


class Wandb(logging.Handler):
    """A run in Weights & Biases, through a separate process; log lines go there too."""

    upload_seconds = 30.0  # that a run waits at its end for the upload
    max_queued = 100_000  # lines of about a kilobyte

    def __init__(self, settings: WandbConfig, config: TrainConfig, run: Run):
        super().__init__()
        self.settings = settings
        self.folder = str(config.run.experiment_dir)
        self.offline_folder = ""
        self.warned = self.exchanging = False
        self.queue: deque[bytes] = deque()  # lines to send
        self.sending = self.received = b""
        self.process: subprocess.Popen[bytes] | None = None
        try:
            with open(os.devnull if run.logs is None else run.logs / "wandb.txt", "ab") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,  # no Ctrl-C from the terminal, no login prompt
                )
        except OSError as error:
            logger.warning(
                f"Weights & Biases could not be started: {error}. Training continues without it."
            )
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        self.inlet, self.outlet = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.inlet, False)
        os.set_blocking(self.outlet, False)
        self._queue(_arguments(settings, config, run))
        if logger.handlers:
            self.setFormatter(logger.handlers[0].formatter)
        logger.addHandler(self)

    def send(self, phase: str, step: int, numbers: Numbers) -> None:
        """Add a point to each curve, and post an alert if one is due."""
        self._queue({"log": {phase: numbers, "iteration": step}})
        if self.settings.alert.due(step):
            text = "\n".join(f"{name}: {value:.6g}" for name, value in numbers.items())
            self._queue({"alert": {"title": f"{phase} results", "text": text}})

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line of the log."""
        self._queue({"text": self.format(record)})

    def finish(self, status: str) -> None:
        """Post `status` (ended, crashed) if enabled, and wait a while for the upload."""
        logger.removeHandler(self)
        alert = self.settings.alert
        if alert.status_updates if alert.status_updates is not None else alert.interval is not None:
            self._queue({"alert": {"title": f"Run {status}!", "text": self.folder}})
        self._queue({"finish": int(status == "crashed")})
        until = time.monotonic() + self.upload_seconds
        while self.process is not None and (left := until - time.monotonic()) > 0:
            select.select([self.outlet], [self.inlet] if self.sending else [], [], left)
            self._exchange(finishing=True)
        if self.process is not None:
            self._end(f"has not taken all records within {self.upload_seconds:g} s")

    def _queue(self, message: dict[str, Any]) -> None:
        if self.process is None:
            return
        self.queue.append(json.dumps(message).encode() + b"\n")
        self._exchange()
        if self.process is not None and len(self.queue) > self.max_queued:
            self._end("takes no records")

    def _exchange(self, finishing: bool = False) -> None:
        """Send what the process accepts without blocking, and log its messages.

        Log lines come from several threads, from signal handlers, and from this method.
        """
        with self.lock or nullcontext():
            if self.exchanging or self.process is None:
                return
            self.exchanging = True
            try:
                if not self._send() or not self._receive():
                    self._end("" if finishing else "has ended unexpectedly")
            finally:
                self.exchanging = False

    def _send(self) -> bool:
        """Returns whether the process still reads."""
        try:
            while self.sending or self.queue:
                self.sending = self.sending or self.queue.popleft()
                self.sending = self.sending[os.write(self.inlet, self.sending) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._receive()
            return False
        return True

    def _receive(self) -> bool:
        """Returns whether the process may still send messages."""
        more = True
        try:
            while data := os.read(self.outlet, 2**16):
                self.received += data
            more = False
        except BlockingIOError:
            pass
        *lines, self.received = self.received.split(b"\n")
        for message in map(json.loads, lines):
            if "folder" in message:
                self.offline_folder = message["folder"]
            else:
                self.warned |= message["level"] == "warning"
                logger.log(
                    logging.getLevelNamesMapping()[message["level"].upper()], message["text"]
                )
        return more

    def _end(self, why: str) -> None:
        """Stop sending. `why`: the reason, or "" if everything was sent."""
        assert self.process is not None
        process, self.process = self.process, None
        with suppress(ProcessLookupError):
            if why:
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError), process:  # closes its pipes, and waits
            pass
        if not self.warned and (why or process.returncode):
            upload = (
                f" `wandb sync {self.offline_folder}` uploads what it took;"
                if self.offline_folder
                else ""
            )
            logger.warning(
                f"Weights & Biases {why or 'has failed'}: training continues without it;{upload}"
                " metrics.jsonl has everything."
            )


def _arguments(settings: WandbConfig, config: TrainConfig, run: Run) -> dict[str, Any]:
    """The arguments of `wandb.init`. A resumed experiment continues its chart."""
    identity = run.folder / "wandb_config.yaml" if run.folder is not None else None
    known = None
    if identity is not None and identity.exists():
        try:
            known = yaml.safe_load(identity.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            logger.warning(
                f"{identity} cannot be read: {error}. This start begins another chart.".replace(
                    "\n", " "
                )
            )
    chart = known.get("id") if isinstance(known, dict) else None
    named = {
        "id": chart if isinstance(chart, str) else uuid.uuid4().hex[:8],
        "project": settings.project_name,
        "name": config.run.experiment_name
        or (run.folder.name if run.folder is not None else "default"),
        "entity": settings.entity_name,
        "group": settings.group_name,
    }
    if identity is not None:
        try:
            write_atomically(identity, yaml.safe_dump(named))
        except OSError as error:
            logger.warning(
                f"{identity} cannot be written: {error.strerror}. The next start begins another"
                " chart."
            )
    return {
        **named,
        "config": config.model_dump(mode="json"),
        "resume": "allow",
        "save_code": False,
        "dir": str(run.folder)
        if run.folder is not None
        else tempfile.mkdtemp(prefix="fast-llm-wandb-"),
        "process": os.getpid(),
    }
