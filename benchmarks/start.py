"""Time from the command `fast-llm train` to its first step and to its end.

    python benchmarks/start.py [--turns 7]

The model has a few thousand weights and takes three steps. Runs alternate with `import torch`,
which is part of a start. Prints median and range in Markdown; the first turn only warms the disk
cache.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = [
    "data.format=random",
    "batch.batch_size=8",
    "batch.micro_batch_size=2",
    "batch.sequence_length=24",
    "training.train_iters=3",
    "training.logs.interval=1",
    "model.base_model.vocab_size=128",
    "model.base_model.transformer.num_layers=2",
    "model.base_model.transformer.hidden_size=40",
    "model.base_model.transformer.num_attention_heads=4",
    "model.base_model.transformer.head_groups=2",
    "model.base_model.transformer.ffn_hidden_size=52",
]


def train(folder: str) -> tuple[float, float]:
    """Seconds to the line of the first step, and to the end of the process."""
    command = [
        sys.executable,
        "-m",
        "fast_llm.cli",
        "train",
        "gpt",
        *SETTINGS,
        f"run.experiment_dir={folder}",
    ]
    started, first = time.perf_counter(), 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "iteration 1/3" in line:
                first = time.perf_counter() - started
    assert first and process.returncode == 0, said
    return first, time.perf_counter() - started


def load() -> float:
    """Seconds of a process that imports torch."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    found: dict[str, list[float]] = {
        "to the first step": [],
        "to the end": [],
        "`import torch` alone": [],
    }
    for turn in range(turns + 1):
        with tempfile.TemporaryDirectory() as folder:
            seconds = *train(str(Path(folder) / "run")), load()
        if turn:
            for times, second in zip(found.values(), seconds, strict=True):
                times.append(second)
    print("| seconds | median | range |\n|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} |")


if __name__ == "__main__":
    main()
