"""The experiment folder: records, logs, the lock; and steps whose numbers are not finite."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_llm.errors import ConfigError, TrainingStopped
from fast_llm.training.run import Run, lock, next_run_number
from tests.helpers import spawn
from tests.training.runs import losses, records, run, settings, write_tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens", 400)
    return tmp_path


def train_on_nonsense(arguments: list[str]) -> str:
    try:
        run(arguments)
    except TrainingStopped as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world", [1, 2])
def test_steps_that_are_not_finite_never_touch_the_weights(tokens: Path, world: int) -> None:
    # The first update is so large that all later losses are NaN.
    arguments = settings(
        tokens,
        "training.train_iters=20",
        "optimizer.learning_rate.base=1e30",
        "optimizer.max_nonfinite_steps=4",
        "training.checkpoint.interval=2",
    )
    for message in spawn(world, train_on_nonsense, arguments):
        assert "were not finite 4 times in a row" in message
        assert message.endswith(" Checkpoint 4 is complete: the same command continues from it.")
    found = records(tokens / "run")
    assert [found[step]["skipped_iters"] for step in (1, 2, 3, 4, 5)] == [
        0,
        1,
        1,
        1,
        1,
    ] and 6 not in found
    assert found[2]["language_model_loss"] is None
    from tests.training.runs import weights

    two, four = (weights(tokens / "run" / "checkpoint" / str(step)) for step in (2, 4))
    assert two == four


def test_a_norm_whose_square_fp32_does_not_hold(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing clips it, and the average of squares would be infinite for good; beyond fp32 not even
    the factor could be given.
    """
    norms = iter([1.0, 1e19, 1e40, 1.0])
    monkeypatch.setattr(
        "fast_llm.training.step.squared_norm",
        lambda *_: torch.tensor(next(norms) ** 2, dtype=torch.float64),
    )
    assert (
        run(settings(tokens, "training.train_iters=4", "optimizer.gradient_norm_clipping=null"))
        == 0
    )
    found = records(tokens / "run")
    assert [found[step]["skipped_iters"] for step in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert found[3]["grad_norm"] > 1e39


def test_fp16_finds_its_scale(tokens: Path) -> None:
    arguments = settings(
        tokens,
        "training.train_iters=16",
        "model.distributed.training_dtype=fp16",
        "optimizer.gradient_scaler.initial=1e8",
    )
    assert run(arguments) == 0
    skipped = [record["skipped_iters"] for record in records(tokens / "run").values()]
    assert 0 < sum(skipped) < 12 and skipped[-1] == 0  # the scale fell until gradients were finite
    assert losses(tokens / "run")[16] < losses(tokens / "run")[sum(skipped) + 1]


def test_metrics_have_the_names_that_users_expect(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    further = f"data.validation_sets.other={tokens}/tokens"
    arguments = settings(
        tokens,
        "training.train_iters=2",
        "training.validation.interval=2",
        "training.validation.iterations=1",
        "training.test_iters=1",
        "training.tensorboard=yes",
        further,
    )
    assert run(arguments) == 0
    expected = (
        "train_iters batch_size iteration language_model_loss consumed_samples consumed_tokens"
        " step_time_ms step_time_average_ms remaining_time completion_time percent_done"
        " skipped_iters nan_iters model_tflops hardware_tflops tokens_per_sec_per_gpu run"
        " grad_norm learning_rate loss_scale step phase mfu data_wait_ms"
    )
    record = records(tokens / "run")[2]
    assert set(expected.split()) <= set(record)
    assert (
        record["consumed_tokens"] == 2 * 8 * 24
        and record["percent_done"] == 100
        and record["loss_scale"] == 1
    )
    assert set(losses(tokens / "run", "validation")) == {0, 2} and set(
        losses(tokens / "run", "test")
    ) == {2}
    assert "other_loss" in records(tokens / "run", "validation")[0]
    line = next(line for line in capsys.readouterr().out.splitlines() if " tok/s " in line)
    assert re.fullmatch(
        r"\d\d-\d\d \d\d:\d\d:\d\d step \d/2  loss \d\.\d{4}  grad \d\.\d{3}  lr \d\.\de-\d"
        r"  [\d.]+k? tok/s  \d\.\dGB  \d+s left(  \d+% waiting for data)?",
        line,
    ), line
    assert list((tokens / "run" / "tensorboard").iterdir())


def test_a_torn_line_is_dropped_and_runs_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "la')
    first = Run(tmp_path, 0, 1, True, next_run_number(tmp_path))
    first.record({"step": 2, "loss": float("nan")})
    first.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "loss": None}]
    assert next_run_number(tmp_path) == 1


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_records_are_kept_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, 0, 1, True, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in (1, 2):
            run.record({"step": step})
    assert (
        capsys.readouterr().out.count(
            "metrics.jsonl: cannot be written: No space left on device; free space on the disk."
        )
        == 1
    )
    write = os.write
    monkeypatch.setattr(
        os, "write", lambda handle, data: write(handle, data[:5])
    )  # the disk accepts a few bytes at a time
    run.record({"step": 3})
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3]
    monkeypatch.setattr(os, "write", full)
    run.record({"step": 4})
    run.close()
    assert "metrics.jsonl: 1 records could not be written and are lost." in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, 0, 1, True, 0)
    handler = next(
        h for h in logging.getLogger("fast_llm").handlers if isinstance(h, logging.FileHandler)
    )
    assert handler.stream is not None
    handler.stream.close()
    handler.stream = Path("/dev/full").open("w")  # noqa: SIM115
    for _ in range(2):
        logging.getLogger("fast_llm").info("on the terminal")
    run.close()
    out, err = capsys.readouterr()
    assert out.count("on the terminal") == 2
    assert (
        err
        == f"{tmp_path}/runs/0/logs/logs_rank_0.txt: cannot be written: No space left on device;"
        " the log continues here.\n"
    )


def test_a_folder_that_cannot_be_created() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^run.experiment_dir: /proc/run cannot be written to: .*; choose another$",
    ):
        lock(Path("/proc/run"))


def test_a_lock_dies_with_its_holder(tokens: Path) -> None:
    code = (
        "import time; from pathlib import Path; from fast_llm.training.run import lock; file ="
        f" lock(Path('{tokens}/run'))"
    )
    command = [sys.executable, "-c", f"{code}; print('held', flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "):
            lock(tokens / "run")
        holder.kill()
        holder.wait()
    lock(tokens / "run").close()
