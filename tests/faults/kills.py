"""SIGKILL at random times: to one rank, all ranks or the launcher, at world sizes 1, 2 and 4.

No start gets stuck, and no published checkpoint is lost. A run that is killed again and again ends
with the losses, weights and export of the undisturbed run, bit for bit. Its data is a mixture in
stages, and many kills are at a border of two: one between saves, one at a save.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from fast_llm.training.audit import inspect_step
from tests.faults.jobs import STUCK, TIMEOUT, Job, alive, command, nothing, reached, send
from tests.training.runs import losses, settings, weights, write_tokens

STEPS, INTERVAL = 24, 3
WORLDS = (1, 2, 4)
VICTIMS = ("one rank", "all ranks", "launcher")
BORDERS = (8, 15)  # last steps of stages
STAGES = (  # the second has longer sequences and other positions
    "[{until: 8, weights: {a: 0.8, b: 0.2}},"
    " {until: 15, weights: {b: 1}, sequence_length: 48, rotary: {theta: 500000}},"
    " {weights: {a: 1}}]"
)


def slow_disk(rank: int) -> None:
    """Make flushing slow, so that many kills hit a save."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.01)
        fsync(handle)

    os.fsync = slow  # type: ignore[assignment]


def arguments(folder: Path, name: str, *further: str) -> list[str]:
    """The settings of a run that saves often, validates and exports."""
    return settings(
        folder,
        f"training.train_iters={STEPS}",
        f"training.checkpoint.interval={INTERVAL}",
        "training.checkpoint.keep=2",
        "training.export.interval=12",
        "training.validation.interval=8",
        "training.validation.iterations=1",
        "training.num_workers=0",
        "model.multi_stage.zero_stage=2",
        f"model.distributed.timeout={TIMEOUT}",
        f"run.experiment_dir={folder}/{name}",
        *further,
    )


def staged(folder: Path, name: str) -> list[str]:
    """These settings with a mixture in stages."""
    return [
        *(one for one in arguments(folder, name) if not one.startswith("data.path=")),
        "data.format=mixture",
        f"data.sources={{a: {folder}/tokens, b: {folder}/more}}",
        f"data.stages={STAGES}",
    ]


def sources(run: Path) -> list[list[str]]:
    """The sources of each step's sequences."""
    steps = [inspect_step(str(run), step) for step in range(1, STEPS + 1)]
    return [[sequence["source"] for sequence in step.sequences] for step in steps]


def result(run: Path) -> dict[str, Any]:
    """The losses, weights and exports of a run."""
    export = run / "export" / "llama" / str(STEPS) / "model.safetensors"
    return {
        "losses": losses(run),
        "validation": losses(run, "validation"),
        "weights": weights(run / "checkpoint" / str(STEPS)),
        "export": export.read_bytes(),
    }


