"""examples/prepare: each launcher runs as it is, and writes the bytes of one process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fast_llm.data.prepare import prepare
from tests.data import synthetic
from tests.data.preparing import configure, everything
from tests.data.ray_cluster import cluster, workers
from tests.helpers import install, slow
from tests.slurm.cluster import Job, Slurm, missing

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "prepare"

FAST_LLM = f"""#!{sys.executable}
import sys
from fast_llm import cli
if __name__ == "__main__":
    sys.exit(cli.main())
"""

pytestmark = slow


class Place:
    """A folder with a corpus, its configuration, and `fast-llm` as a command."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        draw = random.Random(0)
        source = folder / "rows.jsonl"
        with source.open("w") as file:
            for number in range(1300):
                text = f"{number} {synthetic.text(number % 40, draw.randrange(1, 900))}"
                file.write(json.dumps({"text": text if number % 97 else None}) + "\n")
        config = configure(folder / "data", source, model)
        values = config.model_dump(mode="json", exclude_unset=True)
        (folder / "prepare-config.yaml").write_text(yaml.safe_dump(values))
        install(folder / "installed")
        (folder / "bin").mkdir()
        (folder / "bin" / "fast-llm").write_text(FAST_LLM)
        (folder / "bin" / "fast-llm").chmod(0o755)
        self.environment = {
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder}/installed:{ROOT}",
        }
        prepare(configure(folder / "one" / "data", source, model))

    def start(self, script: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(EXAMPLES / script)],
            cwd=self.folder,
            env=os.environ | self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check(self) -> None:
        """The bytes are those of one process."""
        found = {
            name: data
            for name, data in everything(self.folder).items()
            if name == "data.json" or name.startswith("data/")
        }
        assert found == everything(self.folder / "one")


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Place:
    return Place(tmp_path, model)


def test_torchrun_on_two_nodes(place: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        place.start("torchrun.sh", NODES="2", HEAD="127.0.0.1", PORT=port, WORKERS="2")
        for _ in range(2)
    ]
    for node in nodes:
        _, stderr = node.communicate(timeout=300)
        assert node.returncode == 0, stderr
    place.check()


def test_ray(place: Place) -> None:
    with cluster(2) as nodes:
        process = place.start("ray.sh", RAY_ADDRESS=nodes.address)
        while not (found := workers()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        found[0].send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    place.check()


def test_slurm_array(place: Place) -> None:
    if absent := missing():
        pytest.skip(f"no Slurm here ({', '.join(absent)}): apt-get install slurmctld slurmd munge")
    with Slurm() as slurm:
        path = {"PATH": f"{place.environment['PATH']}:{slurm.environment['PATH']}"}
        job = Job(
            slurm,
            place.folder,
            *("--array=3-5", "--cpus-per-task=1"),
            str(EXAMPLES / "slurm-array.sbatch"),
            environment=place.environment | path,
        )
        job.until("all tasks have ended", lambda: not slurm.command("squeue", "--noheader"))
        logs = [path.read_text() for path in place.folder.glob(f"prepare-{job.id}-*.out")]
    assert len(logs) == 3, logs
    assert (place.folder / "data.json").exists(), logs
    place.check()
