"""Effect of low-precision formats on the loss: same model, data and steps in each format.

    PYTHONPATH=. python benchmarks/loss.py fp8        matmuls in fp8 (H100, L40 or newer, or a CPU)
    PYTHONPATH=. python benchmarks/loss.py moments    moments in fp32, bf16 and 8 bits

Each takes five to ten minutes; a further argument is the number of steps. On a GPU the model has 12
layers of width 576 and learns Python's library byte by byte, for 1,000 steps of 16,384 tokens. On a
CPU it has 3 layers of width 192, and steps of 1,024 tokens.

Prints the mean loss of the last 100 steps and the final validation loss, in nats. The reference
runs twice, with sums in another order, to show the size of random differences. Moments are compared
with bf16 matmuls on a GPU and fp32 ones on a CPU.
"""

import json
import statistics
import sys
import tempfile
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
    if sys.argv[1:2] not in (["fp8"], ["moments"]):
        raise SystemExit(__doc__)
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    folder = Path(tempfile.mkdtemp())
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
        *SMOL,
        *("model.base_model.vocab_size=256", f"{transformer}.num_layers=12"),
        *("data.format=list", f"data.path={folder}/library", "data.split=[95,5,0]"),
        *("batch.sequence_length=1024", "batch.batch_size=16", "batch.micro_batch_size=16"),
        *("training.validation.iterations=20", f"training.validation.interval={steps}"),
        *("optimizer.learning_rate.base=1e-3", "optimizer.learning_rate.warmup_iterations=50"),
        *(
            "optimizer.learning_rate.decay_style=cosine",
            f"optimizer.learning_rate.decay_iterations={steps}",
        ),
    ]
    if on_gpu:
        settings += ["model.multi_stage.compile_all=yes"]
    else:
        settings += [f"{transformer}.{name}={value}" for name, value in small.items()]
        settings += ["batch.sequence_length=128", "batch.batch_size=8", "batch.micro_batch_size=8"]
    for name, further in contenders(sys.argv[1], on_gpu).items():
        records = train(folder / name.replace(" ", ""), [*settings, *further], steps)
        last = statistics.mean(r["language_model_loss"] for r in records[-100:])
        lines = (folder / name.replace(" ", "") / "metrics.jsonl").read_text().splitlines()
        evaluations = [
            r["language_model_loss"] for r in map(json.loads, lines) if r["phase"] == "validation"
        ]
        rate = statistics.median(r["tokens_per_sec_per_gpu"] for r in records[50:])
        print(
            f"{name}: last hundred steps {last:.4f}, validation {evaluations[-1]:.4f}, {rate:,.0f}"
            " tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
