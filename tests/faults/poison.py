"""Non-finite and huge numbers at random steps.

They are in the loss, a gradient, a weight, a moment or the data. They occur on one rank or on all,
under every policy for spikes, at world sizes 1, 2 and 4, with several kinds of sharding.

A non-finite step and a skipped spike leave the state of a run in which that update was made and
undone. A rewind leaves the state of a run with other data. Both hold after a SIGKILL at a random
time. NaN, infinities and negative second moments in weights or moments end the run before they are
published, and the same command ends with the bits of an undisturbed run. All ranks decide alike,
and their copies stay equal to the bit. Runs that cannot continue say why in one line.
"""

import json
import math
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from fast_llm.checkpoint import folder as folders
from tests.faults.faults import (
    BATCH,
    HUGE,
    INTERVAL,
    MOMENTS,
    NOT_FINITE,
    SPIKE,
    STEPS,
    VOCABULARY,
    WINDOW,
    Course,
    Fault,
    course,
    disturb,
    misread,
)
from tests.faults.jobs import STUCK, Job, command, nothing, send
from tests.training.runs import losses, records, settings, weights, write_tokens

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "two, ZeRO 1": (2, ("model.multi_stage.zero_stage=1",)),
    "two, ZeRO 3": (2, ("model.multi_stage.zero_stage=3",)),
    "two, bf16": (2, ("model.multi_stage.zero_stage=2", "model.distributed.training_dtype=bf16")),
    "one, bf16": (1, ("model.distributed.training_dtype=bf16", "optimizer.moments_dtype=bf16")),
    "two, tensor parallel": (2, ("model.distributed.tensor_parallel=2",)),
    "two, pipeline": (2, ("model.distributed.pipeline_parallel=2",)),
    "four, ZeRO 2": (4, ("model.multi_stage.zero_stage=2",)),
    "four, two copies": (4, ("model.multi_stage.zero_stage=3", "model.multi_stage.shard_size=2")),
}
PATIENCE = 4 * STUCK  # the machine may be busy


def published_is_good(run: Path, story: str) -> list[int]:
    """Check that everything published is complete and finite. Returns the checkpoints' steps."""
    for _, path in [*folders.find(run / "checkpoint"), *folders.find(run / "export" / "llama")]:
        folders.verify(path)
        for file in path.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert tensor.isfinite().all(), f"{story}: {file}: {name} is not finite"
                assert not name.startswith("exp_avg_sq") or (tensor >= 0).all(), (
                    f"{story}: {file}: {name} has squares below 0"
                )
    return [step for step, _ in folders.find(run / "checkpoint")]


def agree(notes: Path, world: int, story: str) -> None:
    """Check that all ranks decided alike, and that their copies are equal."""
    files = [notes / f"decisions_{rank}" for rank in range(world)]
    decided = [file.read_text().splitlines() if file.exists() else [] for file in files]
    shortest = min(map(len, decided))
    assert len({tuple(lines[:shortest]) for lines in decided}) == 1, (
        f"{story}: ranks decided differently: {decided}"
    )
    held: dict[str, str] = {}
    for rank in range(world):
        if (notes / f"state_{rank}").exists():
            for name, digest in json.loads((notes / f"state_{rank}").read_text()).items():
                assert held.setdefault(name, digest) == digest, (
                    f"{story}: {name} is not the same on rank {rank}"
                )


def one_line(said: str, story: str) -> str:
    """The one line that the user must see, the same from every process that prints it.

    A process that loses another one may say that in its own way.
    """
    reported = {line for line in said.splitlines() if line.startswith("fast-llm train: ")}
    errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", said, re.MULTILINE)
    assert len(reported) == 1 and all("Connection " in error for error in errors), story
    assert len(errors) >= said.count("Traceback"), story
    return reported.pop()


