"""SIGTERM, SIGINT and SIGUSR1 (Slurm's, ahead of the end of time): finish the step, save, leave. A second one leaves at once.

torchrun answers Ctrl-C by sending SIGTERM to processes that had their SIGINT from the terminal already, so a
signal within two seconds of the first counts as the same wish.
"""

import os
import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_WISH = 2.0  # seconds


class Interrupt:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal = 0
        self.since = 0.0
        self.failed = False  # this process is leaving with an error
        self.before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    @property
    def exit_code(self) -> int:
        """That of a run which ends for it."""
        return 0 if self.signal in (0, signal.SIGUSR1) else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > _SAME_WISH:
            # Not sys.exit: whatever is being saved must neither be finished nor cleaned up; it is
            # unpublished, and the last checkpoint is whole.
            os._exit(128 + number)

    def close(self) -> None:
        """Give the signals back to whoever had them.

        All but SIGTERM if this process failed: torchrun sends it as soon as another one has ended, and would silence the one
        that is about to say why.
        """
        for number, handler in self.before.items():
            if not self.failed or number != signal.SIGTERM:
                signal.signal(number, handler)
