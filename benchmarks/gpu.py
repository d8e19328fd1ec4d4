"""Speed of kernels and of training on one GPU.

    PYTHONPATH=. python benchmarks/gpu.py

Takes five minutes; needs PyTorch for CUDA, Triton and pydantic. Prints the machine, the times of
kernels, then tokens/s from the runs' own metrics. Tokens and weights are random: no network, no
data. The first log intervals of each run are warm-up; the median of the others counts.
`python -m tests.gpu` tests correctness.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fast_llm.kernels import cudnn

NOT_COMPILED = ["model.multi_stage.compile_all=no"]
SMOL = [
    "model.base_model.vocab_size=49152",
    "model.base_model.transformer.num_layers=30",
    "model.base_model.transformer.hidden_size=576",
    "model.base_model.transformer.num_attention_heads=9",
    "model.base_model.transformer.head_groups=3",
    "model.base_model.transformer.ffn_hidden_size=1536",
]
BIG = [  # the blocks of Llama-3.1-8B, as many as fit with fp32 masters and moments
    "model.base_model.vocab_size=128256",
    "model.base_model.tie_word_embeddings=no",
    "model.base_model.transformer.num_layers=8",
    "model.base_model.transformer.hidden_size=4096",
    "model.base_model.transformer.num_attention_heads=32",
    "model.base_model.transformer.head_groups=8",
    "model.base_model.transformer.ffn_hidden_size=14336",
]


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    problem = cudnn.load(torch.device("cuda", 0))
    print(f"cuDNN for packed documents: {problem or 'ready'}")
    norms()
    factors()
    long_context()
    folder = Path(tempfile.mkdtemp())
    packed(folder)
    speed(folder)


def library(prefix: Path) -> None:
    """Python's own library as a token file: a document for each module, a token for each byte."""
    import sysconfig

    import numpy as np

    from fast_llm.data.tokenfile import TokenFileWriter

    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:4000]:
        writer.append(np.frombuffer(path.read_bytes(), np.uint8))
    writer.close()


def packed(folder: Path) -> None:
    """Train on documents that differ in each micro-batch, compiled (once for all) and not."""
    library(folder / "library")
    shape = [
        *SMOL,
        "model.base_model.transformer.num_layers=12",
        "batch.sequence_length=16384",
        "batch.batch_size=4",
    ]
    data = ["data.format=list", f"data.path={folder}/library", "batch.micro_batch_size=1"]
    found = {}
    for compiled in ("no", "yes"):
        records = train(
            folder / compiled, [*shape, *data, f"model.multi_stage.compile_all={compiled}"], 25
        )
        found[compiled] = statistics.median(r["tokens_per_sec_per_gpu"] for r in records[5:])
        print(
            f"packed documents, compile_all {compiled}: {found[compiled]:,.0f} tokens/s, loss"
            f" {records[-1]['language_model_loss']:.4f}"
        )
    assert found["yes"] > 1.1 * found["no"]


def speed(folder: Path) -> None:
    for name, shape, batch, further in (
        (
            "SmolLM2-135M, sequence 1024",
            SMOL,
            ["batch.sequence_length=1024", "batch.micro_batch_size=32", "batch.batch_size=64"],
            NOT_COMPILED,
        ),
        (
            "the same, compiled",
            SMOL,
            ["batch.sequence_length=1024", "batch.micro_batch_size=32", "batch.batch_size=64"],
            ["model.multi_stage.compile_all=yes"],
        ),
        (
            "8 blocks of Llama-3.1-8B, sequence 4096",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            NOT_COMPILED,
        ),
        (
            "the same, compiled",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            ["model.multi_stage.compile_all=yes"],
        ),
        (
            "the same, not compiled, mlp_recompute_level: selective",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            [*NOT_COMPILED, "model.base_model.transformer.mlp_recompute_level=selective"],
        ),
        (
            "the same, block",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            [*NOT_COMPILED, "model.base_model.transformer.mlp_recompute_level=block"],
        ),
    ):
        records = train(folder / "speed", [*shape, *batch, *further], 30)
        shutil.rmtree(folder / "speed")
        rates = [r["tokens_per_sec_per_gpu"] for r in records[4:]]
        last = records[-1]
        print(
            f"{name}: {statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to"
            f" {max(rates):,.0f}),"
            f" {last['model_tflops']:.0f} TFLOP/s, MFU {100 * (last['mfu'] or 0):.1f} %, peak"
            f" {last['global_max_reserved'] / 1024:.1f} GiB"
        )


