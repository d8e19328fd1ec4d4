"""The experiment folder of a run, and its logs there and on the terminal.

<experiment_dir>/
├── config.yaml              the resolved configuration, itself valid input
├── metrics.jsonl            one record a line, appended across restarts
├── pretrained/              config.json and tokenizer of the pretrained model, for exports
├── runs/<k>/logs/           logs_rank_<r>.txt of the k-th start; stacks_rank_<r>.txt if it hung
├── tensorboard/             with `training.tensorboard`
├── profile/                 with `training.profiling`
├── checkpoint/<step>/       training state
└── export/<family>/<step>/  Hugging Face folders

Without `run.experiment_dir` nothing is written, and the log goes only to the terminal.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from fast_llm.config.section import dump
from fast_llm.errors import ConfigError, disk_problem
from fast_llm.planning.history import read_records
from fast_llm.planning.run_spec import RunSpec
from fast_llm.storage import write_atomically
from fast_llm.terminal import RED, YELLOW, style

logger = logging.getLogger("fast_llm")


class Run:
    """One start of an experiment: its number, its folder, its logs."""

    def __init__(
        self, folder: Path | None, rank: int, processes: int, timestamps: bool, number: int
    ):
        self.folder = folder
        self.is_main = rank == 0
        self.number = number
        self.progress = ProgressLine(sys.stderr) if self.is_main and sys.stderr.isatty() else None
        self._records: int | None = None  # a file descriptor
        self._unwritten = b""
        self._warned = False
        handlers: list[logging.Handler] = []
        if self.is_main:
            handlers.append(_TerminalHandler(self.progress, timestamps))
        self.logs = folder / "runs" / str(number) / "logs" if folder is not None else None
        if self.logs is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            width = len(str(processes - 1))
            handlers.append(
                _LogFile(self.logs / f"logs_rank_{rank:0{width}d}.txt", encoding="utf-8")
            )
            handlers[-1].setFormatter(_file_formatter(rank, processes, timestamps))
        for old in list(logger.handlers):
            logger.removeHandler(old)
            if isinstance(old, EarlyLog) and self.logs is not None:
                for record in old.records:
                    handlers[-1].handle(record)
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def record(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl: floats unrounded, NaN and infinities as null."""
        if self.folder is None or not self.is_main:
            return
        line = {
            key: None if value != value or value in (_INFINITY, -_INFINITY) else value
            for key, value in values.items()
        }
        self._unwritten += (json.dumps(line) + "\n").encode()
        self._write_records(self.folder / "metrics.jsonl")

    def _write_records(self, path: Path) -> None:
        """Append the unwritten records.

        After an error, for example a full disk, they stay for the next call.
        """
        try:
            if self._records is None:
                _truncate_partial_line(path)
                self._records = os.open(
                    path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
                )
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._records, self._unwritten) :]
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"{path}: cannot be written: {error.strerror}; free space on the disk. Its"
                    " records are kept in memory until they can be written."
                )

    def recorded(self) -> list[dict[str, Any]]:
        """All records of this experiment, the oldest first."""
        return [] if self.folder is None else read_records(self.folder)

    def close(self) -> None:
        """Flush and close what is open."""
        if self.progress is not None:
            self.progress.clear()
        if self.folder is not None and self._unwritten:
            self._write_records(self.folder / "metrics.jsonl")
            if lost := self._unwritten.count(b"\n"):
                logger.error(
                    f"{self.folder / 'metrics.jsonl'}: {lost} records could not be written and are"
                    " lost."
                )
        if self._records is not None:
            os.close(self._records)
            self._records = None
        for handler in list(logger.handlers):
            with contextlib.suppress(OSError):
                handler.close()
            logger.removeHandler(handler)


def _file_formatter(rank: int, processes: int, timestamps: bool) -> logging.Formatter:
    prefix = f"[Rank {rank:0{len(str(processes - 1))}d}] " if processes > 1 else ""
    return logging.Formatter(("%(asctime)s " if timestamps else "") + prefix + "%(message)s")


