"""Changes to torchrun when it starts fast-llm, and the environment that it sets.

`is_first_process` and `process_count` read the environment of a process. `register` changes
torchrun's own process when it starts fast-llm: torchrun imports the entry points of the group
`torchrun.handlers` (meant for rendezvous backends) before it does anything else. Exit code 2 means
that a process has reported a user's mistake: torchrun then ends with 2 as well, without its
traceback and without another attempt. A process that was killed is named in one line.

None of it affects training. If a later torch has other names, torchrun behaves as it does without
this file.
"""

import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from fast_llm.errors import ConfigError, UserError

_NAMES = ("fast-llm", "fast_llm.cli")  # torchrun --no-python fast-llm, torchrun -m fast_llm.cli
_LOGGERS = (
    "torch.distributed.run",
    "__main__",  # the same, of `python -m torch.distributed.run`
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
)
# Lines of torchrun about the end of each process, and about one thread for each process; our log
# has both.
_SUPPRESSED = (
    "OMP_NUM_THREADS",
    "*****",
    "closing signal",
    "failed (exitcode:",
    "death signal, shutting down",
)


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_first() -> None:
    """Let the first process print: torchrun ends all processes as soon as one has ended."""
    time.sleep(1)


@contextmanager
def only_first_prints() -> Iterator[None]:
    """Silence all processes but the first, for mistakes in the command line: all find the same."""
    if is_first_process():
        yield
        return
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    except SystemExit:
        wait_for_first()
        raise


def process_count(training: bool) -> int:
    """The number of processes that torchrun started.

    Raises ConfigError if WORLD_SIZE is not valid, or, with `training`, if RANK is not.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) == 0:
        raise ConfigError(
            [
                f"WORLD_SIZE: given {given!r} in the environment, must be the number of processes;"
                " unset it"
            ]
        )
    size = int(given)
    if training and size > 1:
        rank = os.environ.get("RANK")
        if rank is None or not rank.isdecimal() or int(rank) >= size:
            found = "missing" if rank is None else f"given {rank!r}"
            raise ConfigError(
                [
                    f"RANK: {found} in the environment, must be from 0 to {size - 1}, as WORLD_SIZE"
                    f" is {size}; start the processes with torchrun, or unset both"
                ]
            )
    return size


def register() -> Callable[[Any], Any]:
    """Prepare this process if it is a torchrun that starts fast-llm.

    Returns a rendezvous backend, as the entry point must; this one raises ValueError.
    """
    if any(Path(word).name in _NAMES for word in sys.argv[1:]):
        # By default torch 2.13 reuses the store of the last attempt, which has addresses of
        # processes that have ended.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        try:
            _never_retry_mistakes()
        except Exception:  # another torch: mistakes are retried like crashes
            logging.getLogger(__name__).debug("torchrun will retry mistakes", exc_info=True)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(
                lambda record: not any(part in record.getMessage() for part in _SUPPRESSED)
            )
        sys.excepthook = _ExceptHook(sys.excepthook)
    return _refuse_backend


def _refuse_backend(parameters: Any) -> Any:
    raise ValueError("fast-llm is not a rendezvous backend: use --rdzv_backend c10d")


def _never_retry_mistakes() -> None:
    """Make torchrun end after a process has reported a mistake, whatever --max_restarts says."""
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    wait = PContext.wait

    def wait_and_check(self: Any, *arguments: Any, **further: Any) -> Any:
        result = wait(self, *arguments, **further)
        failures = {} if result is None else result.failures
        if any(failure.exitcode == UserError.exit_code for failure in failures.values()):
            # As torchrun does after the last attempt.
            raise ChildFailedError(name=self.name, failures=failures)
        return result

    PContext.wait = wait_and_check  # type: ignore[method-assign]


class _ExceptHook:
    """sys.excepthook of a torchrun that starts fast-llm: one line instead of a traceback."""

    def __init__(self, before: Callable[..., Any]):
        self.before = before

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        try:
            code, line = _outcome(error)
        except Exception:
            self.before(kind, error, trace)
            return
        if line:
            print(line, file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(code)  # the interpreter exits with the code of a hook that raises this


def _outcome(error: BaseException) -> tuple[int, str]:
    """torchrun's exit code, and a line if no process has reported the reason.

    Raises if the error is not a known one.
    """
    name = type(error).__name__
    if name == "SignalException":  # torchrun itself received a signal
        return 128 + int(error.sigval), ""  # type: ignore[attr-defined]
    if name == "RendezvousClosedError":
        return 1, "torchrun: another node has ended this job"
    if isinstance(error, FileNotFoundError) and Path(str(error.filename)).name in _NAMES:
        return UserError.exit_code, (
            f"torchrun: {error.filename}: no such command: activate the environment that fast-llm"
            " is installed in, or give its path"
        )
    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    codes = {failure.exitcode for failure in failures.values()}
    if UserError.exit_code in codes:
        return UserError.exit_code, ""
    killed = {  # SIGTERM is torchrun's own, to the processes that remained
        rank: failure
        for rank, failure in failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    }
    host = socket.gethostname()
    line = "\n".join(
        f"torchrun: rank {rank} on {host} was killed by {failure.signal_name()}"
        f" (process {failure.pid})"
        for rank, failure in sorted(killed.items())[:8]
    )
    # With another exit code the processes have reported the reason.
    return max(error.get_first_failure()[1].exitcode, 1), line  # type: ignore[attr-defined]
