"""Hang detection, the watcher: find a process that hangs, name it, and end the run.

Each process of a run has a watcher, which polls the process's heartbeat (process.py) five times a
second and reports to the watcher of rank 0, over UDP, about once a second.

When a process has made no progress for too long, all watchers collect stack traces. The watcher of
rank 0 compares the progress of all processes: the others wait for the one with the fewest
heartbeats. It reports that one, and every watcher kills its process: a stopped process responds to
nothing weaker, and torchrun alone waits 30 s before it does the same.

This file is run as a program, by its path: it imports only the standard library.
"""

import contextlib
import json
import mmap
import os
import secrets
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Requests stack traces. Python and Slurm do not use it, and a process without a handler ignores it.
STACKS_SIGNAL = signal.SIGURG
HEARTBEAT = struct.Struct("@QQd64s")  # heartbeats so far, step, seconds allowed, phase
TIMED_OUT, FAILED, ENDED = "collective timed out", "failed", "end"  # the last phases
STATES = {"": "", "stopped": "stopped by a signal ", "ended": "ended "}
_POLL_INTERVAL, _REPORT_INTERVAL = 0.2, 1.0  # seconds


class Status(NamedTuple):
    """The progress of a process, as its watcher sees it."""

    rank: int
    host: str
    process: int
    heartbeats: int
    step: int
    phase: str
    seconds: float  # without progress
    slow: bool  # a slow phase
    state: str  # a key of STATES
    is_waiting: bool | None  # for another process, by its stack traces; None before they exist

    @property
    def location(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watcher:
    """Polls one process, reports to rank 0's watcher, and ends the run when it hangs."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.timeout: float = settings["timeout"]
        self.rank: int = settings["rank"]
        self.process: int = settings["process"]
        self.host = socket.gethostname()
        self.stacks: int = settings["stacks"]
        self.memory = mmap.mmap(settings["memory"], mmap.PAGESIZE, prot=mmap.PROT_READ)
        self.endpoint: tuple[Any, ...] | None = None
        self.socket: socket.socket | None = None
        if settings["endpoint"] is not None:
            address, port, self.token = settings["endpoint"]
            with contextlib.suppress(OSError):
                if settings["socket"] is not None:
                    self.socket = socket.socket(fileno=settings["socket"])
                else:
                    family, kind, _, _, self.endpoint = socket.getaddrinfo(
                        address, port, type=socket.SOCK_DGRAM
                    )[0]
                    self.socket = socket.socket(family, kind)
        # Time while this watcher ran: neither a suspended machine nor a stopped job is a hang.
        self.awake_seconds, self.last_poll = 0.0, time.monotonic()
        self.last_report = -_REPORT_INTERVAL
        self.last_progress = self.last_running = 0.0  # in awake seconds
        self.heartbeats, self.step, self.allowed, self.phase = 0, 0, self.timeout, "start"
        self.process_ended = self.hang_detected = False
        self.is_waiting: bool | None = None
        self.others: dict[int, tuple[Status, Any]] = {}  # on rank 0: status and address, by rank
        self.stacks_requested = False  # by rank 0's watcher
        self.diagnosis: tuple[list[int], str] | None = None

    def run(self) -> None:
        """Watch until the process ends or hangs."""
        while True:
            self.receive(_POLL_INTERVAL)
            self.poll()
            if self.hang_detected or self.stacks_requested or self.is_hung():
                self.handle_hang()
                return
            if self.process_ended or self.awake_seconds - self.last_report >= _REPORT_INTERVAL:
                self.report()
            if self.process_ended:
                return

    def receive(self, seconds: float) -> None:
        """Wait for messages or the end of the process, at most so many seconds."""
        sources: list[Any] = ([] if self.process_ended else [sys.stdin]) + (
            [] if self.socket is None else [self.socket]
        )
        ready = select.select(sources, [], [], seconds)[0]
        if sys.stdin in ready or os.getppid() != self.process:
            self.process_ended = True
        while self.socket is not None and self.socket in ready:
            try:
                data, sender = self.socket.recvfrom(65536, socket.MSG_DONTWAIT)
            except OSError:  # no more messages, or an error from a watcher that has ended
                break
            with contextlib.suppress(ValueError, TypeError, KeyError):
                message = json.loads(data)
                if secrets.compare_digest(str(message["token"]), self.token):
                    self.handle_message(message, sender)

    def handle_message(self, message: dict[str, Any], sender: Any) -> None:
        """Handle a message of another watcher."""
        if self.rank == 0:
            status = Status(*message["status"])
            self.others[status.rank] = status, sender
            self.hang_detected |= message["hang_detected"]
        elif message["diagnosis"] is not None:
            ranks, text = message["diagnosis"]
            self.diagnosis = list(ranks), str(text)
            self.stacks_requested = True
        else:
            self.stacks_requested = True

    def poll(self) -> None:
        """Read the heartbeat and the kernel's state of the process."""
        now = time.monotonic()
        self.awake_seconds += min(now - self.last_poll, 1.0)
        self.last_poll = now
        if _kernel_state(self.process) != "T":
            self.last_running = self.awake_seconds
        heartbeats, step, allowed, phase = HEARTBEAT.unpack_from(self.memory)
        if heartbeats != self.heartbeats:
            name = phase.rstrip(b"\0").decode(errors="replace")
            self.hang_detected |= name == TIMED_OUT and self.stalled_seconds > 0.9 * self.timeout
            self.heartbeats, self.step, self.allowed, self.phase = heartbeats, step, allowed, name
            self.last_progress = self.awake_seconds
        elif self.process_ended and self.phase not in (TIMED_OUT, FAILED, ENDED):
            # NCCL ends a process whose collective timed out.
            self.hang_detected |= self.stalled_seconds > 0.9 * self.timeout

    @property
    def stalled_seconds(self) -> float:
        """Time without a heartbeat."""
        return self.awake_seconds - self.last_progress

    def is_hung(self) -> bool:
        """Whether the process hangs."""
        stopped = self.awake_seconds - self.last_running
        if self.process_ended or (stopped <= self.timeout and self.stalled_seconds <= self.allowed):
            return False
        if stopped <= self.timeout and self.is_debugged():
            self.last_progress, self.is_waiting = self.awake_seconds, None
            return False
        return True

    def is_debugged(self) -> bool:
        """Whether a debugger is attached."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process}/status").read_text().splitlines():
                if line.startswith("TracerPid:") and line.split()[1] != "0":
                    return True
        self.request_stacks()
        return any(name in self.read_stacks() for name in ("/bdb.py", "pydevd"))

    def request_stacks(self) -> None:
        """Have the process write the stack traces of all threads, and wait for them."""
        self.is_waiting = False
        if self.process_ended or _kernel_state(self.process) == "T":
            return
        os.ftruncate(self.stacks, 0)
        os.lseek(self.stacks, 0, os.SEEK_SET)  # the process writes to the same open file
        self.signal(STACKS_SIGNAL)
        deadline, size = time.monotonic() + 1, 0
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, size = size, os.fstat(self.stacks).st_size
            if size == before > 0:
                break
        self.is_waiting = _is_waiting(self.read_stacks())

    def read_stacks(self) -> str:
        """The stack traces that the process wrote."""
        size = os.fstat(self.stacks).st_size
        return os.pread(self.stacks, size, 0).decode(errors="replace").strip("\0")

    def status(self) -> Status:
        """The process's status now."""
        stopped = self.awake_seconds > self.last_running
        state = "ended" if self.process_ended else "stopped" if stopped else ""
        since = self.last_running if state == "stopped" else self.last_progress
        slow = self.allowed >= self.settings["slow_timeout"] > self.timeout and state != "stopped"
        return Status(
            self.rank,
            self.host,
            self.process,
            self.heartbeats,
            self.step,
            self.phase,
            self.awake_seconds - since,
            slow,
            state,
            self.is_waiting,
        )

    def report(self) -> None:
        """Send the status to rank 0's watcher."""
        self.last_report = self.awake_seconds
        if self.rank != 0:
            self.send({"status": self.status(), "hang_detected": self.hang_detected}, self.endpoint)

    def send(self, message: dict[str, Any], address: Any) -> None:
        """Send a message to another watcher, without confirmation."""
        if self.socket is not None and address is not None:
            with contextlib.suppress(OSError):
                self.socket.sendto(json.dumps({"token": self.token, **message}).encode(), address)

    def handle_hang(self) -> None:
        """Find the stalled process and end the run, within three seconds."""
        if self.rank == 0:
            self.broadcast(None)  # first, so that all request stacks at the same time
        if self.is_waiting is None:
            self.request_stacks()
        self.hang_detected = True
        self.report()
        deadline = time.monotonic() + (1.5 if self.rank == 0 else 2.5)
        several = self.settings["processes"] > 1
        while several and self.diagnosis is None and time.monotonic() < deadline:
            self.receive(0.1)
            if self.rank == 0 and self.all_stacks_written():
                break
            if self.rank != 0:
                self.report()
        answered = self.diagnosis is not None
        if self.diagnosis is None:
            reported = [status for status, _ in self.others.values()] if self.rank == 0 else []
            self.diagnosis = diagnose([self.status(), *reported], self.settings)
        if self.rank == 0:
            self.broadcast(self.diagnosis)
        self.terminate(*self.diagnosis, to_terminal=self.settings["first_on_host"] or not answered)

    def all_stacks_written(self) -> bool:
        """Whether every other process has written its stack traces or has ended."""
        statuses = [status for status, _ in self.others.values()]
        return len(statuses) == self.settings["processes"] - 1 and all(
            status.is_waiting is not None or status.state == "ended" for status in statuses
        )

    def broadcast(self, diagnosis: tuple[list[int], str] | None) -> None:
        """Send every other watcher the diagnosis; None requests stack traces."""
        for _, address in self.others.values():
            self.send({"diagnosis": diagnosis}, address)

    def terminate(self, stalled: list[int], text: str, to_terminal: bool) -> None:
        """Report, and kill the process.

        Stalled processes are killed first, so that torchrun names them as the first to fail.

        """
        writer = threading.Thread(target=self.write_report, args=(text, to_terminal), daemon=True)
        writer.start()
        writer.join(1.5)  # the folder's disk may be what hangs
        if self.rank not in stalled:
            self.signal(signal.SIGSTOP)  # else it would report lost connections
            time.sleep(0.4)
        self.signal(signal.SIGKILL)
        os._exit(0)  # without waiting for the writer

    def write_report(self, text: str, to_terminal: bool) -> None:
        """Write the stack traces and the diagnosis to the terminal and the run's logs."""
        several = self.settings["processes"] > 1
        stacks = self.read_stacks().strip()
        if not stacks:
            reason = STATES[self.status().state].strip() or "did not answer"
            stacks = f"No stacks: the process {reason}."
        width = len(str(self.settings["processes"] - 1))
        prefix = f"[Rank {self.rank:0{width}d}] " if several else ""
        lines = "".join(f"{prefix}{line}\n" for line in stacks.splitlines())
        sys.stderr.write(lines + (f"{text}\n" if to_terminal else ""))
        sys.stderr.flush()
        if self.settings["logs"] is not None:
            path = Path(self.settings["logs"]) / f"stacks_rank_{self.rank:0{width}d}.txt"
            path.write_text(f"{text}\n\n{self.status().location}\n{stacks}\n", encoding="utf-8")

    def signal(self, number: int) -> None:
        """Signal the process while it is our parent: later its id may be another process's."""
        if os.getppid() == self.process:
            with contextlib.suppress(OSError):
                os.kill(self.process, number)


def diagnose(statuses: Iterable[Status], settings: dict[str, Any]) -> tuple[list[int], str]:
    """The stalled ranks, and the message for the user."""
    statuses, processes = sorted(statuses), settings["processes"]
    stopped = [status for status in statuses if status.state == "stopped"]
    least = min(status.heartbeats for status in statuses)
    furthest = max(statuses, key=lambda status: status.heartbeats)
    behind = [status for status in statuses if status.heartbeats == least]
    # Of several with the fewest heartbeats, those inside a collective wait for the others.
    stalled = stopped or [status for status in behind if not status.is_waiting] or behind
    names = [_describe(status, processes) for status in stalled]
    named = "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
    missing = sorted(set(range(processes)) - {status.rank for status in statuses})
    if processes == 1:
        text = f"This run hung and was killed: {named}."
    elif len(stalled) == processes or (missing and all(status.is_waiting for status in stalled)):
        text = (
            "This run hung and was killed. The stalled rank is not certain; least progress:"
            f" {named}."
        )
    else:
        text = f"This run hung and was killed. Stalled: {named}."
        if furthest not in stalled:
            text += f" The other ranks were waiting, the furthest in {furthest.location}."
    if missing:
        ranks = ", ".join(map(str, missing[:16])) + (", …" if len(missing) > 16 else "")
        text += f" No message from rank {ranks}."
    if settings["logs"] is not None:
        text += f" Stacks: {settings['logs']}/stacks_rank_*.txt."
    limit = (
        f"training.timeout is {settings['slow_timeout']:g} s"
        if all(status.slow for status in stalled)
        else f"model.distributed.timeout is {settings['timeout']:g} s"
    )
    return [status.rank for status in stalled], f"{text} ({limit})"


def _describe(status: Status, processes: int) -> str:
    rank = f"rank {status.rank}, " if processes > 1 else ""
    return (
        f"{rank}process {status.process} on {status.host}, {STATES[status.state]}in"
        f" {status.location}, for {status.seconds:.0f} s"
    )


def _kernel_state(process: int) -> str:
    """The kernel's state letter: R running, S sleeping, T stopped by a signal."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _is_waiting(stacks: str) -> bool:
    """Whether a thread that the process depends on is inside a collective."""
    saver = "/fast_llm/training/saving.py"
    saver_awaited = any(
        saver in line and line.endswith(" in _join") for line in stacks.splitlines()
    )
    for thread in stacks.split("\n\n"):
        if not saver_awaited and any(
            saver in line and line.endswith(" in _write_with_retries")
            for line in thread.splitlines()
        ):
            continue  # training does not wait for this checkpoint
        frames = [line for line in thread.splitlines() if line.lstrip().startswith("File ")][:3]
        collective_code = (
            "/torch/distributed/",
            "/fast_llm/parallel/mesh.py",
            "/fast_llm/parallel/pipeline.py",
        )
        if any(
            name in frame and "/tensor/_dispatch.py" not in frame
            for frame in frames
            for name in collective_code
        ):
            return True
    return False


if __name__ == "__main__":
    # Ctrl-C, torchrun and Slurm signal every process of a group or job; the watcher ends with its
    # process.
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(_number, signal.SIG_IGN)
    if _settings := os.read(0, 65536):  # nothing: the process ended at once
        Watcher(json.loads(_settings)).run()
