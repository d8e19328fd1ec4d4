"""A preparation on a Ray cluster of several nodes of this machine, with kills."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError, MissingPackage
from tests.data import synthetic
from tests.data.preparing import configure, everything, start
from tests.data.ray_cluster import ROOT, cluster
from tests.helpers import slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("source") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(2600):
            text = f"{number} {synthetic.text(number % 40, draw.randrange(1, 900))}"
            file.write(json.dumps({"text": text if number % 97 else None}) + "\n")
    return path


@pytest.fixture(scope="module")
def one_process(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    prepare(configure(folder / "data", source, model))
    return folder


@slow
def test_driver_is_killed_and_resumes(
    source: Path, one_process: Path, tmp_path: Path, model: Path
) -> None:
    output = tmp_path / "ray" / "data"
    with cluster(2):
        process = start(tmp_path, output, source, model, "distributed.engine=ray")
        while not list((output / "units").glob("*.npz")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = {path: path.stat().st_mtime_ns for path in (output / "units").glob("*.npz")}
        second = start(tmp_path, output, source, model, "distributed.engine=ray")
        while not list(output.glob("shard_*.json")):
            assert second.poll() is None, second.communicate()
            kept = {path: path.stat().st_mtime_ns for path in done if path.exists()}
            time.sleep(0.02)
        assert kept == done
        _, stderr = second.communicate(timeout=300)
        assert second.returncode == 0, stderr
    assert everything(tmp_path / "ray") == everything(one_process)


@slow
def test_without_a_cluster_one_is_started(
    source: Path, one_process: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    prepare(configure(tmp_path / "ray" / "data", source, model, distributed__engine="ray"))
    assert everything(tmp_path / "ray") == everything(one_process)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        prepare(configure(tmp_path / "b", tmp_path / "a.jsonl", model, distributed__engine="ray"))


@slow
def test_a_task_that_kills_its_workers_is_named(
    tmp_path: Path, model: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fast_llm.data.units import UnitTokenizer

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(UnitTokenizer, "__reduce__", lambda _: (_Killed, ()), raising=False)
    with pytest.raises(
        DataError,
        match=r"distributed.engine: ray: 5 workers died with the rows from .*rows.jsonl:\d+ to"
        r" .*rows.jsonl:\d+, most likely because memory ran out; start Ray with fewer CPUs",
    ):
        prepare(configure(tmp_path / "b", source, model, distributed__engine="ray"))


class _Killed:
    def __call__(self, task: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_without_the_package(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingPackage,
        match=r"^distributed.engine: ray needs the package ray: pip install ray$",
    ):
        prepare(configure(tmp_path / "out", tmp_path / "a.txt", model, distributed__engine="ray"))
