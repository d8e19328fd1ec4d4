"""A failing disk: at a write once (EIO), from a write on (ENOSPC), or at a size (RLIMIT_FSIZE).

The disk fails one process of a run with one or two processes, at everything that it writes: lock,
config.yaml, logs, metrics.jsonl, checkpoints, exports; or it fails a preparation. There is no
traceback: a run ends well, or with an exit code and a line with the reason. Earlier checkpoints
stay intact. The same command, on a disk that works, ends with the bits of an undisturbed run and
leaves nothing behind.
"""

import builtins
import errno
import io
import os
import random
import re
import resource
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from tests.data import synthetic
from tests.faults.damage import everything
from tests.faults.jobs import Job, command, fork
from tests.faults.kills import arguments, result
from tests.training.runs import write_tokens

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WAYS = ("once", "full", "limit")


class Failing:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, tick: Any):
        self._file, self._tick = file, tick

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: Any) -> int:
        self._tick("write", self._file.name)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._tick("flush", self._file.name)
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._tick("close", self._file.name)
            finally:
                self._file.close()


def fail(rank: int, victim: int, way: str, number: int, root: Path, until: int = 10**9) -> None:
    """Let the `number`-th operation that writes below `root` fail, in the process of that rank; if
    the disk is full, the others `until` that one as well.
    """
    if rank != victim:
        return
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        return
    done = 0
    frees = ("os.remove", "os.rmdir", "os.rename")
    trace = os.open(root.parent / "operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def tick(kind: str, path: Any) -> None:
        nonlocal done
        if str(root) not in str(path):
            return
        done += 1
        if done <= number:
            real_write(trace, f"{kind} {os.path.relpath(str(path), root)}\n".encode())
        if done == number or (way == "full" and number < done <= until and kind not in frees):
            code = errno.EIO if way == "once" else errno.ENOSPC
            raise OSError(
                code,
                os.strerror(code),
                *([str(path)] if kind not in ("write", "flush", "close") else []),
            )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in (*frees, "os.mkdir") or (
            event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        ):
            tick(event, args[0])

    real_open, real_write, real_fsync = io.open, os.write, os.fsync

    def opening(file: Any, mode: str = "r", *further: Any, **named: Any) -> Any:
        opened = real_open(file, mode, *further, **named)
        return (
            Failing(opened, tick) if set(mode) & set("wax+") and str(root) in str(file) else opened
        )

    def through(real: Any, kind: str) -> Any:
        def call(handle: int, *further: Any) -> Any:
            tick(kind, os.readlink(f"/proc/self/fd/{handle}"))
            return real(handle, *further)

        return call

    io.open = builtins.open = opening
    os.write, os.fsync = through(real_write, "write"), through(real_fsync, "fsync")
    sys.addaudithook(hook)


def trace(folder: Path) -> list[str]:
    """The operations so far. If one failed, it is the last."""
    return (folder / "operations").read_text().splitlines()


def place(hit: str) -> str:
    """The part of a run that an operation belongs to."""
    path = hit.partition(" ")[2]
    for name in ("checkpoint", "export", "metrics.jsonl", "runs"):
        if path.startswith(name):
            return {"runs": "logs"}.get(name, name)
    return "the rest"


def kind(operation: str) -> str:
    """The kind of operation, without the number of a step."""
    return re.sub(r"\.partial-\w+|\.deleted-\w+|\d+", "N", operation)


def runs(folder: Path, budget: int, seed: int) -> "Counter[str]":
    """`budget` runs on a failing disk."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    write_tokens(folder / "tokens", 400)
    whole, kinds = undisturbed(folder, figures)
    every = [(*who, name) for who, found in kinds.items() for name in found]
    failed = set()
    waiting: list[tuple[int, int, str, str]] = []
    while figures["runs"] < budget:
        if not waiting:  # each kind of operation once in each way of failing, in random order
            waiting = [(*one, way) for one in every for way in WAYS[:2]] + [
                (*one, WAYS[2]) for one in every[::9]
            ]
            chance.shuffle(waiting)
        world, victim, name, way = waiting.pop()
        number = (
            chance.randrange(20_000, 150_000)
            if way == "limit"
            else chance.choice(kinds[world, victim][name])
        )
        run = folder / "run"
        story = f"seed {seed}, run {figures['runs']}: {way} {number} in rank {victim} of {world}"
        (folder / "operations").unlink(missing_ok=True)
        figures["runs"] += 1
        disturbed = partial(fail, victim=victim, way=way, number=number, root=run)
        with Job(folder, arguments(folder, "run"), world, disturbed) as job:
            code, said = job.wait(), job.said()
        reached = trace(folder) if way != "limit" else []
        hit = "limit" if way == "limit" else reached[-1] if len(reached) == number else ""
        story += f", {hit}, exit code {code}\n{said}"
        if hit:
            failed.add((world, victim, kind(hit)))
            figures[f"failed in {place(hit) if hit != 'limit' else 'what was too large'}"] += 1
            check_end(world, code, said, story, figures)
        else:
            assert code == 0, story
        for step, path in folders.find(run / "checkpoint"):
            assert folders.verify(path).step == step, story
        lost = "could not be written and are lost" in said or (
            code != 0 and "metrics.jsonl: cannot be written" in said
        )
        figures["metrics lost, and reported"] += lost
        resume(folder, world, whole[world], lost, story)
        shutil.rmtree(run)
    figures["kinds of operations that failed"] = len(failed & set(every))
    figures["of kinds of operations"] = len(every)
    return figures


def undisturbed(
    folder: Path, figures: "Counter[str]"
) -> tuple[dict[int, Any], dict[tuple[int, int], dict[str, list[int]]]]:
    """Results of runs on a good disk by world size, and by world size and rank the numbers of the
    operations of each kind.
    """
    whole: dict[int, Any] = {}
    kinds: dict[tuple[int, int], dict[str, list[int]]] = {}
    for world, victim in ((1, 0), (2, 0), (2, 1)):
        run = folder / f"whole{world}-{victim}"
        (folder / "operations").unlink(missing_ok=True)
        watched = partial(fail, victim=victim, way="once", number=10**9, root=run)
        with Job(folder, arguments(folder, run.name), world, watched) as job:
            assert job.wait() == 0, job.said()
        whole[world] = result(run)
        found: dict[str, list[int]] = {}
        for number, operation in enumerate(trace(folder), start=1):
            found.setdefault(kind(operation), []).append(number)
        kinds[world, victim] = found
        figures[f"operations that write, rank {victim} of {world}"] = sum(map(len, found.values()))
    return whole, kinds


def check_end(world: int, code: int, said: str, story: str, figures: "Counter[str]") -> None:
    """A run whose disk failed ends well, or with a line that says why and no traceback."""
    # A process that lost another one may report it in its own way; the one with the disk may not.
    assert world > 1 or "Traceback" not in said, story
    if not code:
        figures["went on and ended well"] += 1
        return
    reason = r"(No space left on device|Input/output error|File too large)"
    printed = [line for line in said.splitlines() if line.startswith("fast-llm train: ")]
    assert printed and re.search(reason, printed[0]), story
    assert world > 1 or len(printed) == 1, story
    figures["ended with a line"] += 1


def resume(folder: Path, world: int, whole: dict[str, Any], lost: bool, story: str) -> None:
    """Start the run again, on a good disk: it ends as an undisturbed one.

    `lost`: records of metrics.jsonl are missing.
    """
    with Job(folder, arguments(folder, "run"), world) as job:
        assert job.wait() == 0, f"{story}\nthen\n{job.said()}"
    run = folder / "run"
    ended = result(run)
    for name in ended:
        if lost and name in ("losses", "validation"):
            assert ended[name].items() <= whole[name].items(), story
        else:
            assert ended[name] == whole[name], f"{story}: another {name}"
    left = [*run.glob("checkpoint/.*"), *run.glob("export/llama/.*")]
    assert not left, f"{story}: left behind"


def prepared(rank: int, settings: list[str]) -> int:
    """Prepare a dataset in a new process."""
    from fast_llm import cli

    return cli.main(["prepare", *settings])


def preparations(folder: Path, budget: int, seed: int) -> "Counter[str]":
    """`budget` preparations on a failing disk."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    folder.mkdir()
    model = synthetic.llama(folder / "model")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number:03}.txt").write_text(synthetic.text(number, 2500))
    where = folder / "made"
    how = [
        f"output_path={where}/data",
        f"dataset.path={texts}",
        f"tokenizer.path={model}",
        "tokens_per_shard=100000",
    ]
    how += ["tokenize_workers=1"]
    whole: dict[str, bytes] = {}
    operations = 10**9
    while figures["preparations"] < budget + 1:
        way = "once" if not whole else chance.choice(("once", "full", "limit"))
        number = operations if not whole else chance.randrange(1, operations + 1)
        number = chance.randrange(1_000, 200_000) if way == "limit" else number
        where.mkdir()
        before = partial(fail, victim=0, way=way, number=number, root=where)
        code, said = fork(folder, prepared, how, before)
        story = (
            f"seed {seed}, preparation {figures['preparations']}: {way} {number}, exit code"
            f" {code}\n{said}"
        )
        figures["preparations"] += 1
        if not whole:
            assert code == 0, story
            whole, operations = everything(where), len(trace(folder))
            figures["operations that write in a preparation"] = operations
        assert "Traceback" not in said, story
        if code:
            assert (
                len([line for line in said.splitlines() if line.startswith("fast-llm prepare: ")])
                == 1
            ), story
            figures["preparations ended with a line"] += 1
            code, said = fork(folder, prepared, how)
            assert code == 0, f"{story}\nthen\n{said}"
        assert everything(where) == whole, f"{story}: other bytes"
        shutil.rmtree(where)
    figures["preparations"] -= 1
    return figures


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget` runs, and half as many preparations."""
    found = runs(folder, budget, seed) + preparations(folder / "data", budget // 2, seed)
    return {
        **dict(sorted(found.items())),
        "checkpoints damaged": 0,
        "tracebacks": 0,
        "another result": 0,
    }


if __name__ == "__main__":
    command(campaign, 400)
