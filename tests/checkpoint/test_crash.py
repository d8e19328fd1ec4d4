"""Death at any moment of a save: what is found afterwards is the previous checkpoint or the new one, whole."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import state
from fast_llm.checkpoint.weights import export_llama


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a process that has no threads yet, so that it may fork itself."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    process = context.Process(target=_child, args=(function, args, results), daemon=True)
    process.start()
    error, value = results.get(timeout=200)
    process.join()
    assert error is None, error
    return value


def _child(function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    try:
        results.put((None, function(*args)))
    except BaseException:
        results.put((traceback.format_exc(), None))


def fork(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def die_at(number: int, root: Path) -> None:
    """Kill this process just before its `number`-th change below `root`."""
    done = 0

    def count(path: Any) -> None:
        nonlocal done
        if str(root) in str(path):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            # Inside a folder that is being deleted names are relative to it.
            count(args[0] if os.path.isabs(str(args[0])) else root)
        elif event == "open" and isinstance(args[1], str) and args[1][:1] in ("w", "a", "x"):
            count(args[0])

    fsync = os.fsync

    def counted_fsync(handle: int) -> None:
        count(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def content(path: Path) -> float:
    """The one number a checkpoint is full of; all of it must be of one save."""
    info = folders.verify(path).info
    found = {name: torch.empty(5, 3) for name in ("weight/a", "weight/b")}
    state.load(path, found)
    (value,) = {number for tensor in found.values() for number in tensor.flatten().tolist()}
    assert value == info["value"]
    return float(value)


def save(root: Path, step: int, value: float) -> None:
    tensors = {name: torch.full((5, 3), value) for name in ("weight/a", "weight/b")}
    state.save(root, step, tensors, {"value": value})


def every_operation(root: str, again: bool) -> tuple[int, set[tuple[int, float]]]:
    """Die before each operation of a save and a prune; the number of operations, and what was found after them."""
    state.LARGEST_FILE = 60  # a file for each tensor
    found = set()
    for number in range(1, 1000):
        here = Path(root, str(number))
        save(here, 10, 1)
        save(here, 20, 2)
        step = 20 if again else 30

        def work() -> None:
            die_at(number, here)  # noqa: B023
            save(here, step, 3)  # noqa: B023
            folders.prune(here, 1, lambda step: False)  # noqa: B023

        _, status = os.waitpid(fork(work), 0)
        assert status in (0, signal.SIGKILL)
        newest = folders.latest(here)
        assert newest is not None
        found.add((folders.read_manifest(newest).step, content(newest)))
        # The same again succeeds, and leaves nothing behind.
        save(here, step, 4)
        folders.prune(here, 1, lambda step: False)
        assert content(here / str(step)) == 4
        assert [p.name for p in here.iterdir()] == [str(step)]
        if status == 0:
            return number, found
    raise AssertionError("no end")


def test_death_before_every_operation_of_a_save(tmp_path: Path) -> None:
    operations, found = in_child(every_operation, str(tmp_path), False)
    assert operations > 20
    assert found == {(20, 2.0), (30, 3.0)}


def test_death_before_every_operation_of_a_second_save_of_a_step(tmp_path: Path) -> None:
    operations, found = in_child(every_operation, str(tmp_path), True)
    assert operations > 20
    assert found == {(20, 2.0), (20, 3.0)}


def every_operation_of_an_export(root: str) -> int:
    for number in range(1, 1000):
        path = Path(root, str(number), "7")

        def export(value: float) -> None:
            weights = {name: torch.full((5, 3), value) for name in ("a", "b")}
            files = {"tokenizer.json": b"{}"}
            export_llama(
                path,  # noqa: B023
                weights,
                config={"value": value},
                dtype="fp32",
                files=files,
                parameters_per_file=20,
                step=7,
            )

        def work() -> None:
            die_at(number, path.parent)  # noqa: B023
            export(1)

        _, status = os.waitpid(fork(work), 0)
        assert status in (0, signal.SIGKILL)
        if path.exists():
            assert len(folders.verify(path).files) == 5
        export(2)
        folders.prune(path.parent, None, lambda step: False)
        folders.verify(path)
        assert [p.name for p in path.parent.iterdir()] == ["7"]
        if status == 0:
            return number
    raise AssertionError("no end")


def test_death_before_every_operation_of_an_export(tmp_path: Path) -> None:
    assert in_child(every_operation_of_an_export, str(tmp_path)) > 15
