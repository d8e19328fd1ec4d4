"""examples/slurm.sbatch under a real Slurm.

A job is queued again exactly when it has work left, and ends with the losses and weights of an
undisturbed one. Debian has Slurm: `apt-get install slurmctld slurmd munge`. No test depends on
seconds: a run waits after its third step while a file `hold` exists, unless it is to stop, and the
tests wait for states.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from fast_llm.checkpoint import folder
from tests.helpers import install
from tests.slurm.cluster import Job, Slurm, missing
from tests.training.runs import losses, settings, weights, write_tokens

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "slurm.sbatch"
STEPS = 12
FAST_LLM = f"""#!{sys.executable}
# `fast-llm`, which waits after its third step while a file `hold` exists, unless it is to stop
import sys, time
from pathlib import Path

from fast_llm import cli
from fast_llm.training.interrupt import Interrupt

begin = Interrupt.begin_graceful

def begins(interrupt, *given):
    begin(interrupt, *given)
    from fast_llm.training.trainer import Trainer  # now: loading torch is part of the start

    check = Trainer.check_finite

    def held(trainer, step):
        check(trainer, step)
        while step >= 3 and Path("hold").exists() and not trainer.interrupt.signal:
            time.sleep(0.02)

    Trainer.check_finite = held

Interrupt.begin_graceful = begins
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if absent := missing():
        pytest.skip(f"no Slurm here ({', '.join(absent)}): apt-get install slurmctld slurmd munge")
    with Slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> "Training":
    """A job without disturbance."""
    training = Training(slurm, tmp_path_factory.mktemp("undisturbed"))
    training.job.until_state("COMPLETED", "FAILED")
    return training


class Training:
    """A tiny run in two processes, started by the unchanged example."""

    def __init__(
        self,
        slurm: Slurm,
        place: Path,
        *options: str,
        hold: bool = False,
        also: tuple[str, ...] = (),
    ):
        """`options`: of sbatch; `also`: further settings of the YAML."""
        self.slurm, self.place, self.options = slurm, place, options
        self.run = place / "run"
        self.hold = place / "hold"
        write_tokens(place / "tokens", 400)
        install(place / "installed")
        (place / "bin").mkdir()
        (place / "bin" / "fast-llm").write_text(FAST_LLM)
        (place / "bin" / "fast-llm").chmod(0o755)
        given = settings(
            place,
            f"training.train_iters={STEPS}",
            "training.checkpoint.interval=5",
            "training.test_iters=1",
            *also,
        )
        nested: dict[str, object] = {}
        for name, _, value in (one.partition("=") for one in given):
            section = nested
            for key in name.split(".")[:-1]:
                section = section.setdefault(key, {})  # type: ignore[assignment]
            section[name.rpartition(".")[2]] = (
                float(value) if "e-" in value else yaml.safe_load(value)
            )
        (place / "train-config.yaml").write_text(yaml.safe_dump(nested))
        if hold:
            self.hold.touch()
        self.submit()

    def submit(self) -> None:
        tools = f"{self.place}/bin:{Path(sys.executable).parent}"
        self.job = Job(
            self.slurm,
            self.place,
            *("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2"),
            *self.options,
            str(SCRIPT),
            environment={
                "PATH": f"{tools}:{self.slurm.environment['PATH']}",
                "PYTHONPATH": f"{self.place}/installed:{ROOT}",
                **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            },
        )

    def until_held(self) -> None:
        """Wait until the run has done three steps and both processes listen to signals."""
        self.job.until("three steps", lambda: self.steps() >= 3)

    def steps(self) -> int:
        return max(losses(self.run), default=0) if (self.run / "metrics.jsonl").exists() else 0

    def ranks(self) -> list[int]:
        """The processes that torchrun has started, by rank, without their watchers."""
        found: dict[int, int] = {}
        for process in self.processes("fast-llm"):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found[int(psutil.Process(process).environ().get("RANK", -1))] = process
        found.pop(-1, None)
        return [found[rank] for rank in sorted(found)]

    def torchrun(self) -> int | None:
        return next(iter(self.processes("torchrun")), None)

    def processes(self, name: str) -> list[int]:
        """The job's processes that run a Python script of this name."""
        found = []
        for process in self.job.processes():
            try:
                words = psutil.Process(process).cmdline()
            except psutil.NoSuchProcess:
                continue
            if len(words) > 1 and Path(words[1]).name == name:
                found.append(process)
        return found

    def stop_asked(self) -> bool:
        """Whether the batch script has noted that the job will end."""
        return (self.place / f".fast-llm-{self.job.id}" / "stop").exists()

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        newest = folder.latest(self.run / "checkpoint")
        return int(newest.name) if newest is not None else 0

    def resume(self) -> None:
        """Start the queued job again, and wait until the run ends."""
        self.hold.unlink(missing_ok=True)
        self.job.start_now()

    def ends_as(self, undisturbed: "Training", restarts: int) -> None:
        """The job completes, with the same losses and weights, and is not queued again."""
        facts = self.job.until_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), self.job.said
        assert facts["Restarts"] == str(restarts), self.job.said
        assert losses(self.run) == losses(undisturbed.run)
        assert losses(self.run, "test") == losses(undisturbed.run, "test")
        last = Path("checkpoint") / str(STEPS)
        assert weights(self.run / last) == weights(undisturbed.run / last)
        assert "Traceback" not in self.job.said
        assert not list(self.place.glob(".fast-llm-*"))


