"""A process that fails tells the others, so that the user reads one message and nobody waits for a process that is gone.

The processes share the store through which they found each other. A process that fails posts the reason there. One of those
that failed prints it, with rank and host unless all failed alike. The others look twice a second, wait until it is printed (the
launcher ends all as soon as one has ended), and leave with the same exit code.

torchrun keeps the store when it starts processes again, with all that those before them wrote. So each start has its own part,
named by a token of the first process: another process asks for it under a name of its own, which no earlier answer has.
"""

import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fast_llm.errors import ConfigError, ReportedElsewhere, TrainingStopped, UserError
from fast_llm.terminal import print_error

_RENDEZVOUS = 60.0  # seconds that processes wait for each other when the preflight of one failed
_POLL = 0.5  # seconds between looks at the store
_COLLECT = 1.0  # seconds in which a mistake that all processes meet reaches all of them
_GRACE = 5.0  # seconds that a process has to leave after another failed, and that it waits for the message of that one
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited"
)  # as gloo and NCCL say it
_PEER_LOST_MESSAGE = "another process of this run has ended without a message: its host's log, or the launcher, says why"
_STORE_ERRORS = (
    RuntimeError,
    ValueError,
    OSError,
)  # the store is gone with the process that had it


class Failures:
    """What the processes of a run know of each other's failures."""

    def __init__(self, store: dist.Store | None, rank: int, size: int, timeout: float = 0.0):
        self.root_store = store  # None: there is one process
        self.rank, self.size = rank, size
        self.answered_requests: set[bytes] = set()
        self.store: dist.Store | None = None
        if store is not None:
            self.token = secrets.token_hex(8) if rank == 0 else _request_token(store, rank, timeout)
            self.store = dist.PrefixStore(f"fast_llm/{self.token}", store)
        self.code: int | None = None  # another process has failed: the exit code of all
        self.posted = self.store_released = False
        self.store_lost = self.watching = False  # the store; the thread that looks into it
        self.lock = threading.Lock()
        self.report_printed = (
            threading.Event()
        )  # the watching thread knows that the failure of another process was printed
        self.failing = False  # this process is about to end by an error of its own

    @classmethod
    def connect(cls, timeout: float) -> "Failures":
        """Find the other processes of the environment, in `timeout` seconds.

        Raises TrainingStopped if that cannot be.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if size == 1:
            return cls(None, rank, size)
        if dist.is_initialized():
            return cls(dist.distributed_c10d._get_default_store(), rank, size, timeout)
        try:
            return cls(
                next(rendezvous("env://", timeout=timedelta(seconds=timeout)))[0],
                rank,
                size,
                timeout,
            )
        except ValueError as error:  # the environment lacks the address
            raise ConfigError(
                [
                    f"WORLD_SIZE is {size} in the environment: start the processes with torchrun, or unset it ({error})"
                ]
            ) from error
        except RuntimeError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":  # one process of a host says so
                raise ReportedElsewhere(TrainingStopped.exit_code) from error
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise TrainingStopped(
                f"{_rank_and_host(rank)}: the other processes could not be reached at {place} within {timeout:g} s"
                " (model.distributed.timeout); start all of them, and check the address, port and network"
            ) from error

    def wait_for_all(self, problem: UserError | None, timeout: float) -> None:
        """Wait until every process has passed its preflight. Raises, on all of them, if `problem` or that of another kept one from
        it, or if not all came within `timeout` seconds, once that is printed."""
        if self.store is None:
            if problem is not None:
                raise problem
            return
        if problem is not None:
            self._post_failure(problem.report(), problem.exit_code)
        self.store.add("arrived", 1)
        try:
            if self.rank == 0:
                self._hand_out_token(timeout)
            self.store.wait(["all arrived"], timedelta(seconds=timeout))
        except RuntimeError as error:
            if problem is None:
                here = min(self.store.add("arrived", 0), self.size)
                raise self.report_once(
                    TrainingStopped(
                        f"{here} of {self.size} processes have started, the others did not within {timeout:g} s"
                        " (model.distributed.timeout); the launcher, or the log of the other nodes, says why"
                    )
                ) from error
        if problem is not None:
            raise self.report_once(problem) from problem
        if (code := self._posted_code()) is not None:
            raise self._after_report(code)

    def _hand_out_token(self, timeout: float) -> None:
        """The first process tells the others its token, until all have arrived. Raises RuntimeError if they do not."""
        assert self.root_store is not None and self.store is not None
        deadline = time.monotonic() + timeout
        while self.store.add("arrived", 0) < self.size:
            if time.monotonic() > deadline:
                raise RuntimeError("not all processes have arrived")
            for rank in range(1, self.size):
                if self.root_store.check([f"fast_llm/asks/{rank}"]):
                    name = self.root_store.get(f"fast_llm/asks/{rank}")
                    if name not in self.answered_requests:
                        self.answered_requests.add(name)
                        self.root_store.set(f"fast_llm/answer/{name.decode()}", self.token)
            time.sleep(0.02)
        self.store.set("all arrived", "1")

    @contextmanager
    def reporting(self, leave: Callable[[int], None], saved: Callable[[], str]) -> Iterator[None]:
        """What fails inside is reported once, and ends all processes. `leave`: ends this process, which does not come out by
        itself, with an exit code; `saved`: a sentence about what was saved."""
        ended = threading.Event()
        watcher = threading.Thread(
            target=self._watch_store, args=(ended, leave), name="failures", daemon=True
        )
        if self.store is not None:
            self.watching = True
            watcher.start()
        try:
            yield
        except Exception as error:
            self.failing = True
            found = self.report_once(error, saved)
            if found is error:
                raise
            raise found from error
        finally:
            ended.set()

    def report_once(self, error: Exception, saved: Callable[[], str] = str) -> Exception:
        """What this process raises for `error`, once one of those that failed has printed why: itself, or ReportedElsewhere if it only
        lost a process that failed. One process alone prints nothing."""
        if self.store is None or isinstance(error, ReportedElsewhere):
            return error
        if isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)):
            deadline = time.monotonic() + 2 * _POLL
            while time.monotonic() < deadline and not self.store_lost:
                if (code := self._posted_code()) is not None:
                    return self._after_report(code)
                time.sleep(0.05)
            error = TrainingStopped(f"{_PEER_LOST_MESSAGE}. {saved()}")
        if isinstance(error, UserError):
            code, text = error.exit_code, error.report()
        else:
            code, text = 1, "".join(traceback.format_exception(error))
        error.printed = True  # type: ignore[attr-defined]
        try:
            self._post_failure(text, code)
            if not self._is_reporter():
                self._after_report(code)
                return error
            posted = self._collect_failures()
        except _STORE_ERRORS:
            if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, TrainingStopped):
                return error  # one process of each host says that it has lost the others
            posted = {self.rank: (socket.gethostname(), text, code)}
        if isinstance(error, UserError):
            print_error("fast-llm train", _merge_messages(posted, self.size))
        else:
            sys.excepthook(
                type(error), error, error.__traceback__
            )  # PyTorch's, with the rank in front of each line
            for rank, (host, other, _) in posted.items():
                if other.splitlines()[-1:] != text.splitlines()[-1:]:
                    print(f"rank {rank} on {host}: {other}", file=sys.stderr)
        with suppress(*_STORE_ERRORS):
            self.store.set("reported", "1")
            self._release_store(self.store)
        return error

    def _after_report(self, code: int) -> ReportedElsewhere:
        """Once the process that prints has done so."""
        if self.watching and not self.posted:
            self.report_printed.wait(_GRACE)
        elif self.store is not None:
            self._wait_for_report(self.store)
        return ReportedElsewhere(code)

    def _wait_for_report(self, store: dist.Store) -> None:
        deadline = time.monotonic() + _GRACE
        with suppress(*_STORE_ERRORS):
            while time.monotonic() < deadline and not store.check(["reported"]):
                time.sleep(0.05)
            self._release_store(store)

    def _release_store(self, store: dist.Store) -> None:
        """The last use of the store. The process that has it waits for the others'."""
        with self.lock:
            if self.store_released:
                return
            self.store_released = True
        done = store.add("released", 1)
        if (
            self.rank == 0
            and isinstance(self.root_store, dist.TCPStore)
            and not _launcher_owns_store()
        ):
            deadline = time.monotonic() + _GRACE
            while time.monotonic() < deadline and done < self.size:
                time.sleep(0.05)
                done = store.add("released", 0)

    def mark_reported(self) -> None:
        """This process has printed its mistake, before it met the others; so they do not."""
        assert self.store is not None
        self.store.compare_set("reporter", "", "printed")
        self.store.set("reported", "1")

    def _post_failure(self, text: str, code: int) -> None:
        assert self.store is not None
        if self.posted:
            return
        self.posted = True
        self.store.set(f"failed/{self.rank}", json.dumps([socket.gethostname(), text, code]))
        self.store.compare_set("code", "", str(code))
        self.store.add("failures", 1)

    def _posted_code(self) -> int | None:
        """The exit code of all, if any has failed."""
        if self.code is None and self.store is not None and not self.store_lost:
            try:
                return int(self.store.get("code")) if self.store.check(["code"]) else None
            except _STORE_ERRORS:
                self.store_lost = True
        return self.code

    def _is_reporter(self) -> bool:
        """Whether this process is the one to print, in a moment in which others can fail as well. The first process if it is
        among those that failed."""
        assert self.store is not None
        deadline = time.monotonic() + _COLLECT
        while time.monotonic() < deadline and self.store.add("failures", 0) < self.size:
            time.sleep(0.05)
        while self.rank != 0 and time.monotonic() < deadline and not self.store.check(["reporter"]):
            if not self.store.check(["failed/0"]):
                break
            time.sleep(0.05)
        return self.store.compare_set("reporter", "", str(self.rank)).decode() == str(self.rank)

    def _collect_failures(self) -> dict[int, tuple[str, str, int]]:
        """Host, text and code of all that have failed, by rank."""
        assert self.store is not None
        found: dict[int, tuple[str, str, int]] = {}
        for rank in range(self.size):
            if self.store.check([name := f"failed/{rank}"]):
                found[rank] = tuple(json.loads(self.store.get(name)))
        return found

    def _watch_store(self, ended: threading.Event, leave: Callable[[int], None]) -> None:
        """The thread: leaves when another process has failed and this one waits for it."""
        assert self.store is not None
        # A connection of its own: the main thread may be waiting in the middle of a call.
        store = self.store.clone() if hasattr(self.store, "clone") else self.store
        found: int | None = None
        while found is None:
            if ended.wait(_POLL):
                return
            try:
                found = int(store.get("code")) if store.check(["code"]) else None
            except _STORE_ERRORS:
                self.store_lost = True
                self.report_printed.set()
                return
        if self.posted:
            return
        self.code = found
        deadline = time.monotonic() + _GRACE
        self._wait_for_report(store)
        self.report_printed.set()
        if not ended.wait(max(0, deadline - time.monotonic())) and not self.failing:
            leave(found)


