"""Build the parts of a run from its RunSpec: each once, in order."""

import os
from functools import partial

import torch

from fast_llm.config.batch import BatchSizes
from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import TrainConfig
from fast_llm.data.loader import Loader
from fast_llm.kernels import triton as triton_kernels
from fast_llm.model.decoder import Block, CausalLM
from fast_llm.model.layers import enable_fp8
from fast_llm.model.loss import choose_cross_entropy
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.context import apply_context_parallel, shard_batch
from fast_llm.parallel.fsdp import ShardedWeights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.pipeline import Pipeline, keep_stage, stages_of_rank
from fast_llm.parallel.recompute import apply_recompute
from fast_llm.parallel.single import SingleWeights
from fast_llm.parallel.tensor import apply_tensor_parallel
from fast_llm.planning.preflight import RunSpec
from fast_llm.training.checkpointing import CheckpointManager
from fast_llm.training.evaluate import Evaluator
from fast_llm.training.interrupt import Interrupt
from fast_llm.training.metrics import Metrics
from fast_llm.training.run import Run
from fast_llm.training.spikes import SpikeDetector
from fast_llm.training.step import TrainStep
from fast_llm.training.trainer import Trainer
from fast_llm.watchdog.process import Watchdog

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_trainer(
    spec: RunSpec, mesh: Mesh, run: Run, interrupt: Interrupt, watchdog: Watchdog
) -> Trainer:
    """Make each part of a run once, in order."""
    config, heartbeat = spec.config, watchdog.heartbeat
    models, weights = build_model(config, mesh)
    pipeline = build_pipeline(config, spec.batch, models, mesh)
    optimizer = Optimizer(
        weights.local(), config.optimizer, weights.master_low_bits, _has_kernels(config, mesh)
    )
    train_step = TrainStep(
        models[0],
        weights,
        optimizer,
        LossScale(config.optimizer.gradient_scaler, config.model.distributed.training_dtype),
        mesh,
        config.optimizer,
        pipeline,
        heartbeat,
        SpikeDetector(config.training.spikes),
    )
    loader = partial(build_loader, spec, mesh)
    metrics = Metrics(config, run, mesh, spec.batch, spec.cost, spec.completed_steps)
    checkpoints = CheckpointManager(spec, mesh, run, weights, train_step, heartbeat)
    evaluator = Evaluator(spec, mesh, train_step, loader, metrics, interrupt, heartbeat)
    return Trainer(
        spec,
        mesh,
        run,
        train_step,
        checkpoints,
        evaluator,
        loader,
        metrics,
        interrupt,
        heartbeat,
    )


def build_loader(spec: RunSpec, mesh: Mesh, split: str, first_sample: int, steps: int) -> Loader:
    """This process's micro-batches of `steps` steps, from sequence `first_sample` of a split on."""
    config = spec.config
    return Loader(
        spec.dataset,
        split,
        spec.batch,
        rank=mesh.data.rank,
        processes=mesh.data.size,
        vocab_size=config.model.base_model.vocab_size,
        first_sample=first_sample,
        steps=steps,
        isolate=not config.batch.cross_document_attention,
        workers=config.training.num_workers,
        prefetch=config.training.prefetch_factor or 2,
        shard=partial(shard_batch, rank=mesh.context.rank, size=mesh.context.size),
        pin=mesh.device.type == "cuda",
        warn_ms=config.data.data_sample_warn_time_ms,
    )


def build_model(
    config: TrainConfig, mesh: Mesh
) -> tuple[list[CausalLM], SingleWeights | ShardedWeights]:
    """The model, or this process's stages of it, with weights in place but undefined, spread as the configuration says.

    The order: which layers are here, what is recomputed, how sequences and matrices are cut, what
    is compiled, what is sharded.
    """
    settings = config.model
    implementation = choose_cross_entropy(
        settings.base_model.cross_entropy_impl, mesh.device.type, config.run.enable_triton_kernels
    )
    dtype = DTYPES[settings.distributed.training_dtype]
    if not config.run.torch_dynamo_enable:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if not config.run.enable_triton_kernels:
        triton_kernels.AVAILABLE = False
    sizes = stage_sizes(config)
    models = []
    for stage in stages_of_rank(
        settings.multi_stage.pipeline_schedule, mesh.pipeline.rank, mesh.pipeline.size, len(sizes)
    ):
        with torch.device("meta"):
            model = CausalLM(settings.base_model, implementation)
        keep_stage(model, sizes, stage)
        for block in model.model.layers.values():
            assert isinstance(block, Block)
            if settings.distributed.fp8:
                enable_fp8(block)
            apply_recompute(block, settings.base_model.transformer.mlp_recompute_level)
            apply_context_parallel(block, mesh.context)
        apply_tensor_parallel(model, mesh.tensor, settings.distributed.sequence_tensor_parallel)
        if settings.multi_stage.compile_all:
            for block in model.model.layers.values():
                block.compile()
        models.append(model)
    if mesh.weights_mesh is None:
        return models, SingleWeights(
            models[0], dtype, mesh.device, fuse_grad_accumulation=_has_kernels(config, mesh)
        )
    return models, ShardedWeights(
        models, mesh.weights_mesh, settings.multi_stage.zero_stage or 1, dtype
    )


def _has_kernels(config: TrainConfig, mesh: Mesh) -> bool:
    return (
        mesh.device.type == "cuda" and config.run.enable_triton_kernels and triton_kernels.AVAILABLE
    )


def build_pipeline(
    config: TrainConfig, batch: BatchSizes, models: list[CausalLM], mesh: Mesh
) -> Pipeline | None:
    """The pipeline schedule, or None without pipeline parallelism."""
    if mesh.pipeline.size == 1:
        return None
    in_flight, stages = micro_batches_in_flight(config, batch), len(stage_sizes(config))
    schedule = schedule_name(config, in_flight)
    distributed = config.model.distributed
    length = config.batch.sequence_length // mesh.context.size
    if distributed.sequence_tensor_parallel:
        length //= mesh.tensor.size
    hidden = torch.empty(
        (batch.micro_batch_size, length, config.model.base_model.transformer.hidden_size),
        dtype=DTYPES[distributed.training_dtype],
        device="meta",
        requires_grad=True,
    )
    own = stages_of_rank(schedule, mesh.pipeline.rank, mesh.pipeline.size, stages)
    by_stage = dict(zip(own, models, strict=True))
    return Pipeline(by_stage, stages, mesh.pipeline, schedule, in_flight, hidden, mesh.device)
