"""A mistake on one, some or all processes: one message, and all exit with its code.

The launcher of these jobs does not end the processes that are left, as the one of another node
would not.
"""

import errno
import os
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fast_llm.errors import ConfigError, DataError, MissingPackage, TrainingStopped
from fast_llm.parallel.failures import Failures
from tests.faults.jobs import Job
from tests.training.runs import settings, write_tokens

HOST = socket.gethostname()
NONE = "No checkpoint is complete: the same command starts this run from its beginning."


def raises(error: BaseException) -> None:
    raise error


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/config.yaml")


def in_a_step(ranks: tuple[int, ...], fault: Callable[[], None], rank: int) -> None:
    """Fail at the third step, in place of the check of its numbers."""
    from fast_llm.training.trainer import Trainer

    def failing(trainer: Trainer, step: int) -> None:
        if step == 3 and rank in ranks:
            fault()

    Trainer.check_finite = failing  # type: ignore[method-assign, assignment]


def each_its_own(rank: int) -> None:
    in_a_step((0, 1), partial(raises, DataError(f"part {rank}: damaged")), rank)


def another_is_busy(rank: int) -> None:
    in_a_step(
        (0, 1),
        partial(raises, DataError("a: damaged")) if rank == 1 else partial(time.sleep, 60),
        rank,
    )


def while_building(rank: int) -> None:
    from fast_llm.training import build

    if rank == 1:
        build.parallelize = lambda *_: raises(MissingPackage("wandb", "training.wandb"))  # type: ignore[assignment, attr-defined]


def in_the_plan(ranks: tuple[int, ...], rank: int) -> None:
    from fast_llm.planning import preflight as checks

    if rank in ranks:
        checks.preflight = lambda *_, **__: raises(ConfigError(["data.path: not here"]))  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("world", "before", "code", "message"),
    [
        (2, partial(in_the_plan, (1,)), 2, f"rank 1 on {HOST}: data.path: not here"),
        (4, partial(in_the_plan, (1, 3)), 2, f"ranks 1, 3 on {HOST}: data.path: not here"),
        (
            2,
            while_building,
            2,
            f"rank 1 on {HOST}: the command line: training.wandb needs the package wandb: pip"
            " install wandb",
        ),
        (4, partial(in_a_step, (3,), partial(raises, DataError("a: damaged"))), 2, "rank 3 on"
            f" {HOST}: a: damaged"),
        (2, partial(in_a_step, (0, 1), partial(raises, DataError("a: damaged"))), 2, "a: damaged"),
        (2, each_its_own, 2, f"rank 0 on {HOST}: part 0: damaged\n  rank 1 on {HOST}: part 1:"
            " damaged"),
        (2, another_is_busy, 2, f"rank 1 on {HOST}: a: damaged"),
        (
            2,
            partial(in_a_step, (0,), full_disk),
            1,
            f"rank 0 on {HOST}: run/config.yaml: No space left on device; free space on the disk"
            " or repair it, then start the"
            f" same command again. {NONE}",
        ),
        (
            2,
            partial(in_a_step, (0, 1), partial(raises, TrainingStopped("no use.", resumable=True))),
            1,
            f"no use. {NONE}",
        ),
    ],
)  # fmt: skip
def test_one_message(
    tmp_path: Path, world: int, before: Callable[[int], None], code: int, message: str
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    arguments = settings(tmp_path, "training.train_iters=50", "batch.micro_batch_size=1")
    with Job(tmp_path, arguments, world, before, helped=False) as job:
        assert job.wait() == code, job.said()
        log, _, said = job.said().partition("fast-llm train: ")
        assert said == f"{message}\n"
        # the log, and the lines of the plan
        ours = r"\d\d-\d\d \d\d:\d\d:\d\d |[A-Z][\w ]{13}\S| {14}"
        assert all(re.match(ours, line) for line in log.splitlines()), log
        assert job.codes() == [code] * world


def test_a_fault_is_one_traceback(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    arguments = settings(tmp_path, "training.train_iters=50", "run.experiment_dir=null")
    with Job(
        tmp_path, arguments, 2, partial(in_a_step, (0, 1), partial(raises, KeyError("ours"))), False
    ) as job:
        assert job.wait() == 1 and job.codes() == [1, 1]
        assert job.said().count("KeyError: 'ours'") == 1 and job.said().count("Traceback") == 1, (
            job.said()
        )


def test_processes_that_do_not_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        TrainingStopped, match=rf"rank 0 on {HOST}: .* 127.0.0.1:{port} within 2 s \(model.distrib"
    ):
        Failures.connect(2).wait_for_all(None, 2)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(
        ConfigError, match="WORLD_SIZE is 2 in the environment: start the processes with torchrun"
    ):
        Failures.connect(2)
