"""How to continue a model well: replay, rate, schedule, averages and merges, on SmolLM2-135M.

    PYTHONPATH=. python benchmarks/continue_well.py [--device cuda|cpu] [--steps N] [SETTING=VALUE]

The model learns German manual pages. Validation watches German, English of the kind that is
replayed (documents that are not trained on), and other English, which no run trains on. Every run
starts from the same weights. All validate on the same sequences, but for `replay-25-other-seed`,
which shows how much of a difference is chance. The result is a table, and FOLDER/report.html:
`fast-llm report` of all runs. Times are no result: on a GPU, runs share it. SETTINGs go to every
run. Interrupted, the same command does what is still missing.

On cuda: 120 steps of 16 x 1024 tokens (2.0 million), all runs in three minutes on one H200. On cpu:
24 steps of 4 x 512 tokens. Needs the packages of tests/real/model.txt. The model and the token
files are kept in build/real; copy that folder to a machine without a network.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path

from fast_llm.demo import real
from fast_llm.demo.commands import command, words
from fast_llm.errors import UserError

# Steps, and settings that depend on the device.
SIZES: dict[str, tuple[int, list[str]]] = {
    "cuda": (
        120,
        [
            "batch.batch_size=16",
            "batch.micro_batch_size=8",
            "batch.sequence_length=1024",
            "training.validation.iterations=3",
        ],
    ),
    "cpu": (24, ["training.validation.iterations=4"]),
}
PEAK = 5e-4
ALPHAS = (0.3, 0.5, 0.7)


def schedule(steps: int, peak: float = PEAK) -> list[str]:
    """Re-warm to a peak in a tenth of the steps, then a cosine to a tenth of it."""
    rate = "optimizer.learning_rate"
    return [
        *(f"{rate}.base={peak:g}", f"{rate}.minimum={peak / 10:g}", f"{rate}.decay_style=cosine"),
        *(f"{rate}.decay_iterations={steps}", f"{rate}.warmup_iterations={max(1, steps // 10)}"),
    ]


def constant(steps: int, peak: float) -> list[str]:
    """The rate at which pretraining ended, all the time: no warmup and no decay."""
    return [*schedule(steps, peak), *_constant(0)]


def _constant(warmup: int) -> list[str]:
    rate = "optimizer.learning_rate"
    return [f"{rate}.decay_style=constant", f"{rate}.warmup_iterations={warmup}"]


def trunk(steps: int) -> list[str]:
    """Re-warm and stay at the peak: a run from which others can branch; with averages."""
    every = max(1, steps // 60)
    return [
        *(*schedule(steps), *_constant(max(1, steps // 10))),
        f"training.checkpoint.interval={branch_step(steps)}",
        "training.checkpoint.keep=2",
        "training.averages.ema.decay=0.9",
        f"training.averages.ema.interval={every}",
        f"training.averages.mean.start={steps // 2}",
        f"training.averages.mean.interval={every}",
    ]


def branch_step(steps: int) -> int:
    """The step of the trunk after which the branch cools down."""
    return steps - max(1, steps // 5)


def cooldown(steps: int, folder: Path) -> list[str]:
    """Branch off the trunk, and let the rate fall to 0 until its end."""
    rate = "optimizer.learning_rate"
    return [
        real.shares(0.25),
        *schedule(steps),
        *(f"run.branch_from.run={folder}/trunk", f"run.branch_from.step={branch_step(steps)}"),
        *(f"{rate}.decay_style=wsd", f"{rate}.minimum=0"),
        f"{rate}.cooldown={steps - branch_step(steps)}",
    ]


def runs(steps: int) -> dict[str, list[str]]:
    """The runs that begin with the model, by name."""
    share = real.shares
    return {
        "replay-0": [share(0), *schedule(steps)],
        "replay-5": [share(0.05), *schedule(steps)],
        "replay-25": [share(0.25), *schedule(steps)],
        "replay-25-other-seed": [share(0.25), *schedule(steps), "model.distributed.seed=1"],
        "not-rewarmed": [share(0.25), *constant(steps, PEAK / 10)],
        "rate-third": [share(0.25), *schedule(steps, PEAK / 3)],
        "rate-triple": [share(0.25), *schedule(steps, PEAK * 3)],
        "trunk": [share(0.25), *trunk(steps)],
    }


def measurements() -> dict[str, tuple[str, str, float]]:
    """Models that are only measured, by name: a run, which of its exports, and α of a merge.

    With α below 1 the model is base + α (export - base).
    """
    merges = {f"replay-0-merged-{alpha:g}": ("replay-0", "llama", alpha) for alpha in ALPHAS}
    return {
        "trunk-ema": ("trunk", "llama-ema", 1),
        "trunk-mean": ("trunk", "llama-mean", 1),
        **merges,
        "replay-25-merged-0.7": ("replay-25", "llama", 0.7),
    }


class Experiment:
    """Runs `fast-llm` commands, several at a time on a GPU."""

    def __init__(
        self, folder: Path, device: str, steps: int, parallel: int, settings: Sequence[str]
    ):
        self.folder, self.steps = folder, steps
        self.settings = [*SIZES[device][1], *settings]
        self.pool = ThreadPoolExecutor(parallel)
        self.environment = dict(os.environ)
        if device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def call(self, name: str, *arguments: str) -> None:
        """Run a command unless it was done before. Its output goes to FOLDER/logs/NAME.txt."""
        began = time.monotonic()
        log = self.folder / "logs" / f"{name}.txt"
        if log.exists():
            return
        partial = log.with_suffix(".partial")
        with partial.open("w") as file:
            print("$ " + " ".join(words(list(arguments))), file=file, flush=True)
            done = subprocess.run(
                command(list(arguments)),
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise UserError(f"{name} failed:\n{partial.read_text()[-3000:]}")
        partial.rename(log)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)

    def train(self, name: str, model: Path, *settings: str) -> None:
        """Continue a model for all steps."""
        steps = f"{self.steps}"
        self.call(
            name,
            *("train", "gpt", "--config", str(real.CONFIG), *self.settings),
            *(f"training.train_iters={steps}", f"training.export.interval={steps}"),
            f"training.validation.interval={max(1, self.steps // 4)}",
            f"training.logs.interval={max(1, self.steps // 60)}",
            *real.paths(self.folder / name, model),
            *settings,
        )

    def measure(self, name: str, base: Path, run: str, family: str, alpha: float) -> None:
        """Measure the losses of an export of a run, merged with the base if α is below 1."""
        model = self.folder / run / "export" / family / str(self.steps)
        if alpha < 1:
            merged = self.folder / "merged" / name
            weights = ("--base", str(base), "--weights", f"{alpha:g}")
            self.call(f"merge-{name}", "merge", str(merged), str(model), *weights)
            model = merged
        self.train(name, model, "training.train_iters=0", "training.export.interval=null")

    def all(self, model: Path, only: Sequence[str]) -> list[str]:
        """Every run and measurement, or those of `only`. Returns their names.

        Raises UserError for a command that fails.
        """
        first, branch = runs(self.steps), cooldown(self.steps, self.folder)
        measured = measurements()
        names = [*first, "cooldown", *measured]
        chosen = [name for name in names if not only or name in only]
        jobs = [
            self.pool.submit(self.train, name, model, *settings)
            for name, settings in first.items()
            if name in chosen
        ]
        wait(jobs)
        if "cooldown" in chosen:
            jobs.append(self.pool.submit(self.train, "cooldown", model, *branch))
        for name, one in measured.items():
            if name in chosen:
                jobs.append(self.pool.submit(self.measure, name, model, *one))
        for job in jobs:
            job.result()
        return chosen


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/continue-well"))
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--parallel", type=int, help="runs at a time (default: 4 on cuda, 1 on cpu)"
    )
    parser.add_argument("--only", nargs="+", default=[], help="some runs, and what they need")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    given = parser.parse_args()
    steps = given.steps or SIZES[given.device][0]
    parallel = given.parallel or (4 if given.device == "cuda" else 1)
    began = time.monotonic()
    (given.folder / "logs").mkdir(parents=True, exist_ok=True)
    print(f"{given.device}, {steps} steps, {platform.machine()}, {os.cpu_count()} cores,", end=" ")
    print(f"Python {platform.python_version()}, torch {version('torch')}", flush=True)
    try:
        model = real.make_data()
        experiment = Experiment(given.folder, given.device, steps, parallel, given.settings)
        names = experiment.all(model, given.only)
    except UserError as error:
        sys.exit(str(error))
    page = real.report(given.folder, names)
    print(f"{time.monotonic() - began:.0f} s; {page}")


if __name__ == "__main__":
    main()
