"""Find a process that hangs, say which one it was, and end the run.

Beside each process of a run stands a watcher: a small one without torch, which goes on when its process is stopped or holds
Python's lock for ever. The process marks where it is in memory that both see: a microsecond, no thread. The watcher looks
five times a second, and tells the watcher of rank 0, over UDP, about once a second.

When a process has stood still for too long, all of them write the stacks of their threads. The watcher of rank 0 then compares
how far each has come: the least far is who the others wait for. It says so, and every watcher kills its process: a
stopped one does not answer anything less, and torchrun alone would wait 30 s before it does the same.

This file is also what a watcher runs, by its path: it imports nothing but Python's own modules.
"""

import contextlib
import faulthandler
import json
import logging
import mmap
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

logger = logging.getLogger("fast_llm")

SLACK = (
    2.0  # seconds that collectives wait longer than watchers, so that these are the first to speak
)
ASK = (
    signal.SIGURG
)  # asks for stacks; not used by Python or Slurm, and ignored by whoever does not expect it
GAVE_UP, FAILED, ENDED = "waited in vain", "failed", "end"  # the last phases
STATES = {"": "", "stopped": "stopped by a signal ", "ended": "ended "}
_SLOT = struct.Struct("@QQd64s")  # marks so far, step, seconds allowed, phase
_LOOK, _TELL = 0.2, 1.0  # seconds between looks, and between messages to the watcher of rank 0
_AT_ONCE = ("data",)  # phases that have no reason to take longer the first time


class Watchdog:
    """A process's own side: marks where it is."""

    def __init__(
        self,
        timeout: float,
        patience: float,
        logs: Path | None,
        *,
        rank: int = 0,
        processes: int = 1,
        share: Callable[[Any], Any] = lambda value: value,
        warm_up: int = 1,
    ):
        """`timeout`: seconds that a phase may take; `patience`: seconds that a patient phase may, and every phase the first
        `warm_up` times; `logs`: the folder for stacks; `share`: what rank 0 has, on all processes."""
        self.timeout, self.patience, self.warm_up = timeout, patience, warm_up
        self.marks = self.step = 0
        self.phase, self.since = "start", time.monotonic()
        self.times: Counter[str] = Counter()
        self.took: dict[str, float] = {}
        self.watcher: subprocess.Popen[bytes] | None = None
        self.stacks, shared = _memory(), _memory()
        shared.truncate(mmap.PAGESIZE)
        self.memory = mmap.mmap(shared.fileno(), mmap.PAGESIZE)
        self.mark("start", patient=True)
        mail = _bind() if rank == 0 and processes > 1 else None
        settings = {
            "timeout": timeout,
            "patience": patience,
            "process": os.getpid(),
            "rank": rank,
            "processes": processes,
            "stacks": self.stacks.fileno(),
            "memory": shared.fileno(),
            "socket": mail.fileno() if mail is not None else None,
            "post": share(
                (_address(), mail.getsockname()[1], secrets.token_hex(16))
                if mail is not None
                else None
            ),
            "logs": str(logs) if logs is not None else None,
            "first_here": os.environ.get("LOCAL_RANK", "0") == "0",
        }
        faulthandler.register(ASK, self.stacks, all_threads=True)
        try:
            self.watcher = subprocess.Popen(
                [sys.executable, "-SP", __file__],
                stdin=subprocess.PIPE,  # its end tells the watcher that this process has ended
                stdout=subprocess.DEVNULL,
                # Whoever stops a rank and all of its group shall not stop the watcher. Without torchrun it stays in the
                # group: Ctrl-Z stops both, and nothing hangs.
                process_group=0 if processes > 1 else None,
                pass_fds=[
                    file.fileno() for file in (self.stacks, shared, mail) if file is not None
                ],
            )
            assert self.watcher.stdin is not None
            self.watcher.stdin.write(json.dumps(settings).encode() + b"\n")
            self.watcher.stdin.flush()
        except OSError as error:
            logger.warning(
                f"Nobody watches whether this process hangs: no watcher could be started ({error})."
            )
        finally:
            shared.close()
            if mail is not None:
                mail.close()

    def mark(self, phase: str, step: int | None = None, patient: bool = False) -> None:
        """This process begins a phase, which has `timeout` to end. All processes go through the same phases."""
        now = time.monotonic()
        self.took[self.phase] = now - self.since
        took = self.took.get(phase, 0.0)
        self.phase, self.since = phase, now
        self.marks += 1
        self.times[phase] += 1
        self.step = self.step if step is None else step
        if patient or (self.times[phase] <= self.warm_up and phase not in _AT_ONCE):
            allowed = self.patience
        else:  # what was slow and ended may be as slow again: a large model on a CPU
            allowed = self.timeout if took <= self.timeout else 2 * took
        _SLOT.pack_into(self.memory, 0, self.marks, self.step, allowed, phase.encode())

    def failed(self, error: BaseException) -> None:
        """This process leaves with an error: of its own, or because a collective waited for another process for too long."""
        text = str(error).lower()
        self.mark(GAVE_UP if "timed out" in text or "timeout" in text else FAILED, patient=True)

    def close(self) -> None:
        """The end, and the watcher's too."""
        if self.phase not in (GAVE_UP, FAILED):
            self.mark(ENDED, patient=True)
        faulthandler.unregister(ASK)
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


