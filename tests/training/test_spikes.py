"""Spikes: detection, and runs that skip, rewind or stop, are killed, and resume."""

import random
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from torch import Tensor

from fast_llm.checkpoint import folder
from fast_llm.config.train import SpikesConfig
from fast_llm.data.loader import Loader
from fast_llm.errors import TrainingStopped
from fast_llm.model.batch import Batch
from fast_llm.planning.history import BatchSizeEntry, DataOrder, History, SourceState
from fast_llm.training.audit import inspect_step
from fast_llm.training.spikes import SpikeDetector, handle_spike
from fast_llm.training.step import TrainStep
from fast_llm.training.trainer import Trainer
from tests.helpers import some_fast, spawn
from tests.training.runs import losses, records, run, settings, tell, weights, write_tokens

STEPS, BATCH = 14, 8
BAD = (8,)  # batches, counted from 1


def test_what_a_spike_is() -> None:
    spikes = SpikeDetector(SpikesConfig(policy="skip", window=9, threshold=4))
    generator = random.Random(0)
    values = [generator.gauss(3, 0.1) for _ in range(9)]
    assert not any(
        spikes.detect(value, value) for value in [*values[:-1], 99]
    )  # the window is not full
    values[-1] = 99  # a single one moves neither median
    limit = median(values) + 4 * 1.4826 * median(abs(y - median(values)) for y in values)
    again = SpikeDetector(spikes.config)
    again.load_state_dict(spikes.state_dict())
    assert spikes.detect(limit * 1.0001, limit * 0.9999) == (
        f"loss {limit * 1.0001:.4g} is above {median(values):.4g} + 4 ×"
        f" {(limit - median(values)) / 4:.2g}"
    )
    assert again.detect(limit * 0.9999, limit * 1.0001).startswith("gradient norm ")
    flat = SpikeDetector(spikes.config)
    assert not any(flat.detect(2.0, 1.0) for _ in range(9))
    assert not flat.detect(2.079, 1.039)  # a hundredth of the median is not a deviation
    assert flat.detect(2.081, 1.041).count("above") == 2
    # A lasting level becomes normal after half a window.
    assert [bool(flat.detect(3.0, 1.0)) for _ in range(7)] == [True] * 5 + [False] * 2
    off = SpikeDetector(SpikesConfig())
    assert not any(off.detect(value, value) for value in [1.0] * 200 + [9.0])


