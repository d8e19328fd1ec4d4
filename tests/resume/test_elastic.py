"""Runs that lose workers and nodes and get them back; two torchrun agents stand for two nodes.

The second half of the file is what torchrun starts: a slowed-down `fast-llm train` that logs which
process got which sequence.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers import slow, spawn
from tests.training.runs import losses, run, settings, write_tokens

ROOT = Path(__file__).parent.parent.parent
# Two minutes at the pace of a step a second, in which nodes have time to start; six sequences are
# uneven over four processes.
STEPS, BATCH = 120, 6
# With its store shared with the workers, torchrun never tells an agent that joins later where the
# store is.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def arguments(root: Path, name: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={STEPS}",
        "training.checkpoint.interval=2",
        "training.checkpoint.keep=2",
        "training.num_workers=0",
        f"batch.batch_size={BATCH}",
        "batch.micro_batch_size=1",
        "model.multi_stage.zero_stage=2",
        "model.distributed.timeout=20",
        "optimizer.learning_rate.base=1e-3",
        "optimizer.epsilon=1e-4",  # so that differences of rounding stay small
        f"run.experiment_dir={root}/{name}",
    )


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


class Nodes:
    """Agents, each of which stands for a node."""

    def __init__(self, root: Path, name: str):
        self.root, self.name, self.port = root, name, port()
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "1:2",
            "--nproc-per-node",
            "2",
        ]
        command += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{self.port}",
            "--rdzv-id",
            "elastic",
        ]
        command += ["--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1,join_timeout=60"]
        command += [
            "--local-addr",
            "127.0.0.1",
            "--max-restarts",
            "4",
            "-m",
            "tests.resume.test_elastic",
        ]
        log = (self.root / f"agent{len(self.agents)}.log").open("wb")
        environment = ENVIRONMENT | {"ID_LOG": str(self.root / f"{self.name}.ids")}
        self.agents.append(
            subprocess.Popen(
                [*command, *arguments(self.root, self.name)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        )
        return self.agents[-1]

    def wait_for_store(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError(self.said())

    def logged(self) -> list[dict[str, int]]:
        path = self.root / f"{self.name}.ids"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait(self, world: int, after: int, steps: int) -> dict[str, int]:
        """Wait until the processes have been given `steps` steps in a start later than `after`.

        Returns the last log entry.
        """
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            found = [
                entry
                for entry in self.logged()
                if entry["world"] == world and entry["start"] > after
            ]
            if len({entry["step"] for entry in found}) >= steps:
                return found[-1]
            for agent in self.agents:
                assert agent.poll() is None or agent.returncode == -signal.SIGKILL, self.said()
            time.sleep(0.05)
        raise AssertionError(f"no {steps} steps of {world} processes\n{self.said()}")

    def said(self) -> str:
        return "\n".join(
            path.read_text(errors="replace")[-6000:]
            for path in sorted(self.root.glob("agent*.log"))
        )

    def end(self) -> None:
        for agent in self.agents:
            kill(agent)


def kill(agent: "subprocess.Popen[bytes]") -> None:
    """Kill all processes of a node, so that none leaves the rendezvous."""
    if agent.poll() is None:
        process = psutil.Process(agent.pid)
        for part in [process, *process.children(recursive=True)]:
            try:
                part.kill()
            except psutil.NoSuchProcess:
                continue
    agent.wait(10)


@contextmanager
def nodes(root: Path, name: str) -> Iterator[Nodes]:
    made = Nodes(root, name)
    try:
        yield made
    finally:
        made.end()


@slow
def test_a_node_is_lost(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    with nodes(tmp_path, "run") as cluster:
        host = cluster.start()
        cluster.wait_for_store()  # on one machine, the first agent hosts the store
        guest = cluster.start()
        entry = cluster.wait(world=4, after=-1, steps=3)
        kill(guest)
        cluster.wait(world=2, after=entry["start"], steps=2)
        check_complete(cluster, host)


@slow
def test_nodes_and_workers_come_and_go(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    with nodes(tmp_path, "run") as cluster:
        host = cluster.start()
        cluster.wait_for_store()
        guest = cluster.start()
        entry = cluster.wait(world=4, after=-1, steps=3)
        kill(guest)
        entry = cluster.wait(world=2, after=entry["start"], steps=2)
        guest = cluster.start()
        entry = cluster.wait(world=4, after=entry["start"], steps=2)
        worker = next(one["process"] for one in reversed(cluster.logged()) if one["rank"] == 3)
        os.kill(worker, signal.SIGKILL)
        cluster.wait(world=4, after=entry["start"], steps=2)
        check_complete(cluster, host, guest)
        assert len({one["start"] for one in cluster.logged()}) >= 4


def check_complete(cluster: Nodes, *agents: "subprocess.Popen[bytes]") -> None:
    """Let the run end, and compare it with an uninterrupted run of one process."""
    root = cluster.root
    (root / "run.ids.hurry").touch()
    for agent in agents:
        assert agent.wait(180) == 0, cluster.said()
    # torchrun kills after 30 s what does not stop, and logs it: that was not necessary.
    assert "forcefully exiting" not in cluster.said()
    # The last time that a step was trained counts.
    last: dict[int, int] = {}
    for one in cluster.logged():
        last[one["step"]] = max(last.get(one["step"], 0), one["start"])
    seen = [one["sequence"] for one in cluster.logged() if one["start"] == last[one["step"]]]
    assert sorted(seen) == list(range(STEPS * BATCH))
    assert {one["world"] for one in cluster.logged()} == {2, 4}
    assert spawn(1, run, arguments(root, "uninterrupted")) == [0]
    expected, found = losses(root / "uninterrupted"), losses(root / "run")
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=2e-6), step


def main() -> None:
    """The program that torchrun starts."""
    from fast_llm import cli
    from fast_llm.data.loader import Loader
    from fast_llm.training import job
    from fast_llm.training.run import Run

    log, starts = Path(os.environ["ID_LOG"]), list[int]()
    step, make, read = Loader.step, Run.__init__, None

    def numbered(self: Run, *args: object, **named: object) -> None:
        make(self, *args, **named)  # type: ignore[arg-type]
        starts.append(self.number)

    def reported(self: Loader, number: int) -> object:
        nonlocal read
        if self.split != "training":
            return step(self, number)
        if not log.with_name(f"{log.name}.hurry").exists():
            time.sleep(1)
        read = read or self.dataset.read
        given: list[int] = []
        self.dataset.read = lambda phase, index: (given.append(index), read(phase, index))[1]  # type: ignore
        made = step(self, number)
        world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        at = {
            "start": starts[-1],
            "step": self.first_sample // BATCH + number + 1,
            "world": world,
            "rank": rank,
        }
        with log.open("a") as file:
            file.write(
                "".join(
                    json.dumps({**at, "process": os.getpid(), "sequence": index}) + "\n"
                    for index in given
                )
            )
        return made

    Run.__init__ = numbered  # type: ignore
    job.Run = Run  # type: ignore
    Loader.step = reported  # type: ignore
    sys.exit(cli.main(["train", "gpt", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