def preempt(training: Training) -> Path:
    """Submit a job that preempts the other one, and ends when the returned file is deleted."""
    blocker = training.place / "blocker"
    blocker.touch()
    wait = f"while [ -e {blocker} ]; do sleep 0.2; done"
    Job(
        training.slurm,
        training.place,
        "--partition=high",
        "--exclusive",
        "--output=/dev/null",
        f"--wrap={wait}",
    )
    return blocker


def test_a_job_completes(undisturbed: Training) -> None:
    undisturbed.ends_as(undisturbed, restarts=0)
    assert losses(undisturbed.run).keys() == set(range(1, STEPS + 1))
    assert undisturbed.job.said.count(f"Training is complete: {STEPS} steps.") == 1


def test_time_is_nearly_over(slurm: Slurm, undisturbed: Training, tmp_path: Path) -> None:
    training = Training(slurm, tmp_path, "--time=60", hold=True)
    training.until_held()
    limit = ["scontrol", "update", f"JobId={training.job.id}"]
    slurm.command(*limit, "TimeLimit=5")  # less than 300 s are left
    training.job.until_queued_again()
    assert training.saved() >= 3 and training.saved() == training.steps()
    assert "Stopped by a signal after step" in training.job.said
    slurm.command(*limit, "TimeLimit=60")
    training.resume()
    training.ends_as(undisturbed, restarts=1)


def test_two_warnings(slurm: Slurm, undisturbed: Training, tmp_path: Path) -> None:
    """The second warning comes before the run has saved."""
    training = Training(slurm, tmp_path, hold=True)
    training.until_held()
    ranks = training.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    training.job.signal_script()
    training.job.until("the first warning", lambda: "the job is to end soon" in training.job.said)
    training.job.signal_script()
    training.job.signal_script()
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    training.job.until_queued_again()
    assert training.saved() >= 3 and training.saved() == training.steps()
    training.resume()
    training.ends_as(undisturbed, restarts=1)


def test_a_warning_during_the_start(slurm: Slurm, undisturbed: Training, tmp_path: Path) -> None:
    """A signal as soon as torchrun or its processes exist: seconds before they handle it."""
    training = Training(slurm, tmp_path, hold=True)
    job = training.job
    for times, started in enumerate((training.torchrun, training.ranks), start=1):
        job.until("the start", started)
        job.signal_script()
        job.until_queued_again(times)
        if times == 1:
            job.start_now()
    assert job.said.count("Stopped by a signal before the first step") == 2
    assert training.steps() == 0
    training.resume()
    training.ends_as(undisturbed, restarts=2)


