"""Build the parts of a run from its RunSpec: each once, in order."""

from functools import partial

from fast_llm.data.loader import Loader
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.context import shard_batch
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.parallelize import parallelize, uses_triton
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