def long_context() -> None:
    """Attention of the first and last of 8 processes: one document of 131,072 tokens, 8B heads."""
    from fast_llm.model.attention import varlen_attention
    from fast_llm.parallel.context import Sharding

    length, size = 131072, 8
    for rank in (0, size - 1):
        own = Sharding(rank, size, 1, length).varlen_qkv(None, None).to(torch.device("cuda"))
        q = torch.randn(
            length // size, 32, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        both = torch.randn(
            length, 2, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        times: dict[str, list[float]] = {
            "select": [],
            "forward": [],
            "backward": [],
            "select backward": [],
        }
        for _ in range(5):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
            marks[0].record()
            selected = both.index_select(0, own.index)
            marks[1].record()
            keys, values = selected.unbind(1)
            out = varlen_attention(q, keys, values, own, True)
            marks[2].record()
            (gradient,) = torch.autograd.grad(
                out, selected, torch.ones_like(out), retain_graph=True
            )
            marks[3].record()
            torch.autograd.grad(selected, both, gradient)
            marks[4].record()
            torch.cuda.synchronize()
            for name, one, other in zip(times, marks[:-1], marks[1:], strict=True):
                times[name].append(one.elapsed_time(other))
        shown = ", ".join(
            f"{name} {statistics.median(found[1:]):.1f} ms" for name, found in times.items()
        )
        print(
            f"131,072 tokens over 8, process {rank}: {shown}; keys and values gathered:"
            f" {both.nbytes / 1e6:.0f} MB"
        )


def norms() -> None:
    """How long a residual stream and its RMSNorm take, next to what PyTorch's compiler makes."""
    from fast_llm.model.norm import fused_add_rms_norm

    def plain(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.rms_norm(x, weight.shape, weight, 1e-5), x * 1

    for tokens, width in ((8192, 4096), (32768, 576)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
            weight = (1 + 0.1 * torch.randn(width, device="cuda", dtype=dtype)).requires_grad_()
            grads = torch.randn_like(x), torch.randn_like(x)
            took = []
            for way in (lambda x, weight: fused_add_rms_norm(x, weight, 1e-5), plain):
                compiled = torch.compile(way)
                for _ in range(3):
                    torch.autograd.grad(compiled(x, weight), (x, weight), grads)
                # Of the kernels alone: launching them from Python takes as long.
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                ) as profile:
                    for _ in range(10):
                        made = compiled(x, weight)
                        torch.cuda.synchronize()
                        with torch.profiler.record_function("back"):
                            torch.autograd.grad(made, (x, weight), grads)
                        torch.cuda.synchronize()
                took.append(
                    [(e.key[:40], e.self_device_time_total / 10) for e in profile.key_averages()]
                )
            named = [
                "; ".join(f"{name} {time:.0f}" for name, time in one if time > 2) for one in took
            ]
            print(
                f"RMSNorm and residual, {tokens} x {width} in {dtype}: us, forward and backward:"
                f" ours {named[0]};"
                f" the compiler's {named[1]}; four passes of memory: {4 * x.nbytes / 4.2e6:.0f} us"
            )


def factors() -> None:
    """How long it takes to round what products in fp8 take."""
    from fast_llm.model.fp8 import E4M3, E5M2, _scale

    for dtype in (E4M3, E5M2):
        for size in ((8192, 4096), (8192, 14336), (14336, 4096)):
            x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
            scale = _scale(x, dtype)
            both, one = (
                triton_time(partial(torch.ops.fast_llm.quantize_fp8, x, scale, dtype, way, True))
                for way in (True, False)
            )
            largest = triton_time(partial(torch.ops.fast_llm.amax, x))
            print(
                f"{size} to {dtype} in both orders {1e3 * both:.0f} us, transposed alone"
                f" {1e3 * one:.0f}, the greatest"
                f" {1e3 * largest:.0f}; by memory"
                f" {', '.join(f'{n * x.numel() / 4.2e6:.0f}' for n in (4, 3, 2))}"
            )


def triton_time(call: Callable[[], object]) -> float:
    """Milliseconds, median."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def train(folder: Path, settings: list[str], steps: int) -> list[dict[str, float]]:
    """Run the command and read its metrics."""
    command = [
        *(
            sys.executable,
            "-m",
            "fast_llm.cli",
            "train",
            "gpt",
            "model.distributed.training_dtype=bf16",
            *settings,
        ),
        *(f"training.train_iters={steps}", "training.logs.interval=1"),
        *(
            ()
            if any(setting.startswith("data.") for setting in settings)
            else ("data.format=random",)
        ),
        f"run.experiment_dir={folder}",
    ]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-1500:], done.stderr[-3000:])
        raise SystemExit(1)
    assert "recompile_limit" not in done.stderr, done.stderr[-3000:]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({r["step"]: r for r in records if r["phase"] == "training"}.values())


if __name__ == "__main__":
    main()
