"""Slow machines are named: before the first step, and while training."""

import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fast_llm.parallel.mesh import Mesh
from fast_llm.training import machines
from fast_llm.training.log_lines import training_line
from fast_llm.training.machines import Slowest, check_machines, neighbours, slow_processes
from tests.helpers import slow, spawn
from tests.training.runs import records, run, settings, write_tokens
from tests.training.test_log_lines import RECORD

FACTOR = "training.slow_process_factor=2"


def test_a_process_is_slow_above_the_factor_of_the_median() -> None:
    assert slow_processes([1.0, 1.19, 0.9, 1.3], "matmul", 1.2) == []  # the median is 1.095
    assert slow_processes([1.0, 1.0, 1.0, 1.3, 2.0], "matmul", 1.2) == [
        Slowest(4, "matmul", 2.0),
        Slowest(3, "matmul", 1.3),
    ]
    assert slow_processes([0.0, 0.0, 0.0], "matmul", 1.2) == []
    # Waiting counts by what it adds to a step of 2 s, not by its ratio to almost nothing.
    assert slow_processes([1e-6, 1e-4, 0.3], "data", 1.2, step=2.0) == []
    assert slow_processes([0.0, 0.0, 0.5], "data", 1.2, step=2.0) == [Slowest(2, "data", 1.25)]


@pytest.mark.parametrize(
    ("size", "stride"), [(2, 1), (3, 1), (4, 1), (5, 1), (8, 8), (8, 2), (6, 2), (24, 8), (7, 2)]
)
def test_every_process_meets_the_machines_before_and_after_its_own(size: int, stride: int) -> None:
    rounds = [list(neighbours(rank, size, stride)) for rank in range(size)]
    for rank, partners in enumerate(rounds):
        for number, partner in enumerate(partners):
            assert partner is None or (partner != rank and rounds[partner][number] == rank)
    across = stride if size % stride == 0 and size > stride else 1
    for rank, partners in enumerate(rounds):
        others = {(rank + across) % size, (rank - across) % size}
        assert {partner for partner in partners if partner is not None} == others


def test_the_messages() -> None:
    said = Slowest(1, "matmul", 1.3456).sentence(["node1, GPU 0 (A)", "node2, GPU 3 (A)"], 1.2)
    assert said == (
        "Rank 1 on node2, GPU 3 (A) takes 1.35 times as long as the median of 2 processes for"
        " matmuls, above training.slow_process_factor 1.2: the others wait for it; look at its"
        " clocks, its temperature and other programs there, or replace the machine"
    )
    line = training_line(RECORD | {"slowest_rank": 1, "slowest_times": 1.3456}, 2)
    assert "  rank 1 is 1.35 × as slow" in line


def be_slow_in(what: str, seconds: float) -> None:
    """Make this process slow: its matmuls, its writes or its messages."""
    if what == "matmul":
        multiply = torch.mm

        def mm(*args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return multiply(*args, out=out)

        machines.torch.mm = mm  # type: ignore[attr-defined]
    elif what == "write":
        fsync = os.fsync

        def sync(file: int) -> None:
            time.sleep(seconds)
            fsync(file)

        machines.os.fsync = sync  # type: ignore[attr-defined]
    else:
        exchange = dist.batch_isend_irecv

        def late(operations: list[dist.P2POp]) -> list[dist.Work]:
            time.sleep(seconds)
            return exchange(operations)

        machines.dist.batch_isend_irecv = late  # type: ignore[attr-defined]


def checked(folder: str, which: str) -> list[Slowest]:
    """Rank 1 is slow."""
    mesh = Mesh(60, 60)
    if mesh.rank == 1:
        be_slow_in(which, {"matmul": 0.05, "write": 0.5, "exchange": 0.3}[which])
    return check_machines(mesh, 3, Path(folder))


@pytest.mark.parametrize("what", ["matmul", "write", pytest.param("exchange", marks=slow)])
def test_a_slow_process_is_named_before_the_first_step(tmp_path: Path, what: str) -> None:
    """The others take some milliseconds, and may take a third of what it sleeps."""
    for found in spawn(3, checked, str(tmp_path), what):
        assert [(one.rank, one.what) for one in found if one.what == what] == [(1, what)]
    assert not list(tmp_path.iterdir())


def trained(arguments: list[str], seconds: float) -> None:
    """Rank 2 is slow."""
    if os.environ["RANK"] == "2":
        be_slow_in("matmul", seconds)
    assert run(arguments) == 0


def test_a_slow_process_is_named_while_training(tmp_path: Path) -> None:
    """In the log, in metrics.jsonl, and once only as a warning of the log."""
    write_tokens(tmp_path / "tokens")
    arguments = settings(tmp_path, "training.train_iters=4", "training.logs.interval=2", FACTOR)
    spawn(3, trained, arguments, 0.15)
    found = records(tmp_path / "run")
    for record in found.values():
        assert record["slowest_rank"] == 2 and record["slowest_in"] == "matmul"
        assert record["slowest_host"].endswith(", the CPU")
        assert record["slowest_times"] == record["matmul_spread"] > 2
    log = next((tmp_path / "run").glob("runs/0/logs/logs_rank_0.txt")).read_text()
    # Before the first step, and while training. A busy disk may have been slow for it, too.
    assert len(re.findall("Rank 2 on .* for matmuls, above", log)) == 2
    assert log.count("rank 2 is ") == 2


def test_off_by_default(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    spawn(2, trained, settings(tmp_path, "training.train_iters=1"), 0.0)
    (record,) = records(tmp_path / "run").values()
    assert not [name for name in record if "slowest" in name or "spread" in name]
    assert "Speed of" not in (tmp_path / "run/runs/0/logs/logs_rank_0.txt").read_text()


def throttled(arguments: list[str], folder: str) -> None:
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    assert run(arguments) == 0


@slow
def test_a_process_that_gets_a_tenth_of_its_processor_is_named(tmp_path: Path) -> None:
    """Rank 1 is stopped nine tenths of the time, as if its machine were throttled."""
    write_tokens(tmp_path / "tokens")
    arguments = settings(tmp_path, "training.train_iters=80", "training.logs.interval=80", FACTOR)
    done = threading.Event()

    def throttle() -> None:
        while not (tmp_path / "1").exists() or not (tmp_path / "1").read_text():
            time.sleep(0.05)
        process = int((tmp_path / "1").read_text())
        with suppress(ProcessLookupError):  # the run is over
            while not done.wait(0.005):
                os.kill(process, signal.SIGSTOP)
                time.sleep(0.045)
                os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        spawn(3, throttled, arguments, str(tmp_path))
    finally:
        done.set()
        thread.join()
    record = records(tmp_path / "run")[80]
    assert record["slowest_rank"] == 1
