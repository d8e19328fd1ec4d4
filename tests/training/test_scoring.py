"""Log-probabilities of continuations from the weights in memory: those of transformers, bit for bit
the same however the requests come, in every layout.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fast_llm.config.document import read
from fast_llm.planning.preflight import preflight
from fast_llm.training import job
from fast_llm.training.scoring import Request, pack
from fast_llm.training.trainer import Trainer
from tests.helpers import some_fast, spawn
from tests.training.runs import MODEL, write_tokens

LENGTH = 24


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(45):
        tokens = random.integers(0, 128, int(random.integers(2, LENGTH + 2))).tolist()
        made.append(Request(tokens, int(random.integers(1, len(tokens)))))
    made += [Request([5, 6, 7, token], 1) for token in range(128)]  # one is the most likely
    return made


def settings(root: Path, *further: str) -> list[str]:
    return [
        *MODEL,
        "model.base_model.init_method_std_embed=1",
        f"data.path={root}/tokens",
        "data.split=[8,1,1]",
        "batch.batch_size=8",
        "batch.micro_batch_size=2",
        f"batch.sequence_length={LENGTH}",
        "training.export.interval=1",
        "training.export.data_type=fp32",
        f"run.experiment_dir={root}/run",
        *further,
    ]


def score(arguments: list[str]) -> list[tuple[float, bool]]:
    """The scores of a run's first weights, before it trains; nothing on other processes."""
    import os

    torch.set_num_threads(1)
    found: list[Any] = []
    evaluated = Trainer.finish

    def finish(trainer: Trainer) -> str:
        scorer = trainer.evaluator.tasks.scorer
        if trainer.mesh.rank == 0:
            found.extend(scorer.score(requests()))
            scorer.finish()
        else:
            scorer.serve()
        return evaluated(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish", finish)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        assert job.train(preflight(read(None, arguments), processes, weights=True)) == 0
    return found


def test_requests_fill_sequences() -> None:
    rows = pack(requests(), LENGTH)
    numbers = sorted(number for row in rows for number, _, _ in row)
    assert numbers == list(range(len(requests())))
    used = [sum(len(tokens) - 1 for _, tokens, _ in row) for row in rows]
    assert max(used) <= LENGTH and sum(used) / (LENGTH * len(rows)) > 0.9


def expected(folder: Path) -> list[tuple[float, bool]]:
    """One request at a time, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for request in requests():
        tokens = torch.tensor([request.tokens])
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0, -request.targets :]
        targets = tokens[0, -request.targets :]
        total = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        found.append((float(total), bool((logits.argmax(-1) == targets).all())))
    return found


def test_as_transformers(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found = score(settings(tmp_path))
    theirs = expected(tmp_path / "run/export/llama/0")
    for (ours, greedy), (other, most_likely) in zip(found, theirs, strict=True):
        assert ours == pytest.approx(other, abs=2e-4)  # fp32; up to 24 terms of size 10
        assert greedy == most_likely
    assert sum(greedy for _, greedy in found[45:]) == 1


@pytest.mark.parametrize(
    ("world", "further"),
    some_fast(
        [
            (2, ["model.multi_stage.zero_stage=3"]),
            (2, ["model.multi_stage.zero_stage=1", "data.packing=best_fit"]),
            (2, ["model.distributed.tensor_parallel=2"]),
            (2, ["model.distributed.sequence_data_parallel=2"]),
            (2, ["model.distributed.pipeline_parallel=2"]),
            (
                4,
                [
                    "model.distributed.pipeline_parallel=2",
                    "model.distributed.tensor_parallel=2",
                    "model.distributed.sequence_tensor_parallel=yes",
                ],
            ),
            (4, ["model.distributed.sequence_data_parallel=2", "model.multi_stage.zero_stage=2"]),
            (1, ["batch.cross_document_attention=yes"]),
        ],
        lambda one: "tensor_parallel=2" in one[1][0],
    ),
)
def test_every_layout(tmp_path: Path, world: int, further: list[str]) -> None:
    write_tokens(tmp_path / "tokens")
    one = score(settings(tmp_path, f"run.experiment_dir={tmp_path}/one"))
    arguments = settings(tmp_path, *further)
    found = spawn(world, score, arguments)[0] if world > 1 else score(arguments)
    for (ours, greedy), (other, most_likely) in zip(found, one, strict=True):
        assert ours == pytest.approx(other, abs=2e-4)
        assert greedy == most_likely
