"""Hang detection, the training process's side: heartbeats in shared memory.

Each process of a run starts a watcher (watcher.py): a small program without torch, which keeps
working when its process is stopped or holds Python's lock forever. The process records its current
phase in memory that both share.

Cost: a microsecond a heartbeat; no thread.
"""

import contextlib
import faulthandler
import json
import logging
import mmap
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fast_llm.watchdog import watcher
from fast_llm.watchdog.watcher import ENDED, FAILED, HEARTBEAT, STACKS_SIGNAL, TIMED_OUT

logger = logging.getLogger("fast_llm")

# Seconds that collectives wait longer than watchers, so that the watchers report a hang first.
COLLECTIVE_SLACK = 2.0
_SAME_EVERY_TIME = ("data",)  # phases that have no reason to take longer the first time


class Watchdog:
    """Records this process's phase, and owns its watcher."""

    def __init__(
        self,
        timeout: float,
        slow_timeout: float,
        logs: Path | None,
        *,
        rank: int = 0,
        processes: int = 1,
        broadcast: Callable[[Any], Any] = lambda value: value,
        warm_up: int = 1,
    ):
        """Start the watcher.

        `timeout`: seconds that a phase may take; `slow_timeout`: seconds for slow phases, and for
        every phase the first `warm_up` times; `logs`: the folder for stack traces; `broadcast`:
        returns rank 0's value on every process.
        """
        self.timeout, self.slow_timeout, self.warm_up = timeout, slow_timeout, warm_up
        self.heartbeats = self.step = 0
        self.phase, self.phase_start = "start", time.monotonic()
        self.counts: Counter[str] = Counter()  # times each phase has begun
        self.seconds: dict[str, float] = {}  # that each phase took last
        self.watcher: subprocess.Popen[bytes] | None = None
        self.stacks, shared = _anonymous_file(), _anonymous_file()
        shared.truncate(mmap.PAGESIZE)
        self.memory = mmap.mmap(shared.fileno(), mmap.PAGESIZE)
        self.heartbeat("start", slow=True)
        inbox = _bind() if rank == 0 and processes > 1 else None
        settings = {
            "timeout": timeout,
            "slow_timeout": slow_timeout,
            "process": os.getpid(),
            "rank": rank,
            "processes": processes,
            "stacks": self.stacks.fileno(),
            "memory": shared.fileno(),
            "socket": inbox.fileno() if inbox is not None else None,
            "endpoint": broadcast(
                (_address(), inbox.getsockname()[1], secrets.token_hex(16))
                if inbox is not None
                else None
            ),
            "logs": str(logs) if logs is not None else None,
            "first_on_host": os.environ.get("LOCAL_RANK", "0") == "0",
        }
        faulthandler.register(STACKS_SIGNAL, self.stacks, all_threads=True)
        files = [file.fileno() for file in (self.stacks, shared, inbox) if file is not None]
        try:
            self._start_watcher(settings, files)
        except OSError as error:
            logger.warning(f"Hang detection is off: its process could not be started ({error}).")
        finally:
            shared.close()
            if inbox is not None:
                inbox.close()

    def _start_watcher(self, settings: dict[str, Any], files: list[int]) -> None:
        self.watcher = subprocess.Popen(
            [sys.executable, "-SP", watcher.__file__],
            stdin=subprocess.PIPE,  # its end tells the watcher that this process has ended
            stdout=subprocess.DEVNULL,
            # A signal that stops a rank's process group must not stop the watcher. Without torchrun
            # the watcher stays in the group: Ctrl-Z stops both, and nothing hangs.
            process_group=0 if settings["processes"] > 1 else None,
            pass_fds=files,
        )
        assert self.watcher.stdin is not None
        self.watcher.stdin.write(json.dumps(settings).encode() + b"\n")
        self.watcher.stdin.flush()

    def heartbeat(self, phase: str, step: int | None = None, slow: bool = False) -> None:
        """Begin a phase, which has `timeout` seconds to end.

        All processes go through the same phases.
        """
        now = time.monotonic()
        self.seconds[self.phase] = now - self.phase_start
        last = self.seconds.get(phase, 0.0)
        self.phase, self.phase_start = phase, now
        self.heartbeats += 1
        self.counts[phase] += 1
        self.step = self.step if step is None else step
        if slow or (self.counts[phase] <= self.warm_up and phase not in _SAME_EVERY_TIME):
            allowed = self.slow_timeout
        else:  # a phase that was slow and ended may be as slow again: a large model on a CPU
            allowed = self.timeout if last <= self.timeout else 2 * last
        HEARTBEAT.pack_into(self.memory, 0, self.heartbeats, self.step, allowed, phase.encode())

    def begin_warm_up(self) -> None:
        """Let each phase be slow for the first `warm_up` times again, for new shapes."""
        self.counts.clear()

    def failed(self, error: BaseException) -> None:
        """This process ends with an error: of its own, or because a collective timed out."""
        text = str(error).lower()
        timed_out = "timed out" in text or "timeout" in text
        self.heartbeat(TIMED_OUT if timed_out else FAILED, slow=True)

    def close(self) -> None:
        """End the watcher."""
        if self.phase not in (TIMED_OUT, FAILED):
            self.heartbeat(ENDED, slow=True)
        faulthandler.unregister(STACKS_SIGNAL)
        if self.watcher is not None:
            assert self.watcher.stdin is not None
            with contextlib.suppress(OSError):
                self.watcher.stdin.close()
            try:
                self.watcher.wait(5)
            except subprocess.TimeoutExpired:
                self.watcher.kill()
                self.watcher.wait()
        self.memory.close()
        self.stacks.close()


def _anonymous_file() -> BinaryIO:
    """A file without a name, removed when the last process closes it."""
    if hasattr(os, "memfd_create"):  # Linux: no disk either, which may be what hangs
        return os.fdopen(os.memfd_create("watchdog"), "w+b", 0)
    return tempfile.TemporaryFile(buffering=0)


def _bind() -> socket.socket:
    """The UDP socket on which the watcher of rank 0 receives messages."""
    if socket.has_dualstack_ipv6():
        inbox = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        inbox.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    else:
        inbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    inbox.bind(("", 0))
    return inbox


def _address() -> str:
    """This host's address for others: the one it uses towards MASTER_ADDR, else MASTER_ADDR."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = str(probe.getsockname()[0])
        if not own.startswith("127.") and own != "::1":
            return own
    return master
