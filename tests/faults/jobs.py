"""Shared by the campaigns: runs whose processes can be killed, and the command line.

A job is a launcher and its ranks, as torchrun's are. They are forked from a server that has torch
loaded, so a start costs a tenth of a second. The launcher does what torchrun does, with shorter
timeouts: it forwards signals, and ends the other ranks when one fails.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests import helpers  # noqa: F401  tells the server what to load

_context = multiprocessing.get_context("forkserver")
TIMEOUT = 8.0  # model.distributed.timeout of these runs
STUCK = 60.0  # seconds after which a process that should have ended counts as stuck


def nothing(rank: int) -> None:
    """Change nothing."""


class Job:
    """One start of `fast-llm train gpt`, in `world` processes."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        world: int,
        before: Callable[..., None] = nothing,
        helped: bool = True,
    ):
        """`before(rank)` is called in each rank first; `helped`: the launcher ends the other ranks
        when one fails.
        """
        self.world = world
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="job-")
        self.folder = Path(self._folder.name)
        self.launcher = _context.Process(
            target=_launch, args=(self.folder, arguments, world, before, helped)
        )
        self.launcher.start()
        self.ranks: list[int] = []
        deadline = time.monotonic() + STUCK
        while not (self.folder / "ranks").exists():
            assert time.monotonic() < deadline, "the launcher did not start"
            time.sleep(0.002)
        self.ranks = [int(number) for number in (self.folder / "ranks").read_text().split()]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._folder.cleanup()

    def kill_all(self) -> None:
        """Kill all processes that are left."""
        self.launcher.kill()
        self.launcher.join()
        for rank in self.ranks:
            send(rank, signal.SIGKILL)
        self.wait_ranks(STUCK)

    def wait(self, seconds: float = STUCK) -> int:
        """The exit code, which is that of the first rank that failed."""
        self.launcher.join(seconds)
        code = self.launcher.exitcode
        assert code is not None, f"stuck: still there after {seconds:.0f} s\n{self.said()}"
        return code

    def wait_ranks(self, seconds: float = STUCK) -> None:
        """Wait until no rank is left, whether or not the launcher lives."""
        deadline = time.monotonic() + seconds
        while left := [rank for rank in self.ranks if alive(rank)]:
            assert time.monotonic() < deadline, (
                f"stuck: {left} of {self.ranks} after {seconds:.0f} s\n{self.said()}"
            )
            time.sleep(0.005)

    def codes(self) -> list[int]:
        """Each rank's exit code, as a shell reports it."""
        lines = (self.folder / "codes").read_text().splitlines()
        found = {int(rank): int(code) for rank, code in map(str.split, lines)}
        return [found[rank] for rank in self.ranks]

    def said(self) -> str:
        """Standard output and error of all processes."""
        return (self.folder / "said").read_text(errors="replace")


def send(process: int, number: signal.Signals) -> None:
    """Send a signal to a process, which may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def alive(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def reached(run: Path) -> int:
    """The step of the newest record; 0 if there is none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b'"step": ')
        return int(lines[-1].split(b",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


def listens(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = next(
        (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0
    )
    return bool(caught >> (number - 1) & 1)


def _launch(
    folder: Path, arguments: list[str], world: int, before: Callable[..., None], helped: bool
) -> None:
    os.setsid()
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    ranks: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        for rank in ranks:
            send(rank, signal.Signals(number))

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, pass_on)
    for rank in range(world):
        process = os.fork()
        if process == 0:
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)
            _rank(folder, arguments, rank, world, before)
        ranks.append(process)
    (folder / "ranks.new").write_text(" ".join(map(str, ranks)))
    (folder / "ranks.new").rename(folder / "ranks")
    first, left, deadline = 0, set(ranks), float("inf")
    while left:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            if time.monotonic() > deadline:
                for rank in left:
                    send(rank, signal.SIGKILL)
            time.sleep(0.002)
            continue
        left.discard(process)
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        with (folder / "codes").open("a") as file:
            file.write(f"{process} {code}\n")
        if code and not first:
            first = code
            if helped:
                deadline = time.monotonic() + 5
                for rank in left:
                    send(rank, signal.SIGTERM)
    os._exit(first)


def _rank(
    folder: Path, arguments: list[str], rank: int, world: int, before: Callable[..., None]
) -> None:
    import torch
    import torch.distributed as dist

    from fast_llm import cli

    def main() -> int:
        os.setsid()
        torch.set_num_threads(1)
        if world > 1:
            places = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": world,
            }
            os.environ |= {name: str(value) for name, value in places.items()}
            store = dist.FileStore(str(folder / "store"), world)
            # Joining through a file is faster than through an address, and needs no free port.
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TIMEOUT + 2),
            )
        before(rank)
        # Signal handlers stay installed until the process has ended.
        sys.argv = ["fast-llm", "train", "gpt", *arguments]
        return cli.main()

    _end_with(main)


def fork(
    folder: Path,
    function: Callable[..., int],
    arguments: Any,
    before: Callable[[int], None] = nothing,
    stuck: float = STUCK,
) -> tuple[int, str]:
    """Run `function(0, arguments)` in a new process. Returns its exit code and its output."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="fork-") as place:
        process = _context.Process(
            target=_alone, args=(Path(place) / "said", function, arguments, before)
        )
        process.start()
        process.join(stuck)
        code = process.exitcode
        process.kill()
        process.join()
        said = (Path(place) / "said").read_text(errors="replace")
        assert code is not None, f"stuck\n{said}"
        return code, said


def _alone(
    said: Path, function: Callable[..., int], arguments: Any, before: Callable[[int], None]
) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)

    def main() -> int:
        before(0)
        return function(0, arguments)

    _end_with(main)


def _end_with(main: Callable[[], int]) -> None:
    """End this process with the exit code of `main`; 1 and a traceback if it raises."""
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(campaign: Callable[[Path, int, int], dict[str, Any]], budget: int) -> None:
    """Run a campaign as its command line says, and print its figures as a Markdown table."""
    parser = argparse.ArgumentParser(description=sys.modules[campaign.__module__].__doc__)
    parser.add_argument("--budget", type=int, default=budget)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = campaign(Path(folder), given.budget, given.seed)
    figures["seconds"] = round(time.monotonic() - started)
    print(
        f"\n| {Path(sys.argv[0]).stem} --budget {given.budget} --seed {given.seed} | |\n|---|---|"
    )
    for name, value in figures.items():
        print(f"| {name} | {value} |")
