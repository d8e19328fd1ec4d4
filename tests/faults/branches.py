"""SIGKILL to branches: at their start and while they save their first checkpoint.

Each ends with the bits of the undisturbed branch, and the run that it branched from stays as it
was. Branches of a run that is running, and deletes its checkpoints, train or end with a line.
"""

import hashlib
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.jobs import Job, command, nothing
from tests.faults.kills import VICTIMS, arguments, kill, published, result, slow_disk
from tests.training.runs import write_tokens

STEP = 12  # of the trunk, after which its branches begin
WORLDS = (1, 2)
GONE = r"has no checkpoint of this step|the other run (deleted|replaced) it while it was read"


def branch(folder: Path, name: str) -> list[str]:
    """A cooldown with another batch size."""
    return arguments(
        folder,
        name,
        f"run.branch_from={{run: {folder}/trunk, step: {STEP}}}",
        "batch.batch_size=16",
        "optimizer.learning_rate.decay_style=wsd",
        "optimizer.learning_rate.decay_iterations=24",
        "optimizer.learning_rate.cooldown=0.5",
    )


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: kills."""
    write_tokens(folder / "tokens", 400)
    chance, figures = random.Random(seed), Counter[str]()
    trunk = arguments(folder, "trunk", "training.checkpoint.keep=null")
    with Job(folder, trunk, 2) as job:
        assert job.wait() == 0, job.said()
    before = contents(folder / "trunk")
    undisturbed: dict[int, Any] = {}
    seconds: dict[int, float] = {}
    for world in WORLDS:
        with Job(folder, branch(folder, f"whole{world}"), world, slow_disk) as job:
            started = time.monotonic()
            while not published(folder / f"whole{world}"):
                assert job.launcher.is_alive() or published(folder / f"whole{world}"), job.said()
                time.sleep(0.001)
            seconds[world] = time.monotonic() - started
            assert job.wait() == 0, job.said()
        undisturbed[world] = result(folder / f"whole{world}")
    while figures["kills"] < budget:
        world, figures["branches"] = chance.choice(WORLDS), figures["branches"] + 1
        name = f"killed{figures['branches']}"
        story = f"seed {seed}, kill {figures['kills']}, {name}, world {world}"
        # The first branch is killed once, at its start, so that each campaign branches again.
        for _ in range(chance.randint(1, 2) if figures["kills"] else 1):
            interrupted(folder, name, world, seconds[world], chance, figures, story)
        again(folder, name, world, figures, story)
        assert result(folder / name) == undisturbed[world], f"{story}: another result"
        for part in ("checkpoint", "export/llama"):
            assert not list((folder / name / part).glob(".*")), f"{story}: something is left"
        assert contents(folder / "trunk") == before, f"{story}: the trunk changed"
    of_a_running_run(folder, max(2, budget // 10), figures)
    return {**dict(sorted(figures.items())), "different": 0, "trunks changed": 0}


def interrupted(
    folder: Path,
    name: str,
    world: int,
    seconds: float,
    chance: random.Random,
    figures: "Counter[str]",
    story: str,
) -> None:
    """A start that is killed before its first checkpoint is published, or while it is written.

    `seconds`: until an undisturbed branch has published it.
    """
    run, in_save, at_start = folder / name, chance.random() < 0.5, not figures["kills"]
    with Job(folder, branch(folder, name), world, slow_disk, chance.random() < 0.5) as job:
        if at_start:
            while job.launcher.is_alive() and not run.exists():
                time.sleep(0.001)
        elif in_save:
            while job.launcher.is_alive() and not list(run.glob("checkpoint/.*.partial-*")):
                time.sleep(0.001)
        else:
            job.launcher.join(chance.uniform(0, seconds))
        if not job.launcher.is_alive():
            assert job.wait() == 0, f"{story}\n{job.said()}"
            return
        figures["kills"] += 1
        figures["before a checkpoint"] += not published(run)
        kill(job, chance.choice(VICTIMS), chance, branch(folder, name), run, figures)


def again(folder: Path, name: str, world: int, figures: "Counter[str]", story: str) -> None:
    """The start after the kills: it branches again, unless a checkpoint of the branch exists."""
    own = max(published(folder / name), default=None)
    with Job(folder, branch(folder, name), world) as job:
        assert job.wait() == 0, f"{story}\n{job.said()}"
        said = job.said()
    found = re.search(r"(Branching|Resuming) from \S+, after step (\d+)[.:]", said)
    assert found is not None, f"{story}\n{said}"
    expected = ("Branching", STEP) if own is None else ("Resuming", own)
    assert (found[1], int(found[2])) == expected, f"{story}: {found[0]} with {own}"
    figures["branched again"] += own is None


def of_a_running_run(folder: Path, attempts: int, figures: "Counter[str]") -> None:
    """Branches of the newest checkpoint of a run that keeps only one."""
    running = arguments(
        folder, "running", "training.checkpoint.keep=1", "training.train_iters=100_000"
    )
    with Job(folder, running, 1, nothing) as job:
        while not published(folder / "running"):
            time.sleep(0.001)
        for attempt in range(attempts):
            step = published(folder / "running")[-1]
            origin = f"run.branch_from={{run: {folder}/running, step: {step}}}"
            steps = f"training.train_iters={step + 3}"
            with Job(folder, arguments(folder, f"of{attempt}", origin, steps), 1) as one:
                code, said = one.wait(), one.said()
            assert code == 0 or (code == 2 and re.search(GONE, said)), said
            figures["branches of a running run" if code == 0 else "refused with a line"] += 1
        assert job.launcher.is_alive(), job.said()


if __name__ == "__main__":
    command(campaign, 100)
