"""Compile every Triton kernel for a GPU, on a machine without one, as a program.

    python -m tests.kernels.triton_compiles

Triton's interpreter accepts Python that its compiler refuses. Here the kernels' functions are
called with tensors on the CPU, and each kernel is compiled for Hopper but not launched. Prints how
many kernels were compiled.
"""

from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fast_llm.kernels import triton as kernels
from fast_llm.kernels.rounding import BLOCK

COMPILED: set[int] = set()


def compile_only() -> None:
    """Let launches end after the compilation."""
    run = triton.JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        COMPILED.add(id(compiled))
        return compiled

    triton.JITFunction.run = warm_up
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )


def softmax_cross_entropy() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits, labels = torch.zeros(4, 9001, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        for z_loss in (0.0, 1e-4):
            for known in (None, torch.zeros(4)):
                kernels.softmax_cross_entropy_(logits, labels, -100, True, known, z_loss)
        kernels.softmax_cross_entropy_(logits, labels, -100, False)


def adamw() -> None:
    rest = {"step": 1, "learning_rate": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    rest |= {"epsilon": 1e-8, "factor": 0.5, "seed": 3}
    gradient, absmax = torch.zeros(4 * BLOCK), torch.zeros(4)
    for moments in (torch.float32, torch.bfloat16, torch.int8):
        second = torch.uint8 if moments == torch.int8 else moments
        one, two = (torch.zeros(4 * BLOCK, dtype=dtype) for dtype in (moments, second))
        blocks = (absmax, absmax.clone()) if moments == torch.int8 else None
        low = torch.zeros(4 * BLOCK, dtype=torch.int16)
        kernels.adamw_(gradient, None, gradient.clone(), one, two, blocks, **rest)  # type: ignore[arg-type]
        kernels.adamw_(gradient.bfloat16(), low, gradient, one, two, blocks, **rest)  # type: ignore[arg-type]


def rms_norm() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (576, 4096):
            x, weight = torch.zeros(8, width, dtype=dtype), torch.zeros(width, dtype=dtype)
            for residual_grad in (None, x):
                kernels.rms_norm_backward(x, residual_grad, x, weight, torch.zeros(8))


def others() -> None:
    numbers: list[Tensor] = [torch.zeros(64, 128, dtype=t) for t in (torch.bfloat16, torch.float32)]
    for x in numbers:
        kernels.add_(numbers[1], x)
        kernels.amax(x)
        for short in (torch.float8_e4m3fn, torch.float8_e5m2):
            results = torch.empty(0, dtype=short), torch.zeros(64, 128, dtype=short)
            for row_major in results:
                for transposed in (results[0], results[1].t().contiguous()):
                    kernels.quantize_fp8(x, torch.ones(()), row_major, transposed)


if __name__ == "__main__":
    compile_only()
    for compile_kernels in (softmax_cross_entropy, adamw, rms_norm, others):
        compile_kernels()
    print(len(COMPILED))
