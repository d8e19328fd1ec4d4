"""TensorBoard's and Weights & Biases' records, read back; neither can end a run."""

import errno
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from fast_llm.training import charts
from fast_llm.training.metrics import Metrics
from tests.helpers import spawn
from tests.training.runs import losses, records, run, settings, write_tokens
from tests.training.test_spikes import arguments, spiking


@pytest.fixture(autouse=True)
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tokens(tmp_path / "tokens", 400)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-login"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    return tmp_path


def curve(folder: Path, name: str) -> dict[int, float]:
    """A curve as TensorBoard reads it. Fails if a step comes twice."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars(name)
    assert len({point.step for point in points}) == len(points), points
    return {point.step: point.value for point in points}


def logged(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("runs/*/logs/logs_rank_*.txt")))


def wandb_files(folder: Path) -> list[Path]:
    """W&B's offline files, one for each start."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def wandb_records(path: Path, kind: str) -> Iterator[Any]:
    """The records of a kind in a file of W&B.

    LevelDB's log format, as its own service reads it, with its own messages.
    """
    data, at, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # of a block
            at += left
            continue
        _, size, part = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # a complete record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == kind:
                yield getattr(record, kind)


def history(path: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve in the order in which they were recorded: iteration and value."""
    found = []
    for record in wandb_records(path, "history"):
        row = {
            ".".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.item
        }
        if name in row:
            found.append((row["iteration"], row[name]))
    return found


def test_the_learning_rate_is_the_one_that_is_applied(tokens: Path) -> None:
    scale = "optimizer.default_learning_rate_scale=0.25"
    assert run(settings(tokens, "training.train_iters=2", "training.tensorboard=yes", scale)) == 0
    assert records(tokens / "run")[2]["learning_rate"] == 0.25e-2
    assert curve(tokens / "run", "Training/learning_rate")[2] == pytest.approx(0.25e-2)
    assert "lr 2.5e-3" in logged(tokens / "run")


def test_tensorboard_after_going_back_and_after_a_kill(tokens: Path) -> None:
    how = arguments(tokens, "run", "rewind", "training.tensorboard=yes")
    validation = ["training.validation.interval=2", "training.validation.iterations=1"]
    for kill_at in (7, -4, 0):  # killed after the checkpoint of step 6, asked to stop, complete
        spawn(1, spiking, [*how, *validation], (8, 14), kill_at)
    for phase, name in (("training", "Training"), ("validation", "Validation")):
        expected = losses(tokens / "run", phase)
        assert curve(tokens / "run", f"{name}/language_model_loss") == pytest.approx(
            expected, rel=1e-6
        )
    assert set(losses(tokens / "run")) == set(range(1, 15))


def without_room(arguments: list[str]) -> int:
    """A full disk for TensorBoard alone: its files cannot grow."""
    send, failed = charts.TensorBoard.send, charts.TensorBoard._failed
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def sent(self: charts.TensorBoard, phase: str, step: int, numbers: charts.Numbers) -> None:
        size = max(path.stat().st_size for path in self.folder.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
        send(self, phase, step, numbers)
        time.sleep(0.05)  # of its writer thread
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)

    def logged(self: charts.TensorBoard, error: OSError) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        failed(self, error)

    charts.TensorBoard.send, charts.TensorBoard._failed = sent, logged  # type: ignore[method-assign]
    return run(arguments)


def test_a_full_disk_under_tensorboard_ends_nothing(
    tokens: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert spawn(
        1, without_room, settings(tokens, "training.train_iters=8", "training.tensorboard=yes")
    ) == [0]
    assert len(losses(tokens / "run")) == 8
    assert (
        logged(tokens / "run").count("tensorboard cannot be written: File too large. They end here")
        == 1
    )
    assert "Traceback" not in capfd.readouterr().err


WANDB = "training.wandb.entity_name=us"


def offline(*how: Any) -> Any:
    """`spiking` in a process whose environment is not that of the test: the server that forks it
    began earlier.
    """
    os.environ["WANDB_MODE"] = "offline"
    return spiking(*how)


def test_wandb_after_going_back_and_after_a_kill(tokens: Path) -> None:
    how = arguments(tokens, "run", "rewind", WANDB, "training.wandb.alert.interval=7")
    validation = ["training.validation.interval=7", "training.validation.iterations=1"]
    for kill_at in (-7, 0):
        spawn(1, offline, [*how, *validation], (8, 14), kill_at)
    first, second = wandb_files(tokens / "run")
    identity = yaml.safe_load((tokens / "run" / "wandb_config.yaml").read_text())
    for path in (first, second):  # one chart
        (started,) = wandb_records(path, "run")
        assert (started.run_id, started.project, started.entity) == (
            identity["id"],
            "fast_llm",
            "us",
        )
        assert (started.display_name, started.run_group) == ("run", "default")
        sections = {update.key: json.loads(update.value_json) for update in started.config.update}
        assert sections["training"]["train_iters"] == 14 and sections["batch"]["batch_size"] == 8
        axes = {metric.glob_name: metric.step_metric for metric in wandb_records(path, "metric")}
        assert axes["Training.*"] == axes["Validation.*"] == axes["Test.*"] == "iteration"
    # Each record of metrics.jsonl is there in this order, also those of steps that were trained
    # again.
    lines = [
        json.loads(line) for line in (tokens / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for phase, name in (("training", "Training"), ("validation", "Validation")):
        expected = [
            (line["step"], line["language_model_loss"]) for line in lines if line["phase"] == phase
        ]
        found = [
            point
            for path in (first, second)
            for point in history(path, f"{name}.language_model_loss")
        ]
        assert found == expected
    steps = [step for path in (first, second) for step, _ in history(path, "Training.grad_norm")]
    assert (
        steps[:7] == list(range(1, 8))
        and sorted(set(steps)) == list(range(1, 15))
        and len(steps) > 14
    )
    # The validation of step 7, which the signal interrupted, then those of step 14.
    alerts = ["Validation results", "Training results", "Validation results", "Run ended!"]
    assert [alert.title for alert in wandb_records(second, "alert")] == alerts
    assert "Weights & Biases records offline; upload the run with `wandb sync " in logged(
        tokens / "run"
    )


def test_wandb_without_a_login(tokens: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(settings(tokens, "training.train_iters=2", WANDB)) == 0
    out, err = capfd.readouterr()
    (path,) = wandb_files(tokens / "run")
    assert err == "" and out.count("Weights & Biases") == 1 and "Traceback" not in out
    assert (
        "Weights & Biases: there is no login on this machine (`wandb login`, or WANDB_API_KEY in"
        " the environment). The run is"
        f" recorded offline; upload it with `wandb sync {path.parent}`." in out
    )
    assert len(history(path, "Training.language_model_loss")) == 2


@pytest.mark.parametrize("content", [b"id: [", b"\xff", b"", b"id: 7", b"- a"])
def test_wandbs_identity_that_is_damaged(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tokens / "run").mkdir()
    (tokens / "run" / "wandb_config.yaml").write_bytes(content)
    assert run(settings(tokens, "training.train_iters=1", WANDB)) == 0
    assert len(yaml.safe_load((tokens / "run" / "wandb_config.yaml").read_text())["id"]) == 8
    warned = logged(tokens / "run").count("wandb_config.yaml cannot be read: ")
    assert warned == (content in (b"id: [", b"\xff"))


def test_wandbs_identity_that_cannot_be_written(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(charts, "write_atomically", full)
    assert run(settings(tokens, "training.train_iters=1", WANDB)) == 0
    assert (
        logged(tokens / "run").count(
            "wandb_config.yaml cannot be written: No space left on device."
        )
        == 1
    )


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_wandb_without_a_network(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("BASE_URL", "http://127.0.0.1:9"),
        ("API_KEY", "a" * 40),
        ("INIT_TIMEOUT", "2"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert run(settings(tokens, "training.train_iters=2", WANDB)) == 0
    out, err = capfd.readouterr()
    (path,) = wandb_files(tokens / "run")
    assert err == "" and out.count("Weights & Biases") == 1 and "Traceback" not in out
    assert f". The run is recorded offline; upload it with `wandb sync {path.parent}`." in out
    assert len(history(path, "Training.language_model_loss")) == 2


def test_wandb_writes_nothing_to_the_working_directory(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TMPDIR", str(tokens / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tokens / "tmp"))
    (tokens / "tmp").mkdir()
    (tokens / "here").mkdir()
    (tokens / "here" / "json.py").write_text("1/0")  # must not be imported
    monkeypatch.chdir(tokens / "here")
    assert run(settings(tokens, "training.train_iters=1", WANDB, "run.experiment_dir=null")) == 0
    assert os.listdir(tokens / "here") == ["json.py"]
    (path,) = tokens.glob("tmp/fast-llm-wandb-*/wandb/offline-run-*/*.wandb")
    assert len(history(path, "Training.language_model_loss")) == 1


@pytest.mark.parametrize(
    ("name", "number", "why"),
    [
        (
            "wandb-core",
            signal.SIGKILL,
            "Weights & Biases records nothing from here on: Connection lost.",
        ),
        (
            "wandb-core",
            signal.SIGSTOP,
            "Weights & Biases has not taken all records within 2 s: training continues",
        ),
        (
            "python",
            signal.SIGKILL,
            "Weights & Biases has ended unexpectedly: training continues without it; `wandb sync ",
        ),
        (
            "python",
            signal.SIGSTOP,
            "Weights & Biases has not taken all records within 2 s: training continues",
        ),
    ],
)
def test_what_becomes_of_wandb_ends_nothing(
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    number: signal.Signals,
    why: str,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(charts.Wandb, "upload_seconds", 2.0)
    write, hit = Metrics.write, list[psutil.Process]()

    def disturbed(self: Metrics, step: int, *counts: Any) -> None:
        write(self, step, *counts)
        if step == 2:
            assert self.wandb is not None and self.wandb.process is not None
            while not self.wandb.offline_folder:
                time.sleep(0.1)
                self.wandb._exchange()
            process = psutil.Process(self.wandb.process.pid)
            chosen = [process] if name == "python" else process.children(recursive=True)
            hit.extend(chosen)
            for one in chosen:
                one.send_signal(number)
        if step > 2:
            time.sleep(0.2)

    monkeypatch.setattr(Metrics, "write", disturbed)
    assert run(settings(tokens, "training.train_iters=6", WANDB)) == 0
    for one in hit:
        if one.is_running():
            one.kill()
    out, err = capfd.readouterr()
    assert out.count(why) == 1 and "Training is complete: 6 steps." in out and err == ""
    # and the one that says that the run is recorded offline
    assert out.count("Weights & Biases") == 2
    assert len(losses(tokens / "run")) == 6


def test_a_wandb_that_takes_nothing_is_given_up(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(charts.Wandb, "max_queued", 20)
    write = Metrics.write

    def disturbed(self: Metrics, step: int, *counts: Any) -> None:
        if self.wandb is not None and self.wandb.process is not None and step == 2:
            self.wandb.process.send_signal(signal.SIGSTOP)
            self.wandb.sending = b" " * 2**20  # more than a pipe holds
        write(self, step, *counts)

    monkeypatch.setattr(Metrics, "write", disturbed)
    assert run(settings(tokens, "training.train_iters=20", WANDB)) == 0
    assert (
        logged(tokens / "run").count(
            "Weights & Biases takes no records: training continues without it;"
        )
        == 1
    )
