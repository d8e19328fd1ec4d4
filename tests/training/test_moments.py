"""Training with low-precision moments: any layout and any dtype reads their checkpoints.

Loss curves are in test_curves.py.
"""

from pathlib import Path
from shutil import copytree

import pytest
import torch

from fast_llm.checkpoint import folder, state
from fast_llm.config.document import read
from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.models.parameters import shapes
from fast_llm.optim.optimizer import Optimizer
from tests.helpers import spawn
from tests.training.runs import MODEL, losses, run, run_all, settings, write_tokens

DTYPES = ("fp32", "bf16", "int8")


def arguments(root: Path, name: str, steps: int, moments: str, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={steps}",
        "training.checkpoint.interval=1000",
        f"optimizer.moments_dtype={moments}",
        "optimizer.learning_rate.base=3e-3",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


def test_any_layout_reads_the_same_moments(tmp_path: Path) -> None:
    """A shard's blocks of 8-bit moments start elsewhere than an unsharded weight's.

    The values are the same, and quantized values and scales once they were read.
    """
    write_tokens(tmp_path / "tokens", 400)
    given = arguments(tmp_path, "sharded", 4, "int8", "model.multi_stage.zero_stage=3")
    assert spawn(3, run, given) == [0, 0, 0]
    saved = folder.latest(tmp_path / "sharded" / "checkpoint")
    assert saved is not None
    sizes = shapes(validate(TrainConfig, read(None, MODEL)).model.base_model)
    whole = {
        f"{part}/{name}": torch.empty(size)
        for part in ("exp_avg", "exp_avg_sq")
        for name, size in sizes.items()
    }
    state.load(saved, whole)
    optimizer = Optimizer(
        {name: torch.zeros(size) for name, size in sizes.items()},
        OptimizerConfig(moments_dtype="int8"),
    )
    for _ in range(2):
        with optimizer.moments(changed=True) as moments:
            parts = zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
            tensors = {
                f"{part}/{name}": tensor
                for part, numbers in parts
                for name, tensor in numbers.items()
            }
            state.load(saved, tensors)
        with optimizer.moments() as (first, second):
            for name in sizes:
                assert (
                    torch.equal(first[name].float(), whole[f"exp_avg/{name}"]) and first[name].any()
                )
                assert (
                    torch.equal(second[name].float(), whole[f"exp_avg_sq/{name}"])
                    and second[name].any()
                )


def test_runs_resume_with_other_moments(tmp_path: Path) -> None:
    """From each dtype to each other, and to another layout."""
    write_tokens(tmp_path / "tokens", 400)
    begun = [arguments(tmp_path, moments, 4, moments) for moments in DTYPES]
    assert spawn(2, run_all, [*begun, arguments(tmp_path, "whole", 8, "fp32")]) == [[0] * 4] * 2
    expected = losses(tmp_path / "whole")
    every = []
    for before in DTYPES:
        for after in DTYPES:
            copytree(
                tmp_path / before / "checkpoint", tmp_path / f"{before} {after}" / "checkpoint"
            )
            every.append(arguments(tmp_path, f"{before} {after}", 8, after))
    assert spawn(1, run_all, every) == [[0] * len(every)]
    for before in DTYPES:
        for after in DTYPES:
            found = losses(tmp_path / f"{before} {after}")
            assert found.keys() == {5, 6, 7, 8}
            assert found == {step: pytest.approx(expected[step], rel=1e-3) for step in found}