class Bench:
    """A folder with data in which runs are made, and the counts so far."""

    def __init__(self, folder: Path, chance: random.Random, figures: "Counter[str]"):
        self.folder, self.chance, self.figures = folder, chance, figures
        self.number = 0
        self.undisturbed: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        write_tokens(folder / "tokens", 400, VOCABULARY)

    def arguments(self, layout: str, name: str, *further: str) -> list[str]:
        return settings(
            self.folder,
            f"training.train_iters={STEPS}",
            f"training.checkpoint.interval={INTERVAL}",
            "training.checkpoint.keep=null",
            "training.export.interval=12",
            "training.export.keep=null",
            "training.validation.interval=12",
            "training.validation.iterations=1",
            "training.num_workers=0",
            f"training.spikes.window={WINDOW}",
            "training.spikes.threshold=1000",
            f"model.distributed.timeout={PATIENCE / 2}",
            "optimizer.learning_rate.base=1e-3",
            f"run.experiment_dir={self.folder}/{name}",
            *LAYOUTS[layout][1],
            *further,
        )

    def name(self) -> str:
        self.number += 1
        return f"run{self.number}"

    def start(
        self,
        layout: str,
        name: str,
        further: Sequence[str] = (),
        faults: Sequence[Fault] = (),
        reference: Course | None = None,
        kill: bool = False,
    ) -> tuple[int, str]:
        """The exit code and what was said; that of SIGKILL if the run was killed on the way."""
        world = LAYOUTS[layout][0]
        notes = self.folder / f"notes of {name} {time.monotonic_ns()}"
        notes.mkdir()
        began = time.monotonic()
        before = partial(disturb, faults=faults, notes=notes, reference=reference)
        with Job(self.folder, self.arguments(layout, name, *further), world, before) as job:
            if kill:
                job.launcher.join(self.chance.uniform(0, self.seconds[layout]))
                if job.launcher.is_alive():
                    for rank in job.ranks:
                        send(rank, signal.SIGKILL)
            code, said = job.wait(PATIENCE), job.said()
            job.wait_ranks(STUCK)
        self.seconds.setdefault(layout, time.monotonic() - began)
        story = f"{layout}, {name}, {further}, {faults}, exit code {code}\n{said}"
        agree(notes, world, story)
        published_is_good(self.folder / name, story)
        return code, said

    def whole(self, layout: str) -> Path:
        """The undisturbed run of this layout."""
        if layout not in self.undisturbed:
            code, said = self.start(layout, f"whole {layout}")
            assert code == 0, said
            self.undisturbed[layout] = self.folder / f"whole {layout}"
        return self.undisturbed[layout]

    def rank(self, layout: str) -> int | None:
        ranks: list[int | None] = [None, *range(LAYOUTS[layout][0])]
        return self.chance.choice(ranks)

    def faults(self, batches: Sequence[int], layout: str, spike: bool) -> list[Fault]:
        """Faults of steps: each batch gets one that is not finite, or a spike."""
        found = []
        for batch in batches:
            place = self.chance.choice(("loss", "gradient"))
            value = (
                SPIKE
                if spike
                else self.chance.choice(NOT_FINITE + (HUGE if place == "gradient" else ()))
            )
            # What is finite counts only where this rank's numbers do, and copies must get the same.
            rank = self.rank(layout) if not math.isfinite(value) else None
            found.append(Fault(batch, place, value, rank, self.chance.randrange(2**20)))
        return found