def published(run: Path) -> list[int]:
    """The steps of the published checkpoints."""
    return [step for step, _ in folders.find(run / "checkpoint")]


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: kills."""
    write_tokens(folder / "tokens", 400)
    write_tokens(folder / "more", 200)
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    longest = 0.0
    undisturbed: dict[int, Any] = {}
    seconds: dict[int, float] = {}
    for world in WORLDS[: max(1, budget // 3)]:
        with Job(folder, staged(folder, f"whole{world}"), world, slow_disk) as job:
            started = time.monotonic()
            assert job.wait() == 0, job.said()
            seconds[world] = time.monotonic() - started
        undisturbed[world] = result(folder / f"whole{world}")
    while figures["kills"] < budget:
        world = chance.choice(list(undisturbed))
        figures["runs"] += 1
        name = f"killed{figures['runs']}"
        run, complete = folder / name, False
        while not complete:
            story = f"seed {seed}, kill {figures['kills']}, {name}, world {world}"
            doomed = figures["kills"] < budget
            complete, took = start(
                folder, name, world, seconds[world], doomed, chance, figures, story
            )
            longest = max(longest, took)
        with Job(folder, staged(folder, name), world) as job:
            # The last kill may have left work undone.
            assert job.wait() == 0, f"{story}\n{job.said()}"
        assert result(run) == undisturbed[world], f"{story}: another result"
        assert sources(run) == sources(folder / f"whole{world}"), f"{story}: other data"
        for part in ("checkpoint", "export/llama"):
            assert not list((run / part).glob(".*")), f"{story}: something was left behind"
    assert budget < 100 or figures["inside a save"] >= budget / 5, (
        "too few kills hit a save to prove much"
    )
    return {
        **dict(sorted(figures.items())),
        "longest end, s": round(longest, 1),
        "stuck": 0,
        "lost": 0,
        "different": 0,
    }


def start(
    folder: Path,
    name: str,
    world: int,
    seconds: float,
    doomed: bool,
    chance: random.Random,
    figures: "Counter[str]",
    story: str,
) -> tuple[bool, float]:
    """One start of a run, killed if it is `doomed`.

    Returns whether the run is complete, and how long the kill took.

    `seconds`: that an undisturbed run takes.
    """
    run, longest = folder / name, 0.0
    before = published(run)
    story += f", with {before}"
    slow, victim = chance.random() < 0.7, chance.choice(VICTIMS)
    after = chance.uniform(0, seconds)
    disk = slow_disk if slow else nothing
    with Job(folder, staged(folder, name), world, disk, chance.random() < 0.5) as job:
        if doomed:
            place = chance.random()
            border = chance.choice(BORDERS) + chance.choice((-1, 0, 1)) if place > 0.7 else 0
            figures["at a border"] += wait_for_step(job, run, border) if border else 0
            if not border:
                wait(job, after, run if place < 0.4 else None, chance)
        if not doomed or not job.launcher.is_alive():
            assert job.wait() == 0, f"{story}\n{job.said()}"
        else:
            known = published(run)
            figures.update(("kills", f"world {world}", victim))
            longest = kill(job, victim, chance, staged(folder, name), run, figures)
            assert max(published(run), default=0) >= max(known, default=0), (
                f"{story}: lost, had {known}"
            )
        resumed = re.search(
            r"Resuming from .*, after step (\d+)\.|Starting from (random) weights",
            job.said(),
        )
        if resumed:
            # Orphans that still run while the next start begins may have saved more meanwhile.
            assert int(resumed[1] or 0) == max(before, default=0), (
                f"{story}: resumed from {resumed[0]}"
            )
        finished = "Training is complete" in job.said()
    newest = folders.latest(run / "checkpoint")
    there = published(run)
    assert (newest is None and not there) or (
        newest is not None and folders.verify(newest).step == max(there)
    ), f"{story}: {newest} of {there}"
    unfinished = list((run / "export/llama").glob(".*"))
    return finished and max(there, default=0) == STEPS and not unfinished, longest


def wait(job: Job, after: float, run: Path | None, chance: random.Random) -> None:
    """Some seconds, or until there is a save or an export in `run` to hit; at most until the job
    ends.
    """
    if run is None:
        job.launcher.join(after)
        return
    skip = chance.randrange(4)
    seen: set[Path] = set()
    while len(seen) <= skip and job.launcher.is_alive():
        seen |= {*run.glob("checkpoint/.*.partial-*"), *run.glob("export/llama/.*.partial-*")}
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))


def wait_for_step(job: Job, run: Path, step: int) -> bool:
    """Wait until the run has logged this step; whether it has, and is not far beyond."""
    while job.launcher.is_alive() and reached(run) < step:
        time.sleep(0.001)
    return reached(run) <= step + 1


def kill(
    job: Job,
    victim: str,
    chance: random.Random,
    again: list[str],
    run: Path,
    figures: "Counter[str]",
) -> float:
    """Kill, note where that was, and wait until everything has ended; the seconds that this took by
    itself.
    """
    if victim == "launcher":
        job.launcher.kill()
    else:
        victims = chance.sample(job.ranks, len(job.ranks) if victim == "all ranks" else 1)
        for rank in victims:
            send(rank, signal.SIGKILL)
    inside = [
        part for part in ("checkpoint", "export/llama") if list((run / part).glob(".*.partial-*"))
    ]
    figures["inside a save"] += "checkpoint" in inside
    figures["inside an export"] += "export/llama" in inside
    started = time.monotonic()
    if victim == "launcher":
        # Its ranks keep running, as torchrun's do. A new start is refused meanwhile.
        if chance.random() < 0.5:
            with Job(run.parent, again, job.world) as second:
                code = second.wait()
                refused = "another run " in second.said()
                assert code == (2 if refused else 0), second.said()
                figures["second starts refused"] += refused
        if chance.random() < 0.5:
            for rank in job.ranks:
                send(rank, signal.SIGKILL)
    job.wait_ranks(STUCK)
    assert not any(map(alive, job.ranks))
    return time.monotonic() - started


if __name__ == "__main__":
    command(campaign, 500)
