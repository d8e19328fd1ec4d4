"""A long run: thousands of steps of a tiny model in one folder, with all faults at random.

SIGKILL of one rank, of all, or of the launcher; SIGTERM and SIGUSR1; a full disk for a while; a
stopped rank (SIGSTOP); a flipped bit in the newest checkpoint between starts; non-finite steps, and
spikes. At the end all losses, validations, the export and the weights equal those of a run with the
same non-finite steps and spikes and nothing else, bit for bit.

That other run is one process, in which nothing may grow: memory, open files, threads, children, and
time a step. It often saves with a callback, validates, logs, exports and checks for corruption.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.checkpoint import folder as folders
from fast_llm.training.trainer import Trainer
from tests.faults import damage, disk
from tests.faults.faults import NOT_FINITE, SPIKE, Fault, disturb
from tests.faults.jobs import STUCK, Job, command, reached, send
from tests.training.runs import losses, records, settings, weights, write_tokens

BATCH, WINDOW, SAVE, VALIDATE, EXPORT = 4, 16, 40, 100, 250
SAMPLE = 10  # steps between measurements of a process
HUNG = 6.0  # model.distributed.timeout where a rank will be stopped
EVENTS = {
    "one rank killed": 4,
    "all ranks killed": 3,
    "launcher killed": 2,
    "SIGTERM": 3,
    "SIGUSR1": 2,
    "disk full for a while": 3,
    "rank stopped": 1,
}
DAMAGED = 0.2  # of the times that a run is down and has two checkpoints
# Memory that a process may grow by once a third of its life is over, MB in 100 steps. Its first
# thousand steps cost 8 MB, then there is next to nothing (0.01); one that keeps the batch of each
# step grows by 0.8.
GROWTH = 0.1
# times the processor's time a step, last third against second: it varies by a tenth on a shared
# machine
SLOWER = 1.5


def arguments(folder: Path, name: str, steps: int, *further: str) -> list[str]:
    model = "model.base_model.transformer"
    return settings(
        folder,
        f"{model}.num_layers=1",
        f"{model}.hidden_size=16",
        f"{model}.num_attention_heads=2",
        f"{model}.head_groups=1",
        f"{model}.kv_channels=8",
        f"{model}.ffn_hidden_size=24",
        f"batch.batch_size={BATCH}",
        "batch.sequence_length=16",
        f"training.train_iters={steps}",
        f"training.checkpoint.interval={SAVE}",
        "training.checkpoint.keep=3",
        "training.checkpoint.callback.script=env true",
        f"training.export.interval={EXPORT}",
        "training.export.keep=2",
        f"training.validation.interval={VALIDATE}",
        "training.validation.iterations=1",
        "training.double_check.interval=500",
        "training.num_workers=1",
        "training.spikes.policy=skip",
        f"training.spikes.window={WINDOW}",
        "training.spikes.threshold=1000",
        "model.multi_stage.zero_stage=2",
        f"model.distributed.timeout={STUCK / 2}",  # the machine may be busy
        "optimizer.learning_rate.base=1e-3",
        f"run.experiment_dir={folder}/{name}",
        *further,
    )


def faults(steps: int, world: int, chance: random.Random) -> list[Fault]:
    """Steps that are not finite, and spikes; few enough that medians do not heed them, and never
    three in a row.
    """
    found: list[Fault] = []
    batch = WINDOW
    while (batch := batch + chance.randrange(8, 160)) <= steps:
        place, spike = chance.choice(("loss", "gradient")), chance.random() < 0.3
        value = SPIKE if spike else chance.choice(NOT_FINITE)
        rank = None if spike else chance.choice([None, *range(world)])
        found.append(Fault(batch, place, value, rank, chance.randrange(2**20)))
    return found


# The measurements of a process.


def watched(rank: int, numbers: Sequence[Fault], into: Path, steps: int) -> None:
    """Record the resources of this process while it writes no checkpoint."""
    disturb(rank, numbers, None)
    start, page = Trainer.train, os.sysconf("SC_PAGESIZE")
    seen = np.zeros((steps // SAMPLE + 1, 6))

    def look(step: int) -> tuple[float, ...]:
        tasks = os.listdir("/proc/self/task")
        children = sum(
            len(Path(f"/proc/self/task/{task}/children").read_text().split()) for task in tasks
        )
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6
        return (
            step,
            resident,
            len(os.listdir("/proc/self/fd")),
            len(tasks),
            children,
            time.process_time(),
        )

    def train(self: Trainer) -> None:
        add, count = self.metrics.add, 0

        def looking(step: int, result: Any) -> None:
            nonlocal count
            add(step, result)
            if (
                step % SAMPLE == SAMPLE - 1 and not self.checkpoints.saver.busy
            ):  # otherwise the saver's thread and files would count
                seen[count] = look(step)
                count += 1

        self.metrics.add = looking  # type: ignore[method-assign]
        start(self)
        np.save(into / f"uses_{rank}.npy", seen[:count])

    Trainer.train = train  # type: ignore[method-assign]


def growth(uses: np.ndarray, story: str, long: bool) -> dict[str, float]:
    """Check that a process did not grow after a third of its life, the warm-up."""
    step, resident, files, threads, children, seconds = uses[len(uses) // 3 :].T
    assert len(step) > 3, story
    slope = float(np.polyfit(step, resident, 1)[0]) * 100
    # Open files and threads are exactly as many each time. A callback's process is waited for when
    # the next one starts.
    assert len({*files}) == 1, f"{story}: open files {files.tolist()}"
    assert len({*threads}) == 1, f"{story}: threads {threads.tolist()}"
    assert max(children) <= 2, f"{story}: children {children.tolist()}"
    middle = len(step) // 2
    rates = [
        (part[-1] - part[0]) / (at[-1] - at[0])
        for part, at in zip(_halves(seconds, middle), _halves(step, middle), strict=True)
    ]
    if long:  # in hundreds of steps the allocator has not seen everything yet, and a rate is noise
        assert slope < GROWTH, f"{story}: {slope:.3f} MB in 100 steps: {resident.tolist()}"
        assert rates[1] < SLOWER * rates[0], f"{story}: {rates} s a step"
    return {
        "MB": slope,
        "files": files[0],
        "threads": threads[0],
        "children": max(children),
        "slower": rates[1] / rates[0],
    }


def _halves(values: np.ndarray, middle: int) -> tuple[np.ndarray, np.ndarray]:
    return values[:middle], values[middle:]


# The faults.


def flip_newest(run: Path, chance: random.Random) -> bool:
    """Flip one bit of the newest of at least two checkpoints."""
    found = folders.find(run / "checkpoint")
    if len(found) < 2:
        return False
    damage.flip(chance.choice(sorted(found[-1][1].glob("*.safetensors"))), chance)
    return True


def interfere(job: Job, event: str, chance: random.Random) -> None:
    """Inject faults into the processes."""
    if event == "launcher killed":
        job.launcher.kill()
        time.sleep(
            chance.choice((0, 0, chance.uniform(0, 1)))
        )  # its ranks keep running, as torchrun's do
        for rank in job.ranks:
            send(rank, signal.SIGKILL)
    elif event in ("SIGTERM", "SIGUSR1"):
        os.kill(job.launcher.pid or 0, signal.Signals[event])
    elif event == "rank stopped":
        send(chance.choice(job.ranks), signal.SIGSTOP)
    else:
        for rank in chance.sample(job.ranks, 1 if event == "one rank killed" else len(job.ranks)):
            send(rank, signal.SIGKILL)


def full_disk(
    rank: int, numbers: Sequence[Fault], victim: int, number: int, until: int, root: Path
) -> None:
    """Make the disk of one process full for a while."""
    disturb(rank, numbers, None)
    disk.fail(rank, victim, "full", number, root, until)


def live(
    folder: Path,
    steps: int,
    world: int,
    numbers: Sequence[Fault],
    chance: random.Random,
    story: str,
) -> "Counter[str]":
    """Run until complete, with all faults."""
    figures: Counter[str] = Counter()
    run, complete = folder / "disturbed", False
    longest = max(40, min(300, steps // 5))  # steps from a start to the next fault
    while not complete:
        figures["starts"] += 1
        assert figures["starts"] < 20 + steps // 10, f"{story}: no end"
        if figures["starts"] > 1 and chance.random() < DAMAGED and flip_newest(run, chance):
            figures["newest checkpoint damaged"] += 1
        event = chance.choices(list(EVENTS), list(EVENTS.values()))[0]
        target = reached(run) + chance.randrange(5, longest)
        further = (
            (f"model.distributed.timeout={HUNG}", "training.timeout=15")
            if event == "rank stopped"
            else ()
        )
        before: Any = partial(disturb, faults=numbers, notes=None)
        if event == "disk full for a while":
            begin = chance.randrange(20, 4 * longest)
            end = begin + chance.randrange(20, 4 * longest)
            which = {"victim": chance.randrange(world), "number": begin, "until": end}
            before = partial(full_disk, numbers=numbers, root=run, **which)
        with Job(folder, arguments(folder, "disturbed", steps, *further), world, before) as job:
            deadline = time.monotonic() + 4 * STUCK
            while job.launcher.is_alive() and reached(run) < min(target, steps):
                assert time.monotonic() < deadline, (
                    f"{story}: stuck at {reached(run)}\n{job.said()[-5000:]}"
                )
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.1))
            if target < steps and job.launcher.is_alive():
                figures[event] += 1
                interfere(job, "SIGTERM" if event.startswith("disk") else event, chance)
            code = job.wait(4 * STUCK)
            job.wait_ranks(STUCK)
            said = job.said()
        if event in ("SIGTERM", "SIGUSR1"):
            assert code in (0, 143 if event == "SIGTERM" else 0), (
                f"{story}, {event}, exit code {code}\n{said[-5000:]}"
            )
        complete = code == 0 and "Training is complete" in said
        figures["damaged checkpoints passed over"] += "Skipped: " in said
    with Job(
        folder, arguments(folder, "disturbed", steps), world
    ) as job:  # what a kill at the very end left undone
        assert job.wait() == 0, f"{story}\n{job.said()}"
    return figures


def result(run: Path, steps: int) -> dict[str, Any]:
    """The losses, weights and export of a run."""
    of_steps = records(run)
    return {
        "steps": sorted(of_steps),
        "losses": losses(run),
        "validation": losses(run, "validation"),
        "left out": [
            (step, one["skipped_iters"], one["spikes"]) for step, one in sorted(of_steps.items())
        ],
        "weights": weights(run / "checkpoint" / str(steps)),
        "export": weights(run / "export" / "llama" / str(steps)),
    }


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: steps; from 1000 on in two processes."""
    chance = random.Random(seed)
    world, long = 2 if budget >= 1000 else 1, budget >= 5000
    story = f"seed {seed}, {budget} steps, world {world}"
    write_tokens(folder / "tokens", 400)
    numbers = faults(budget, world, chance)
    before = partial(watched, numbers=numbers, into=folder, steps=budget)
    began = time.monotonic()
    with Job(folder, arguments(folder, "whole", budget), world, before) as job:
        assert job.wait(3600) == 0, f"{story}\n{job.said()[-5000:]}"
    seconds = time.monotonic() - began
    whole = result(folder / "whole", budget)
    assert whole["steps"] == [*range(1, budget + 1)]
    bad = {fault.batch for fault in numbers}
    assert {step for step, skipped, _ in whole["left out"] if skipped} == bad, (
        f"{story}: other steps left out"
    )
    uses = [
        growth(np.load(folder / f"uses_{rank}.npy"), f"{story}, rank {rank}", long)
        for rank in range(world)
    ]
    figures = live(folder, budget, world, numbers, chance, story)
    found = result(folder / "disturbed", budget)
    for name in whole:
        assert found[name] == whole[name], (
            f"{story}: other {name}: {_difference(found[name], whole[name])}"
        )
    for run in (folder / "whole", folder / "disturbed"):
        assert not [*run.glob("checkpoint/.*"), *run.glob("export/llama/.*")], (
            f"{story}: left behind in {run}"
        )
        assert len([*run.glob("checkpoint/*")]) == 3 and len([*run.glob("export/llama/*")]) <= 2, (
            f"{story}: not deleted"
        )
    worst = {name: max(use[name] for use in uses) for name in uses[0]}
    return {
        "steps": budget,
        "processes": world,
        "steps that were not finite": sum(fault.value != SPIKE for fault in numbers),
        "spikes": sum(fault.value == SPIKE for fault in numbers),
        **dict(sorted(figures.items())),
        "undisturbed: steps a second": round(budget / seconds, 1),
        "memory, MB in 100 steps": round(worst["MB"], 4),
        "open files, all the time": int(worst["files"]),
        "threads, all the time": int(worst["threads"]),
        "children at most": int(worst["children"]),
        "processor time a step, last third by second": round(worst["slower"], 2),
        "stuck": 0,
        "different": 0,
    }


def _difference(found: Any, expected: Any) -> str:
    """The first difference of two results."""
    one, other = (
        dict(value) if isinstance(value, dict) else dict(enumerate(value))
        for value in (found, expected)
    )
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return (
        f"{len(keys)} of {len(other)}, first {keys[0]}: {one.get(keys[0])!r:.80}"
        f" {other.get(keys[0])!r:.80}"
    )


if __name__ == "__main__":
    command(campaign, 10_000)