def test_a_warning_when_all_is_done(slurm: Slurm, undisturbed: Training, tmp_path: Path) -> None:
    training = Training(slurm, tmp_path, hold=True)
    training.until_held()
    torchrun = training.torchrun()
    assert torchrun is not None
    os.kill(torchrun, signal.SIGSTOP)
    training.hold.unlink()
    training.job.until("all steps", lambda: "Training is complete" in training.job.said)
    training.job.until("its processes have left", lambda: not training.ranks())
    training.job.signal_script()
    training.job.until("the signal is noted", training.stop_asked)
    os.kill(torchrun, signal.SIGCONT)
    training.ends_as(undisturbed, restarts=0)


@pytest.mark.parametrize(
    ("partition", "parameters"), [("grace", ""), ("grace", "preempt_send_user_signal"), ("low", "")]
)
def test_preemption(
    slurm: Slurm, undisturbed: Training, tmp_path: Path, partition: str, parameters: str
) -> None:
    """With a grace time Slurm warns the step or, if configured, the script; else SIGTERM to all."""
    slurm.configure(parameters)
    slurm.command("scontrol", "reconfigure")
    try:
        training = Training(slurm, tmp_path, f"--partition={partition}", hold=True)
        training.until_held()
        blocker = preempt(training)
        training.job.until_queued_again()
    finally:
        slurm.configure()
        slurm.command("scontrol", "reconfigure")
    assert "Stopped by a signal after step" in training.job.said
    assert training.saved() >= 3 and training.saved() == training.steps()
    blocker.unlink()
    training.resume()
    training.ends_as(undisturbed, restarts=1)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("training.train_itres=3", "training.train_itres"),
        ("model.distributed.tensor_parallel=3", "WORLD_SIZE"),
    ],
)
def test_a_mistake_is_tried_once(slurm: Slurm, tmp_path: Path, mistake: str, message: str) -> None:
    training = Training(slurm, tmp_path, also=(mistake,))
    facts = training.job.until_state("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    said = [line for line in training.job.said.splitlines() if not line.startswith("srun:")]
    assert said[0].startswith("fast-llm train:") and message in "".join(said)
    assert all(line.startswith("  ") for line in said[1:]), said


def test_a_process_is_killed(slurm: Slurm, undisturbed: Training, tmp_path: Path) -> None:
    """torchrun starts it, and the other one, again."""
    training = Training(slurm, tmp_path, hold=True)
    training.until_held()
    os.kill(training.ranks()[1], signal.SIGKILL)
    training.hold.unlink()
    training.ends_as(undisturbed, restarts=0)


def test_torchrun_is_killed(slurm: Slurm, undisturbed: Training, tmp_path: Path) -> None:
    """The job fails, even if it was preempted before; submitted again, it resumes."""
    training = Training(slurm, tmp_path, "--partition=grace", hold=True)
    training.until_held()
    blocker = preempt(training)
    training.job.until_queued_again()
    saved = training.steps()
    blocker.unlink()
    training.job.start_now()
    training.job.until("a step after it was preempted", lambda: training.steps() > saved)
    torchrun = training.torchrun()
    assert torchrun is not None
    os.kill(torchrun, signal.SIGKILL)
    facts = training.job.until_state("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1"), training.job.said
    # Slurm needs cgroups to find processes whose parent has died; this cluster has none.
    for process in training.job.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    training.job.until("its processes have ended", lambda: not training.job.processes())
    training.hold.unlink()
    training.submit()
    training.ends_as(undisturbed, restarts=0)


def test_a_canceled_job_stays_canceled(slurm: Slurm, tmp_path: Path) -> None:
    """Even if it was warned before, and was about to requeue itself."""
    training = Training(slurm, tmp_path, hold=True)
    training.until_held()
    ranks = training.ranks()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    training.job.signal_script()
    training.job.until("the signal is noted", training.stop_asked)
    slurm.command("scancel", training.job.id)  # which sends SIGCONT, then SIGTERM
    training.job.until_state("CANCELLED")
    training.job.until("its processes have ended", lambda: not training.job.processes())
    facts = training.job.until_state("CANCELLED", "PENDING")
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
