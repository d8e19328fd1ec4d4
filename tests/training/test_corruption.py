"""A flipped bit is found and named, and correct state is not suspected.

tests/layouts/test_layouts.py checks the latter over all layouts.
"""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from fast_llm import cli
from fast_llm.checkpoint import folder
from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.errors import TrainingStopped
from fast_llm.model.batch import Batch
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.single import SingleWeights
from fast_llm.training.corruption import Report, digest, find_differences, find_nonfinite_state
from fast_llm.training.step import TrainStep
from fast_llm.training.trainer import Trainer
from tests.helpers import spawn
from tests.training.runs import losses, run, settings, weights, write_tokens

HOST = socket.gethostname()
NORM = "model.layers.1.input_layernorm.weight"


def arguments(root: Path, name: str, *further: str) -> list[str]:
    return settings(
        root,
        "training.train_iters=6",
        "training.checkpoint.interval=3",
        "training.double_check.interval=2",
        "batch.batch_size=12",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


def flip(tensor: Tensor, bit: int = 3) -> None:
    """Flip one bit of the last element."""
    dtype = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    tensor.detach().view(dtype).flatten()[-1:].bitwise_xor_(1 << bit)


def in_weight(trainer: Trainer) -> None:
    flip(trainer.checkpoints.weights.local()[NORM])


def in_moment(trainer: Trainer) -> None:
    flip(trainer.train_step.optimizer.exp_avg_sq["model.norm.weight"])


def in_counter(trainer: Trainer) -> None:
    trainer.train_step.optimizer.updates += 1


def in_loss(trainer: Trainer) -> None:
    """From now on, each pass without gradients differs by another bit."""
    before, times = trainer.train_step.loss, 0

    def wrong(micro_batches: Sequence[Batch]) -> Tensor:
        nonlocal times
        times += 1
        return before(micro_batches) + times * 1e-6

    trainer.train_step.loss = wrong  # type: ignore[method-assign]


def in_training(trainer: Trainer) -> None:
    """From now on, the training pass is wrong."""
    before = TrainStep.forward_backward

    def wrong(self: TrainStep, batches: Sequence[Batch], seed: float) -> Tensor:
        loss = before(self, batches, seed)
        self.first_loss += 1e-6
        return loss

    TrainStep.forward_backward = wrong  # type: ignore[method-assign, assignment]


def in_gathered(trainer: Trainer) -> None:
    """From now on, a gathered weight of this process is wrong."""
    before = trainer.train_step.loss

    def wrong(micro_batches: Sequence[Batch]) -> Tensor:
        loss = before(micro_batches)
        gathered = trainer.checkpoints.weights.models[0].model.layers["1"].mlp.up_proj.weight  # type: ignore
        flip(gathered)
        return loss

    trainer.train_step.loss = wrong  # type: ignore[method-assign]


def in_working(trainer: Trainer) -> None:
    assert isinstance(trainer.checkpoints.weights, SingleWeights)
    flip(trainer.checkpoints.weights.working["lm_head.weight"])


def flipping(arguments_: list[str], fault: Callable[[Trainer], None], rank: str) -> int:
    """A run, started by the command line, in which a process computes wrongly after step 3."""
    check = Trainer.check_finite

    def faulty(trainer: Trainer, step: int) -> None:
        check(trainer, step)
        if step == 3 and os.environ["RANK"] == rank:
            fault(trainer)

    Trainer.check_finite = faulty  # type: ignore[method-assign, assignment]
    return cli.main(["train", "gpt", *arguments_])


COPIES = "model.multi_stage.shard_size=1"
UNTIED = "model.base_model.tie_word_embeddings=no"
BF16 = "model.distributed.training_dtype=bf16"
FAULTS: list[tuple[Any, int, str, list[str], str]] = [
    (
        in_weight,
        3,
        "1",
        [COPIES],
        f"rank 1 on {HOST}: weight of {NORM} (part 0) is not what the 2 other processes hold",
    ),
    (
        in_weight,
        2,
        "1",
        [COPIES],
        f"weight of {NORM} (part 0) is not the same on rank 0 on {HOST}, rank 1 on {HOST}",
    ),
    (
        in_weight,
        2,
        "0",
        ["model.distributed.tensor_parallel=2"],
        f"weight of {NORM} (part 0) is not the same on rank 0 on {HOST}, rank 1 on {HOST}",
    ),
    (
        in_moment,
        3,
        "2",
        [COPIES],
        f"rank 2 on {HOST}: exp_avg_sq of model.norm.weight (part 0) is not what the 2 other"
        " processes hold",
    ),
    (
        in_counter,
        3,
        "0",
        [],
        f"rank 0 on {HOST}: the number of updates is not what the 2 other processes hold",
    ),
    (
        in_loss,
        2,
        "1",
        [],
        f"rank 1 on {HOST}: the loss of the same micro-batch was computed twice and is ",
    ),
    (in_training, 2, "1", [], f"rank 1 on {HOST}: the loss of a micro-batch was "),
    (
        in_loss,
        1,
        "0",
        [],
        f"rank 0 on {HOST}: the loss of the same micro-batch was computed twice and is ",
    ),
    (
        in_gathered,
        3,
        "1",
        [BF16],
        f"rank 1 on {HOST}: gathered model.layers.1.mlp.up_proj.weight is not what the 2 other"
        " processes hold",
    ),
    (
        in_working,
        1,
        "0",
        [BF16, UNTIED],
        f"rank 0 on {HOST}: lm_head.weight is not the rounded fp32 weight",
    ),
]


@pytest.mark.parametrize(
    ("fault", "world", "rank", "how", "reported"),
    FAULTS,
    ids=[f"{f[0].__name__} {f[1]}" + "".join(f[3]) for f in FAULTS],
)
def test_what_is_wrong_is_named(
    tmp_path: Path,
    fault: Callable[[Trainer], None],
    world: int,
    rank: str,
    how: list[str],
    reported: str,
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(world, flipping, arguments(tmp_path, "run", *how), fault, rank) == [1] * world
    (log, *_) = sorted((tmp_path / "run" / "runs" / "0" / "logs").glob("logs_rank_*.txt"))
    said = log.read_text()
    assert "Corruption check at step 2: " in said and "values are consistent" in said
    assert f"Corruption check at step 4: {reported}" in said
    # The update of step 4 was not applied.
    assert "step 3/6  loss" in said and "step 4/6  loss" not in said
    newest = folder.latest(tmp_path / "run" / "checkpoint")
    assert newest is not None and newest.name == "3"


def test_it_changes_nothing(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    how = (COPIES, "model.multi_stage.zero_stage=2", "model.distributed.training_dtype=bf16")
    for name, interval in (("checked", "1"), ("plain", "null")):
        given = arguments(tmp_path, name, *how, f"training.double_check.interval={interval}")
        assert spawn(2, run, given) == [0, 0]
    assert losses(tmp_path / "checked") == losses(tmp_path / "plain")
    one, other = (weights(tmp_path / name / "checkpoint" / "6") for name in ("checked", "plain"))
    assert one == other
    said = (tmp_path / "checked" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    assert said.count("values are consistent") == 6 and "only the latter are compared" not in said


def other_kernels(arguments_: list[str]) -> int:
    """Training's loss always has other bits than a pass without gradients."""
    in_training(None)  # type: ignore[arg-type]
    return run(arguments_)


def test_passes_that_differ_by_their_kernels_are_no_fault(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(2, other_kernels, arguments(tmp_path, "run")) == [0, 0]
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_1.txt").read_text()
    assert (
        said.count("only the latter are compared") == 1 and said.count("values are consistent") == 3
    )


def test_every_element_counts() -> None:
    values = torch.randn(1000)
    before = digest(values)
    found = set()
    for at in range(0, 1000, 7):
        for bit in (0, 13, 31):
            values.view(torch.int32)[at] ^= torch.tensor(
                1 << bit if bit < 31 else -(2**31), dtype=torch.int32
            )
            found.add(digest(values))
            values.view(torch.int32)[at] ^= torch.tensor(
                1 << bit if bit < 31 else -(2**31), dtype=torch.int32
            )
    assert before not in found and len(found) == 143 * 3
    assert digest(values) == before != digest(values.flip(0))
    assert digest(values.bfloat16()) == digest(values.bfloat16().view(50, 20))


def test_the_odd_one_out() -> None:
    reports = [
        Report(f"node{rank}", [], {"a": 1, "b": rank % 2, **({"c": 5} if rank else {})})
        for rank in range(4)
    ]
    assert find_differences(reports) == [
        "b is not the same on rank 0 on node0, rank 1 on node1, rank 2 on node2, rank 3 on node3"
    ]
    reports[2].replicated.update(b=1, c=6)
    assert find_differences(reports) == [
        "rank 0 on node0: b is not what the 3 other processes hold",
        "rank 2 on node2: c is not what the 2 other processes hold",
    ]


@pytest.mark.parametrize(
    ("part", "value", "reported"),
    [
        ("weight", float("nan"), "holds NaN or infinities"),
        ("exp_avg", -float("inf"), "holds NaN or infinities"),
        (
            "exp_avg_sq",
            float("inf"),
            "holds NaN or infinities",
        ),  # the step's numbers stay finite: this weight's updates become 0
        ("exp_avg_sq", -1e-6, ", averages of squares, holds numbers below zero"),
    ],
)
def test_what_no_update_makes_is_neither_saved_nor_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float, reported: str
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    after = Trainer.check_finite

    def changed(self: Trainer, step: int) -> None:
        after(self, step)
        if step == 5:
            optimizer = self.train_step.optimizer
            tensors = (
                self.checkpoints.weights.local() if part == "weight" else getattr(optimizer, part)
            )
            tensors["model.norm.weight"][3] = value

    monkeypatch.setattr(Trainer, "check_finite", changed)
    for due in ("training.export.interval=5", "training.checkpoint.interval=5"):
        how = arguments(
            tmp_path,
            part,
            "training.checkpoint.interval=3",
            "training.double_check.interval=null",
            due,
        )
        with pytest.raises(TrainingStopped) as error:
            run(how)
        what = "exported" if "export" in due else "saved"
        assert str(error.value).startswith(
            f"step 5: rank 0 on {HOST}: {part} of"
            f" model.norm.weight{'' if reported[0] == ',' else ' '}{reported}. It was not {what}. "
        )
        assert "Checkpoint 3 is complete: the same command continues from it." in str(error.value)
        assert [path.name for path in (tmp_path / part / "checkpoint").iterdir()] == ["3"]
        assert not list((tmp_path / part / "export" / "llama").glob("*"))


def test_steps_that_are_not_finite_tell_whether_the_weights_are_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    after = Trainer.check_finite

    def changed(self: Trainer, step: int) -> None:
        after(self, step)
        if step == 2:
            self.checkpoints.weights.local()["model.norm.weight"][3] = float("nan")

    monkeypatch.setattr(Trainer, "check_finite", changed)
    how = arguments(
        tmp_path, "run", "training.checkpoint.interval=6", "optimizer.max_nonfinite_steps=2"
    )
    with pytest.raises(
        TrainingStopped,
        match=r"^step 4: rank 0 on .*: weight of model.norm.weight holds NaN or infinities\. No",
    ):
        run([*how, "training.double_check.interval=null"])


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_what_no_update_makes(moments: Literal["fp32", "bf16", "int8"], fault: float) -> None:
    weights = {"a": torch.ones(300), "b": torch.ones(4), "none of it here": torch.ones(0)}
    optimizer = Optimizer(weights, OptimizerConfig(moments_dtype=moments))
    step = cast(
        TrainStep,
        SimpleNamespace(optimizer=optimizer, weights=SimpleNamespace(local=lambda: weights)),
    )
    gradients = {name: torch.full_like(weight, 1e18) for name, weight in weights.items()}
    optimizer.step(gradients, 1e-3, 1.0)
    assert find_nonfinite_state(step) == []
    gradients["a"][200] = fault
    optimizer.step(gradients, 1e-3, 1.0)
    assert find_nonfinite_state(step) == [
        f"{part} of a holds NaN or infinities" for part in ("weight", "exp_avg", "exp_avg_sq")
    ]
