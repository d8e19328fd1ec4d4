"""Settings of a whole process, made once at the start: libraries, environment, warnings."""

import logging
import os
import warnings

import torch

from fast_llm.config.train import TrainConfig
from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.kernels import triton as triton_kernels
from fast_llm.training.allocator import keep_freed_memory


def configure_process(config: TrainConfig) -> None:
    """Make all settings of the process. Call it before the first tensor."""
    quiet_torch_distributed()
    if not config.run.torch_dynamo_enable:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if not config.run.enable_triton_kernels:
        triton_kernels.AVAILABLE = False
    if not torch.cuda.is_available():
        keep_freed_memory()
        cpu_kernels.use_faster_exact_matmul()


def quiet_torch_distributed() -> None:
    """Silence warnings of torch.distributed that only restate the layout that the user chose.

    Examples: checkpoints (DCP) with one process, gathers of DTensors. With TORCH_LOGS its log
    messages stay.
    """
    warnings.filterwarnings("ignore", module=r"torch\.distributed\b")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)
