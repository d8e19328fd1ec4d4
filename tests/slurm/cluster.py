"""A private Slurm of one node: munged, slurmctld and slurmd, with all files in a temporary folder.

It needs no cgroups, no systemd and no configuration of the machine. It does not touch a Slurm that
the machine belongs to.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 300.0  # seconds that a loaded machine may need for any state that the tests wait for
_SEARCHED = (
    f"{os.environ['PATH']}:/usr/sbin:/sbin"  # daemons are in /usr/sbin, which only root searches
)
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

# The example takes torchrun's port from the number of the job: clusters of one machine count from
# different numbers.
_CONF = """
ClusterName=fast-llm-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
FirstJobId={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=5
SlurmctldParameters={parameters}
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=60
MessageTimeout=60
MinJobAge=100000
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:2
PartitionName=low Nodes={host} Default=YES State=UP PriorityTier=1
PartitionName=grace Nodes={host} State=UP PriorityTier=1 GraceTime=3600
PartitionName=high Nodes={host} State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCHED) is None]


def until(what: str, condition: Callable[[], Any], explain: Callable[[], str] = str) -> Any:
    """Poll until a condition is true. Returns its value; raises AssertionError after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}\n{explain()}"
        time.sleep(0.05)
    return value


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    """A running cluster. `environment` makes Slurm's commands talk to it."""

    def __init__(self) -> None:
        # Not below pytest's folder, which other users cannot enter: munged and its clients insist.
        # Names of Unix sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="fast-llm-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        self.environment = inherited | {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": _SEARCHED,
        }
        # A process that ends the cluster when this one closes the pipe, or is gone.
        self.guard = subprocess.Popen(
            [sys.executable, __file__, self.folder], stdin=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> "Slurm":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.controller, self.node = _free_ports(2)
        self.configure()
        # Any character devices serve as GPUs. CUDA_VISIBLE_DEVICES is not set: the tests run on the
        # CPU.
        devices = "".join(
            f"Name=gpu File=/dev/{name} Flags=no_gpu_env\n" for name in ("null", "zero")
        )
        (self.folder / "gres.conf").write_text(devices)
        version = self.command("sinfo", "--version").split()[1]
        plugin = "disabled" if tuple(map(int, version.split(".")[:2])) >= (23, 11) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        munge = [
            f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "log", "seed")
        ]
        self.daemon("munged", "--foreground", f"--socket={self.folder}/munge/socket", *munge)
        until("munged's socket", (self.folder / "munge" / "socket").exists, self.logs)
        self.daemon("slurmctld", "-D", "-i")
        self.daemon("slurmd", "-D", "-N", _host())
        until(
            "an idle node",
            lambda: self.command("sinfo", "-h", "-o", "%T", check=False) == "idle",
            self.logs,
        )

    def configure(self, parameters: str = "") -> None:
        """Write slurm.conf, with these SlurmctldParameters."""
        values: dict[str, Any] = {"host": _host(), "folder": self.folder, "parameters": parameters}
        values |= {"controller": self.controller, "node": self.node, "user": _user()}
        text = _CONF.format(**values)
        (self.folder / "slurm.conf").write_text(
            text if parameters else text.replace("SlurmctldParameters=\n", "")
        )

    def daemon(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("ab") as output:
            subprocess.Popen(
                words,
                env=self.environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def command(self, *words: str, check: bool = True, **options: Any) -> str:
        """Run one of Slurm's commands. Returns its output."""
        options = {"env": self.environment} | options
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=PATIENCE, check=False, **options
        )
        if check and done.returncode:
            raise AssertionError(
                f"{words}: exit code {done.returncode}: {done.stdout}{done.stderr}\n{self.logs()}"
            )
        return done.stdout.strip()

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(
            [*self.folder.glob("*.log"), *self.folder.glob("*.out"), *self.folder.glob("munge/log")]
        )
        return "\n".join(
            f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files
        )

    def close(self) -> None:
        """End every daemon and every process of every job; delete the folder."""
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        self.guard.wait()


def processes(folder: Path, *with_environment: str) -> list[int]:
    """Processes of the cluster in `folder` and of its jobs whose environment has all of these."""
    wanted = {f"SLURM_CONF={folder}/slurm.conf", *with_environment}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended, or belongs to another user
            continue
        if wanted <= set(environment):
            found.append(int(path.parent.name))
    return found


def _end(folder: Path) -> None:
    """Kill the rest of a cluster: first the daemons, which would start or end other processes."""
    while found := processes(folder):
        for process in sorted(found):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


class Job:
    """A batch job."""

    def __init__(
        self, slurm: Slurm, place: Path, *words: str, environment: dict[str, str] | None = None
    ):
        """Submit from the folder `place`; `words`: options of sbatch, and the script."""
        self.slurm, self.place = slurm, place
        environment = slurm.environment | (environment or {})
        self.id = slurm.command("sbatch", "--parsable", *words, env=environment, cwd=place)

    @property
    def facts(self) -> dict[str, str]:
        """The output of `scontrol show job`."""
        text = self.slurm.command("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def said(self) -> str:
        """Standard output and error of all its starts."""
        file = self.place / f"slurm-{self.id}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        return until(
            f"job {self.id}: {what}",
            condition,
            lambda: f"{self.facts}\n{self.said[-6000:]}\n{self.slurm.logs()}",
        )

    def until_state(self, *states: str) -> dict[str, str]:
        """Wait for a state. Returns all facts of the job."""

        def reached() -> dict[str, str] | None:
            facts = self.facts
            return facts if facts["JobState"] in states else None

        return dict(self.until(f"{' or '.join(states)}", reached))

    def until_queued_again(self, times: int = 1) -> None:
        """Wait until the job is pending again, and no process of it is left."""
        self.until(f"requeued {times} times", lambda: self.facts["Restarts"] == str(times))
        self.until_state("PENDING")
        self.until("its processes have ended", lambda: not self.processes() and not self._steps())

    def _steps(self) -> list[int]:
        """Slurm's own processes for the job; they may still report the end of the last start."""
        found = []
        for process in processes(self.slurm.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(psutil.Process(process).cmdline()).startswith(
                    f"slurmstepd: [{self.id}."
                ):
                    found.append(process)
        return found

    def start_now(self) -> None:
        """Start in three seconds instead of Slurm's two minutes.

        Not at once: slurmd takes credentials of the second of the requeue for the last start's.
        """
        self.slurm.command("scontrol", "update", f"JobId={self.id}", "StartTime=now+3")

    def processes(self, *with_environment: str) -> list[int]:
        return processes(self.slurm.folder, f"SLURM_JOB_ID={self.id}", *with_environment)

    def signal_script(self, name: str = "USR1") -> None:
        """Signal the batch script alone, as `--signal=B:…` does."""
        self.slurm.command("scancel", "--batch", f"--signal={name}", self.id)


if __name__ == "__main__":  # the job's guard
    sys.stdin.read()
    _end(Path(sys.argv[1]))
