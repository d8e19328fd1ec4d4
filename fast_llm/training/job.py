"""A training job: process group, lock, experiment folder, hang detection, training, exit code.

start.py calls `train`; build.py makes the Trainer, whose `train` is the loop.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TextIO

import psutil
import torch

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.collectives import all_gather_object
from fast_llm.config.train import TrainConfig
from fast_llm.errors import ConfigError, TrainingStopped, disk_problem
from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.kernels import cudnn
from fast_llm.kernels import triton as triton_kernels
from fast_llm.model.linear import upcast_to_fp32
from fast_llm.parallel.failures import Failures
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.disk import format_bytes
from fast_llm.planning.layout import UPCASTING_CPU, ParallelLayout, Workload
from fast_llm.planning.memory import required_bytes
from fast_llm.planning.report import describe_run
from fast_llm.planning.run_spec import RunSpec
from fast_llm.planning.search import resolve_run
from fast_llm.tensors import torch_dtype
from fast_llm.terminal import counted, wrap_width
from fast_llm.training.build import build_trainer
from fast_llm.training.interrupt import Interrupt
from fast_llm.training.machines import check_machines
from fast_llm.training.process import configure_process
from fast_llm.training.run import Run, lock, next_run_number, prepare_folder
from fast_llm.training.saving import describe_saved
from fast_llm.training.trainer import Trainer
from fast_llm.watchdog.process import COLLECTIVE_SLACK, Watchdog
from fast_llm.watchdog.watcher import ENDED

logger = logging.getLogger("fast_llm")

_WEEK = 7 * 24 * 3600.0  # seconds; the timeout of slow phases without training.timeout


def train(
    spec: RunSpec,
    interrupt: Interrupt | None = None,
    locating: AbstractContextManager[None] | None = None,
) -> int:
    """Train. Returns the exit code: 0, or 128 + n if signal n (not SIGUSR1) stopped any process.

    `interrupt`: of a process that exits after this; without it, signal handlers are restored.
    `locating`: adds the place of a setting to error messages. Raises UserError.
    """
    locating = locating or nullcontext()
    if interrupt is not None:
        return _train(spec, interrupt, locating)
    interrupt = Interrupt()
    try:
        return _train(spec, interrupt, locating)
    finally:
        interrupt.close()


def _train(spec: RunSpec, interrupt: Interrupt, locating: AbstractContextManager[None]) -> int:
    started = time.perf_counter()
    configure_process(spec.config)
    config = spec.config
    distributed = config.model.distributed
    saved = partial(describe_saved, spec.folder)
    failures = Failures.connect(distributed.timeout + COLLECTIVE_SLACK)
    with failures.reporting(interrupt.exit_now, saved):
        try:
            mesh = Mesh(
                distributed.timeout + COLLECTIVE_SLACK,
                config.training.timeout or _WEEK,
                config.model.multi_stage.shard_size,
                tensor=distributed.tensor_parallel,
                context=distributed.sequence_data_parallel,
                pipeline=distributed.pipeline_parallel,
                expert=distributed.expert_parallel,
                failures=failures,
            )
            interrupt.begin_graceful(lambda: failures.failing or failures.code is not None)
            with locating, exclusive_lock(spec, mesh):
                return _run(spec, mesh, interrupt, started)
        except OSError as error:
            if (problem := disk_problem(error)) is None:
                raise
            raise TrainingStopped(f"{problem}. {saved()}") from error


@contextmanager
def exclusive_lock(spec: RunSpec, mesh: Mesh) -> Iterator[None]:
    """Exclude other runs from the experiment folder. Raises ConfigError on every process."""
    held: TextIO | None = None
    refused: list[str] = []
    if spec.folder is not None and mesh.rank == 0:
        try:
            held = lock(spec.folder)
            root, own = spec.folder / "checkpoint", None if spec.branches else spec.checkpoint
            # The preflight ran before the lock was held. Sizes are compared first: digests are
            # slow.
            if (
                checkpoints.latest(root, content=False, quiet=True) != own
                and checkpoints.latest(root, quiet=True) != own
            ):
                refused = [
                    f"run.experiment_dir: another run saved to {spec.folder} just now; start the"
                    " same command again"
                ]
        except ConfigError as error:
            refused = error.problems
    try:
        if refused := mesh.broadcast(refused):
            raise ConfigError(refused)
        yield
    finally:
        if held is not None:
            held.close()


def _run(spec: RunSpec, mesh: Mesh, interrupt: Interrupt, started: float) -> int:
    """Set up the experiment folder, train, and return the exit code."""
    _check_fp8(spec.config, mesh)
    memory, triton = mesh.broadcast((_device_memory(mesh), triton_kernels.AVAILABLE))
    spec = resolve_run(spec, memory, _device_kind(spec.config, mesh.device), triton)
    number = mesh.broadcast(next_run_number(spec.folder))
    if mesh.rank == 0:
        prepare_folder(spec)
    mesh.barrier()
    run = Run(spec.folder, mesh.rank, mesh.size, spec.config.run.log_timestamps, number)
    watchdog = build_watchdog(spec.config, mesh, run)
    # A process that exits during a long save must not be taken for one that hangs.
    interrupt.before_exit = partial(watchdog.heartbeat, ENDED)
    try:
        logger.info("What this run does:\n" + describe_run(spec, wrap_width(sys.stdout)))
        for warning in spec.warnings:
            logger.warning(f"{warning}.")
        _log_memory(spec, mesh, memory)
        _load_kernels(spec.config, mesh)
        if (factor := spec.config.training.slow_process_factor) and mesh.size > 1:
            check_machines(mesh, factor, spec.folder)
        trainer = build_trainer(spec, mesh, run, interrupt, watchdog)
        interrupt.effect = trainer.on_signal
        logger.info(f"Ready on {_describe_device(mesh)} in {time.perf_counter() - started:.1f} s.")
        try:
            trainer.train()
        except BaseException as error:
            watchdog.failed(error)
            trainer.metrics.close("crashed")
            raise
        watchdog.heartbeat("closing", slow=True)
        trainer.metrics.close("ended")
        code = _agree_on_exit_code(trainer, interrupt)
        if mesh.rank == 0 and not trainer.stopping:
            _note_complete(trainer)
    finally:
        interrupt.before_exit = lambda: None
        watchdog.close()
        run.close()
    mesh.close()
    return code


def build_watchdog(config: TrainConfig, mesh: Mesh, run: Run) -> Watchdog:
    """Start hang detection for this process."""
    return Watchdog(
        config.model.distributed.timeout,
        config.training.timeout or _WEEK,
        run.logs,
        rank=mesh.rank,
        processes=mesh.size,
        broadcast=mesh.broadcast,
        # The compiler compiles again for as many shapes (its recompile limit).
        warm_up=8 if config.model.multi_stage.compile_all is True else 1,
    )


def _agree_on_exit_code(trainer: Trainer, interrupt: Interrupt) -> int:
    """The exit code of all processes: 0 for a complete run.

    torchrun takes a node whose processes all return 0 for finished: it would not restart it with
    the others.
    """
    code = 0
    if trainer.stopping:
        code = max(all_gather_object(interrupt.exit_code, trainer.mesh.slow_group))
    interrupt.agreed_exit_code = code
    return code


def _note_complete(trainer: Trainer) -> None:
    """Create FAST_LLM_COMPLETE_FILE once all steps are done: exit code 0 may also mean SIGUSR1."""
    complete = trainer.state.step >= trainer.config.train_iters
    if complete and (path := os.environ.get("FAST_LLM_COMPLETE_FILE")):
        try:
            Path(path).touch()
        except OSError as error:
            logger.warning(
                f"FAST_LLM_COMPLETE_FILE: {path}: {error.strerror}; the launcher may start this"
                " run again."
            )


def _load_kernels(config: TrainConfig, mesh: Mesh) -> None:
    """Load the kernels of this device, and log which cannot be used."""
    if mesh.device.type == "cpu" and (problem := cpu_kernels.load()):
        logger.warning(
            "Training on the CPU without Fast-LLM's own kernels, at about half the speed: they"
            f" could not be built ({problem}); install a C++ compiler (g++ or clang++ with OpenMP),"
            " or name one in the environment variable CXX."
        )
    if (
        mesh.device.type == "cuda"
        and _uses_varlen_attention(config)
        and (problem := cudnn.load(mesh.device))
    ):
        logger.info(
            f"Attention within documents uses PyTorch's kernel instead of cuDNN's: {problem}."
        )


def _uses_varlen_attention(config: TrainConfig) -> bool:
    """Whether attention is limited to documents, or a process has only a part of each sequence."""
    packed = not config.batch.cross_document_attention and config.data.format != "random"
    parted = packed or config.model.distributed.sequence_data_parallel > 1
    return parted and config.model.base_model.transformer.use_flash_attention


def _check_fp8(config: TrainConfig, mesh: Mesh) -> None:
    if (
        config.model.distributed.fp8
        and mesh.device.type == "cuda"
        and torch.cuda.get_device_capability() < (8, 9)
    ):
        name = torch.cuda.get_device_name()
        raise ConfigError(
            [
                f"model.distributed.fp8: given yes, which {name} does not support: leave it out,"
                " or use a newer GPU"
            ]
        )


def _device_kind(config: TrainConfig, device: torch.device) -> str:
    """The kind of device, for the forecast."""
    dtype = torch_dtype(config.model.distributed.training_dtype)
    return (
        UPCASTING_CPU
        if device.type == "cpu" and upcast_to_fp32(torch.empty(0, dtype=dtype))
        else device.type
    )


def _device_memory(mesh: Mesh) -> float:
    """Bytes of memory available to this process."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.get_device_properties(mesh.device).total_memory)
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _log_memory(spec: RunSpec, mesh: Mesh, memory: float) -> None:
    kind, used = _device_kind(spec.config, mesh.device), 0.0
    for number in (None, *range(len(spec.config.data.stages))):
        stage = spec.in_stage(number)
        shape = Workload.of(stage.config, stage.batch.batch_size)
        used = max(used, required_bytes(shape, ParallelLayout.of(stage.config, mesh.size), kind))
    words = f"Memory by forecast: {format_bytes(used)} of {format_bytes(memory)} a process"
    if used <= memory:
        logger.info(f"{words}.")
    else:
        logger.warning(
            f"{words}: it will probably not fit. batch.micro_batch_size: auto, or `fast-llm plan`,"
            " finds what fits."
        )


def _describe_device(mesh: Mesh) -> str:
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        return f"{mesh.size} × {name}" if mesh.size > 1 else name
    processes = counted(mesh.size, "process", "processes")
    return f"the CPU ({processes} × {counted(torch.get_num_threads(), 'thread')})"
