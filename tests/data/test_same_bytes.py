"""Every engine writes the same files: one process, workers, torchrun's ranks, Ray with kills."""

import gzip
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fast_llm.data.prepare import prepare
from tests.data import synthetic
from tests.data.preparing import configure, content, everything, start
from tests.data.ray_cluster import cluster, remove_a_node, workers
from tests.helpers import slow

SETTINGS = ["dataset.max_bad_lines=3"]
Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of some megabytes in files that can and cannot be divided, with odd rows."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for number in range(2600):
        text = f"{number} {synthetic.text(number % 40, draw.randrange(1, 900))}"
        lines.append(json.dumps({"text": text if number % 97 else None}) + "\n")
    for number in (40, 1300, 2599):
        lines[number] = '{"text": oops}\n'
    lines[700] = "\n"
    lines[2598] = '{"text": ""}\n'
    (folder / "a.jsonl").write_text("".join(lines[:2000]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[2000:]).encode()))
    return folder


@pytest.fixture(scope="module")
def one_process(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    found = content(prepare(configure(folder / "data", source, model, dataset__max_bad_lines=3)))
    assert len(found["datasets"]) > 3
    assert found["skipped"] == {"empty": 1, "not_text": 27, "not_json": 3}
    return folder


def _ended(process: Process) -> str:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


def two_workers(folder: Path, source: Path, model: Path) -> None:
    _ended(start(folder, folder / "out" / "data", source, model, *SETTINGS, "tokenize_workers=2"))


def torchrun(folder: Path, source: Path, model: Path) -> None:
    process = start(
        folder,
        folder / "out" / "data",
        source,
        model,
        *SETTINGS,
        launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    )
    _ended(process)


def ray_with_kills(folder: Path, source: Path, model: Path) -> None:
    """A worker is killed, then a node."""
    output = folder / "out" / "data"
    with cluster(3) as nodes:
        process = start(folder, output, source, model, *SETTINGS, "distributed.engine=ray")

        def wait_for(done: Callable[[], bool]) -> None:
            while not done():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)

        def has_units(count: int) -> bool:
            return len(list((output / "units").glob("*.npz"))) >= count

        wait_for(lambda: has_units(1) and bool(workers()))
        workers()[0].send_signal(signal.SIGKILL)
        wait_for(lambda: has_units(2))
        remove_a_node(nodes)
        stderr = _ended(process)
    assert "Ray: 4 nodes, 3 CPUs." in stderr
    assert "Ray: a worker or its node died (" in stderr


@slow
@pytest.mark.parametrize("engine", [two_workers, torchrun, ray_with_kills])
def test_every_engine_writes_the_files_of_one_process(
    engine: Callable[[Path, Path, Path], None],
    source: Path,
    one_process: Path,
    tmp_path: Path,
    model: Path,
) -> None:
    engine(tmp_path, source, model)
    assert everything(tmp_path / "out") == everything(one_process)
