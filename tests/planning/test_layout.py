"""Layouts: axes multiply out, and the processes of a pipeline have all parameters of the model."""

from dataclasses import replace

import pytest

from fast_llm.models.parameters import cost
from fast_llm.planning.layout import LocalSizes, ParallelLayout, Workload
from tests.planning.configs import LLAMA, config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("pipeline", "further"),
    [
        (1, []),
        (2, []),
        (4, ["model.multi_stage.layers_per_stage=4"]),
        (
            2,
            [
                "model.multi_stage.layers_per_stage=8",
                "model.multi_stage.pipeline_schedule=zbv_zero_bubble",
            ],
        ),
    ],
)
def test_pipeline_ranks_have_all_parameters(pipeline: int, further: list[str], tied: bool) -> None:
    settings = [
        *LLAMA,
        "optimizer.moments_dtype=bf16",
        f"model.distributed.pipeline_parallel={pipeline}",
        *further,
    ]
    wanted = config(settings)
    layout = ParallelLayout.of(wanted, 8)
    workload = replace(Workload.of(wanted, 256), tied_embeddings=tied)
    ranks = [LocalSizes(workload, layout, "cuda", rank) for rank in range(pipeline)]
    matrix = workload.vocabulary * workload.hidden
    expected = cost(wanted.model.base_model, 4096).parameters - matrix * tied
    first, last = ranks[0], ranks[0 if layout.schedule == "zbv_zero_bubble" else -1]
    copies = matrix * (tied and first is not last)  # the head's rank holds the tied weight too
    assert sum(rank.parameters for rank in ranks) == expected + copies
    assert sum(rank.layers for rank in ranks) == workload.layers
    assert first.has_embedding and last.has_head
    assert (last.head_parameters > 0) is not tied


def test_axes_multiply_out() -> None:
    settings = [
        *LLAMA,
        "model.distributed.tensor_parallel=2",
        "model.distributed.sequence_tensor_parallel=yes",
        "model.distributed.sequence_data_parallel=2",
        "model.distributed.pipeline_parallel=2",
        "model.multi_stage.shard_size=4",
        "optimizer.moments_dtype=bf16",
    ]
    wanted = config(settings)
    layout = ParallelLayout.of(wanted, 64)
    assert (layout.data, layout.replicas, layout.shards) == (8, 16, 4)
    sizes = LocalSizes(Workload.of(wanted, 256), layout, "cuda")
    assert (sizes.tokens, sizes.stream_tokens) == (2 * 4096 // 2, 2 * 4096 // 4)
    matrices = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert sizes.block_parameters == matrices // 2 + 2 * 4096  # norms are not divided
