"""From a plan to a run: every part made once, in order."""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from torch import nn

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.train import TrainConfig
from fast_llm.errors import ConfigError
from fast_llm.model.llama import Block, Llama
from fast_llm.model.loss import choose_cross_entropy
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.fsdp import ShardedWeights
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.recompute import apply_recompute
from fast_llm.parallel.single import SingleWeights
from fast_llm.training.interrupt import Interrupt
from fast_llm.training.memory import keep_freed_memory
from fast_llm.training.plan import Plan, describe, prepare_folder
from fast_llm.training.run import Run, lock, next_run_number
from fast_llm.training.step import Step
from fast_llm.training.trainer import Trainer

logger = logging.getLogger("fast_llm")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WEEK = 7 * 24 * 3600.0


def train(plan: Plan) -> int:
    """Train as planned; the exit code: 0, or 128 and the signal that ended the run early.

    Raises UserError for what training itself meets.
    """
    started = time.perf_counter()
    # With one process DCP tells the user what the code says already.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    config = plan.config
    mesh = Mesh(config.model.distributed.timeout, config.training.timeout or _WEEK, config.model.multi_stage.shard_size)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    with _alone(plan, mesh):
        return _train(plan, mesh, started)


@contextmanager
def _alone(plan: Plan, mesh: Mesh) -> Iterator[None]:
    """No other run in this experiment folder. Raises ConfigError, on every process, if there is one."""
    held: TextIO | None = None
    refused: list[str] = []
    if plan.folder is not None and mesh.rank == 0:
        try:
            held = lock(plan.folder)
            root = plan.folder / "checkpoint"
            # The plan was made before the lock was ours. Sizes are compared first: digests take their time.
            if (
                checkpoints.latest(root, content=False) != plan.checkpoint
                and checkpoints.latest(root) != plan.checkpoint
            ):
                refused = [
                    f"run.experiment_dir: another run saved to {plan.folder} just now; start the same command again"
                ]
        except ConfigError as error:
            refused = error.problems
    try:
        if refused := mesh.share(refused):
            raise ConfigError(refused)
        yield
    finally:
        if held is not None:
            held.close()


def _train(plan: Plan, mesh: Mesh, started: float) -> int:
    config = plan.config
    number = mesh.share(next_run_number(plan.folder))
    if mesh.rank == 0:
        prepare_folder(plan)
    mesh.wait()
    run = Run(plan.folder, mesh.rank, mesh.size, config.run.log_timestamps, number)
    interrupt = Interrupt()
    try:
        logger.info("What this run does:\n" + describe(plan))
        model, weights = build_model(config, mesh)
        optimizer = Optimizer(weights.local(), config.optimizer)
        loss_scale = LossScale(config.optimizer.gradient_scaler, config.model.distributed.training_dtype)
        step = Step(model, weights, optimizer, loss_scale, mesh, config.optimizer)
        trainer = Trainer(plan, mesh, run, model, weights, step, interrupt)
        logger.info(f"Ready on {_device(mesh)} in {time.perf_counter() - started:.1f} s.")
        try:
            trainer.fit()
        except BaseException:
            trainer.metrics.close("crashed")
            raise
        trainer.metrics.close("ended")
    finally:
        interrupt.close()
        run.close()
    mesh.close()
    return 128 + interrupt.signal if interrupt.signal else 0


def build_model(config: TrainConfig, mesh: Mesh) -> tuple[nn.Module, SingleWeights | ShardedWeights]:
    """The model with its weights in place but undefined, spread as the configuration says.

    The order: what is recomputed, what is compiled, what is sharded.
    """
    implementation = choose_cross_entropy(
        config.model.base_model.cross_entropy_impl, mesh.device.type, config.run.enable_triton_kernels
    )
    dtype = DTYPES[config.model.distributed.training_dtype]
    with torch.device("meta"):
        model = Llama(config.model.base_model, implementation)
    blocks = list(model.model.layers)
    for block in blocks:
        assert isinstance(block, Block)
        apply_recompute(block, config.model.base_model.transformer.mlp_recompute_level)
    if not config.run.torch_dynamo_enable:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if config.model.multi_stage.compile_all:
        for block in blocks:
            block.compile()
    if mesh.data is None:
        return model, SingleWeights(model, dtype, mesh.device)
    return model, ShardedWeights(model, blocks, mesh.data, config.model.multi_stage.zero_stage or 1, dtype)


def _device(mesh: Mesh) -> str:
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        return f"{mesh.size} × {name}" if mesh.size > 1 else name
    return f"the CPU ({mesh.size} process{'es' if mesh.size > 1 else ''} × {torch.get_num_threads()} threads)"
