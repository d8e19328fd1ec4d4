"""Signals to stop: SIGTERM, SIGINT, and SIGUSR1, which Slurm sends before the time limit.

The first signal ends the run after the current step, once it is saved. A second SIGTERM or SIGINT
ends the process at once. A second SIGUSR1 does not: Slurm may send several, also after the SIGTERM
of a preemption. torchrun answers Ctrl-C with SIGTERM to processes that had their SIGINT already, so
signals within two seconds of the first count as one.

Before the process group exists there is nothing to save: SIGTERM and SIGINT end a process as any
other. SIGUSR1 is handled from the start, because its exit code 0 would not make torchrun end the
other processes. A process that starts after a launcher sent SIGUSR1 finds the file
FAST_LLM_STOP_FILE.

A thread handles the signals: Python runs handlers only between two bytecodes of the main thread,
which may wait for a hanging process or a GPU. The thread prints with one system call, without
logging, whose locks other threads may hold.
"""

import atexit
import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_DEBOUNCE = 2.0  # seconds
# Seconds before SIGTERM is acknowledged: torchrun also sends it when a process has failed, and that
# one reports why.
_ACKNOWLEDGE_DELAY = 1.0


class Interrupt:
    """Receives the signals of this process, and remembers the first one."""

    def __init__(self) -> None:
        self.signal = 0
        self.signal_time = 0.0
        self.before_exit: Callable[[], None] = lambda: None  # called before exiting at once
        # Describes what a signal does now, and what a second one costs.
        self.effect: Callable[[], tuple[str, str]] = lambda: (
            "the run ends before its first step",
            "",
        )
        self.is_failing: Callable[[], bool] = lambda: False  # the run is ending by an error
        self.prints = os.environ.get("RANK", "0") == "0"
        self.acknowledge_at: float | None = None  # monotonic time
        self.agreed_exit_code: int | None = None  # of all processes, when the run has ended
        self.previous_handlers: dict[signal.Signals, Any] = {}
        # Python writes the number of each signal that has a handler to a pipe at once.
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.previous_wakeup_fd = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self.thread.start()
        self._handle(signal.SIGUSR1)
        # A launcher first creates the file and then sends the signal: one of them is noticed.
        if (stop := os.environ.get("FAST_LLM_STOP_FILE")) and os.path.exists(stop):
            self._on_signal(signal.SIGUSR1)
            os.write(self.writer, bytes(1))  # wakes the thread

    def begin_graceful(self, is_failing: Callable[[], bool] = lambda: False) -> None:
        """Handle SIGTERM and SIGINT too: the process group exists, so all can stop together.

        `is_failing`: whether the run is about to end by an error.
        """
        self.is_failing = is_failing
        self._handle(signal.SIGTERM, signal.SIGINT)

    @property
    def exit_code(self) -> int:
        """The exit code of a run that ended because of the signal."""
        return 0 if self.signal in (0, signal.SIGUSR1) else 128 + self.signal

    def _handle(self, *numbers: signal.Signals) -> None:
        self.previous_handlers |= {
            number: signal.signal(number, lambda *_: None) for number in numbers
        }

    def _listen(self) -> None:
        while True:
            wait = (
                None
                if self.acknowledge_at is None
                else max(self.acknowledge_at - time.monotonic(), 0)
            )
            if not select.select([self.reader], [], [], wait)[0]:
                self._acknowledge()
                continue
            if not (received := os.read(self.reader, 64)):
                return
            for number in received:
                if number in _SIGNALS:
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
            self.acknowledge_at = self.signal_time + (
                _ACKNOWLEDGE_DELAY if number == signal.SIGTERM else 0
            )
        elif number != signal.SIGUSR1 and time.monotonic() - self.signal_time > _DEBOUNCE:
            if self.agreed_exit_code is None and not self.is_failing():
                self._print(f"A second signal ends the run at once{self.effect()[1]}.")
            # Not sys.exit: an unfinished save must neither complete nor be cleaned up; it is not
            # published. After the agreed exit code, the signal is torchrun's, which ends the others
            # once one has ended.
            self.exit_now(128 + number if self.agreed_exit_code is None else self.agreed_exit_code)

    def exit_now(self, exit_code: int) -> None:
        """End this process at once, whatever it is doing."""
        self.before_exit()
        os._exit(exit_code)

    def _acknowledge(self) -> None:
        self.acknowledge_at = None
        if self.agreed_exit_code is not None or self.is_failing():
            return
        effect, further = self.effect()
        limit = ""
        if self.signal == signal.SIGINT and "TORCHELASTIC_RUN_ID" in os.environ:
            seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            limit = f" torchrun waits {seconds} s for this."
        name = "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name
        second = "SIGTERM or Ctrl-C" if self.signal == signal.SIGUSR1 else "A second one"
        self._print(
            f"{name}: {effect}.{limit} {second}, {_DEBOUNCE:g} s later or more, ends the run at"
            f" once{further}."
        )

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            # Not if that would block: a paused terminal, or a program that does not read.
            if self.prints and select.select([], [2], [], 0)[1]:
                os.write(2, (("\r\x1b[K" if os.isatty(2) else "") + text + "\n").encode())

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.previous_wakeup_fd)
        os.close(self.writer)
        self.thread.join()
        os.close(self.reader)


# What a signal to stop does first, by the part of the run.
_ON_SIGNAL = {
    "start": "the run ends before its next step; there is nothing new to save",
    "steps": "the current step is finished and saved, then the run ends",
    "end": "the run ends; the same command does the rest of what is due at its end",
}


def describe_stop(lifecycle: str, step: int, saves: bool, saved: int) -> tuple[str, str]:
    """Describe what a signal to stop does now, and what a second one costs.

    `lifecycle`: start, steps or end; `saves`: whether the run has an experiment folder; `saved`:
    the step of the newest complete checkpoint, or -1.
    """
    if not saves:
        return (
            "the run ends after the current step. Nothing is saved: run.experiment_dir is not set",
            "",
        )
    effect = _ON_SIGNAL[lifecycle]
    if lifecycle == "start":
        return effect, ""
    if saved < 0:
        return effect, " and loses all steps: no checkpoint is complete yet"
    if saved < step or lifecycle == "steps":
        return effect, f" and loses the steps after checkpoint {saved}"
    return effect, ""


# Commands other than training.


class StopSignal(KeyboardInterrupt):
    """SIGTERM or SIGINT ends a command that does not train."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_signals(training: bool, own_process: bool) -> Iterator[None]:
    """SIGTERM and SIGINT raise StopSignal inside; a second one ends the process at once.

    With `training` they end the process immediately, also inside C code, until an Interrupt takes
    over. With `own_process` they are ignored once the command is done: a signal that meets the
    interpreter while it exits would change the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, leave)
        raise StopSignal(number)

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    before = {
        number: signal.signal(number, signal.SIG_DFL if training else stop) for number in numbers
    }
    before[signal.SIGUSR1] = signal.getsignal(signal.SIGUSR1)
    if own_process:
        # Python restores the default handlers before it has exited: a late signal would then end
        # the process.
        atexit.register(ignore)
    try:
        yield
    finally:
        if not own_process:
            for number, handler in before.items():
                signal.signal(number, handler)
        elif not training:
            ignore()
