"""How this process's part of the model is made: every kind of parallelism, applied in order.

Numbers in comments are rows of the table in docs/architecture.md. Rows with a mesh axis (1, 3, 4,
5, 8) change nothing if the axis has one process. The model contains no communication. It offers
`keep`, `Attention.core`, `Block.feed_forward`, `main_grad`, and blocks for FSDP2 and the compiler.

A new dimension also needs its memory and time in planning/memory.py and planning/time.py, and a
layout in tests/layouts/test_layouts.py.
"""

from typing import cast

import torch

from fast_llm.config.batch import BatchSizes, derive_batch_sizes
from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.parameter_rules import is_frozen
from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import TrainConfig
from fast_llm.kernels import triton as triton_kernels
from fast_llm.model.decoder import Block, CausalLM
from fast_llm.model.layers import enable_fp8
from fast_llm.model.loss import choose_cross_entropy
from fast_llm.models import family_of
from fast_llm.parallel.context import apply_context_parallel
from fast_llm.parallel.experts import apply_expert_parallel
from fast_llm.parallel.fsdp import ShardedWeights, named_weights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.pipeline import MicroBatches, Pipeline, keep_stage, stages_of_rank
from fast_llm.parallel.recompute import apply_recompute
from fast_llm.parallel.single import SingleWeights
from fast_llm.parallel.tensor import apply_tensor_parallel
from fast_llm.parallel.weights import Weights
from fast_llm.tensors import torch_dtype


def parallelize(
    config: TrainConfig, batch: BatchSizes, mesh: Mesh
) -> tuple[list[CausalLM], Weights, Pipeline | None]:
    """The pipeline stages of this process (one without a pipeline), their weights, and the
    pipeline.

    Weights are allocated on `mesh.device` with undefined values. `config` and `mesh` agree:
    constraints between sizes are checked in config/checks.py.
    """
    base, distributed, multi_stage = (
        config.model.base_model,
        config.model.distributed,
        config.model.multi_stage,
    )
    base = base.for_context(config.batch.sequence_length)
    triton = uses_triton(config, mesh.device)
    dtype = torch_dtype(distributed.training_dtype)
    cross_entropy = choose_cross_entropy(
        base.cross_entropy_impl, mesh.device.type, config.run.enable_triton_kernels
    )
    sizes = stage_sizes(config)
    stages = stages_of_rank(
        multi_stage.pipeline_schedule, mesh.pipeline.rank, mesh.pipeline.size, len(sizes)
    )
    plan = family_of(base).tensor_plan(base)
    models = []
    for stage in stages:
        with torch.device("meta"):
            model = CausalLM(base, cross_entropy)
        keep_stage(model, sizes, stage)  # 1
        blocks = [cast(Block, block) for block in model.blocks.values()]
        for block in blocks:
            if distributed.fp8:
                enable_fp8(block)
            apply_recompute(block, base.transformer.mlp_recompute_level)  # 2
            apply_context_parallel(block, mesh.context)  # 3
        apply_expert_parallel(model, plan, mesh)  # 4
        apply_tensor_parallel(model, plan, mesh.tensor, distributed.sequence_tensor_parallel)  # 5
        _freeze(model, config.optimizer)  # after row 5, which makes new parameters
        if multi_stage.compile_all is True:
            for block in blocks:
                block.compile()  # 6
        models.append(model)
    weights: Weights
    if mesh.weights_mesh is None:  # the run has one process, so no pipeline either
        weights = SingleWeights(models[0], dtype, mesh.device, fuse_grad_accumulation=triton)
    else:
        # Gradients are averaged over context × data. Default: ZeRO 1.
        weights = ShardedWeights(
            models,
            mesh.weights_mesh,
            multi_stage.zero_stage or 1,
            dtype,
            mesh.expert_weights_mesh,
        )  # 7
    if mesh.pipeline.size == 1:
        return models, weights, None
    by_stage = dict(zip(stages, models, strict=True))
    return models, weights, _pipeline(config, batch, mesh, by_stage, len(sizes))  # 8


def _freeze(model: CausalLM, config: OptimizerConfig) -> None:
    """Let the parameters that the settings freeze have no gradient."""
    for name, parameter in named_weights(model):
        parameter.requires_grad_(not is_frozen(config, name))


def uses_triton(config: TrainConfig, device: torch.device) -> bool:
    """Whether the project's Triton kernels run: on a GPU, if installed and not switched off."""
    return device.type == "cuda" and config.run.enable_triton_kernels and triton_kernels.AVAILABLE


def _pipeline(
    config: TrainConfig, batch: BatchSizes, mesh: Mesh, models: dict[int, CausalLM], stages: int
) -> Pipeline:
    """The pipeline of `stages` stages in all. `models`: stage number → model, on this process."""
    kinds = {config.batch.sequence_length: _micro_batches(config, batch, mesh)}
    for number in range(len(config.data.stages)):
        inside = config.in_stage(number)
        if inside.batch.sequence_length not in kinds:
            sizes = derive_batch_sizes(inside.batch, mesh.data.size, pipeline=True)
            kinds[inside.batch.sequence_length] = _micro_batches(inside, sizes, mesh)
    return Pipeline(models, stages, mesh.pipeline, list(kinds.values()), mesh.device)


def _micro_batches(config: TrainConfig, batch: BatchSizes, mesh: Mesh) -> MicroBatches:
    """The micro-batches of the run, or of a stage of its data."""
    distributed = config.model.distributed
    in_flight = micro_batches_in_flight(config, batch)
    rows, length = batch.micro_batch_size, config.batch.sequence_length // mesh.context.size
    exchanged = length // (mesh.tensor.size if distributed.sequence_tensor_parallel else 1)
    hidden = torch.empty(
        (rows, exchanged, config.model.base_model.transformer.hidden_size),
        dtype=torch_dtype(distributed.training_dtype),
        device="meta",
        requires_grad=True,
    )
    schedule = schedule_name(config, in_flight)
    return MicroBatches(in_flight, schedule, torch.Size((rows, length)), hidden)
