"""A crash before the k-th change to the disk, for every k.

The operations are a save, a second save of a step, an export, and a pair of token files. Each crash
is tried once as a kill, which loses nothing that was written, and three times as a power cut, which
loses what was not flushed: names in folders, contents of files, or a mixture. Afterwards the
previous version or the new one is there and complete; the new one if the call had returned. After a
kill, the same call succeeds and leaves nothing else behind.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import state
from fast_llm.checkpoint.weights import export_hugging_face
from fast_llm.data.tokenfile import TokenFile, TokenFileWriter
from fast_llm.errors import DataError
from tests import helpers  # noqa: F401  tells the server what to load
from tests.faults.jobs import command

RETURNED = "returned"  # a file in the folder: the call had returned


# The operations, and the number that their result was written with.


def save(root: Path, step: int, value: float) -> None:
    """A checkpoint full of one number, in two files; and what it makes superfluous goes."""
    tensors = {name: torch.full((5, 3), value) for name in ("weight/a", "weight/b")}
    state.save(root, step, tensors, {"value": value})


def saved(root: Path) -> float | None:
    """The step of the newest complete checkpoint, all of whose files must come from one save."""
    newest = folders.latest(root)
    if newest is None:
        return None
    info = folders.verify(newest).info
    found = {name: torch.empty(5, 3) for name in ("weight/a", "weight/b")}
    state.load(newest, found)
    (value,) = {number for tensor in found.values() for number in tensor.flatten().tolist()}
    assert value == info["value"]
    return float(value)


def prune(root: Path) -> None:
    folders.prune(root, 1, lambda step: False)


def export(root: Path, value: float) -> None:
    weights = {name: torch.full((5, 3), value) for name in ("a", "b")}
    export_hugging_face(
        root / "7",
        weights,
        config={"value": value},
        dtype="fp32",
        files={"tokenizer.json": b"{}"},
        parameters_per_file=20,
        step=7,
    )


def exported(root: Path) -> float | None:
    found = folders.latest(root, "export")
    if found is None:
        return None
    assert len(folders.verify(found).files) == 5
    return float(json.loads((found / "config.json").read_text())["value"])


def write_tokens(root: Path, value: float) -> None:
    root.mkdir(exist_ok=True)
    writer = TokenFileWriter(root / "tokens", np.dtype("uint16"))
    for length in (int(value), 0, 8 - int(value)):  # another index would fit these tokens, too
        writer.append(np.full(length, int(value)))
    writer.close()


def tokens(root: Path) -> float | None:
    """The tokens of a pair; None also for a pair that is refused."""
    try:
        file = TokenFile(root / "tokens")
    except DataError:
        return None
    (value,) = set(file.tokens_at(0, file.tokens).tolist())
    assert file.lengths.tolist() == [value, 0, 8 - value]
    return float(value)


@dataclass(frozen=True)
class Way:
    """A path through the code that writes."""

    before: Callable[[Path], Any]
    work: Callable[[Path], Any]
    clean: Callable[[Path], Any]
    found: Callable[[Path], float | None]
    may_find: set[float | None]  # while the work runs; 3 afterwards
    left: set[str]  # files in the folder after the work was repeated


def _two_saves(root: Path) -> None:
    save(root, 10, 1)
    save(root, 20, 2)


PATHS = {
    "save": Way(_two_saves, lambda root: save(root, 30, 3), prune, saved, {2, 3}, {"30"}),
    "save again": Way(_two_saves, lambda root: save(root, 20, 3), prune, saved, {2, 3}, {"20"}),
    "first save": Way(
        lambda root: None, lambda root: save(root, 5, 3), prune, saved, {None, 3}, {"5"}
    ),
    "export": Way(
        lambda root: None, lambda root: export(root, 3), prune, exported, {None, 3}, {"7"}
    ),
    "export again": Way(
        lambda root: export(root, 2), lambda root: export(root, 3), prune, exported, {2, 3}, {"7"}
    ),
    "token files": Way(
        lambda root: write_tokens(root, 2),
        lambda root: write_tokens(root, 3),
        lambda root: None,
        tokens,
        {None, 2, 3},
        {"tokens.bin", "tokens.idx"},
    ),
}


# The kinds of death, and what a power cut leaves.


class Disk:
    """The disk after a power cut: the contents and names that were flushed.

    Kept in a folder, by inode. Flushed files stay open, so that no inode number is used again.
    """

    def __init__(self, store: Path):
        self.store = store
        store.mkdir(exist_ok=True)

    def flushed(self, handle: int) -> None:
        """Record the current content of a file or folder as flushed."""
        number = os.fstat(handle).st_ino
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        os.open(path, os.O_RDONLY)
        if path.is_dir():
            names = {
                entry.name: entry.stat(follow_symlinks=False).st_ino for entry in path.iterdir()
            }
            (self.store / f"{number}.names").write_text(json.dumps(names))
        else:
            shutil.copyfile(path, self.store / str(number))

    def everything(self, root: Path) -> None:
        """Record all current contents as flushed."""
        for path in [root.parent, root, *root.rglob("*")]:
            if path.exists():
                handle = os.open(path, os.O_RDONLY)
                self.flushed(handle)

    def after_power_cut(self, root: Path, into: Path, keeps_names: Callable[[], bool]) -> None:
        """Make in `into` what a power cut leaves of `root`.

        `keeps_names`: whether folders have their names at the power cut, or those last flushed.
        """
        places = {path.stat().st_ino: path for path in [root, *root.rglob("*")] if path.exists()}

        def make(number: int, at: Path) -> None:
            there = places.get(number)
            listed = self.store / f"{number}.names"
            if listed.exists() or (there is not None and there.is_dir()):
                at.mkdir()
                names = json.loads(listed.read_text()) if listed.exists() else {}
                if there is not None and keeps_names():
                    names = {entry.name: entry.stat().st_ino for entry in there.iterdir()}
                for name, inner in names.items():
                    make(inner, at / name)
            elif (self.store / str(number)).exists():
                shutil.copyfile(self.store / str(number), at)
            else:  # of the right size, and nothing in it
                at.write_bytes(bytes(there.stat().st_size if there is not None else 0))

        above = json.loads((self.store / f"{root.parent.stat().st_ino}.names").read_text())
        number = root.stat().st_ino if root.exists() and keeps_names() else above.get(root.name)
        if number is not None:
            make(number, into)
        else:
            into.mkdir()


def die_at(number: int, root: Path, disk: Disk) -> None:
    """Kill this process before its `number`-th change below `root`."""
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
        disk.flushed(handle)

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def one_death(
    folder: Path, name: str, number: int, chance: random.Random, figures: "Counter[str]"
) -> bool:
    """Die at the `number`-th change of an operation and check what is left.

    Returns whether the operation had more changes.
    """
    path = PATHS[name]
    here = folder / f"{name} {number}"
    root = here / "tree"
    here.mkdir()
    path.before(root)
    disk = Disk(here / "safe")
    disk.everything(root)
    child = os.fork()
    if child == 0:
        try:
            die_at(number, root, disk)
            path.work(root)
            (here / RETURNED).touch()
            path.clean(root)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    story = f"{name}, death at change {number}"
    may_find = {3} if (here / RETURNED).exists() else path.may_find
    cuts: dict[str, Callable[[], bool]] = {
        "all that was not flushed lost": lambda: False,
        "contents lost, names kept": lambda: True,
        "contents lost, names here and there": lambda: chance.random() < 0.5,
    }
    for cut, keeps_names in cuts.items():
        left = here / cut
        disk.after_power_cut(root, left, keeps_names)
        value = path.found(left)
        assert value in may_find, f"{story}, then a power cut, {cut}: found {value}, not {may_find}"
        figures["power cuts"] += 1
        figures["previous one found"] += value != 3
        figures["new one found"] += value == 3
    value = path.found(root)
    assert value in may_find, f"{story}: found {value}, not {may_find}"
    figures["previous one found"] += value != 3
    figures["new one found"] += value == 3
    path.work(root)
    path.clean(root)
    assert path.found(root) == 3, story
    assert {entry.name for entry in root.iterdir()} == path.left, (
        f"{story}: left behind {list(root.iterdir())}"
    )
    figures["kills"] += 1
    shutil.rmtree(here)
    return status != 0


def _in_child(folder: str, budget: int, seed: int, results: Any) -> None:
    """Run a function in a process without threads, which may fork."""
    torch.set_num_threads(1)
    state.LARGEST_FILE_BYTES = 60  # a file for each tensor
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    try:
        for name in PATHS:
            number = 1
            while one_death(Path(folder), name, number, chance, figures):
                # A small budget leaves out some of the cases; the seed decides which.
                number += 1 if budget >= 250 else chance.randrange(1, 2 * max(1, 250 // budget))
                assert number < 1000, "no end"
            figures[f"changes of {name}"] = number - 1
        results.put((None, dict(figures)))
    except BaseException:
        results.put((f"seed {seed}\n{traceback.format_exc()}", {}))


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """Crash at random changes. `budget`: from 250 on, at every change."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    process = context.Process(
        target=_in_child, args=(str(folder), budget, seed, results), daemon=True
    )
    process.start()
    error, figures = results.get(timeout=600)
    process.join()
    assert error is None, error
    assert figures["previous one found"] and figures["new one found"]
    return {**figures, "mixtures": 0, "lost": 0}


if __name__ == "__main__":
    command(campaign, 250)
