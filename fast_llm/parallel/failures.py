"""One error message for a run of many processes; no process waits for a failed one.

The processes share the store of their rendezvous. A process that fails posts its error there. One
of the failed processes prints all errors, with rank and host unless all are the same. The other
processes poll the store twice a second. They wait until the report is printed, because the launcher
ends all processes as soon as one has ended, and exit with the same exit code.

torchrun keeps the store, with its content, when it restarts processes. So each start uses a prefix
of its own, a token that the first process chooses. The others request it under a random name, which
no earlier start has answered.
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

# In seconds:
_RENDEZVOUS = 60.0  # for processes to find each other after an error before the start
_POLL = 0.5  # between looks at the store
_COLLECT = 1.0  # for all processes to post an error that they share
_GRACE = 5.0  # for the report of another process, and to exit after it
# Errors of gloo and NCCL when another process has ended.
_PEER_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
_PEER_LOST_MESSAGE = (
    "another process of this run has ended without a message; see the log of its host or of the"
    " launcher"
)
_STORE_ERRORS = (RuntimeError, ValueError, OSError)  # raised if the process with the store ended


class Failures:
    """Shares failures between the processes of a run."""

    def __init__(self, store: dist.Store | None, rank: int, size: int, timeout: float = 0.0):
        """`store`: of the rendezvous; None with one process.

        `timeout`: seconds to wait for the token.
        """
        self.root_store = store
        self.rank, self.size = rank, size
        self.answered_requests: set[bytes] = set()
        self.store: dist.Store | None = None
        if store is not None:
            self.token = secrets.token_hex(8) if rank == 0 else _request_token(store, rank, timeout)
            self.store = dist.PrefixStore(f"fast_llm/{self.token}", store)
        self.code: int | None = None  # the exit code of all processes, once another one failed
        self.posted = False  # this process has posted its failure
        self.store_released = self.store_lost = False
        self.watching = False  # the thread of `_watch_store` runs
        self.lock = threading.Lock()
        self.report_printed = threading.Event()  # set by the thread
        self.failing = False  # this process is about to exit by an error of its own

    @classmethod
    def connect(cls, timeout: float) -> "Failures":
        """Find the other processes, as the environment describes them, within `timeout` seconds.

        Raises TrainingStopped if they cannot be reached, and ConfigError without their address.
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
                    f"WORLD_SIZE is {size} in the environment: start the processes with torchrun,"
                    f" or unset it ({error})"
                ]
            ) from error
        except RuntimeError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":  # one process per host reports
                raise ReportedElsewhere(TrainingStopped.exit_code) from error
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise TrainingStopped(
                f"{_rank_and_host(rank)}: the other processes could not be reached at {place}"
                f" within {timeout:g} s (model.distributed.timeout); start all of them, and check"
                " the address, port and network"
            ) from error

    def wait_for_all(self, problem: UserError | None, timeout: float) -> None:
        """Wait until every process has arrived here, with or without a `problem`.

        Raises on all processes, after the report is printed, if any has a problem or if some do not
        arrive within `timeout` seconds.
        """
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
                        f"{here} of {self.size} processes have started, the others did not within"
                        f" {timeout:g} s (model.distributed.timeout); see the launcher's output and"
                        " the logs of the other nodes"
                    )
                ) from error
        if problem is not None:
            raise self.report_once(problem) from problem
        if (code := self._posted_code()) is not None:
            raise self._after_report(code)

    def _hand_out_token(self, timeout: float) -> None:
        """On the first process: answer requests for the token until all processes have arrived.

        Raises RuntimeError if they do not within `timeout` seconds.
        """
        assert self.root_store is not None and self.store is not None
        deadline = time.monotonic() + timeout
        while self.store.add("arrived", 0) < self.size:
            if time.monotonic() > deadline:
                raise RuntimeError("not all processes have arrived")
            for rank in range(1, self.size):
                if self.root_store.check([f"fast_llm/requests/{rank}"]):
                    name = self.root_store.get(f"fast_llm/requests/{rank}")
                    if name not in self.answered_requests:
                        self.answered_requests.add(name)
                        self.root_store.set(f"fast_llm/tokens/{name.decode()}", self.token)
            time.sleep(0.02)
        self.store.set("all arrived", "1")

    @contextmanager
    def reporting(
        self, exit_now: Callable[[int], None], saved: Callable[[], str]
    ) -> Iterator[None]:
        """A context whose exceptions are reported once, and end all processes of the run.

        `exit_now`: called with the exit code if another process failed and this one does not leave
        the context. `saved`: returns a sentence about the newest checkpoint.
        """
        ended = threading.Event()
        watcher = threading.Thread(
            target=self._watch_store, args=(ended, exit_now), name="failures", daemon=True
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
        """Report `error` together with those of other processes, and return what to raise.

        That is `error`, or ReportedElsewhere if it only follows from the failure of another
        process. With one process nothing is printed here.
        """
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
                return error  # one process per host reports the loss of the others
            posted = {self.rank: (socket.gethostname(), text, code)}
        if isinstance(error, UserError):
            print_error("fast-llm train", _merge_messages(posted, self.size))
        else:
            # PyTorch's hook, which puts the rank in front of each line.
            sys.excepthook(type(error), error, error.__traceback__)
            for rank, (host, other, _) in posted.items():
                if other.splitlines()[-1:] != text.splitlines()[-1:]:
                    print(f"rank {rank} on {host}: {other}", file=sys.stderr)
        with suppress(*_STORE_ERRORS):
            self.store.set("reported", "1")
            self._release_store(self.store)
        return error

    def _after_report(self, code: int) -> ReportedElsewhere:
        """Wait for the report of another process, and return what to raise."""
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
        """Declare that this process no longer needs the store.

        The process that serves the store waits for all others to do so.
        """
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
        """Keep other processes from printing: this one has printed the error already."""
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
        """The exit code of the first failure, if any process has failed."""
        if self.code is None and self.store is not None and not self.store_lost:
            try:
                return int(self.store.get("code")) if self.store.check(["code"]) else None
            except _STORE_ERRORS:
                self.store_lost = True
        return self.code

    def _is_reporter(self) -> bool:
        """Wait for failures of other processes, then decide whether this process prints all of
        them.

        Rank 0 does if it is one of them, otherwise the first that asks.
        """
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
        """Host, message and exit code of each failed process, by rank."""
        assert self.store is not None
        found: dict[int, tuple[str, str, int]] = {}
        for rank in range(self.size):
            if self.store.check([name := f"failed/{rank}"]):
                found[rank] = tuple(json.loads(self.store.get(name)))
        return found

    def _watch_store(self, ended: threading.Event, exit_now: Callable[[int], None]) -> None:
        """The thread: ends this process if another one failed and this one is still running."""
        assert self.store is not None
        # A connection of its own: the main thread may be blocked in a call.
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
            exit_now(found)


def report_before_start(error: UserError, printed: bool) -> UserError:
    """Report an error found before the processes have connected, and return what to raise.

    One process reports those of all. `printed`: this process has printed `error` already.
    """
    try:
        failures = Failures.connect(_RENDEZVOUS)
    except ConfigError:  # without a launcher rank 0 has printed it
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
    """Ask the first process for the token of this start."""
    name = secrets.token_hex(8)
    store.set(f"fast_llm/requests/{rank}", name)
    store.wait([f"fast_llm/tokens/{name}"], timedelta(seconds=timeout))
    return store.get(f"fast_llm/tokens/{name}").decode()


def _launcher_owns_store() -> bool:
    """Whether the launcher serves the store, and not the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _rank_and_host(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _merge_messages(posted: dict[int, tuple[str, str, int]], size: int) -> str:
    """One message for all failures, with ranks and hosts unless all processes failed alike."""
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
