"""Measure the rates of one GPU that bound the training step of Llama-3.1-8B.

    PYTHONPATH=. python benchmarks/rates.py            (about two minutes; needs PyTorch for CUDA)

matmuls    the six shapes at 8,192 tokens in bf16: forward (x Wᵀ), gradient of the input (g W)
           and of the weight (gᵀ x), the last also accumulated in fp32
attention  causal, 32 heads in 8 groups of 128, each backend, forward and backward; FLOPs of the
           causal half
others     a copy; matmuls without pause, with clock and power

Prints median and range of the repeats, after a warm-up of 0.3 s each.
"""

import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, HIDDEN, MLP, VOCABULARY = 8192, 4096, 14336, 128256
SHAPES = {  # from, to
    "q, k, v": (HIDDEN, 6144),
    "o": (HIDDEN, HIDDEN),
    "gate, up": (HIDDEN, 2 * MLP),
    "down": (MLP, HIDDEN),
    "head": (HIDDEN, VOCABULARY),
    "8192³": (8192, 8192),
}


def seconds(function: Callable[[], object], repeats: int = 20) -> list[float]:
    """Of each of `repeats` calls."""
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until:
        function()
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def rate(work: float, function: Callable[[], object]) -> str:
    """Work per second, in units of 10¹²."""
    try:
        times = seconds(function)
    except (RuntimeError, TypeError) as error:
        return f"not here: {str(error).splitlines()[0][:60]}"
    return (
        f"{work / statistics.median(times) / 1e12:.0f}"
        f" ({work / max(times) / 1e12:.0f}–{work / min(times) / 1e12:.0f})"
    )


def products() -> None:
    print(
        "\n| TFLOP/s | forward | by input | by weight | by weight, added in fp32"
        " |\n|---|---|---|---|---|"
    )
    for name, (inputs, outputs) in SHAPES.items():
        x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        g = torch.randn(TOKENS, outputs, device="cuda", dtype=torch.bfloat16)
        total = torch.zeros(outputs, inputs, device="cuda")
        work = 2.0 * TOKENS * inputs * outputs

        def added(g: torch.Tensor = g, x: torch.Tensor = x, total: torch.Tensor = total) -> None:
            torch.addmm(total, g.t(), x, out_dtype=torch.float32, out=total)

        cells = [
            rate(work, partial(torch.matmul, x, w.t())),
            rate(work, partial(torch.matmul, g, w)),
            rate(work, partial(torch.matmul, g.t(), x)),
            rate(work, added),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        del x, w, g, total


def attention() -> None:
    print("\n| attention, TFLOP/s | forward | backward |\n|---|---|---|")
    for length, batch in ((4096, 2), (8192, 1)):
        work = 2.0 * 2 * batch * 32 * length**2 * 128 / 2
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, None):
            name = "PyTorch's choice" if backend is None else backend.name.lower()
            print(
                f"| {batch} × {length}, {name} |"
                f" {' | '.join(one_backend(batch, length, work, backend))} |",
                flush=True,
            )
        documents(batch, length, work)


def one_backend(batch: int, length: int, work: float, backend: SDPBackend | None) -> list[str]:
    """The rates of forward and backward; None is what PyTorch chooses."""
    q, k, v = (
        torch.randn(
            batch, heads, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for heads in (32, 8, 8)
    )

    def forward() -> torch.Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        out = forward()
        grad = torch.randn_like(out)
    except RuntimeError as error:
        return [f"not here: {str(error).splitlines()[0][:60]}", ""]
    backward = rate(
        2.5 * work, lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    )
    return [rate(work, forward), backward]


def documents(batch: int, length: int, work: float) -> None:
    """Through the boundaries of documents, one as long as the sequence."""
    from fast_llm.kernels import cudnn
    from fast_llm.model.attention import _varlen_kernel

    q, k, v = (
        torch.randn(
            batch * length, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for heads in (32, 8, 8)
    )
    ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device="cuda")
    for way in ("PyTorch's kernel", "cuDNN"):
        if way == "cuDNN" and (problem := cudnn.load(torch.device("cuda", 0))):
            print(
                f"| {batch} × {length}, by boundaries, cuDNN | not here: {problem[:60]} | |",
                flush=True,
            )
            continue
        out = _varlen_kernel(q, k, v, ends, ends, length, length, None, None)
        grad = torch.randn_like(out)
        cells = [
            rate(work, lambda: _varlen_kernel(q, k, v, ends, ends, length, length, None, None)),
            rate(
                2.5 * work,
                partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True),
            ),
        ]
        print(f"| {batch} × {length}, by boundaries, {way} | {' | '.join(cells)} |", flush=True)
    cudnn.unload()


def sustained(length: float = 20.0) -> None:
    """Products without pause: what the clock comes down to."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,power.draw,temperature.gpu",
        "--format=csv,noheader",
    ]
    print("\n8192³ without pause: seconds, TFLOP/s, clock, power, temperature")
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < length:
        times = seconds(lambda: a @ b, 500)
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        print(
            f"{passed:.0f} s: {2 * 8192**3 / statistics.mean(times) / 1e12:.0f}, {said}", flush=True
        )


def main() -> None:
    """Measure and print."""
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN"
        f" {torch.backends.cudnn.version()}"
    )
    products()
    attention()
    big = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(big)
    times = seconds(lambda: other.copy_(big))
    print(f"\ncopy, TB/s read and written: {2 * 2**30 / statistics.median(times) / 1e12:.2f}")
    sustained()


if __name__ == "__main__":
    main()
