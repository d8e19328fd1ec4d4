"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: once, twice at once, and twice later.

A rank sends them when it begins a phase for the k-th time: to itself, to all ranks, or to its
launcher, which forwards them as torchrun does; at world sizes 1, 2 and 4. No job gets stuck, and
none prints a traceback. All ranks end with the documented exit code, and a checkpoint of the step
where they stopped exists. Started again and again, and at last undisturbed, the run ends with the
losses, weights and exports of an undisturbed run, bit for bit, and leaves nothing behind.
"""

import importlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from tests.faults import kills
from tests.faults.jobs import Job, alive, command, listens, send
from tests.faults.kills import published
from tests.training.runs import losses, weights, write_tokens

STEPS = 10
WORLDS = (1, 2, 4)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TARGETS = ("one rank", "all ranks", "launcher")
TIMES = ("once", "twice", "late")  # late: a second signal, which ends the process
ENDS = 30.0  # seconds in which a job must end, on a busy machine
_LATER = 2.2  # seconds until a second signal counts as a new one, with a margin
_THREADS = (
    "writing a checkpoint",
    "publishing",
)  # mostly of the saver's thread, while training continues

# A phase is recognized by its heartbeat, or by a function that is called.
MARKS: tuple[str, ...] = (
    "reading weights",
    "data",
    "forward and backward",
    "sum over processes",
    "update",
    "log",
    "validation",
    "test",
)
MARKS += ("saving", "exporting", "end of training", "closing")
CALLS = {
    "plan": ("fast_llm.planning.preflight", "preflight"),
    "before the processes meet": ("fast_llm.training.job", "Mesh"),
    "while the processes meet": ("fast_llm.parallel.mesh", "_new_slow_group"),
    "after the processes met": ("fast_llm.training.job", "_check_fp8"),
    "building the model": ("fast_llm.training.build", "parallelize"),
    "reading a batch": ("fast_llm.data.loader", "Loader.step"),
    "copying for a checkpoint": ("fast_llm.checkpoint.state", "stage"),
    "writing a checkpoint": ("fast_llm.checkpoint.state", "save"),
    "publishing": ("fast_llm.checkpoint.folder", "publish"),
    "writing an export": ("fast_llm.training.checkpointing", "export_hugging_face"),
    "leaving the others": ("fast_llm.parallel.mesh", "Mesh.close"),
}
# Before training, SIGTERM and SIGINT end a process as they end any other.
EARLY = ("plan", "before the processes meet", "while the processes meet")
ONCE = {
    *EARLY,
    *(
        "after the processes met",
        "building the model",
        "reading weights",
        "test",
        "closing",
        "leaving the others",
    ),
}
ONCE |= {"end of training"}


@dataclass(frozen=True)
class Case:
    """The signals, their time and their receivers."""

    phase: str
    count: int  # the occurrence of the phase
    rank: int  # the rank that sends
    target: str
    number: signal.Signals
    times: str
    second: signal.Signals


def arm(rank: int, case: Case, note: Path) -> None:
    """Have a process of that rank send the signals. What it was doing is written to `note`."""
    kills.slow_disk(rank)
    if rank != case.rank:
        return
    from fast_llm.training.interrupt import Interrupt
    from fast_llm.training.trainer import Trainer

    noted, entered, trainers = threading.Event(), 0, list[Trainer]()
    take, make = Interrupt._on_signal, Trainer.__init__

    def taken(interrupt: Interrupt, number: int) -> None:
        take(interrupt, number)
        noted.set()

    def made(trainer: Trainer, *given: Any) -> None:
        make(trainer, *given)
        trainers.append(trainer)

    def enter() -> None:
        nonlocal entered
        entered += 1
        if entered == case.count:
            done = trainers[0].state.step if trainers else 0
            note.write_text(json.dumps({"done": done, "time": time.monotonic()}))
            strike(case, noted)

    Interrupt._on_signal, Trainer.__init__ = taken, made  # type: ignore[method-assign, assignment]
    call_before(case.phase, enter)


def call_before(phase: str, function: Callable[[], None]) -> None:
    """Have a function called each time that this process begins a phase."""
    if phase not in CALLS:
        from fast_llm.watchdog.process import Watchdog

        heartbeat = Watchdog.heartbeat

        def noticed(watchdog: Watchdog, name: str, *given: Any, **named: Any) -> None:
            heartbeat(watchdog, name, *given, **named)
            if name == phase:
                function()

        Watchdog.heartbeat = noticed  # type: ignore[method-assign, assignment]
        return
    module, name = CALLS[phase]
    owner = importlib.import_module(module)
    if "." in name:
        owner, name = getattr(owner, name.split(".")[0]), name.split(".")[1]
    original = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        function()
        return original(*given, **named)

    setattr(owner, name, wrapped)


def strike(case: Case, noted: threading.Event) -> None:
    """Send the signals of a case. `noted`: set once this process has noticed one."""
    launcher = os.getppid()
    ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    others = [int(process) for process in ranks if int(process) != os.getpid()]
    # A process without handlers dies of a signal, and the others would report its loss.
    heard = [signal.SIGUSR1] if case.phase in EARLY else list(SIGNALS)
    while not all(
        listens(process, number) or not alive(process) for process in others for number in heard
    ):
        time.sleep(0.002)  # at the end of a run another process may have ended already
    victims = {"one rank": [], "all ranks": others, "launcher": [launcher]}[case.target]
    if case.target != "launcher":
        victims = [*victims, os.getpid()]
    for victim in victims:
        send(victim, case.number)
    # A signal through the launcher takes a moment, which must not lead into another phase.
    assert noted.wait(10)
    if case.times != "once":
        time.sleep(0.2 if case.times == "twice" else _LATER)
        for victim in victims:
            send(victim, case.second)
        time.sleep(10 if case.times == "late" and case.second != signal.SIGUSR1 else 0.1)


def arguments(folder: Path, name: str) -> list[str]:
    """The settings of a run that uses every phase in few steps."""
    return kills.arguments(
        folder,
        name,
        f"training.train_iters={STEPS}",
        "training.checkpoint.interval=3",
        "training.export.interval=5",
        "training.validation.interval=4",
        "training.test_iters=1",
    )


def result(run: Path) -> dict[str, Any]:
    """The losses, weights and exports of a run."""
    return {
        **{phase: losses(run, phase) for phase in ("training", "validation", "test")},
        "weights": weights(run / "checkpoint" / str(STEPS)),
        "exports": {
            str(file.relative_to(run)): file.read_bytes()
            for path in (run / "export/llama").iterdir()
            for file in path.glob("*.safetensors")
        },
    }


def choose(phase: str, world: int, chance: random.Random) -> Case:
    rank = 0 if phase == "publishing" else chance.randrange(world)
    count = 1 if phase in ONCE else chance.randrange(1, 4)
    number, target, times = (
        chance.choice(SIGNALS),
        chance.choice(TARGETS),
        chance.choice((*TIMES, "once")),
    )
    return Case(phase, count, rank, target, number, times, chance.choice(SIGNALS))


def check(
    case: Case, job: Job, run: Path, known: list[int], note: Path, figures: "Counter[str]"
) -> None:
    """Check how a job that was sent signals ended."""
    struck, codes, there = json.loads(note.read_text()), job.codes(), published(run)
    said = job.said()
    assert "Traceback" not in said
    assert max(there, default=0) >= max(known, default=0), "a checkpoint was lost"
    newest = folders.latest(run / "checkpoint")
    assert (newest is None and not there) or (
        newest is not None and folders.verify(newest).step == max(there)
    )
    fatal = None  # the signal that ended the process that sent it
    if case.phase in EARLY and case.number != signal.SIGUSR1:
        fatal = case.number
    elif case.phase == "leaving the others":  # all have agreed on the exit code
        fatal = None
    elif case.second != signal.SIGUSR1 and (
        case.times == "late" or (case.times == "twice" and case.phase in EARLY)
    ):
        fatal = case.second
    if fatal is not None:
        assert codes[case.rank] == 128 + fatal
        # The others had the same, or were ended by the launcher, or found that one of them had
        # gone, or had done all they had to.
        may = {128 + fatal, 128 + signal.SIGTERM, 128 + signal.SIGKILL, 1}
        assert set(codes) <= may | ({0} if "Training is complete" in said else set())
        if 1 in codes:
            assert said.count("another process of this run has ended") == (codes[0] == 1)
        figures["left at once"] += 1
        return
    if "Training is complete" in said:
        assert struck["done"] == STEPS
        assert case.phase in (
            "saving",
            "exporting",
            "writing an export",
            "closing",
            "leaving the others",
            *_THREADS,
        )
        assert set(codes) == {0} and max(there) == STEPS
        figures["complete all the same"] += 1
        return
    assert "Stopped by a signal" in said
    # Of two signals that arrive while a process is stopped, either may be handled first.
    wishes = {case.number} if case.times == "once" else {case.number, case.second}
    assert len(set(codes)) == 1 and codes[0] in {
        0 if number == signal.SIGUSR1 else 128 + number for number in wishes
    }
    figures["stopped"] += 1
    if "before the first step" in said:
        assert there == known
        figures["stopped before the first step"] += 1
    else:
        # The current step is finished, and the next one too if all had agreed to begin it.
        further = 1 + (case.phase == "update") + (case.phase in _THREADS)
        assert struck["done"] <= max(there) <= min(struck["done"] + further, STEPS)


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: signals, sent once or twice."""
    write_tokens(folder / "tokens", 400)
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    longest = 0.0
    worlds = WORLDS if budget >= 50 else WORLDS[:2]
    phases = [*MARKS, *CALLS]
    chance.shuffle(phases)
    coming = cycle(phases)
    undisturbed: dict[int, Any] = {}
    for world in worlds:
        with Job(folder, arguments(folder, f"whole{world}"), world) as job:
            assert job.wait() == 0, job.said()
        undisturbed[world] = result(folder / f"whole{world}")
    while figures["signals"] < budget:
        world = chance.choice((*worlds, 1))
        figures["runs"] += 1
        run = folder / f"signalled{figures['runs']}"
        how, story = arguments(folder, run.name), f"seed {seed}, {run.name}, world {world}"
        for _ in range(min(chance.randrange(1, 5), budget - figures["signals"])):
            phase = next(coming)
            if world == 1 and phase == "while the processes meet":
                continue
            case = choose(phase, world, chance)
            story += f"\nthen {case}"
            took = start(folder, run, world, case, story, figures)
            if took is None:
                break
            longest = max(longest, took)
        with Job(folder, how, world) as job:
            assert job.wait() == 0, f"{story}\nthen left in peace\n{job.said()}"
        found = result(run)
        for name, expected in undisturbed[world].items():
            assert found[name] == expected, f"{story}\nanother {name}"
        left = [path for path in run.rglob(".*") if path.name != ".lock"]
        assert not left, f"{story}\nleft behind: {left}"
    assert budget < 100 or all(figures[f"in {phase}"] for phase in phases), (
        "a phase was not reached"
    )
    return {
        **dict(sorted(figures.items())),
        "longest end, s": round(longest, 1),
        "stuck": 0,
        "lost": 0,
        "different": 0,
    }


def start(
    folder: Path, run: Path, world: int, case: Case, story: str, figures: "Counter[str]"
) -> float | None:
    """One start of a run that gets a signal.

    Returns how long it took to end; None if the phase was not reached.
    """
    known, note = published(run), folder / "struck"
    note.unlink(missing_ok=True)
    how = arguments(folder, run.name)
    with Job(folder, how, world, partial(arm, case=case, note=note)) as job:
        code = job.wait()
        if not note.exists():  # the phase had no work left
            assert code == 0 and "Training is complete" in job.said(), f"{story}\n{job.said()}"
            return None
        took: float = time.monotonic() - json.loads(note.read_text())["time"]
        figures.update(
            (
                "signals",
                f"world {world}",
                f"{case.times}, {case.number.name}",
                f"to {case.target}",
                f"in {case.phase}",
            )
        )
        try:
            assert took < ENDS, f"took {took:.0f} s"
            check(case, job, run, known, note, figures)
        except AssertionError as error:
            raise AssertionError(
                f"{story}\n{error}\n{job.codes()}, had {known}, has {published(run)},"
                f" {note.read_text()}\n{job.said()}"
            ) from error
    return took


if __name__ == "__main__":
    command(campaign, 210)
