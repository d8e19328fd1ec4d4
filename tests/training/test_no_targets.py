"""Batches without target tokens: documents of one token each, in which nothing is predicted."""

import math
from pathlib import Path

import numpy as np
import pytest

from fast_llm.checkpoint import folder
from fast_llm.data.tokenfile import TokenFileWriter
from tests.helpers import spawn
from tests.training.runs import records, run, run_all, settings, weights


def write(prefix: Path, lengths: list[int]) -> None:
    random = np.random.default_rng(0)
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    for length in lengths:
        writer.append((random.integers(128) + np.arange(length)) % 128)
    writer.close()


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """Documents of one token each."""
    write(tmp_path / "tokens", [1] * 3000)
    return tmp_path


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """Half of the sequences without a target."""
    write(tmp_path / "tokens", [24, *[1] * 24] * 40)
    return tmp_path


def log(folder: Path) -> str:
    return (folder / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_updated_and_no_number_is_made_up(single: Path, world: int) -> None:
    arguments = settings(
        single,
        "training.train_iters=5",
        "training.checkpoint.interval=1",
        "training.validation.interval=5",
        "training.validation.iterations=1",
        "training.test_iters=1",
        "optimizer.weight_decay=0.1",
        "optimizer.max_nonfinite_steps=2",
        "training.spikes.policy=stop",
    )
    assert spawn(world, run, arguments) == [0] * world
    first, last = (single / "run" / "checkpoint" / str(step) for step in (1, 5))
    assert weights(first) == weights(last)
    assert all(set(data) <= {0} for name, data in weights(last).items() if "exp_avg" in name)
    info = folder.verify(last).info
    assert (info["updates"], info["skipped"], info["samples"]) == (0, 0, 40)
    assert not any(info["spikes"].values())
    for record in records(single / "run").values():
        assert (record["language_model_loss"], record["grad_norm"]) == (None, None)
        assert (record["target_tokens"], record["skipped_iters"], record["nan_iters"]) == (0, 1, 0)
    for phase in ("validation", "test"):
        found = records(single / "run", phase)
        assert found and all(
            r["language_model_loss"] is None and r["tokens"] == 0 for r in found.values()
        )
    text = log(single / "run")
    assert (
        "perplexity" not in text and "step 5/5  validation: no target tokens  0 tokens in " in text
    )
    assert "Validation at step 0: validation has no target tokens, so there is no loss" in text
    # Of five such steps, the 1st, 2nd and 4th are logged.
    warned = [line for line in text.splitlines() if "no target tokens: its documents" in line]
    assert [line.partition(" has no")[0][-6:] for line in warned] == ["Step 1", "Step 2", "Step 4"]
    assert "the update was skipped (step 4 of this kind since the start)" in warned[2]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_steps_with_targets_are_not_disturbed(some: Path, dtype: str) -> None:
    arguments = settings(
        some,
        "training.train_iters=16",
        "training.checkpoint.interval=16",
        "batch.batch_size=1",
        "batch.micro_batch_size=1",
        "training.spikes.policy=skip",
        "training.spikes.window=4",
        f"model.distributed.training_dtype={dtype}",
        "optimizer.gradient_scaler.initial=1024",
    )
    assert run(arguments) == 0
    found = records(some / "run")
    without = [step for step, record in found.items() if not record["target_tokens"]]
    assert 3 < len(without) < 13
    for step, record in found.items():
        assert (record["language_model_loss"] is None) == (step in without)
        assert record["skipped_iters"] == (step in without) and not record["spikes"]
    info = folder.verify(some / "run" / "checkpoint" / "16").info
    assert info["updates"] == 16 - len(without)
    assert len(info["spikes"]["loss"]) == 4 and min(info["spikes"]["loss"]) > 1
    if dtype == "fp16":
        assert info["loss_scale"]["clean_updates"] == 16 - len(without)


@pytest.mark.parametrize("cross_entropy", ["fused", "torch"])
@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_without_targets_add_nothing(
    some: Path, world: int, cross_entropy: str
) -> None:
    """One micro-batch of eight sequences, or eight of one, of which half have no target: the same
    training.
    """
    common = settings(
        some,
        "training.train_iters=3",
        "training.checkpoint.interval=3",
        f"model.base_model.cross_entropy_impl={cross_entropy}",
    )
    several = [*common, "batch.micro_batch_size=1", f"run.experiment_dir={some}/several"]
    at_once = [
        *common,
        f"batch.micro_batch_size={8 // world}",
        f"run.experiment_dir={some}/at_once",
    ]
    spawn(world, run_all, [several, at_once])
    one, other = records(some / "several"), records(some / "at_once")
    for step in (1, 2, 3):
        assert 0 < one[step]["target_tokens"] == other[step]["target_tokens"] < 150
        for name in ("language_model_loss", "grad_norm"):
            assert math.isclose(one[step][name], other[step][name], rel_tol=1e-5), name


def test_a_further_validation_set_without_targets(some: Path) -> None:
    write(some / "single", [1] * 1000)
    arguments = settings(
        some,
        "training.train_iters=1",
        "training.validation.interval=1",
        "training.validation.iterations=1",
        f"data.validation_sets.single={some}/single",
        "data.split=[5,5,0]",
    )
    assert run(arguments) == 0
    (last,) = [record for step, record in records(some / "run", "validation").items() if step == 1]
    assert last["single_loss"] is None and last["language_model_loss"] > 1
    assert "validation of single: no target tokens" in log(some / "run")