def _memory() -> BinaryIO:
    """A file that is in no folder and goes with those who have it open."""
    if hasattr(os, "memfd_create"):  # Linux: no disk either, which may be what hangs
        return os.fdopen(os.memfd_create("watchdog"), "w+b", 0)
    return tempfile.TemporaryFile(buffering=0)


def _bind() -> socket.socket:
    """Where the watcher of rank 0 gets its mail."""
    if socket.has_dualstack_ipv6():
        mail = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        mail.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    else:
        mail = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mail.bind(("", 0))
    return mail


def _address() -> str:
    """How other hosts reach this one: by the address it has towards MASTER_ADDR, or as MASTER_ADDR itself."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = str(probe.getsockname()[0])
        if not own.startswith("127.") and own != "::1":
            return own
    return master


class Place(NamedTuple):
    """Where a process is, as its watcher sees it."""

    rank: int
    host: str
    process: int
    marks: int
    step: int
    phase: str
    seconds: float  # since it went on last
    patient: bool
    state: str  # of STATES
    waits: bool | None  # for another process, as its stacks tell; None before they were asked for

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.phase}"


class Watcher:
    """The process beside: looks, tells, and ends the run."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.timeout: float = settings["timeout"]
        self.rank: int = settings["rank"]
        self.process: int = settings["process"]
        self.host = socket.gethostname()
        self.stacks: int = settings["stacks"]
        self.memory = mmap.mmap(settings["memory"], mmap.PAGESIZE, prot=mmap.PROT_READ)
        self.post: tuple[Any, ...] | None = None
        self.mail: socket.socket | None = None
        if settings["post"] is not None:
            address, port, self.token = settings["post"]
            with contextlib.suppress(OSError):
                if settings["socket"] is not None:
                    self.mail = socket.socket(fileno=settings["socket"])
                else:
                    family, kind, _, _, self.post = socket.getaddrinfo(
                        address, port, type=socket.SOCK_DGRAM
                    )[0]
                    self.mail = socket.socket(family, kind)
        # Seconds as far as this process was awake: a machine that sleeps, or a job that is stopped as a whole, does not hang.
        self.clock, self.last_look, self.last_told = 0.0, time.monotonic(), -_TELL
        self.since = self.running = (
            0.0  # when its process went on last, and when it was last seen not stopped
        )
        self.marks, self.step, self.allowed, self.phase = 0, 0, self.timeout, "start"
        self.gone = self.alarmed = False
        self.waits: bool | None = None
        self.others: dict[
            int, tuple[Place, Any]
        ] = {}  # what rank 0 knows of the others, and where they are reached
        self.called = False  # by rank 0's watcher, to ask for stacks
        self.verdict: tuple[list[int], str] | None = None

    def run(self) -> None:
        """Until the process ends or hangs."""
        while True:
            self.listen(_LOOK)
            self.look()
            if self.alarmed or self.called or self.overdue():
                self.alarm()
                return
            if self.gone or self.clock - self.last_told >= _TELL:
                self.tell()
            if self.gone:
                return

    def listen(self, seconds: float) -> None:
        """Wait for mail or the end of the process."""
        sources: list[Any] = ([] if self.gone else [sys.stdin]) + (
            [] if self.mail is None else [self.mail]
        )
        ready = select.select(sources, [], [], seconds)[0]
        if sys.stdin in ready or os.getppid() != self.process:
            self.gone = True
        while self.mail is not None and self.mail in ready:
            try:
                data, sender = self.mail.recvfrom(65536, socket.MSG_DONTWAIT)
            except OSError:  # no more of it, or a refusal from a watcher that has ended
                break
            with contextlib.suppress(ValueError, TypeError, KeyError):
                letter = json.loads(data)
                if secrets.compare_digest(str(letter["token"]), self.token):
                    self.open(letter, sender)

    def open(self, letter: dict[str, Any], sender: Any) -> None:
        """A letter of another watcher."""
        if self.rank == 0:
            place = Place(*letter["place"])
            self.others[place.rank] = place, sender
            self.alarmed |= letter["alarm"]
        elif letter["verdict"] is not None:
            ranks, text = letter["verdict"]
            self.verdict = list(ranks), str(text)
            self.called = True
        else:
            self.called = True

    def look(self) -> None:
        """Where is the process?"""
        now = time.monotonic()
        self.clock += min(now - self.last_look, 1.0)
        self.last_look = now
        if _state(self.process) != "T":
            self.running = self.clock
        marks, step, allowed, phase = _SLOT.unpack_from(self.memory)
        if marks != self.marks:
            name = phase.rstrip(b"\0").decode(errors="replace")
            self.alarmed |= name == GAVE_UP and self.clock - self.since > 0.9 * self.timeout
            self.marks, self.step, self.allowed, self.phase = marks, step, allowed, name
            self.since = self.clock
        elif self.gone and self.phase not in (
            GAVE_UP,
            FAILED,
            ENDED,
        ):  # NCCL ends a process that lost patience
            self.alarmed |= self.clock - self.since > 0.9 * self.timeout

    def overdue(self) -> bool:
        """Whether the process hangs."""
        stopped = self.clock - self.running
        if self.gone or (stopped <= self.timeout and self.clock - self.since <= self.allowed):
            return False
        if stopped <= self.timeout and self.debugged():
            self.since, self.waits = self.clock, None
            return False
        return True

    def debugged(self) -> bool:
        """Whether somebody is looking at it."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process}/status").read_text().splitlines():
                if line.startswith("TracerPid:") and line.split()[1] != "0":
                    return True
        self.ask()
        return any(name in self.read() for name in ("/bdb.py", "pydevd"))

    def ask(self) -> None:
        """Have the stacks of all threads written, and wait for them."""
        self.waits = False
        if self.gone or _state(self.process) == "T":
            return
        os.ftruncate(self.stacks, 0)
        os.lseek(self.stacks, 0, os.SEEK_SET)  # of both: the process writes to the same open file
        self.signal(ASK)
        deadline, size = time.monotonic() + 1, 0
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, size = size, os.fstat(self.stacks).st_size
            if size == before > 0:
                break
        self.waits = _waits(self.read())

    def read(self) -> str:
        """The stacks that were written."""
        size = os.fstat(self.stacks).st_size
        return os.pread(self.stacks, size, 0).decode(errors="replace").strip("\0")

    def place(self) -> Place:
        """Where the process is."""
        state = "ended" if self.gone else "stopped" if self.clock > self.running else ""
        seconds = self.clock - (self.running if state == "stopped" else self.since)
        patient = self.allowed >= self.settings["patience"] > self.timeout and state != "stopped"
        return Place(
            self.rank,
            self.host,
            self.process,
            self.marks,
            self.step,
            self.phase,
            seconds,
            patient,
            state,
            self.waits,
        )

    def tell(self) -> None:
        """Tell rank 0's watcher."""
        self.last_told = self.clock
        if self.rank != 0:
            self.send({"place": self.place(), "alarm": self.alarmed}, self.post)

    def send(self, letter: dict[str, Any], address: Any) -> None:
        """To another watcher; whether it arrives is not known."""
        if self.mail is not None and address is not None:
            with contextlib.suppress(OSError):
                self.mail.sendto(json.dumps({"token": self.token, **letter}).encode(), address)

    def alarm(self) -> None:
        """Find out who is late, and end the run. Takes a second or two, whatever has stopped working."""
        if self.rank == 0:
            self.call(None)  # first of all, so that all ask at the same time
        if self.waits is None:
            self.ask()
        # A process that was called says so in its turn, which alarms nobody any more.
        self.alarmed = True
        self.tell()
        deadline = time.monotonic() + (1.5 if self.rank == 0 else 2.5)
        while (
            self.verdict is None and time.monotonic() < deadline and self.settings["processes"] > 1
        ):
            self.listen(0.1)
            if self.rank == 0 and self.all_asked():
                break
            if self.rank != 0:
                self.tell()
        answered = self.verdict is not None
        if self.verdict is None:
            known = [place for place, _ in self.others.values()] if self.rank == 0 else []
            self.verdict = judge([self.place(), *known], self.settings)
        if self.rank == 0:
            self.call(self.verdict)
        self.end(*self.verdict, aloud=self.settings["first_here"] or not answered)

    def all_asked(self) -> bool:
        """Whether every other process has written its stacks, or has ended."""
        places = [place for place, _ in self.others.values()]
        return len(places) == self.settings["processes"] - 1 and all(
            place.waits is not None or place.state == "ended" for place in places
        )

    def call(self, verdict: tuple[list[int], str] | None) -> None:
        """Have every other watcher ask for stacks, or tell them the end."""
        for _, address in self.others.values():
            self.send({"verdict": verdict}, address)

    def end(self, late: list[int], text: str, aloud: bool) -> None:
        """Say it, and kill the process: the late first, so that torchrun names these as the first to fail."""
        speaker = threading.Thread(target=self.speak, args=(text, aloud), daemon=True)
        speaker.start()
        speaker.join(1.5)  # the folder's disk may be what hangs
        if self.rank not in late:
            self.signal(signal.SIGSTOP)  # else it would complain of lost connections
            time.sleep(0.4)
        self.signal(signal.SIGKILL)
        os._exit(0)  # without waiting for the speaker

    def speak(self, text: str, aloud: bool) -> None:
        """The stacks, then what they mean: on the terminal and in the run's logs."""
        several = self.settings["processes"] > 1
        stacks = self.read().strip()
        if not stacks:
            stacks = (
                f"No stacks: the process {STATES[self.place().state].strip() or 'did not answer'}."
            )
        width = len(str(self.settings["processes"] - 1))
        mark = f"[Rank {self.rank:0{width}d}] " if several else ""
        lines = "".join(f"{mark}{line}\n" for line in stacks.splitlines())
        sys.stderr.write(lines + (f"{text}\n" if aloud else ""))
        sys.stderr.flush()
        if self.settings["logs"] is not None:
            path = Path(self.settings["logs"]) / f"stacks_rank_{self.rank:0{width}d}.txt"
            path.write_text(f"{text}\n\n{self.place().where}\n{stacks}\n", encoding="utf-8")

    def signal(self, number: int) -> None:
        """Signal the process, if it is there: while it is our parent, its number is no one else's."""
        if os.getppid() == self.process:
            with contextlib.suppress(OSError):
                os.kill(self.process, number)


