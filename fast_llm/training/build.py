"""Build the parts of a run from its RunSpec: each once, in order."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from fast_llm.data.fim import FIM_COUNTS
from fast_llm.data.loader import Loader
from fast_llm.model.decoder import CausalLM, Head
from fast_llm.model.loss import ZLoss
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.context import shard_batch
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.parallelize import parallelize, uses_triton
from fast_llm.planning.run_spec import RunSpec, StageSettings
from fast_llm.training.checkpointing import CheckpointManager
from fast_llm.training.evaluate import Evaluator
from fast_llm.training.experts import RouterMonitor
from fast_llm.training.interrupt import Interrupt
from fast_llm.training.machines import SpeedMonitor
from fast_llm.training.metrics import Z_LOSS, Metrics
from fast_llm.training.run import Run
from fast_llm.training.samples import Sampler
from fast_llm.training.scoring import Scorer
from fast_llm.training.source_losses import SUMS, SourceMonitor
from fast_llm.training.spikes import SpikeDetector
from fast_llm.training.step import PADDING, TrainStep
from fast_llm.training.task_evaluation import TaskEvaluator
from fast_llm.training.trainer import Trainer
from fast_llm.watchdog.process import Watchdog


def build_trainer(
    spec: RunSpec, mesh: Mesh, run: Run, interrupt: Interrupt, watchdog: Watchdog
) -> Trainer:
    """Build the model, its optimizer and step, then everything else that a Trainer needs."""
    config, heartbeat = spec.config, watchdog.heartbeat
    models, weights, pipeline = parallelize(config, spec.batch, mesh)
    optimizer = Optimizer(
        weights.local(),
        config.optimizer,
        weights.master_low_bits,
        use_kernel=uses_triton(config, mesh.device),
    )
    transformer = config.model.base_model.transformer
    routers = RouterMonitor(models, transformer, mesh) if transformer.expert_layers() else None
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
        routers,
    )
    sources = SourceMonitor(spec.dataset, not config.batch.cross_document_attention, mesh)
    sources.warn_unknown()
    _add_sums(spec, train_step, models, sources)
    loader = partial(build_loader, spec, mesh)
    metrics = Metrics(
        config,
        run,
        mesh,
        spec.batch,
        spec.cost,
        spec.completed_steps,
        sources,
        routers,
        SpeedMonitor.of(mesh, config.training.slow_process_factor),
    )
    checkpoints = CheckpointManager(spec, mesh, run, weights, train_step, heartbeat)
    scorer = _build_scorer(spec, train_step, models, interrupt, heartbeat)
    tasks = TaskEvaluator(spec, mesh, run, scorer, metrics, heartbeat)
    evaluator = Evaluator(spec, mesh, train_step, loader, metrics, interrupt, heartbeat, tasks)
    sampler = Sampler(spec, mesh, run, models[0], heartbeat)
    return Trainer(
        spec,
        mesh,
        run,
        train_step,
        checkpoints,
        evaluator,
        sampler,
        loader,
        metrics,
        interrupt,
        heartbeat,
        partial(_apply_stage, models, watchdog),
    )


def _build_scorer(
    spec: RunSpec,
    train_step: TrainStep,
    models: Sequence[CausalLM],
    interrupt: Interrupt,
    heartbeat: Callable[..., None],
) -> Scorer:
    return Scorer(
        train_step,
        train_step.mesh,
        models,
        (spec.batch.micro_batch_size, spec.config.batch.sequence_length),
        spec.config.model.base_model.transformer.window_size,
        ((0,) * len(FIM_COUNTS), (0,) * len(spec.dataset.source_names)),
        lambda: interrupt.signal != 0,
        heartbeat,
    )


def _apply_stage(models: Sequence[CausalLM], watchdog: Watchdog, stage: StageSettings) -> None:
    """Give the model the rotary positions of a stage, whose shapes may be new to the compiler."""
    watchdog.begin_warm_up()
    base = stage.config.model.base_model.for_context(stage.length)
    for model in models:
        model.set_rotary(base.transformer)


def _add_sums(
    spec: RunSpec,
    train_step: TrainStep,
    models: Sequence[CausalLM],
    sources: SourceMonitor,
) -> None:
    """Let the step sum over all processes what this run's records need."""
    device = train_step.mesh.device
    if sources.several:
        sources.attach(models)
        train_step.sums[SUMS] = sources.losses.sums
    if coefficient := spec.config.model.base_model.z_loss_coefficient:
        z_loss = ZLoss(coefficient, torch.zeros((), dtype=torch.float64, device=device))
        train_step.sums[Z_LOSS] = z_loss.total
        for head in (model.head for model in models):
            if isinstance(head, Head):
                head.z_loss = z_loss
    if spec.dataset.fim is not None:
        train_step.sums["fim"] = torch.zeros(4, dtype=torch.float64, device=device)
    if spec.config.data.packing == "best_fit":
        train_step.sums[PADDING] = torch.zeros(
            len(spec.dataset.source_names), dtype=torch.float64, device=device
        )


def build_loader(
    spec: RunSpec,
    mesh: Mesh,
    split: str,
    first_sample: int,
    steps: int,
    stage: StageSettings | None = None,
) -> Loader:
    """This process's micro-batches of `steps` steps, from sequence `first_sample` of a split on.

    `stage`: of training; None outside of all stages.
    """
    config = spec.config
    return Loader(
        spec.dataset,
        split,
        spec.batch if stage is None else stage.batch,
        rank=mesh.data.rank,
        processes=mesh.data.size,
        vocab_size=config.model.base_model.vocab_size,
        first_sample=first_sample,
        steps=steps,
        isolate=not config.batch.cross_document_attention,
        workers=config.training.num_workers,
        prefetch=config.training.prefetch_factor or 2,
        shard=partial(
            shard_batch,
            rank=mesh.context.rank,
            size=mesh.context.size,
            window=config.model.base_model.transformer.window_size,
        ),
        pin=mesh.device.type == "cuda",
        warn_ms=config.data.data_sample_warn_time_ms,
        length=None if stage is None else stage.length,
    )