def steps_left_out(bench: Bench, layout: str, story: str) -> int:
    """Non-finite steps and spikes under a policy, perhaps with a kill, against a run that is given
    what to leave out.
    """
    chance, figures = bench.chance, bench.figures
    bench.whole(layout)
    policy = chance.choice(("none", "skip", "rewind"))
    bad: list[int] = []
    for batch in chance.sample(range(1, STEPS + 1), chance.randrange(2, 8)):
        # Three in a row are for `too_many_in_a_row`, and spikes are judged by WINDOW steps before
        # the checkpoint of step 8.
        near = [one for one in bad if abs(one - batch) <= 2]
        if len(near) < 2 and sum(one <= 2 * INTERVAL for one in bad) < 2 * INTERVAL - WINDOW:
            bad.append(batch)
    late = [batch for batch in range(3 * INTERVAL, STEPS) if batch not in bad]
    spikes = [] if policy == "none" else chance.sample(late, chance.choice((1, 1, 2)))
    faults = bench.faults(bad, layout, False) + bench.faults(spikes, layout, True)
    expected = course(faults, policy)
    name, other = bench.name(), bench.name()
    further = (f"training.spikes.policy={policy}",)
    code, said = bench.start(layout, name, further, faults, kill=(killed := chance.random() < 0.5))
    figures["kills"] += code == 128 + signal.SIGKILL
    if killed and code:
        code, said = bench.start(layout, name, further, faults)
    story += f", {policy}, {faults}, expected {expected}\n{said}"
    assert code == 0, story
    code, reference_said = bench.start(layout, other, reference=expected)
    assert code == 0, f"{story}\nreference\n{reference_said}"
    run, reference = bench.folder / name, bench.folder / other
    assert weights(run / "checkpoint" / str(STEPS)) == weights(
        reference / "checkpoint" / str(STEPS)
    ), f"{story}: other weights"
    exported, should = (
        (one / "export/llama" / str(STEPS) / "model.safetensors").read_bytes()
        for one in (run, reference)
    )
    assert exported == should, f"{story}: another export"
    found, wanted = losses(run), losses(reference)
    for step, batch in expected.batch_of.items():
        assert batch in expected.left_out or found[step] == wanted[step], (
            f"{story}: another loss at step {step}"
        )
    assert losses(run, "validation")[STEPS] == losses(reference, "validation")[STEPS], (
        f"{story}: another validation loss"
    )
    # What metrics.jsonl and the checkpoint say of it.
    of_steps = records(run)
    left_out = {step for step, batch in expected.batch_of.items() if batch in expected.left_out}
    assert {step for step, one in of_steps.items() if one["skipped_iters"]} == left_out, (
        f"{story}: not recorded in metrics.jsonl"
    )
    spiked = {step for step, batch in expected.batch_of.items() if batch in expected.spikes}
    assert {step for step, one in of_steps.items() if one["spikes"]} == spiked, (
        f"{story}: spikes in metrics.jsonl"
    )
    info = folders.verify(run / "checkpoint" / str(STEPS)).info
    assert info["passed_over"] == expected.skipped_ranges and info["updates"] == STEPS - len(
        left_out
    ), f"{story}: {info}"
    figures["steps left out"] += len(left_out)
    figures["rewinds"] += len(expected.skipped_ranges)
    figures[f"policy {policy}"] += 1
    return len(faults)


def a_spike_that_stops(bench: Bench, layout: str, story: str) -> int:
    """`training.spikes.policy: stop`."""
    faults = bench.faults([batch := bench.chance.randrange(WINDOW + 1, STEPS + 1)], layout, True)
    name = bench.name()
    for _ in range(2):  # the same command comes to the same end
        code, said = bench.start(layout, name, ("training.spikes.policy=stop",), faults)
        story += f", stop, {faults}, exit code {code}\n{said}"
        reported = one_line(said, story)
        assert (
            code == 1
            and f"Step {batch} is a spike" in reported
            and "is complete: the same command" in reported
        ), story
        _nothing_since(bench, layout, name, batch, story)
    bench.figures["ended with a line"] += 1
    return 1


def too_many_in_a_row(bench: Bench, layout: str, story: str) -> int:
    """`optimizer.max_nonfinite_steps`."""
    first = bench.chance.randrange(1, STEPS - 2)
    faults = bench.faults(range(first, first + 3), layout, False)
    name = bench.name()
    code, said = bench.start(layout, name, ("optimizer.max_nonfinite_steps=3",), faults)
    story += f", in a row, {faults}, exit code {code}\n{said}"
    reported = one_line(said, story)
    assert (
        code == 1
        and f"step {first + 2}: loss or gradients were not finite 3 times in a row" in reported
    ), story
    assert " is complete: the same command" in reported, story
    _nothing_since(bench, layout, name, first, story)
    bench.figures["ended with a line"] += 1
    return len(faults)


def _nothing_since(bench: Bench, layout: str, name: str, batch: int, story: str) -> None:
    """The last checkpoint must have the weights of the undisturbed run before this batch."""
    whole, run = bench.whole(layout), bench.folder / name
    last = (batch - 1) // INTERVAL * INTERVAL
    found = [step for step, _ in folders.find(run / "checkpoint")]
    assert [step for step in found if step < batch] == [*range(INTERVAL, last + 1, INTERVAL)], (
        f"{story}: {found}"
    )
    if last:
        one, other = (weights(place / "checkpoint" / str(last)) for place in (whole, run))
        assert one == other, f"{story}: other weights at step {last}"


