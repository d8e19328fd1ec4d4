"""What signals mean before, in and after a run, where no phase of it is needed to tell."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from fast_llm.training.interrupt import Interrupt
from tests import helpers  # noqa: F401  tells the server what to load
from tests.campaigns.jobs import STUCK, Job
from tests.training.runs import settings, write_tokens


def waits_in_vain(folder: str, begins: bool) -> None:
    """For another process, in the middle of C++."""
    import torch.distributed as dist

    interrupt = Interrupt()
    if begins:
        interrupt.begin()
    (Path(folder) / "ready").touch()
    dist.FileStore(f"{folder}/store", 2).wait(["never"], timedelta(seconds=300))


@pytest.mark.parametrize(("begins", "numbers"), [(True, "TERM INT"), (False, "USR1 USR1"), (False, "TERM")])
def test_who_waits_for_others_hears_the_second_signal(tmp_path: Path, begins: bool, numbers: str) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=waits_in_vain, args=(str(tmp_path), begins))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.pid is not None
    for number in (signal.Signals[f"SIG{name}"] for name in numbers.split()):
        assert process.is_alive()
        os.kill(process.pid, number)
        process.join(2.5)
    process.join(STUCK)
    # By itself; but one that has not met the others is ended by the kernel.
    assert process.exitcode == (-number if numbers == "TERM" else 128 + number)


def leaves(number: int) -> None:
    """Told to end while it leaves, long after it was first told."""
    interrupt = Interrupt()
    interrupt.begin()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2.2)
    interrupt.agreed = number
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STUCK)


def test_who_leaves_keeps_the_exit_code() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=leaves, args=(130,))
    process.start()
    process.join(STUCK)
    assert process.exitcode == 130


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    interrupt = Interrupt()
    interrupt.begin()
    for number in (signal.SIGUSR1, signal.SIGTERM):  # the same wish
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    assert interrupt.signal == signal.SIGUSR1 and interrupt.exit_code == 0
    interrupt.close()
    assert not interrupt.thread.is_alive()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


def loses_the_other(rank: int) -> None:
    from fast_llm.training.trainer import Trainer

    def die(trainer: Trainer, step: int) -> None:
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.check_finite = die  # type: ignore[method-assign]


def test_who_loses_another_process_says_so_in_a_line(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    with Job(tmp_path, settings(tmp_path, "training.train_iters=50"), 2, loses_the_other, helped=False) as job:
        assert job.wait() == 128 + signal.SIGKILL
        assert job.codes() == [1, 128 + signal.SIGKILL]
        assert job.said().count("fast-llm train: another process of this run has ended") == 1
        assert "Traceback" not in job.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_other_commands_leave_with_a_line(number: signal.Signals) -> None:
    code = f"""
import os, sys, time
from fast_llm import cli
def long(parsed):
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)
cli._verify = long
sys.argv = ["fast-llm", "verify", "x"]
sys.exit(cli.main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=STUCK)
    assert result.returncode == 128 + number
    assert result.stderr == f"fast-llm verify: stopped by {number.name}\n"
