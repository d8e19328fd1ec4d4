"""Effect of low-precision formats on the loss: same model, data and steps in each format.

    PYTHONPATH=. python benchmarks/loss.py fp8        matmuls in fp8 (H100, L40 or newer, or a CPU)
    PYTHONPATH=. python benchmarks/loss.py moments    moments in fp32, bf16 and 8 bits
    PYTHONPATH=. python benchmarks/loss.py real       both, on one GPU and real tokens

`real` trains SmolLM2-135M's shape with Llama 3's vocabulary on the tokens that `make test-gpu`
trains on (folder FAST_LLM_GPU_DATA, by default build/gpu-data), from two seeds; three runs share
the card, so it prints no speeds. Each seed has other initial weights, data order and random
rounding: their difference shows the noise.

Each takes five to ten minutes; a further argument is the number of steps. On a GPU, fp8 and moments
train 12 layers of width 576 on Python's library byte by byte, for 1,000 steps of 16,384 tokens. On
a CPU the model has 3 layers of width 192, and a step 1,024 tokens.

Prints the mean loss of the last 100 steps and the final validation loss, in nats. Without seeds,
the reference runs twice, with sums in another order, to show the size of random differences.
Moments are compared with bf16 matmuls on a GPU and fp32 ones on a CPU.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu import SMOL, library, train


def contenders(what: str, on_gpu: bool) -> dict[str, list[str]]:
    """By name, the settings of each."""
    other_order = "batch.micro_batch_size=2"
    if what == "fp8":
        return {
            "bf16": [],
            "fp8": ["model.distributed.fp8=yes"],
            "bf16, smaller micro-batches": [other_order],
        }
    products = f"model.distributed.training_dtype={'bf16' if on_gpu else 'fp32'}"
    found = {
        f"{name} moments": [products, f"optimizer.moments_dtype={name}"]
        for name in ("fp32", "bf16", "int8")
    }
    return found | {"fp32 moments, smaller micro-batches": [*found["fp32 moments"], other_order]}


def main() -> None:
    if sys.argv[1:2] not in (["fp8"], ["moments"], ["real"]):
        raise SystemExit(__doc__)
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    folder = Path(tempfile.mkdtemp())
    if sys.argv[1] == "real":
        return real(folder, steps)
    library(folder / "library")
    transformer, on_gpu = "model.base_model.transformer", torch.cuda.is_available()
    small = {
        "num_layers": 3,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "head_groups": 3,
        "ffn_hidden_size": 512,
    }
    settings = [
        *("model.base_model.vocab_size=256", f"{transformer}.num_layers=12"),
        *("data.format=list", f"data.path={folder}/library"),
        *common(steps),
    ]
    if on_gpu:
        settings += ["model.multi_stage.compile_all=yes"]
    else:
        settings += [f"{transformer}.{name}={value}" for name, value in small.items()]
        settings += ["batch.sequence_length=128", "batch.batch_size=8", "batch.micro_batch_size=8"]
    for name, further in contenders(sys.argv[1], on_gpu).items():
        run = folder / name.replace(" ", "")
        records = train(run, [*SMOL, *settings, *further], steps)
        rate = statistics.median(r["tokens_per_sec_per_gpu"] for r in records[50:])
        print(f"{name}: {losses(run, records)}, {rate:,.0f} tokens/s", flush=True)


def common(steps: int) -> list[str]:
    """16 sequences of 1,024 tokens a step, and a cosine schedule."""
    rate = "optimizer.learning_rate"
    return [
        *("data.split=[95,5,0]", "batch.sequence_length=1024", "batch.batch_size=16"),
        *("batch.micro_batch_size=16", "training.validation.iterations=20"),
        *(f"training.validation.interval={steps}", f"{rate}.base=1e-3"),
        *(f"{rate}.warmup_iterations=50", f"{rate}.decay_style=cosine"),
        f"{rate}.decay_iterations={steps}",
    ]


def losses(run: Path, records: list[dict[str, float]]) -> str:
    """The last hundred steps' and the last validation's."""
    last = statistics.mean(r["language_model_loss"] for r in records[-100:])
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    validation = [r["language_model_loss"] for r in lines if r["phase"] == "validation"][-1]
    return f"last hundred steps {last:.4f}, validation {validation:.4f}"


def real(folder: Path, steps: int) -> None:
    """bf16, int8 moments and fp8, each from two seeds, on one GPU."""
    data = Path(os.environ.get("FAST_LLM_GPU_DATA", "build/gpu-data")).absolute()
    settings = [
        *SMOL,
        *("model.base_model.vocab_size=128256", "model.multi_stage.compile_all=yes"),
        *("data.format=file", f"data.path={data}/code.json"),
        *common(steps),
        *("data.split=[85,15,0]", "training.validation.iterations=10"),
    ]
    formats = {
        "bf16, fp32 moments": ["optimizer.moments_dtype=fp32"],
        "bf16, int8 moments": ["optimizer.moments_dtype=int8"],
        "fp8, fp32 moments": ["model.distributed.fp8=yes", "optimizer.moments_dtype=fp32"],
    }

    def one(case: tuple[int, str]) -> str:
        seed, name = case
        run = folder / f"{seed}{name.replace(' ', '')}"
        further = [*formats[name], f"model.distributed.seed={seed}"]
        return f"{name}, seed {seed}: {losses(run, train(run, [*settings, *further], steps))}"

    with ThreadPoolExecutor(3) as threads:
        for line in threads.map(one, itertools.product((1, 2), formats)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