def report_before_start(error: UserError, printed: bool) -> UserError:
    """What this process raises for a mistake in its settings, once the processes have met and one of them has reported the mistakes
    of all. `printed`: this process has printed its own already."""
    try:
        failures = Failures.connect(_RENDEZVOUS)
    except ConfigError:  # without a launcher the first process has printed it
        error.printed = True
        return error
    except UserError:
        return error
    if printed:
        failures.mark_reported()
    try:
        failures.wait_for_all(error, _RENDEZVOUS)
    except UserError as agreed:
        return agreed
    return error


def _request_token(store: dist.Store, rank: int, timeout: float) -> str:
    """The token of this start."""
    name = secrets.token_hex(8)
    store.set(f"fast_llm/asks/{rank}", name)
    store.wait([f"fast_llm/answer/{name}"], timedelta(seconds=timeout))
    return store.get(f"fast_llm/answer/{name}").decode()


def _launcher_owns_store() -> bool:
    """Whether the launcher has the store, and not the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _rank_and_host(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _merge_messages(posted: dict[int, tuple[str, str, int]], size: int) -> str:
    """One message for all that failed: with ranks and hosts, unless all failed alike."""
    by_text: dict[str, list[int]] = {}
    for rank, (_, text, _) in posted.items():
        by_text.setdefault(text, []).append(rank)
    if len(by_text) == 1 and len(posted) == size:
        return next(iter(by_text))
    messages = []
    for text, ranks in by_text.items():
        hosts = sorted({posted[rank][0] for rank in ranks})
        numbers = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
        place = ", ".join(hosts[:4]) + (", …" if len(hosts) > 4 else "")
        messages.append(f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {place}: {text}")
    return "\n  ".join(messages)
