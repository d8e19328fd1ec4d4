"""Signals before, during and after a run."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from fast_llm.training.interrupt import Interrupt
from tests import helpers  # noqa: F401  tells the server what to load
from tests.faults.jobs import STUCK, Job
from tests.training.runs import losses, run, settings, write_tokens


def waits_until_stopped(folder: str, begins: bool) -> None:
    """Wait in C++, in another process, until a signal arrives."""
    import torch.distributed as dist

    interrupt = Interrupt()
    if begins:
        interrupt.begin_graceful()
    (Path(folder) / "ready").touch()
    dist.FileStore(f"{folder}/store", 2).wait(["never"], timedelta(seconds=300))


@pytest.mark.parametrize(
    ("begins", "numbers"), [(True, "TERM INT"), (True, "USR1 USR1 TERM"), (False, "TERM")]
)
def test_who_waits_for_others_hears_the_second_signal(
    tmp_path: Path, begins: bool, numbers: str
) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=waits_until_stopped, args=(str(tmp_path), begins)
    )
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
    # Before the process group exists, the operating system ends the process.
    assert process.exitcode == (-number if numbers == "TERM" else 128 + number)


def leaves(number: int) -> None:
    """A second signal while the process exits, long after the first."""
    interrupt = Interrupt()
    interrupt.begin_graceful()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2.2)
    interrupt.agreed_exit_code = number
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STUCK)


def test_who_leaves_keeps_the_exit_code() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=leaves, args=(130,))
    process.start()
    process.join(STUCK)
    assert process.exitcode == 130


def test_signals_are_given_back() -> None:
    before = [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ]
    interrupt = Interrupt()
    interrupt.begin_graceful()
    for number in (signal.SIGUSR1, signal.SIGTERM):  # counts as the same signal
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    assert interrupt.signal == signal.SIGUSR1 and interrupt.exit_code == 0
    interrupt.close()
    assert not interrupt.thread.is_alive()
    assert before == [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ]


def loses_the_other(rank: int) -> None:
    from fast_llm.training.trainer import Trainer

    def die(trainer: Trainer, step: int) -> None:
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.check_finite = die  # type: ignore[method-assign, assignment]


def test_who_loses_another_process_says_so_in_a_line(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    with Job(
        tmp_path, settings(tmp_path, "training.train_iters=50"), 2, loses_the_other, helped=False
    ) as job:
        assert job.wait() == 128 + signal.SIGKILL
        assert job.codes() == [1, 128 + signal.SIGKILL]
        host = socket.gethostname()
        assert (
            job.said().count(
                f"fast-llm train: rank 0 on {host}: another process of this run has ended without"
            )
            == 1
        )
        assert "Traceback" not in job.said()


def is_slow(folder: str, rank: int) -> None:
    """Make the third step take seconds."""
    from fast_llm.training.trainer import Trainer

    def wait(trainer: Trainer, step: int) -> None:
        if step == 3:
            (Path(folder) / f"ready{rank}").touch()
            time.sleep(4)

    Trainer.check_finite = wait  # type: ignore[method-assign, assignment]


_AGAIN = "A second one, 2 s later or more, ends the run at once"


@pytest.mark.parametrize(
    ("world", "further", "signals", "said"),
    [
        (
            1,
            ["training.checkpoint.interval=2", "training.checkpoint.background=no"],
            ["INT"],
            f"Ctrl-C: the current step is finished and saved, then the run ends. {_AGAIN} and"
            " loses the steps after checkpoint 2.\n",
        ),
        (
            2,
            [],
            ["INT", "INT"],
            f"Ctrl-C: the current step is finished and saved, then the run ends. {_AGAIN} and"
            " loses all steps: no checkpoint is"
            " complete yet.\nA second signal ends the run at once and loses all steps: no"
            " checkpoint is complete yet.\n",
        ),
        (
            1,
            ["run.experiment_dir=null"],
            ["TERM"],
            "SIGTERM: the run ends after the current step. Nothing is saved: run.experiment_dir is"
            " not set."
            f" {_AGAIN}.\n",
        ),
    ],
)
def test_signals_are_acknowledged_at_once(
    tmp_path: Path, world: int, further: list[str], signals: list[str], said: str
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    arguments = settings(tmp_path, "training.train_iters=50", "run.log_timestamps=no", *further)
    with Job(tmp_path, arguments, world, partial(is_slow, str(tmp_path))) as job:
        while len(list(tmp_path.glob("ready*"))) < world:
            time.sleep(0.01)
        time.sleep(0.2)
        for number in signals:
            before = len(job.said())
            sent = time.monotonic()
            assert job.launcher.pid is not None
            os.kill(job.launcher.pid, signal.Signals[f"SIG{number}"])
            while len(job.said()) == before:
                assert time.monotonic() < sent + 3, job.said()
                time.sleep(0.01)
            time.sleep(2.2 if len(signals) > 1 else 0)
        code = job.wait()
        assert code == 128 + signal.Signals[f"SIG{signals[0]}"]
        lines = [
            line
            for line in job.said().splitlines(keepends=True)
            if line.startswith(("Ctrl-C", "SIGTERM", "A second"))
        ]
        assert "".join(lines) == said
        ends = job.said().splitlines()[-1]
        if len(signals) == 1:
            after = (
                "the same command continues"
                if len(further) and "null" not in further[0]
                else "nothing was saved"
            )
            assert re.match(rf"Stopped by a signal after step [34]; {after}", ends)


def test_a_launcher_knows_whether_a_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 0 in each case."""
    write_tokens(tmp_path / "tokens", 400)
    stop, complete = tmp_path / "stop", tmp_path / "complete"
    monkeypatch.setenv("FAST_LLM_STOP_FILE", str(stop))
    monkeypatch.setenv("FAST_LLM_COMPLETE_FILE", str(complete))
    arguments = settings(tmp_path, "training.train_iters=3", "training.checkpoint.interval=3")
    stop.touch()  # before the process started
    assert run(arguments) == 0
    assert "Stopped by a signal before the first step" in capsys.readouterr().out
    assert not complete.exists()
    stop.unlink()
    assert run([*arguments, "training.train_iters=6", "training.shutdown.interval=3"]) == 0
    assert losses(tmp_path / "run").keys() == {1, 2, 3} and not complete.exists()
    assert run([*arguments, "training.train_iters=4"]) == 0
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4} and complete.exists()
    monkeypatch.setenv("FAST_LLM_COMPLETE_FILE", str(tmp_path / "nowhere" / "complete"))
    assert run([*arguments, "training.train_iters=4"]) == 0
    message = (
        f"FAST_LLM_COMPLETE_FILE: {tmp_path}/nowhere/complete: No such file or directory; the"
        " launcher may"
    )
    assert message in capsys.readouterr().out


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
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=STUCK
    )
    assert result.returncode == 128 + number
    assert result.stderr == f"fast-llm verify: stopped by {number.name}\n"
