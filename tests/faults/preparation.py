"""`fast-llm prepare` killed at random times: a worker, the main process, or all; also on two nodes.

Some are stopped by a signal instead. Started again until it is complete, a preparation has the
bytes of an undisturbed one, file by file, and no other files. No start gets stuck, and no process
is left running. A stopped preparation ends with a line and the documented exit code.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.data import synthetic
from tests.faults.damage import everything
from tests.faults.jobs import command, listens, send

# seconds after which a process that should have ended counts as stuck, on a busy machine
STUCK = 240.0
VICTIMS = ("worker", "main process", "all")
# Small ranges, so that there is work for several workers; slow disks, so that many kills fall
# between two files that belong together.
_COMMAND = """
import os, pathlib, sys, time
if __name__ == "__main__":
    from fast_llm import cli
    from fast_llm.data import workers
    workers.RANGE_BYTES = 40_000
    replace, fsync = pathlib.Path.replace, os.fsync
    def slow(call):
        def slowly(*given):
            time.sleep(0.01)
            done = call(*given)
            time.sleep(0.01)
            return done
        return slowly
    pathlib.Path.replace, os.fsync = slow(replace), slow(fsync)
    sys.exit(cli.main())
"""


def sources(folder: Path) -> dict[str, list[str]]:
    """What is prepared, with which settings, by name; each of several token files."""
    model = synthetic.llama(folder / "model")
    texts = [synthetic.text(number, 300 + 70 * (number % 60)) for number in range(90)]
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    (folder / "texts" / "040.txt").write_bytes(b"")
    (folder / "texts" / "080.txt").write_bytes(b"\xff\xfe not UTF-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files, rows = f"dataset.path={folder}/texts", f"dataset.path={folder}/rows.jsonl"
    common = [f"tokenizer.path={model}", "tokens_per_shard=100000"]
    return {
        "one worker": [files, *common],
        "three workers": [files, *common, "tokenize_workers=3"],
        "two workers, a table": [rows, *common, "tokenize_workers=2"],
        "two nodes": [files, *common, "distributed.world_size=2"],
    }


class Preparation:
    """One start of `fast-llm prepare`, in a session of its own."""

    def __init__(self, folder: Path, settings: list[str], before: str = ""):
        """`before`: what the program does first."""
        script = folder / "command.py"
        script.write_text(f"{before}{_COMMAND}")
        self.said_to = folder / f"said-{time.monotonic_ns()}"
        with self.said_to.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "prepare", "gpt_memmap", *settings],
                stdout=said,
                stderr=said,
                start_new_session=True,
                env=os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
            )

    def said(self) -> str:
        return self.said_to.read_text(errors="replace")

    def running(self) -> list[int]:
        """Its running processes, the main one included."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state not in "ZX":
                found.append(int(stat.parent.name))
        return found

    def workers(self) -> list[int]:
        """The processes that tokenize or will tokenize."""
        found = []
        for process in self.running():
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes()
            except OSError:
                continue
            if b"spawn_main" in words:
                found.append(process)
        return found

    def wait(self) -> int:
        """The exit code as a shell reports it, once no process is left."""
        try:
            code = self.process.wait(STUCK)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"stuck: still there after {STUCK:.0f} s\n{self.said()}") from None
        deadline = time.monotonic() + STUCK
        while left := self.running():
            assert time.monotonic() < deadline, f"left running: {left}\n{self.said()}"
            time.sleep(0.01)
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        for process in self.running():
            send(process, signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class Death:
    """The signal that ends a start, its receivers and its time."""

    number: signal.Signals
    victim: str
    after: float  # seconds
    # or once so many more files are there, below 0 so many before all of them; 0 is not to wait for
    # any
    files: int

    def come(self, start: Preparation, output: Path, all_of_them: int) -> bool:
        """Wait, then send the signal. Returns whether the preparation was still running."""
        before = len(list(output.glob("*")))
        begun = time.monotonic()
        while start.process.poll() is None:
            present = len(list(output.glob("*")))
            if self.files:
                there = (
                    present - before >= self.files
                    if self.files > 0
                    else present >= all_of_them + self.files
                )
            else:
                there = time.monotonic() - begun > self.after
            # The interpreter's start is not our code.
            ready = self.number == signal.SIGKILL or listens(start.process.pid, self.number)
            ready = bool(start.workers()) if self.victim == "worker" else ready
            if there and ready:
                break
            time.sleep(0.002)
        if self.files:
            time.sleep(self.after % 0.05)
        victims = start.workers()[:1] if self.victim == "worker" else [start.process.pid]
        if start.process.poll() is not None or not victims:
            return False
        if self.victim == "all":
            os.killpg(start.process.pid, self.number)
        else:
            send(victims[0], self.number)
        return True


def check(death: Death, code: int, said: str) -> str:
    """Check how a start that got a signal ended. Raises AssertionError if that is not allowed."""
    assert "Traceback" not in said and "Exception ignored" not in said
    reported = [line for line in said.splitlines() if line.startswith("fast-llm prepare: ")]
    if death.victim == "worker":  # which may have had no work left
        assert code in (0, 2)
        assert len(reported) == (code == 2) and all(
            "a worker process died" in line for line in reported
        )
        return "ended with a line for want of a worker" if code else "done all the same"
    if code == 0:
        assert not reported
        return "done all the same"
    assert code == 128 + death.number
    if death.number == signal.SIGKILL:
        return "killed"
    assert reported == [
        f"fast-llm prepare: stopped by {death.number.name}; the same command resumes it"
    ]
    assert "leaked" not in said
    return "stopped with a line"


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: kills; there are a third as many signals."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    longest = 0.0
    whole: dict[str, dict[str, bytes]] = {}
    seconds: dict[str, float] = {}
    files_of: dict[str, int] = {}
    settings = sources(folder)
    names = list(settings) if budget >= 20 else ["three workers"]
    for name in names:
        where = folder / f"whole, {name}"
        begun = time.monotonic()
        for start in starts(folder, name, settings[name], where):
            assert start.wait() == 0, start.said()
        seconds[name] = time.monotonic() - begun
        whole[name] = everything(where)
        files_of[name] = len(list((where / "data").glob("*")))
        figures[f"token files, {name}"] = len(
            [file for file in whole[name] if file.endswith(".bin")]
        )
    while figures["kills"] < budget:
        name = names[figures["preparations"] % len(names)]
        figures["preparations"] += 1
        where = folder / f"killed {figures['preparations']}"
        story = f"seed {seed}, preparation {figures['preparations']}, {name}"
        for _ in range(chance.randrange(3, 7)):
            death = choose(name, seconds[name], chance)
            story += f"\nthen {death}"
            running = starts(folder, name, settings[name], where)
            met, took = die(death, name, running, where, files_of[name], story, chance, figures)
            longest = max(longest, took)
            if not met or figures["kills"] == budget:
                break
        for start in starts(folder, name, settings[name], where):
            assert start.wait() == 0, f"{story}\nthen left in peace\n{start.said()}"
        found = everything(where)
        assert found.keys() == whole[name].keys(), (
            f"{story}\nother files: {found.keys() ^ whole[name].keys()}"
        )
        for file, expected in whole[name].items():
            assert found[file] == expected, f"{story}\n{file} has other bytes"
    return {
        **dict(sorted(figures.items())),
        "longest end, s": round(longest, 1),
        "left running": 0,
        "different": 0,
    }


def starts(folder: Path, name: str, settings: list[str], where: Path) -> list[Preparation]:
    """Start a preparation: one process, or one for each node."""
    nodes = [[f"distributed.rank={node}"] for node in range(2)] if name == "two nodes" else [[]]
    return [Preparation(folder, [f"output_path={where}/data", *settings, *node]) for node in nodes]


def choose(name: str, seconds: float, chance: random.Random) -> Death:
    """Choose how and when to end a preparation that takes `seconds`."""
    number = (
        signal.SIGKILL if chance.random() < 0.75 else chance.choice((signal.SIGTERM, signal.SIGINT))
    )
    possible = (
        [*VICTIMS, *VICTIMS[:1]] if "workers" in name and number == signal.SIGKILL else VICTIMS[1:]
    )
    files = chance.choice((0, 1, 3, 6, -1, -3))
    return Death(number, chance.choice(possible), chance.uniform(0, seconds), files)


def die(
    death: Death,
    name: str,
    running: list[Preparation],
    where: Path,
    files: int,
    story: str,
    chance: random.Random,
    figures: "Counter[str]",
) -> tuple[bool, float]:
    """End one of the running preparations.

    Returns whether it was still running, and how long its end took.

    `files`: the number of files of a complete preparation.
    """
    hit, longest = chance.choice(running), 0.0
    try:
        met = death.come(hit, where / "data", files)
        at = time.monotonic()
        codes = [start.wait() for start in running]
        longest = time.monotonic() - at if len(running) == 1 and met else 0.0
        if met:
            what = "kills" if death.number == signal.SIGKILL else "asked to stop"
            figures.update((what, f"{death.number.name} to {death.victim}", name))
            figures[check(death, codes[running.index(hit)], hit.said())] += 1
            figures["as it ended"] += death.files < 0
            figures["with a file half written"] += bool(list(where.rglob("*.partial")))
        assert all(
            code == 0
            for start, code in zip(running, codes, strict=True)
            if not met or start is not hit
        )
    except AssertionError as error:
        said = "\n".join(start.said() for start in running)
        raise AssertionError(f"{story}\n{error}\n{said}") from error
    finally:
        for start in running:
            start.kill()
    return met, longest


if __name__ == "__main__":
    command(campaign, 50)