def wrong_memory(bench: Bench, layout: str, story: str) -> int:
    """Overwrite one number in weights or moments, once."""
    chance, figures = bench.chance, bench.figures
    whole = bench.whole(layout)
    place = chance.choice(("weight", *MOMENTS))
    values = (*NOT_FINITE, *NOT_FINITE, *HUGE, *([-1e3] if place == "exp_avg_sq" else []))
    fault = Fault(
        chance.randrange(1, STEPS + 1),
        place,
        chance.choice(values),
        bench.rank(layout),
        chance.randrange(2**20),
    )
    if fault.value in HUGE and LAYOUTS[layout][0] > 1:
        fault = Fault(
            fault.batch, place, fault.value, None, fault.chosen
        )  # else copies would differ
    name = bench.name()
    code, said = bench.start(layout, name, (), [fault])
    story += f", wrong memory, {fault}, exit code {code}\n{said}"
    assert code in (0, 1), story
    if code:
        reported = one_line(said, story)
        assert " is complete: the same command " in reported, story
        figures["ended with a line"] += 1
    if fault.value in HUGE:  # it may be anything; what is published is finite
        figures["huge, and trained on with" if code == 0 else "huge, and ended for it"] += 1
        return 1
    assert code == 1 and re.search(
        r"holds (NaN or infinities|numbers below zero)|below zero", reported
    ), story
    assert (
        max((step for step, _ in folders.find(bench.folder / name / "checkpoint")), default=0)
        < fault.batch
    ), story
    figures[f"found before it was published: {place}"] += 1
    code, said = bench.start(layout, name)
    assert code == 0, f"{story}\nthen\n{said}"
    for part in ("checkpoint", "export/llama"):
        assert weights(bench.folder / name / part / str(STEPS)) == weights(
            whole / part / str(STEPS)
        ), f"{story}: {part}"
    assert losses(bench.folder / name) == losses(whole), f"{story}: other losses"
    return 1


def strange_tokens(bench: Bench, layout: str, story: str) -> int:
    """A token that is not in the vocabulary: in the file, or read by one rank only, perhaps as a
    label alone.
    """
    chance, figures = bench.chance, bench.figures
    whole, world = bench.whole(layout), LAYOUTS[layout][0]
    name, token = bench.name(), chance.choice((VOCABULARY, VOCABULARY + 1, 2**15, 2**16 - 1))
    arguments = bench.arguments(layout, name)
    before: Any = nothing
    if chance.random() < 0.5:
        prefix = bench.folder / f"{name} tokens"
        write_tokens(prefix, 400, VOCABULARY)
        data = np.memmap(f"{prefix}.bin", np.uint16, "r+")
        where = f"token {chance.randrange(len(data))} of the file"
        data[int(where.split()[1])] = token
        data.flush()
        arguments.append(f"data.path={prefix}")
    else:
        prefix = bench.folder / "tokens"
        sequence = chance.randrange(STEPS * BATCH)
        where = f"sequence {sequence}"
        place = chance.choice((-1, -1, chance.randrange(25)))
        before = partial(misread, sequence=sequence, place=place, token=token)
    with Job(bench.folder, arguments, world, before) as job:
        code, said = job.wait(PATIENCE), job.said()
        job.wait_ranks(STUCK)
    story += f", token {token}, {where}, exit code {code}\n{said}"
    published_is_good(bench.folder / name, story)
    if code == 0 and prefix.name != "tokens":  # the token was not read
        assert losses(bench.folder / name) == losses(whole), story
        figures["strange tokens, never read"] += 1
        return 1
    reported = one_line(said, story)
    assert (
        code == 2 and f"{prefix}: document " in reported and f" holds token {token} " in reported
    ), story
    figures["strange tokens, named"] += 1
    return 1


KINDS = {
    steps_left_out: 6,
    wrong_memory: 5,
    strange_tokens: 2,
    too_many_in_a_row: 2,
    a_spike_that_stops: 1,
}


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: faults."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    bench = Bench(folder, chance, figures)
    layouts = list(LAYOUTS)[: max(2, budget // 10)]
    first = list(KINDS)
    while figures["faults"] < budget:
        kind = first.pop(0) if first else chance.choices(list(KINDS), list(KINDS.values()))[0]
        layout = chance.choice(layouts)
        story = f"seed {seed}, after {figures['faults']} faults, {layout}"
        figures["faults"] += kind(bench, layout, story)
        figures[f"layout {layout}"] += 1
        for path in [*folder.glob("run*"), *folder.glob("notes*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    wanted = [f"layout {layout}" for layout in layouts] + [
        "policy none",
        "policy skip",
        "policy rewind",
        "rewinds",
        "kills",
    ]
    assert budget < 200 or all(figures[name] for name in wanted), (
        f"not everything happened: {figures}"
    )
    return {
        **dict(sorted(figures.items())),
        "decided differently": 0,
        "different": 0,
        "published and not finite": 0,
    }


if __name__ == "__main__":
    command(campaign, 200)