def arguments(root: Path, name: str, policy: str, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={STEPS}",
        "training.checkpoint.interval=3",
        "training.checkpoint.keep=null",
        "training.export.interval=7",
        f"training.spikes.policy={policy}",
        "training.spikes.window=5",
        "training.spikes.threshold=8",
        "optimizer.learning_rate.base=1e-3",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


class Kill(Exception):
    """Stands for a kill: no code of the package catches it."""


def spiking(
    arguments_: list[str], bad: tuple[int, ...] = BAD, kill_at: int = 0
) -> tuple[int | str, list[int]]:
    """A run of whose `bad` batches loss and gradients are as large as they are not, killed when it
    has made so many steps, or asked to stop if the number is negative; and the batches with which
    its steps ended, those that were passed over included.
    """
    step, check, given = Loader.step, Trainer.check_finite, list[int]()
    forward_backward, worse = TrainStep.forward_backward, list[Sequence[Batch]]()

    def reported(self: Loader, number: int) -> list[Batch]:
        batches = step(self, number)
        if self.split == "training" and self.first_sample // BATCH + number + 1 in bad:
            worse.append(batches)
        return batches

    def disturbed(self: TrainStep, batches: Sequence[Batch], seed: float) -> Tensor:
        factor = 3 if any(one is batches for one in worse) else 1
        return factor * forward_backward(self, batches, 10 * factor * seed if factor > 1 else seed)

    def killed(self: Trainer, number: int) -> None:
        check(self, number)
        given.append(self.state.consumed_samples // BATCH)
        if len(given) == kill_at:
            self.checkpoints.saver.drain()
            raise Kill
        if len(given) == -kill_at:
            tell(self, signal.SIGTERM)

    Loader.step, Trainer.check_finite, TrainStep.forward_backward = reported, killed, disturbed  # type: ignore[method-assign, assignment]
    try:
        return run(arguments_), given
    except (Kill, TrainingStopped) as error:
        return str(error), given
    finally:
        Loader.step, Trainer.check_finite = step, check  # type: ignore[method-assign]
        TrainStep.forward_backward = forward_backward  # type: ignore[method-assign]


def updates(path: Path) -> int:
    found: int = folder.verify(path).info["updates"]
    return found


@pytest.mark.parametrize("world", some_fast([1, 2], (2).__eq__))
def test_skip(tmp_path: Path, world: int) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert (
        spawn(world, spiking, arguments(tmp_path, "run", "skip"))
        == [(0, list(range(1, STEPS + 1)))] * world
    )
    assert updates(tmp_path / "run" / "checkpoint" / "14") == STEPS - 1
    found = records(tmp_path / "run")
    assert [
        step for step, record in found.items() if record["spikes"] or record["skipped_iters"]
    ] == [8]
    assert (
        found[8]["language_model_loss"] > found[7]["language_model_loss"] + 0.2
    )  # the loss of the spike is logged
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    assert (
        "Step 8 is a spike: loss " in said
        and "(median and deviations of 5 steps): its update was skipped." in said
    )
    # Killed between the checkpoint and the spike: the window is the checkpoint's.
    assert (
        spawn(world, spiking, arguments(tmp_path, "parts", "skip"), BAD, 7)
        == [("", list(range(1, 8)))] * world
    )
    assert (
        spawn(world, spiking, arguments(tmp_path, "parts", "skip"))
        == [(0, list(range(7, STEPS + 1)))] * world
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")
    assert weights(tmp_path / "parts" / "checkpoint" / "14") == weights(
        tmp_path / "run" / "checkpoint" / "14"
    )
    # The same steps without a spike are the same bits with and without a policy.
    for policy in ("none", "rewind"):
        assert (
            spawn(world, spiking, arguments(tmp_path, policy, policy), ())
            == [(0, list(range(1, STEPS + 1)))] * world
        )
    assert losses(tmp_path / "none") == losses(tmp_path / "rewind")
    one, other = (weights(tmp_path / policy / "checkpoint" / "14") for policy in ("none", "rewind"))
    assert one == other != weights(tmp_path / "run" / "checkpoint" / "14")


@pytest.mark.parametrize("world", some_fast([1, 2], (2).__eq__))
def test_rewind(tmp_path: Path, world: int) -> None:
    write_tokens(tmp_path / "tokens", 400)
    # Back from step 8 to the checkpoint of step 6, on with batch 9: step 12 has batch 14, and is a
    # spike again.
    order = list(range(1, 20))
    bad = (8, 14)
    assert spawn(world, spiking, arguments(tmp_path, "run", "rewind"), bad) == [(0, order)] * world
    info = folder.verify(tmp_path / "run" / "checkpoint" / "14").info
    assert info["passed_over"] == [
        {"after": 6, "spike": 8, "sequences": 2 * BATCH},
        {"after": 9, "spike": 12, "sequences": 3 * BATCH},
    ]
    assert info["updates"] == STEPS and info["samples"] == (STEPS + 5) * BATCH
    assert [path.name for path in sorted((tmp_path / "run" / "export" / "llama").iterdir())] == [
        "14",
        "7",
    ]
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    assert (
        "5 steps): rewinding to checkpoint 6; training continues with the data after the spike."
        in said
    )
    # Killed before the first spike; after the rewind and before a checkpoint; and after one: the
    # same each time. A run that is asked to stop at the spike leaves no checkpoint of a step that
    # will be undone.
    for begin, kill_at, code in ((0, 7, ""), (6, 4, ""), (6, -1, 143), (6, 6, "")):
        expected = [(code, order[begin : begin + (kill_at if kill_at > 0 else 2)])] * world
        assert (
            spawn(world, spiking, arguments(tmp_path, "parts", "rewind"), bad, kill_at) == expected
        )
    assert (
        spawn(world, spiking, arguments(tmp_path, "parts", "rewind"), bad)
        == [(0, order[11:])] * world
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")
    for part in ("checkpoint", "export/llama"):
        assert weights(tmp_path / "parts" / part / "14") == weights(tmp_path / "run" / part / "14")


def test_inspect_step_knows_skipped_ranges(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    arguments_ = arguments(tmp_path, "run", "rewind")
    # steps 7 and 8 again, without a checkpoint since
    (killed,) = spawn(1, spiking, arguments_, BAD, 10)
    assert killed == ("", [*range(1, 9), 9, 10])
    reported = {step: inspect_step(str(tmp_path / "run"), step).as_text() for step in (6, 7, 8)}
    assert next(line for line in reported[6] if line.startswith("sequence")) == "sequence 40"
    for step, first in ((7, 64), (8, 72)):
        expected = [f"sequence {first + i}" for i in range(BATCH)]
        assert [line for line in reported[step] if line.startswith("sequence")] == expected
        assert (
            "steps 7 to 8, a spike, were undone; the run continued with later data"
            in reported[step][1]
        )
    assert spawn(1, spiking, arguments_) == [(0, [*range(7, 9), *range(9, 17)])]
    assert {
        step: inspect_step(str(tmp_path / "run"), step).as_text() for step in (6, 7, 8)
    } == reported
    assert (
        next(
            line
            for line in inspect_step(str(tmp_path / "run"), 14).as_text()
            if line.startswith("sequence")
        )
        == f"sequence {15 * BATCH}"
    )


def test_stop_and_too_many_rewinds(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    for policy, sentence in (
        (
            "stop",
            "Its update was not applied. Look at the step's data with `fast-llm why`",
        ),
        (
            "rewind",
            "The run was rewound 1 times already (training.spikes.max_rewinds). Look at the data"
            " of these steps",
        ),
    ):
        how = arguments(tmp_path, policy, policy, "training.spikes.max_rewinds=1")
        results = spawn(2, spiking, how, (8, 10))
        assert results[0] == results[1] and str(results[0][0]).startswith(
            "Step 8 is a spike: loss "
        )
        assert sentence in str(results[0][0])
        assert str(results[0][0]).endswith(
            " Checkpoint 6 is complete: the same command continues from it."
        )
        newest = folder.latest(tmp_path / policy / "checkpoint")
        assert newest is not None and newest.name == "6"


def test_a_run_that_begins_with_too_many_rewinds_stops() -> None:
    """As a branch of a run that was rewound more often than the branch allows."""
    config = SpikesConfig(policy="rewind", max_rewinds=2)
    for rewinds in (2, 3, 50):
        with pytest.raises(TrainingStopped, match=f"rewound {rewinds} times already"):
            handle_spike(config, 9, "loss", rewinds, lambda: Path("6"))
    assert handle_spike(config, 9, "loss", 1, lambda: Path("6")) == Path("6")


def test_where_there_is_no_checkpoint_the_step_is_skipped(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    how = arguments(tmp_path, "run", "rewind", "training.checkpoint.interval=14")
    assert spawn(1, spiking, how) == [(0, list(range(1, STEPS + 1)))]
    assert updates(tmp_path / "run" / "checkpoint" / "14") == STEPS - 1
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    assert "5 steps); there is no checkpoint to rewind to: its update was skipped." in said


def test_where_a_step_begins() -> None:
    passed: list[dict[str, int]] = [
        {"after": 4, "spike": 6, "sequences": 20},
        {"after": 4, "spike": 5, "sequences": 10},
        {"after": 8, "spike": 9, "sequences": 10},
    ]
    source = SourceState(name="a", digest="a", key=0)
    order = DataOrder(index=0, sequence_length=8, seed=0, data={}, edges=[0, 1], sources=[source])
    history = History(batches=[BatchSizeEntry(after=0, index=0, batch_size=10)], orders=[order])
    starts = [history.first_sequence(step, passed) for step in range(1, 11)]
    assert starts == [0, 10, 20, 30, 70, 80, 90, 100, 120, 130]
    assert all(one < other for one, other in pairwise(starts))