def judge(places: Iterable[Place], settings: dict[str, Any]) -> tuple[list[int], str]:
    """The ranks that were late, and what to say."""
    places, processes = sorted(places), settings["processes"]
    stopped = [place for place in places if place.state == "stopped"]
    least, most = min(place.marks for place in places), max(places, key=lambda place: place.marks)
    behind = [place for place in places if place.marks == least]
    # Of several that are equally far, those do not wait which are not in the middle of talking to others.
    late = stopped or [place for place in behind if not place.waits] or behind
    told = [
        f"{f'rank {place.rank}, ' if processes > 1 else ''}process {place.process} on {place.host},"
        f" {STATES[place.state]}in {place.where}, for {place.seconds:.0f} s"
        for place in late
    ]
    who = "; ".join(told[:8]) + (f"; and {len(told) - 8} more" if len(told) > 8 else "")
    missing = sorted(set(range(processes)) - {place.rank for place in places})
    if processes == 1:
        text = f"This run hung and was ended: {who}."
    elif len(late) == processes or (missing and all(place.waits for place in late)):
        text = f"This run hung and was ended. It is not certain who was late; the least far: {who}."
    else:
        text = f"This run hung and was ended. Late: {who}."
        if most not in late:
            text += f" The others waited, the furthest in {most.where}."
    if missing:
        text += f" Nothing was heard of rank {', '.join(map(str, missing[:16]))}{', …' if len(missing) > 16 else ''}."
    if settings["logs"] is not None:
        text += f" Stacks: {settings['logs']}/stacks_rank_*.txt."
    if all(place.patient for place in late):
        return [
            place.rank for place in late
        ], f"{text} (training.timeout is {settings['patience']:g} s)"
    return [
        place.rank for place in late
    ], f"{text} (model.distributed.timeout is {settings['timeout']:g} s)"


def _state(process: int) -> str:
    """The kernel's letter: R runs, S sleeps, T stopped by a signal."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _waits(stacks: str) -> bool:
    """Whether one of the threads is in the middle of talking to other processes, and the process waits for that thread."""
    saver = "/fast_llm/training/saving.py"
    awaited = any(saver in line and line.endswith(" in _end") for line in stacks.splitlines())
    for thread in stacks.split("\n\n"):
        if not awaited and any(
            saver in line and line.endswith(" in _run") for line in thread.splitlines()
        ):
            continue  # checkpoints are written while training goes on
        frames = [line for line in thread.splitlines() if line.lstrip().startswith("File ")][:3]
        talk = (
            "/torch/distributed/",
            "/fast_llm/parallel/mesh.py",
            "/fast_llm/parallel/pipeline.py",
        )
        if any(
            name in frame and "/tensor/_dispatch.py" not in frame
            for frame in frames
            for name in talk
        ):
            return True
    return False


if __name__ == "__main__":
    # Ctrl-C, torchrun and Slurm reach every process of a group or job; the watcher ends with its process.
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(_number, signal.SIG_IGN)
    if _settings := os.read(0, 65536):  # nothing: the process ended at once
        Watcher(json.loads(_settings)).run()
