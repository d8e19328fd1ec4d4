"""A process that hangs is found and named, and the run ends."""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from fast_llm.data.loader import Loader
from fast_llm.model.decoder import CausalLM
from fast_llm.training.checkpointing import CheckpointManager
from fast_llm.training.trainer import Trainer
from fast_llm.watchdog.watcher import Status, diagnose
from tests import helpers  # noqa: F401
from tests.training.runs import losses, run, settings, write_tokens

TIMEOUT = 3.0
LATER = 5.0  # seconds after the timeout within which a job must end
_context = multiprocessing.get_context("forkserver")  # tests.helpers tells it what to load


def arguments(folder: Path, steps: int, *further: str) -> list[str]:
    return settings(
        folder,
        f"training.train_iters={steps}",
        f"model.distributed.timeout={TIMEOUT}",
        "data.split=[9,1,0]",
        *further,
    )


class Job:
    """Processes of one run, started as torchrun starts them.

    They have sessions of their own and meet at an address.
    """

    def __init__(
        self,
        folder: Path,
        world: int,
        hang: Callable[[int], None],
        *further: str,
        steps: int = 1_000_000,
    ):
        write_tokens(folder / "tokens", 400)
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = [
            _context.Process(
                target=_process,
                args=(arguments(folder, steps, *further), rank, world, port, str(folder), hang),
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait_for(self, name: str) -> float:
        """Wait until a process reports that its hang begins, or that a step is done.

        Returns the time.
        """
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and all(p.is_alive() for p in self.processes), (
                self.said()
            )
            time.sleep(0.02)
        return time.monotonic()

    def ends_by(self, deadline: float) -> list[int | None]:
        """Wait for the end. Returns the exit codes."""
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """Standard error of all processes."""
        return (self.folder / "stderr").read_text()

    def stacks(self, rank: int) -> str:
        return (self.folder / "run" / "runs" / "0" / "logs" / f"stacks_rank_{rank}.txt").read_text()


def _process(
    arguments: list[str], rank: int, world: int, port: int, folder: str, hang: Callable[[int], None]
) -> None:
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if world > 1:
        places = {
            "RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        os.environ |= {"MASTER_ADDR": "localhost"} | {
            name: str(value) for name, value in places.items()
        }
    hang(rank)
    code = run(arguments)
    assert not psutil.Process().children(), "a process is left behind"
    sys.exit(code)


def nothing(rank: int) -> None:
    """Do not hang; create a file when the third step is done."""
    before = Trainer.check_finite

    def say(trainer: Trainer, step: int) -> None:
        before(trainer, step)
        if step == 3:
            Path(f"ready_{rank}").touch()

    Trainer.check_finite = say  # type: ignore[method-assign, assignment]


def in_the_loader(rank: int) -> None:
    before = Loader.step

    def sleepy_read(loader: Loader, step: int) -> Any:
        if rank == 1 and step == 4:
            Path("hangs").touch()
            time.sleep(600)
        return before(loader, step)

    Loader.step = sleepy_read  # type: ignore[method-assign, assignment]


def in_the_first_forward(rank: int) -> None:
    before = CausalLM.forward

    def sleepy_forward(*args: Any) -> Any:
        if rank == 1:
            Path("hangs").touch()
            time.sleep(600)
        return before(*args)

    CausalLM.forward = sleepy_forward  # type: ignore[method-assign, assignment]


def in_every_forward(rank: int) -> None:
    """Slow phases that are no hangs: the first time, and after a slow time that ended."""
    before = CausalLM.forward

    def slow_forward(*args: Any) -> Any:
        time.sleep(0.8)
        return before(*args)

    CausalLM.forward = slow_forward  # type: ignore[method-assign, assignment]


def with_pythons_lock(rank: int) -> None:
    before = Loader.step

    def locked_read(loader: Loader, step: int) -> Any:
        if step == 4:
            Path("hangs").touch()
            ctypes.PyDLL(None).sleep(
                600
            )  # no other thread runs Python any more, and no handler of a signal
        return before(loader, step)

    Loader.step = locked_read  # type: ignore[method-assign, assignment]


def in_no_way_but_unwatched(rank: int) -> None:
    """Kill the watcher."""
    before = CheckpointManager.restore

    def restore(checkpoints: CheckpointManager) -> None:
        (watcher,) = psutil.Process().children()
        watcher.kill()
        before(checkpoints)

    CheckpointManager.restore = restore  # type: ignore[method-assign, assignment]


def test_a_stopped_process_and_its_group(tmp_path: Path) -> None:
    # Rank 0, whose watcher is the one that compares; the watcher is not of the group.
    with Job(tmp_path, 2, nothing) as job:
        job.wait_for("ready_0")
        stopped = job.wait_for("ready_1")
        pid = job.processes[0].pid
        assert pid is not None
        os.killpg(pid, signal.SIGSTOP)
        assert job.ends_by(stopped + TIMEOUT + LATER) == [-signal.SIGKILL] * 2, job.said()
        assert time.monotonic() - stopped > 0.6 * TIMEOUT
        assert (
            f"Stalled: rank 0, process {pid} on {socket.gethostname()}, stopped by a signal in step"
            in job.said()
        )
        assert "[Rank 1]   File" in job.said() and "in _train" in job.stacks(1)
        assert "No stacks: the process stopped by a signal." in job.stacks(0)


def test_a_process_that_sleeps_in_its_loader(tmp_path: Path) -> None:
    with Job(tmp_path, 2, in_the_loader) as job:
        hangs = job.wait_for("hangs")
        assert job.ends_by(hangs + TIMEOUT + LATER) == [-signal.SIGKILL] * 2, job.said()
        assert "Stalled: rank 1, process" in job.said() and "in step 5, data, for 3 s" in job.said()
        assert (
            "The other ranks were waiting, the furthest in step 5, forward and backward."
            in job.said()
        )
        assert "in sleepy_read" in job.stacks(1) and "sleepy_read" not in job.stacks(0)
        assert "torch/distributed" in job.stacks(0)


def test_a_collective_that_loses_patience_first(tmp_path: Path) -> None:
    # The first forward pass may take as long as a compiler does, but gloo waits for `timeout`
    # alone.
    with Job(tmp_path, 2, in_the_first_forward) as job:
        hangs = job.wait_for("hangs")
        codes = job.ends_by(hangs + TIMEOUT + LATER)
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), job.said()
        assert (
            "Stalled: rank 1, process" in job.said()
            and "in step 1, forward and backward" in job.said()
        )
        assert "in sleepy_forward" in job.stacks(1)


def test_one_process_that_holds_pythons_lock(tmp_path: Path) -> None:
    with Job(tmp_path, 1, with_pythons_lock, "training.num_workers=0") as job:
        hangs = job.wait_for("hangs")
        assert job.ends_by(hangs + TIMEOUT + LATER) == [-signal.SIGKILL], job.said()
        assert f"This run hung and was killed: process {job.processes[0].pid} on" in job.said()
        assert "in step 5, data, for 3 s" in job.said() and "in locked_read" in job.stacks(0)


def test_a_job_that_sleeps_as_a_whole_does_not_hang(tmp_path: Path) -> None:
    timeout = 1.5
    with Job(tmp_path, 1, nothing, f"model.distributed.timeout={timeout}", steps=60) as job:
        job.wait_for("ready_0")
        process = psutil.Process(job.processes[0].pid)
        everything = [*process.children(), process]
        assert len(everything) == 2
        for each in everything:
            each.suspend()
        time.sleep(timeout + 1)
        for each in everything:
            each.resume()
        assert job.ends_by(time.monotonic() + 60) == [0] and job.said() == ""


def test_what_is_slow_every_time_is_no_hang(tmp_path: Path) -> None:
    with Job(
        tmp_path,
        1,
        in_every_forward,
        "model.distributed.timeout=0.5",
        "batch.batch_size=4",
        steps=1,
    ) as job:
        assert job.ends_by(time.monotonic() + 60) == [0] and job.said() == ""


@pytest.mark.parametrize("hang", [nothing, in_no_way_but_unwatched])
def test_a_run_that_does_not_hang(tmp_path: Path, hang: Callable[[int], None]) -> None:
    further = (
        "training.checkpoint.interval=1",
        "training.validation.interval=1",
        "training.validation.iterations=2",
    )
    with Job(tmp_path, 2, hang, *further, steps=3) as job:
        assert job.ends_by(time.monotonic() + 60) == [0, 0] and job.said() == ""
    assert len(losses(tmp_path / "run")) == 3 and not list((tmp_path / "run").rglob("stacks*"))


def test_under_torchrun(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "fast_llm.cli", "train", *arguments(tmp_path, 1_000_000)]
    output = (tmp_path / "output").open("w+")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as job:
        while not metrics.exists() or len(losses(tmp_path / "run")) < 5:
            assert job.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        ranks = sorted(
            psutil.Process(job.pid).children(), key=lambda process: process.environ()["RANK"]
        )
        ranks[1].suspend()
        job.wait(TIMEOUT + LATER)
    text = (tmp_path / "output").read_text()
    assert job.returncode == 1 and f"Stalled: rank 1, process {ranks[1].pid} on" in text
    # torchrun names the right one too.
    report = (
        r"torchrun: rank 1 on \S+ was killed by SIGKILL|Root Cause.*rank +: 1 \(local_rank: 1\)"
    )
    assert re.search(report, text, re.S), (
        text
    )  # the second where the entry points are not installed


def status(rank: int, heartbeats: int, **further: Any) -> Status:
    values: dict[str, Any] = {
        "step": 7,
        "phase": "data",
        "seconds": 60.0,
        "slow": False,
        "state": "",
        "is_waiting": False,
    } | further
    return Status(rank, f"node{rank // 2}", 100 + rank, heartbeats, **values)


@pytest.mark.parametrize(
    ("statuses", "stalled", "text"),
    [
        # The fewest heartbeats.
        (
            [status(0, 9), status(1, 9), status(2, 8), status(3, 9)],
            [2],
            "Stalled: rank 2, process 102 on node1, in step 7",
        ),
        # Of equal progress, the process that does not wait; but a stopped process first.
        (
            [
                status(0, 9, is_waiting=True),
                status(1, 9),
                status(2, 9, is_waiting=True),
                status(3, 9, is_waiting=True),
            ],
            [1],
            "Stalled: rank 1,",
        ),
        (
            [status(0, 8), status(1, 9, state="stopped"), status(2, 9), status(3, 9)],
            [1],
            "stopped by a signal in step 7",
        ),
        # All equal, as when a device hangs; or some that do not answer.
        (
            [status(rank, 9, is_waiting=True) for rank in range(4)],
            [0, 1, 2, 3],
            "The stalled rank is not certain",
        ),
        (
            [status(0, 9, is_waiting=True), status(2, 9, is_waiting=True)],
            [0, 2],
            "No message from rank 1, 3.",
        ),
        (
            [status(rank, 9, slow=True) for rank in range(4)],
            [0, 1, 2, 3],
            "(training.timeout is 3600 s)",
        ),
    ],
)
def test_diagnosis(statuses: list[Status], stalled: list[int], text: str) -> None:
    found, said = diagnose(
        statuses, {"processes": 4, "logs": "logs", "timeout": 60.0, "slow_timeout": 3600.0}
    )
    assert found == stalled and text in said and "Stacks: logs/stacks_rank_*.txt" in said
