"""One step: sums for the log that go with its reduction."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fast_llm.model.decoder import Head
from fast_llm.training.step import StepResult
from fast_llm.training.trainer import Trainer
from tests.helpers import slow, spawn
from tests.training.runs import losses, run, settings, write_tokens


def run_with_sums(arguments: list[str]) -> list[dict[str, list[float]]]:
    """Train while every head counts labels; the sums of each step."""
    found: list[dict[str, list[float]]] = []
    run_step, forward = Trainer.run_step, Head.__call__
    count = torch.zeros(2, dtype=torch.float64)

    def counted(head: Head, hidden: Any, labels: Any = None) -> Any:
        if labels is not None:
            count.add_(torch.tensor([1, int((labels != -100).sum())]))
        return forward(head, hidden, labels)

    def with_sums(trainer: Trainer, *given: Any) -> StepResult:
        trainer.train_step.sums["count"] = count
        trainer.train_step.sums["more"] = torch.full((), 7.0)
        result = run_step(trainer, *given)
        found.append({"targets": [result.targets], **result.sums})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_step", with_sums)
        patch.setattr(Head, "__call__", counted)
        assert run(arguments) == 0
    return found


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, []),
        (2, ["model.distributed.tensor_parallel=2"]),
        pytest.param(2, [], marks=slow),
        pytest.param(2, ["model.distributed.sequence_data_parallel=2"], marks=slow),
        pytest.param(2, ["model.distributed.pipeline_parallel=2"], marks=slow),
    ],
)
def test_further_sums_count_every_token_once(
    tmp_path: Path, processes: int, layout: list[str]
) -> None:
    """Also while a corruption check computes losses again; and training stays as it is."""
    write_tokens(tmp_path / "tokens")
    common = settings(
        tmp_path, "training.train_iters=3", "training.double_check.interval=2", *layout
    )
    spawn(processes, run, common)
    with_sums = [*common, f"run.experiment_dir={tmp_path}/sums"]
    steps = spawn(processes, run_with_sums, with_sums)
    assert all(each == steps[0] for each in steps) and len(steps[0]) == 3
    context = 2 if "model.distributed.sequence_data_parallel=2" in layout else 1
    for found in steps[0]:
        assert found["count"] == [4.0 * context, *found["targets"]]
        assert found["more"] == [0.0]  # set to 0 at the beginning of the step
    assert losses(tmp_path / "sums") == losses(tmp_path / "run")
