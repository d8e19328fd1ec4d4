"""SIGTERM, SIGINT and SIGUSR1 (Slurm's, ahead of the end of time): finish the step, save, leave. A second one leaves at once.

torchrun answers Ctrl-C by sending SIGTERM to processes that had their SIGINT from the terminal already, so a
signal within two seconds of the first counts as the same wish.

Before the processes have met there is nothing to save and nobody to agree with: SIGTERM and SIGINT end a process as they end
any other, at once and in whatever it is. SIGUSR1 is noted from the start, for its exit code 0 would not make torchrun end the others.

A thread takes the signals: Python's handlers run only between two lines of Python, and who waits for a process that hangs, or for a
GPU, would not hear of the second one.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_WISH = 2.0  # seconds


class Interrupt:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal = 0
        self.since = 0.0
        self.last: Callable[[], None] = lambda: None  # done before leaving at once
        self.agreed: int | None = None  # the exit code of all processes, once there is nothing left but to leave
        self.before: dict[signal.Signals, Any] = {}
        # Python writes the number of each signal that has a handler into a pipe, as soon as it comes.
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.woken = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()
        self._note_also(signal.SIGUSR1)

    def begin(self) -> None:
        """The processes have met: from here on they leave together."""
        self._note_also(signal.SIGTERM, signal.SIGINT)

    @property
    def exit_code(self) -> int:
        """That of a run which ends for it."""
        return 0 if self.signal in (0, signal.SIGUSR1) else 128 + self.signal

    def _note_also(self, *numbers: signal.Signals) -> None:
        self.before |= {number: signal.signal(number, lambda *_: None) for number in numbers}

    def _listen(self) -> None:
        while came := os.read(self.reader, 64):
            for number in came:
                if number in _SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > _SAME_WISH:
            self.last()
            # Not sys.exit: whatever is being saved must neither be finished nor cleaned up; it is
            # unpublished, and the last checkpoint is whole.
            # torchrun ends the others as soon as one has ended, which is no other wish.
            os._exit(128 + number if self.agreed is None else self.agreed)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.woken)
        os.close(self.writer)
        self.thread.join()
        os.close(self.reader)
