"""Checkpoints written in the background: the same bytes, and failures in the meantime."""

import errno
import faulthandler
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import Any

import pytest
import torch

from fast_llm import cli
from fast_llm.checkpoint import folder, state
from fast_llm.errors import CheckpointError, TrainingStopped
from fast_llm.tensors import Stored
from fast_llm.training import saving
from fast_llm.training.trainer import Trainer
from fast_llm.watchdog import watcher
from tests.helpers import _context, spawn
from tests.training.runs import losses, run, settings, tell, until, weights, write_tokens

Write = Callable[[str, int], None]


def arguments(root: Path, name: str, steps: int, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={steps}",
        "training.checkpoint.interval=4",
        "training.checkpoint.keep=null",
        "training.num_workers=0",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


def disturb(
    before_writing: Write, after_step: Callable[[Trainer, int], None] = lambda trainer, step: None
) -> None:
    """Have something done in the saver's thread, given the checkpoint's step and the attempt, and
    after each step.
    """
    write, check, attempts = state._Writer.write_data, Trainer.check_finite, dict[str, int]()

    def disturbed(self: state._Writer, *arguments: Any) -> Any:
        step = self.folder.name.split(".")[1]
        attempts[step] = attempts.get(step, 0) + 1
        before_writing(step, attempts[step])
        return write(self, *arguments)

    def checked(trainer: Trainer, step: int) -> None:
        check(trainer, step)
        after_step(trainer, step)

    state._Writer.write_data = disturbed  # type: ignore[method-assign, assignment]
    Trainer.check_finite = checked  # type: ignore[method-assign, assignment]
    saving._PAUSE = saving._LAST_PAUSE = 0.05


def full_at_first(root: Path, rank: str) -> int:
    """Make one process's disk full during the first write of step 4, which lasts until step 6."""
    reached = 0

    def before_writing(step: str, attempt: int) -> None:
        if step == "4" and attempt == 1:
            until(lambda: reached >= 6)
            if os.environ["RANK"] == rank:
                raise OSError(errno.ENOSPC, "No space left on device", "the disk")

    def after_step(trainer: Trainer, step: int) -> None:
        nonlocal reached
        reached = step
        if step == 7:
            until(lambda: folder.is_complete(root / "run" / "checkpoint" / "4"))

    disturb(before_writing, after_step)
    return run(arguments(root, "run", 10, "model.multi_stage.zero_stage=2"))


@pytest.mark.parametrize(("world", "rank"), [(1, "0"), (2, "1")])
def test_training_continues_and_bytes_are_the_same(tmp_path: Path, world: int, rank: str) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(world, full_at_first, tmp_path, rank) == [0] * world
    how = ("model.multi_stage.zero_stage=2", "training.checkpoint.background=no")
    assert spawn(world, run, arguments(tmp_path, "plain", 10, *how)) == [0] * world
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    for step in ("4", "8", "10"):
        found, expected = (
            folder.verify(tmp_path / name / "checkpoint" / step) for name in ("run", "plain")
        )
        assert found.files == expected.files and len(found.files) == world
        del found.info["settings"], expected.info["settings"]
        assert found.info == expected.info
    for one in range(world):
        said = (tmp_path / "run" / "runs" / "0" / "logs" / f"logs_rank_{one}.txt").read_text()
        assert (
            "checkpoint/4: could not be saved: No space left on device (the disk). Training"
            " continues; the next" in said
        )
        assert (
            said.index("the next attempt is in 0.05 s.")
            < said.index("checkpoint/4 in ")
            < said.index("step  8/10  loss")
        )
        assert "training paused for" in said
        plain = (tmp_path / "plain" / "runs" / "0" / "logs" / f"logs_rank_{one}.txt").read_text()
        assert "Saved " in plain and "paused for" not in plain


def slow(arguments_: list[str]) -> int:
    disturb(lambda step, attempt: time.sleep(0.3))
    return run(arguments_)


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(2, slow, arguments(tmp_path, "run", 3, "training.checkpoint.interval=1")) == [0, 0]
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_1.txt").read_text()
    assert said.count("Training waits: the checkpoint of step") == 2
    assert [step for step, _ in folder.find(tmp_path / "run" / "checkpoint")] == [1, 2, 3]


def killed_in_the_middle(arguments_: list[str]) -> None:
    disturb(lambda step, attempt: os.kill(os.getpid(), signal.SIGKILL) if step == "8" else None)
    run(arguments_)


def test_a_kill_in_the_middle_leaves_the_one_before(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    process = _context.Process(target=killed_in_the_middle, args=(arguments(tmp_path, "run", 12),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    root = tmp_path / "run" / "checkpoint"
    assert folder.latest(root) == root / "4" and len(list(root.iterdir())) == 2
    assert spawn(1, run, arguments(tmp_path, "run", 12)) == [0]
    assert len(list(root.iterdir())) == 3
    assert spawn(1, run, arguments(tmp_path, "whole", 12)) == [0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(root / "12") == weights(tmp_path / "whole" / "checkpoint" / "12")


def always_full(arguments_: list[str]) -> tuple[int, str]:
    def before_writing(step: str, attempt: int) -> None:
        if step != "4" and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device", "the disk")

    disturb(before_writing)
    with redirect_stderr(StringIO()) as errors:
        return cli.main(["train", "gpt", *arguments_]), errors.getvalue()


@pytest.mark.parametrize("background", ["yes", "no"])
def test_failing_to_the_end_is_an_error(tmp_path: Path, background: str) -> None:
    write_tokens(tmp_path / "tokens", 400)
    how = f"training.checkpoint.background={background}"
    root = tmp_path / "run" / "checkpoint"
    problem = "could not be saved: No space left on device (the disk)"
    place = f"override run.experiment_dir={tmp_path}/run: run.experiment_dir"
    assert spawn(2, always_full, arguments(tmp_path, "run", 14, how)) == [
        (2, f"fast-llm train: {place}: {root}/14: {problem} (at the end, after 3 attempts)\n"),
        (2, ""),
    ]
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_1.txt").read_text()
    assert f"checkpoint/12: {problem}. Training continues without this checkpoint." in said
    assert "Training is complete" not in said
    assert max(losses(tmp_path / "run")) == 14
    assert [path.name for path in root.iterdir()] == ["4"]


def stopped_while_saving(arguments_: list[str], how: str) -> int | str:
    """Send a signal at step 5, while step 4 is written."""

    def after_step(trainer: Trainer, step: int) -> None:
        if step == 5 and how == "signal" and os.environ["RANK"] == "1":
            tell(trainer, signal.SIGTERM)
        if step == 5 and how == "error":
            raise TrainingStopped("enough")

    disturb(lambda step, attempt: time.sleep(0.3), after_step)
    try:
        return run(arguments_)
    except TrainingStopped as error:
        return str(error)


@pytest.mark.parametrize(
    ("how", "result", "steps"), [("signal", 143, ["4", "6"]), ("error", "enough", ["4"])]
)
def test_what_is_being_written_is_waited_for(
    tmp_path: Path, how: str, result: object, steps: list[str]
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(2, stopped_while_saving, arguments(tmp_path, "run", 12), how) == [result] * 2
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir()) == steps
    for step in steps:
        folder.verify(tmp_path / "run" / "checkpoint" / step)


def test_without_memory_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    monkeypatch.setattr(saving, "available_memory", lambda: 360_000)
    assert run(arguments(tmp_path, "run", 8)) == 0
    said = capsys.readouterr().out
    sentence = (
        "Training waits for each checkpoint and export to be written: a copy in the host's memory"
        " would need 329 kB, and 360 kB"
    )
    assert said.count(sentence) == 1 and said.count("Saved ") == 2 and "paused for" not in said


def test_a_fault_in_the_thread_ends_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    monkeypatch.setattr(folder, "publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(arguments(tmp_path, "run", 1000))
    assert max(losses(tmp_path / "run")) < 1000


def test_a_hang_is_not_excused_by_the_thread_that_saves(tmp_path: Path) -> None:
    """Its talking to other processes means that this one waits for them only where the training
    thread waits for it.
    """
    write_tokens(tmp_path / "tokens", 400)
    training, thread = spawn(
        2, stacks_while_saving, arguments(tmp_path, "run", 6), tmp_path / "looked"
    )[1]
    assert "/torch/distributed/" in thread and "saving.py" in thread
    assert not watcher._is_waiting(
        training.replace("in _join", "in elsewhere")
    ) and watcher._is_waiting(training)
    assert watcher._is_waiting(
        thread.replace("in _write_with_retries", "in elsewhere")
    ) and not watcher._is_waiting(thread)


def stacks_while_saving(arguments_: list[str], looked: Path) -> tuple[str, str] | None:
    """Stacks of rank 1 while its training thread waits for its saver, which waits for rank 0.

    Returns all stacks, and the saver's.
    """
    found, saver = "", re.compile(r"/saving\.py.* in _write_with_retries$", re.M)

    def both_wait() -> bool:
        nonlocal found
        with TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            found = file.read()
        return " in _join\n" in found and any(
            saver.search(p) and "/torch/distributed/" in p for p in found.split("\n\n")
        )

    def look() -> None:
        until(both_wait)
        looked.touch()

    if os.environ["RANK"] == "0":
        disturb(lambda step, attempt: until(looked.exists) if step == "6" else None)
        run(arguments_)
        return None
    disturb(
        lambda step, attempt: None,
        lambda trainer, step: Thread(target=look).start() if step == 6 else None,
    )
    run(arguments_)
    (thread,) = [part for part in found.split("\n\n") if saver.search(part)]
    return found, thread


def test_memory_of_a_container(tmp_path: Path) -> None:
    free = saving.available_memory()
    assert free > 0
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert saving.available_memory(tmp_path) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert saving.available_memory(tmp_path) > 3_000_000


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_checkpoint_is_raised_after_an_export_of_its_step(
    background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_LAST_PAUSE", 0.01)
    weight = torch.ones(4)
    stored = {"weight/a": Stored.of(weight, (weight,))}

    def fails(*_: Any) -> Path:
        raise CheckpointError("the disk is full")

    saver = saving.Saver(None, background)
    saver.start("checkpoint", 10, stored, fails, last=True)
    saver.start("export", 10, stored, lambda *_: Path("written"), last=True)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.wait()
    assert saver.last_started == {"checkpoint": -1, "export": 10}


def test_a_checkpoint_after_an_export_of_its_step_is_copied_too(tmp_path: Path) -> None:
    """The export's copy has the weights alone, in memory that was allocated for all."""
    stored = {f"{part}/a": torch.full((4,), 1.0) for part in ("weight", "exp_avg")}
    every = {name: Stored.of(tensor, (tensor,)) for name, tensor in stored.items()}
    found: dict[str, torch.Tensor] = {}

    def write(tensors: Any, part_of: Callable[[str], torch.Tensor]) -> Path:
        found.update({name: part_of(name).clone() for name in tensors})
        return tmp_path

    saver = saving.Saver(None, background=True)
    saver.host_copy.copies = {name: (torch.zeros(4),) for name in stored}
    saver.start("export", 0, {"weight/a": every["weight/a"]}, write)
    saver.start("checkpoint", 0, every, write, last=True)
    saver.wait()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
