"""One GPU: that its fast paths compute what the slow ones do, that a run resumes, and how fast training is.

    PYTHONPATH=. python benchmarks/gpu.py            (five minutes; needs PyTorch for CUDA, Triton, pydantic)

Prints the machine, then a line for each comparison (bound beside it), then tokens/s from the runs' own metrics.
Random tokens and weights: no network, no data. Each run warms up over its first log intervals; the median of the rest counts.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

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
    attention()
    cross_entropy()
    folder = Path(tempfile.mkdtemp())
    resume(folder)
    for name, shape, batch, further in (
        (
            "SmolLM2-135M, sequence 1024",
            SMOL,
            ["batch.sequence_length=1024", "batch.micro_batch_size=32", "batch.batch_size=64"],
            [],
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
            [],
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
            ["model.base_model.transformer.mlp_recompute_level=selective"],
        ),
        (
            "the same, block",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            ["model.base_model.transformer.mlp_recompute_level=block"],
        ),
    ):
        records = train(folder / "speed", [*shape, *batch, *further], 30)
        shutil.rmtree(folder / "speed")
        rates = [r["tokens_per_sec_per_gpu"] for r in records[4:]]
        last = records[-1]
        print(
            f"{name}: {statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}),"
            f" {last['model_tflops']:.0f} TFLOP/s, MFU {100 * (last['mfu'] or 0):.1f} %, peak {last['global_max_reserved'] / 1024:.1f} GiB"
        )


def attention() -> None:
    from fast_llm.model.attention import Documents
    from fast_llm.model.attention import attention as attend

    lengths = (1, 700, 323, 1000, 24)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    documents = Documents(lengths, ends, max(lengths))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        q, k, v = (
            torch.randn(2, 1024, heads, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
        )
        out = attend(q, k, v, documents, True)
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        flat = [x.flatten(0, 1) for x in exact]
        parts = [x.split(lengths) for x in flat]
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)[
                0
            ].transpose(0, 1)
            for part in zip(*parts, strict=True)
        ]
        expected = torch.cat(outs)
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        worst = max(distance(a, b) for a, b in zip((out.flatten(0, 1), *found), (expected, *wanted), strict=True))
        print(f"attention in {dtype}: differs from float64 by {worst:.1e} (bound {bound:.0e})")
        assert worst < bound


def cross_entropy() -> None:
    from fast_llm.model.loss import cross_entropy as loss_of

    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        hidden = torch.randn(1000, 512, device="cuda", dtype=dtype, requires_grad=True)
        weight = (0.05 * torch.randn(128256, 512, device="cuda", dtype=dtype)).requires_grad_()
        labels = torch.randint(128256, (1000,), device="cuda")
        labels[5:50] = -100
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        expected = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=-100, reduction="sum")
        wanted = torch.autograd.grad(expected, exact)
        for implementation in ("torch", "fused", "triton"):
            loss = loss_of(hidden, weight, labels, implementation, None)
            found = torch.autograd.grad(loss, (hidden, weight))
            worst = max(distance(a, b) for a, b in zip((loss, *found), (expected, *wanted), strict=True))
            print(f"cross entropy {implementation} in {dtype}: differs from float64 by {worst:.1e} (bound {bound:.0e})")
            assert worst < bound


def resume(folder: Path) -> None:
    shape = [
        *SMOL,
        "model.base_model.transformer.num_layers=4",
        "batch.sequence_length=512",
        "batch.batch_size=8",
        "batch.micro_batch_size=4",
    ]
    saves = ["training.checkpoint.interval=4", "training.export.interval=8"]
    whole = train(folder / "whole", [*shape, *saves], 8)
    train(folder / "parts", [*shape, *saves], 4)
    parts = train(folder / "parts", [*shape, *saves], 8)
    difference = max(
        abs(a["language_model_loss"] - b["language_model_loss"]) for a, b in zip(whole, parts, strict=True)
    )
    print(
        f"four and four steps differ from eight by {difference:.1e} nats (flash attention's backward is not deterministic)"
    )
    assert difference < 1e-2


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other).norm() / other.norm()).item()


def train(folder: Path, settings: list[str], steps: int) -> list[dict[str, float]]:
    """Run the command and read its metrics."""
    command = [
        *(sys.executable, "-m", "fast_llm.cli", "train", "gpt", *settings),
        *("data.format=random", "model.distributed.training_dtype=bf16", f"training.train_iters={steps}"),
        *("training.logs.interval=1", f"run.experiment_dir={folder}"),
    ]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-1500:], done.stderr[-3000:])
        raise SystemExit(1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({r["step"]: r for r in records if r["phase"] == "training"}.values())


if __name__ == "__main__":
    main()
