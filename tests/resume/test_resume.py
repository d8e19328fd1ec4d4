"""An interrupted run ends with the bits of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from fast_llm.checkpoint import folder
from fast_llm.checkpoint.folder import MANIFEST
from fast_llm.errors import ConfigError
from fast_llm.model import linear
from fast_llm.model.decoder import CausalLM
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel import parallelize
from fast_llm.parallel.single import SingleWeights
from fast_llm.training import job
from fast_llm.training.trainer import Trainer
from tests.helpers import some_fast, spawn
from tests.training.runs import losses, records, run, settings, tell, weights, write_tokens


def arguments(root: Path, name: str, steps: int, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={steps}",
        "training.validation.interval=4",
        "training.validation.iterations=1",
        "training.checkpoint.interval=2",
        "training.checkpoint.keep=2",
        "training.export.interval=4",
        "optimizer.learning_rate.decay_style=cosine",
        "optimizer.learning_rate.decay_iterations=8",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


@pytest.mark.parametrize(
    ("world", "zero_stage", "dtype", "moments"),
    some_fast(
        [
            *(
                (world, stage, dtype, "auto")
                for dtype in ("fp32", "bf16")
                for world, stage in ((1, 1), (2, 1), (2, 2), (2, 3))
            ),
            (1, 1, "fp32", "int8"),
            (3, 3, "bf16", "int8"),
        ],
        lambda one: one[0] == 1 or one[:3] == (2, 3, "fp32"),
    ),
)
def test_four_and_four_steps_are_eight(
    tmp_path: Path, world: int, zero_stage: int, dtype: str, moments: str
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    how = (
        f"model.multi_stage.zero_stage={zero_stage}",
        f"model.distributed.training_dtype={dtype}",
        f"optimizer.moments_dtype={moments}",
    )
    assert spawn(world, run, arguments(tmp_path, "uninterrupted", 8, *how)) == [0] * world
    for steps in (4, 8):
        assert spawn(world, run, arguments(tmp_path, "parts", steps, *how)) == [0] * world
    assert losses(tmp_path / "uninterrupted") == losses(tmp_path / "parts")
    assert losses(tmp_path / "uninterrupted", "validation") == losses(
        tmp_path / "parts", "validation"
    )
    uninterrupted, parts = (
        weights(tmp_path / name / "checkpoint" / "8") for name in ("uninterrupted", "parts")
    )
    assert uninterrupted == parts and len(uninterrupted) >= 3 * 20
    exports = [
        tmp_path / name / "export" / "llama" / "8" / "model.safetensors"
        for name in ("uninterrupted", "parts")
    ]
    assert exports[0].read_bytes() == exports[1].read_bytes()


def with_split_masters(arguments_: list[str], rounded: bool = False) -> int:
    """As on a GPU: split masters, and moments in bf16 or in 8 bits.

    `rounded`: round the head's gradient, as unsplit masters do.
    """

    def in_halves(
        model: CausalLM, dtype: torch.dtype, device: torch.device, fuse_grad_accumulation: bool
    ) -> SingleWeights:
        assert not fuse_grad_accumulation  # not on a CPU
        made = SingleWeights(model, dtype, device, fuse_grad_accumulation=True)
        if rounded:
            model.lm_head.main_grad = None
        return made

    parallelize.SingleWeights = in_halves  # type: ignore[assignment, attr-defined]
    before = Optimizer.__init__

    def counted(self: Optimizer, *args: object, **kwargs: object) -> None:
        before(self, *args, **kwargs)  # type: ignore[arg-type]
        assert self.master_low_bits and self.exp_avg["model.norm.weight"].dtype in (
            torch.bfloat16,
            torch.int8,
        )

    Optimizer.__init__ = counted  # type: ignore[method-assign]
    return run(arguments_)


def rounding(function: Callable[[list[str]], int], arguments_: list[str]) -> int:
    """Run with matmuls rounded to bf16, as on a processor with bf16 instructions.

    Without them, the gradients of split masters are added to their sums unrounded, while those of
    fp32 masters are rounded: from step 2 on the losses differ by 4e-4.
    """
    with linear.upcasting():
        return function(arguments_)


@pytest.mark.parametrize("moments", some_fast(["bf16", "int8"], "int8".__eq__))
def test_split_masters(tmp_path: Path, moments: str) -> None:
    """Split masters survive checkpoints and exports bit for bit, and train as fp32 masters."""
    write_tokens(tmp_path / "tokens", 400)
    how = ["model.distributed.training_dtype=bf16", f"optimizer.moments_dtype={moments}"]
    assert spawn(1, rounding, run, arguments(tmp_path, "plain", 8, *how)) == [0]
    assert spawn(
        1,
        rounding,
        partial(with_split_masters, rounded=True),
        arguments(tmp_path, "rounded", 8, *how),
    ) == [0]
    assert spawn(
        1, rounding, with_split_masters, arguments(tmp_path, "uninterrupted", 8, *how)
    ) == [0]
    for steps in (4, 8):
        assert spawn(
            1, rounding, with_split_masters, arguments(tmp_path, "parts", steps, *how)
        ) == [0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "uninterrupted")
    for part in ("checkpoint", "export/llama"):
        assert weights(tmp_path / "uninterrupted" / part / "8") == weights(
            tmp_path / "parts" / part / "8"
        )
    # One weight in 65,536 is halfway between two bf16 numbers and is rounded the other way. From
    # then on losses differ by less than bf16's rounding, 2^-9.
    rounded, plain = losses(tmp_path / "rounded"), losses(tmp_path / "plain")
    assert (rounded[1], rounded[2]) == (plain[1], plain[2])
    assert rounded == pytest.approx(plain, rel=1e-3)
    assert losses(tmp_path / "uninterrupted") != rounded
    assert losses(tmp_path / "uninterrupted") == pytest.approx(plain, rel=1e-3)


def test_fp8_trains_as_bf16_does(tmp_path: Path) -> None:
    """On one process and sharded, compiled or not, to the same curve but for the noise of three
    bits; and a resumed run continues with the same bits.
    """
    write_tokens(tmp_path / "tokens", 400)
    transformer = "model.base_model.transformer"
    sizes = [
        f"{transformer}.hidden_size=64",
        f"{transformer}.ffn_hidden_size=96",
        f"{transformer}.kv_channels=16",
    ]
    how = [*sizes, "batch.sequence_length=32", "model.distributed.training_dtype=bf16"]
    fp8 = [*how, "model.distributed.fp8=yes"]
    assert spawn(1, run, arguments(tmp_path, "bf16", 8, *how)) == [0]
    assert spawn(1, run, arguments(tmp_path, "fp8", 8, *fp8)) == [0]
    for steps in (4, 8):
        assert spawn(1, run, arguments(tmp_path, "parts", steps, *fp8)) == [0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "fp8")
    assert spawn(
        1, with_split_masters, arguments(tmp_path, "split", 8, *fp8, "optimizer.moments_dtype=bf16")
    ) == [0]
    assert spawn(
        2, run, arguments(tmp_path, "sharded", 8, *fp8, "model.multi_stage.zero_stage=3")
    ) == [0, 0]
    exact = losses(tmp_path / "bf16")
    assert losses(tmp_path / "fp8") != exact
    for name in ("fp8", "split", "sharded"):
        # Of the 20 % that are learned; Adam's first steps follow the signs of gradients, and those
        # of small ones change.
        assert losses(tmp_path / name) == pytest.approx(exact, rel=0.02), name


def test_what_is_auto_is_written_down_and_kept(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    auto = ["batch.micro_batch_size=auto", "optimizer.moments_dtype=auto"]
    assert spawn(1, run, arguments(tmp_path, "uninterrupted", 8, "batch.micro_batch_size=8")) == [0]
    assert spawn(1, run, arguments(tmp_path, "parts", 4, *auto)) == [0]
    decided = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert (decided["batch"]["micro_batch_size"], decided["optimizer"]["moments_dtype"]) == (
        8,
        "fp32",
    )
    assert spawn(1, run, arguments(tmp_path, "parts", 8, *auto)) == [0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "uninterrupted")
    # The resumed run keeps its dtype, not the one that this machine would get.
    assert spawn(1, run, arguments(tmp_path, "bf16", 4, "optimizer.moments_dtype=bf16")) == [0]
    assert spawn(1, run, arguments(tmp_path, "bf16", 8, *auto)) == [0]
    assert (
        yaml.safe_load((tmp_path / "bf16" / "config.yaml").read_text())["optimizer"][
            "moments_dtype"
        ]
        == "bf16"
    )
    logs = (tmp_path / "parts" / "runs").rglob("*")
    text = "".join(path.read_text() for path in logs if path.is_file())
    assert "Memory by forecast: " in text and " → auto" not in text and "fp32 → bf16" not in text


def too_little(arguments_: list[str]) -> int:
    job._device_memory = lambda mesh: 1e6
    return run(arguments_)


def test_too_little_memory_is_reported(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(1, too_little, arguments(tmp_path, "run", 1)) == [0]
    text = "".join(
        path.read_text() for path in (tmp_path / "run" / "runs").rglob("*") if path.is_file()
    )
    assert (
        "of 1 MB a process: it will probably not fit. batch.micro_batch_size: auto, or `fast-llm"
        " plan`, finds what fits." in text
    )


def test_other_layouts_continue_with_the_same_data(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(1, run, arguments(tmp_path, "uninterrupted", 8)) == [0]
    for world, zero_stage, shard_size, steps in (
        (2, 3, 2, 2),
        (4, 1, 2, 4),
        (1, 1, 2, 6),
        (2, 2, 1, 8),
    ):
        how = (
            f"model.multi_stage.zero_stage={zero_stage}",
            f"model.multi_stage.shard_size={shard_size}",
        )
        assert spawn(world, run, arguments(tmp_path, "parts", steps, *how)) == [0] * world
    expected, found = losses(tmp_path / "uninterrupted"), losses(tmp_path / "parts")
    assert expected.keys() == found.keys()
    # Sums over the batch are taken in another order: 6e-8 an addition, magnified a little by eight
    # updates of Adam.
    assert all(abs(found[step] - loss) < 2e-6 * loss for step, loss in expected.items())
    exports = [
        tmp_path / name / "export" / "llama" / "4" / "model.safetensors"
        for name in ("uninterrupted", "parts")
    ]
    assert exports[0].stat().st_size == exports[1].stat().st_size


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    run(arguments(tmp_path, "uninterrupted", 8))
    run(arguments(tmp_path, "parts", 4))
    newest = next((tmp_path / "parts" / "checkpoint" / "4").glob("*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    run(arguments(tmp_path, "parts", 8))
    assert "checkpoint/2, after step 2" in capsys.readouterr().out
    assert losses(tmp_path / "uninterrupted") == losses(tmp_path / "parts")
    # If no checkpoint is left, the run does not start from the beginning.
    for checkpoint in (tmp_path / "parts" / "checkpoint").iterdir():
        (checkpoint / MANIFEST).write_text("{}")
    with pytest.raises(
        ConfigError, match=r"no checkpoint in .*/parts/checkpoint is usable \(of 2; .*start over"
    ):
        run(arguments(tmp_path, "parts", 12))


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "fast_llm.cli", "train", "gpt", *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "number",
    some_fast([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], signal.SIGTERM.__eq__),
)
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    write_tokens(tmp_path / "tokens", 400)
    arguments_ = arguments(
        tmp_path,
        "run",
        5000,
        "training.checkpoint.interval=5000",
        "training.validation.interval=5000",
    )
    with subprocess.Popen(
        command(arguments_), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for(tmp_path / "run", 3, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == (0 if number == signal.SIGUSR1 else 128 + number)
    assert "Stopped by a signal after step" in output
    newest = folder.latest(tmp_path / "run" / "checkpoint")
    assert newest is not None and int(newest.name) == max(losses(tmp_path / "run"))


def wait_for(run_folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a run has written a step's record."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run_folder / "metrics.jsonl").exists() and max(records(run_folder), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get that far")


def signalled_after_three_steps(arguments_: list[str], number: signal.Signals) -> int:
    before = Trainer.check_finite

    def signalled(trainer: Trainer, step: int) -> None:
        before(trainer, step)
        if step == 3 and os.environ.get("RANK", "1") == "1":
            tell(trainer, number)

    Trainer.check_finite = signalled  # type: ignore[method-assign, assignment]
    return run(arguments_)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]
)
def test_all_leave_as_the_one_that_was_signalled(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """torchrun takes a node whose processes return 0 for finished."""
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(2, signalled_after_three_steps, arguments(tmp_path, "run", 8), number) == [
        code,
        code,
    ]
    newest = folder.latest(tmp_path / "run" / "checkpoint")
    assert newest is not None and newest.name == "4"


def test_what_was_broken_off_is_done_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops at step 4, where a validation and an export are due."""
    write_tokens(tmp_path / "tokens", 400)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "check_finite", Trainer.check_finite)
        assert signalled_after_three_steps(arguments(tmp_path, "run", 8), signal.SIGTERM) == 143
    newest = folder.latest(tmp_path / "run" / "checkpoint")
    assert newest is not None and newest.name == "4"
    assert (
        4 not in losses(tmp_path / "run", "validation")
        and not (tmp_path / "run" / "export").exists()
    )
    assert run(arguments(tmp_path, "run", 8)) == 0
    assert set(losses(tmp_path / "run", "validation")) == {0, 4, 8}
    assert [step for step, _ in folder.find(tmp_path / "run" / "export" / "llama")] == [4, 8]


def test_a_finished_run_writes_what_is_due_and_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert (
        run(
            arguments(
                tmp_path,
                "run",
                4,
                "training.export.interval=null",
                "training.validation.interval=null",
                "training.validation.iterations=null",
            )
        )
        == 0
    )
    assert not (tmp_path / "run" / "export").exists()
    assert run(arguments(tmp_path, "run", 4)) == 0
    assert (tmp_path / "run" / "export" / "llama" / "4" / "config.json").exists()
    assert 4 in losses(tmp_path / "run", "validation")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    # A kill while the last checkpoint but one is deleted, and one in an export.
    left = [
        tmp_path / "run" / name
        for name in ("checkpoint/.2.deleted-0123abcd", "export/llama/.4.partial-0123abcd")
    ]
    for folder_ in left:
        folder_.mkdir()
    assert run(arguments(tmp_path, "run", 4)) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert not any(folder_.exists() for folder_ in left)
    assert "Training is complete" in capsys.readouterr().out
