"""What fp8 does to the loss: the same model, data and steps in bf16 and in fp8, on one GPU.

    PYTHONPATH=. python benchmarks/fp8.py            (three minutes; needs PyTorch for CUDA 8.9 or later, Triton, pydantic)

A model of 12 layers of 576 learns Python's library byte by byte, a thousand steps of 16,384 tokens. Printed: the mean loss of the last 100
steps, and that of the validation at the end, in nats. bf16 runs twice, from other random weights, for the size of chance.
"""

import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.gpu import SMOL, library, train

STEPS = 1000


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    library(folder / "library")
    settings = [
        *SMOL,
        *("model.base_model.transformer.num_layers=12", "model.base_model.vocab_size=256"),
        *("data.format=list", f"data.path={folder}/library", "data.split=[95,5,0]"),
        *("batch.sequence_length=1024", "batch.batch_size=16", "batch.micro_batch_size=16"),
        *(
            "model.multi_stage.compile_all=yes",
            "training.validation.iterations=20",
            f"training.validation.interval={STEPS}",
        ),
        *("optimizer.learning_rate.base=1e-3", "optimizer.learning_rate.warmup_iterations=50"),
        *("optimizer.learning_rate.decay_style=cosine", f"optimizer.learning_rate.decay_iterations={STEPS}"),
    ]
    for name, further in (
        ("bf16", []),
        ("fp8", ["model.distributed.fp8=yes"]),
        ("bf16, other weights", ["model.distributed.seed=1235"]),
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
