"""What an installed fast-llm changes in torchrun's own process, when that starts fast-llm.

torchrun imports the entry points of the group `torchrun.handlers` (new rendezvous backends) before it does anything
else; ours is `register`. A process that ends with exit code 2 has reported a user's mistake: torchrun then ends with
2 as well, without its traceback, and does not try again. A process that was killed is named in a line.

Nothing here decides how a run goes. Where a later torch has other names, torchrun behaves as it does without this.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from fast_llm.errors import UserError

_NAMES = ("fast-llm", "fast_llm.cli")  # torchrun --no-python fast-llm, torchrun -m fast_llm.cli
_LOGGERS = (
    "torch.distributed.run",
    "__main__",  # the same, of `python -m torch.distributed.run`
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
)
# Lines of torchrun that follow each end of a process, or say that each process computes with one thread, as the log does.
_CHATTER = (
    "OMP_NUM_THREADS",
    "*****",
    "closing signal",
    "failed (exitcode:",
    "death signal, shutting down",
)


def register() -> Callable[[Any], Any]:
    """Prepare this process if it is a torchrun that starts fast-llm. Returns what the entry point asks for, a rendezvous
    backend, which nobody can choose by mistake: it refuses."""
    if any(Path(word).name in _NAMES for word in sys.argv[1:]):
        # Else torch 2.13 has a restart use the store of the last attempt, where processes find addresses of dead ones.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        try:
            _give_up_after_mistakes()
        except Exception:  # another torch: mistakes are tried again as often as crashes
            logging.getLogger(__name__).debug("torchrun will retry mistakes", exc_info=True)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(
                lambda record: not any(part in record.getMessage() for part in _CHATTER)
            )
        sys.excepthook = _Report(sys.excepthook)
    return _no_backend


def _no_backend(parameters: Any) -> Any:
    raise ValueError("fast-llm is no rendezvous backend: use --rdzv_backend c10d")


def _give_up_after_mistakes() -> None:
    """Have torchrun end, whatever --max_restarts says, when one of its processes has reported a user's mistake."""
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    wait = PContext.wait

    def wait_and_look(self: Any, *arguments: Any, **further: Any) -> Any:
        result = wait(self, *arguments, **further)
        if result is not None and any(
            one.exitcode == UserError.exit_code for one in result.failures.values()
        ):
            raise ChildFailedError(
                name=self.name, failures=result.failures
            )  # as torchrun does after the last attempt
        return result

    PContext.wait = wait_and_look  # type: ignore[method-assign]


class _Report:
    """sys.excepthook of a torchrun that starts fast-llm."""

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
        raise SystemExit(
            code
        )  # the interpreter takes the exit code of an exception hook that raises this


def _outcome(error: BaseException) -> tuple[int, str]:
    """torchrun's exit code, and a line if nobody else says what happened. Raises if this is none of the known ends."""
    name = type(error).__name__
    if name == "SignalException":  # torchrun itself was asked to end
        return 128 + int(error.sigval), ""  # type: ignore[attr-defined]
    if name == "RendezvousClosedError":
        return 1, "torchrun: another node has ended this job"
    if isinstance(error, FileNotFoundError) and Path(str(error.filename)).name in _NAMES:
        return UserError.exit_code, (
            f"torchrun: {error.filename}: no such command: activate the environment that fast-llm is installed in, or give"
            " its path"
        )
    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    codes = {failure.exitcode for failure in failures.values()}
    if UserError.exit_code in codes:
        return UserError.exit_code, ""
    # SIGTERM is torchrun's own, to the processes that were left.
    killed = {
        rank: one
        for rank, one in failures.items()
        if one.exitcode < 0 and one.exitcode != -signal.SIGTERM
    }
    line = "\n".join(
        f"torchrun: rank {rank} on {socket.gethostname()} was killed by {one.signal_name()} (process {one.pid})"
        for rank, one in sorted(killed.items())[:8]
    )
    # With another exit code the processes have said why.
    return max(error.get_first_failure()[1].exitcode, 1), line  # type: ignore[attr-defined]
