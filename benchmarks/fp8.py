"""What fp8 does to the loss: the same model, data and steps in bf16 and in fp8, on one GPU, or a smaller model on a CPU.

    PYTHONPATH=. python benchmarks/fp8.py            (five minutes; a GPU has to be an H100, an L40 or newer)

A model of 12 layers of 576 learns Python's library byte by byte, a thousand steps of 16,384 tokens; on a CPU
one of 3 layers of 192, of 1,024 tokens. Printed: the mean loss of the last 100
steps, and that of the validation at the end, in nats. bf16 runs twice, with sums in another
order, for the size of chance.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import SMOL, library, train

STEPS = 1000


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    library(folder / "library")
    transformer, on_gpu = "model.base_model.transformer", torch.cuda.is_available()
    small = {"num_layers": 3, "hidden_size": 192, "num_attention_heads": 6, "head_groups": 3, "ffn_hidden_size": 512}
    settings = [
        *SMOL,
        *("model.base_model.vocab_size=256", f"{transformer}.num_layers=12"),
        *("data.format=list", f"data.path={folder}/library", "data.split=[95,5,0]"),
        *("batch.sequence_length=1024", "batch.batch_size=16", "batch.micro_batch_size=16"),
        *("training.validation.iterations=20", f"training.validation.interval={STEPS}"),
        *("optimizer.learning_rate.base=1e-3", "optimizer.learning_rate.warmup_iterations=50"),
        *("optimizer.learning_rate.decay_style=cosine", f"optimizer.learning_rate.decay_iterations={STEPS}"),
    ]
    if on_gpu:
        settings += ["model.multi_stage.compile_all=yes"]
    else:
        settings += [f"{transformer}.{name}={value}" for name, value in small.items()]
        settings += ["batch.sequence_length=128", "batch.batch_size=8", "batch.micro_batch_size=8"]
    for name, further in (
        ("bf16", []),
        ("fp8", ["model.distributed.fp8=yes"]),
        ("bf16, smaller micro-batches", ["batch.micro_batch_size=2"]),
    ):
        records = train(folder / name.replace(" ", ""), [*settings, *further], STEPS)
        last = statistics.mean(r["language_model_loss"] for r in records[-100:])
        lines = (folder / name.replace(" ", "") / "metrics.jsonl").read_text().splitlines()
        evaluations = [r["language_model_loss"] for r in map(json.loads, lines) if r["phase"] == "validation"]
        rate = statistics.median(r["tokens_per_sec_per_gpu"] for r in records[50:])
        print(
            f"{name}: last hundred steps {last:.4f}, validation {evaluations[-1]:.4f}, {rate:,.0f} tokens/s", flush=True
        )


if __name__ == "__main__":
    main()