class _TerminalFormatter(logging.Formatter):
    """The time without the year or rank, as only rank 0 prints. Warnings and errors stand out."""

    def __init__(self, timestamps: bool):
        super().__init__("%(asctime)s %(message)s" if timestamps else None, "%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return style(text, sys.stdout, RED if record.levelno >= logging.ERROR else YELLOW)


class EarlyLog(logging.Handler):
    """The log before a Run exists.

    The first process prints each line at once; a Run writes them to the log files later.
    """

    def __init__(self, rank: int, timestamps: bool):
        super().__init__()
        self.is_main = rank == 0
        self.records: list[logging.LogRecord] = []
        self.setFormatter(_TerminalFormatter(timestamps))

    def __enter__(self) -> "EarlyLog":
        self.before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger.removeHandler(self)
        logger.level, logger.propagate = self.before

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        if self.is_main:
            print(self.format(record), flush=True)


_INFINITY = float("inf")


def next_run_number(folder: Path | None) -> int:
    """The number of the next start in this folder, from 0."""
    if folder is None or not (folder / "runs").is_dir():
        return 0
    numbers = [int(entry.name) for entry in (folder / "runs").iterdir() if entry.name.isdigit()]
    return max(numbers, default=-1) + 1


def lock(folder: Path) -> TextIO:
    """Lock an experiment folder until the returned file is closed or this process ends.

    Raises ConfigError that names the process with the lock. The kernel releases the lock after a
    crash.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        if disk_problem(error) is not None:
            raise
        raise ConfigError(
            [f"run.experiment_dir: {folder} cannot be written to: {error.strerror}; choose another"]
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise ConfigError(
            [
                f"run.experiment_dir: another run writes to {folder}: {holder}; wait for it, stop"
                " it, or choose another run.experiment_dir"
            ]
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning(
            f"{folder} cannot be locked ({error.strerror}): make sure that no other run writes to"
            " it."
        )
        return file
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {socket.gethostname()} since"
        f" {datetime.now():%Y-%m-%d %H:%M:%S}\n"
    )
    file.flush()
    return file


def prepare_folder(spec: RunSpec) -> None:
    """Write the files of an experiment folder that exist before the first step; on rank 0."""
    folder = spec.folder
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", dump(spec.config))
    if spec.extra_files or spec.pretrained_config is not None:
        (folder / "pretrained").mkdir(exist_ok=True)
        for name, content in spec.extra_files.items():
            target = folder / "pretrained" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != content:
                target.write_bytes(content)


def _truncate_partial_line(path: Path) -> None:
    """Remove an incomplete last line, which a crash leaves and the next record would continue."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            file.truncate(end)


class _LogFile(logging.FileHandler):
    """A log file whose write errors end no run, and are reported once."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not self.reported:
            self.reported = True
            why = error.strerror if isinstance(error, OSError) else error
            print(
                f"{self.baseFilename}: cannot be written: {why}; the log continues here.",
                file=sys.stderr,
            )


class _TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """The log on the terminal. It clears the progress line before each record."""

    def __init__(self, progress: "ProgressLine | None", timestamps: bool):
        super().__init__(sys.stdout)
        self.progress = progress
        self.setFormatter(_TerminalFormatter(timestamps))

    def emit(self, record: logging.LogRecord) -> None:
        if self.progress is not None:
            self.progress.clear()
        super().emit(record)


class ProgressLine:
    """A progress bar at the bottom of a terminal, redrawn at most five times a second."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.shown = 0.0

    def show(self, done: int, total: int, text: str) -> None:
        """Draw a bar for `done` of `total`, followed by `text`."""
        now = time.monotonic()
        if now - self.shown < 0.2 and done != total:
            return
        self.shown = now
        filled = round(24 * done / max(total, 1))
        line = f"{'━' * filled}{'─' * (24 - filled)} {done:,}/{total:,} {text}"
        self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def clear(self) -> None:
        """Remove the bar, before a log line."""
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
