"""Speed of reading sequences and batches from token files in the page cache.

    python benchmarks/loader.py [--tokens 200_000_000] [--document 400] [--length 4096] [--shards 8]

Writes random int32 token files to a temporary folder, with documents of 0.5 to 1.5 times
`--document` tokens, or with `--sigma` log-normal lengths with this median. Measures on one core:
opening, reading sequences (`Dataset.read`), finding them (permutation and mixture only), and
complete batches (`Loader`: also labels, positions and documents), in the step itself and in
threads. Both ways of packing are read by turns. Prints a table in Markdown.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.loader import Loader
from fast_llm.data.tokenfile import TokenFileWriter

VOCABULARY = 128_256
Packing = Literal["concatenate", "best_fit"]
BATCH = BatchSizes(batch_size=32, micro_batch_size=2, micro_batches=16)


def write(
    folder: Path, tokens: int, document: int, sigma: float, shards: int, edited: bool
) -> Path:
    """A dataset.json; `edited`: each shard weighted by hand, so that it is a source of its own."""
    random = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        prefix = folder / f"shard_{number}"
        if not prefix.with_name(prefix.name + ".idx").exists():
            writer = TokenFileWriter(prefix, np.dtype("int32"))
            while writer.tokens < tokens // shards:
                lengths = random.integers(document // 2, document * 3 // 2, 10_000)
                if sigma:
                    drawn = random.lognormal(np.log(document), sigma, 10_000)
                    lengths = np.maximum(drawn, 1).astype(np.int64)
                writer.append_many(
                    random.integers(VOCABULARY, size=lengths.sum(), dtype=np.int32), lengths
                )
            writer.close()
        entries.append({"prefix": prefix.name} | ({"weight": 1 + number} if edited else {}))
    path = folder / f"dataset_{edited}.json"
    path.write_text(json.dumps({"datasets": entries}))
    return path


def open_(path: Path, length: int, packing: Packing) -> Dataset:
    """Open a dataset with all documents for training, ready to be read."""
    config = DataConfig(format="file", path=[str(path)], split=[1], packing=packing)
    dataset = open_dataset(config, length, 0, VOCABULARY)
    dataset.splits["training"].open()
    return dataset


def read_rates(datasets: Sequence[Dataset], length: int) -> list[tuple[float, float, float]]:
    """For each dataset: tokens read a second, the best and the worst of five rounds, and seconds to
    find one sequence.
    """
    count = max(1, 10_000_000 // length)
    reading: list[list[float]] = [[] for _ in datasets]
    finding: list[list[float]] = [[] for _ in datasets]
    for turn in range(5):
        indices = range(turn * count, (turn + 1) * count)
        for place, dataset in enumerate(datasets):
            started = time.perf_counter()
            for index in indices:
                dataset.read("training", index)
            reading[place].append(time.perf_counter() - started)
            started = time.perf_counter()
            for index in indices:
                dataset.splits["training"].find(index)
            finding[place].append(time.perf_counter() - started)
    size = count * length
    return [
        (size / min(read), size / max(read), min(find) / count)
        for read, find in zip(reading, finding, strict=True)
    ]


def batch_rate(dataset: Dataset, length: int, workers: int) -> float:
    """Tokens a second that a loader gives when nothing else is done, the best of three rounds."""
    steps = max(4, 10_000_000 // (length * BATCH.batch_size))
    best = 0.0
    for turn in range(3):
        with Loader(
            dataset,
            "training",
            BATCH,
            rank=0,
            processes=1,
            vocab_size=VOCABULARY,
            first_sample=turn * steps * BATCH.batch_size,
            steps=steps,
            isolate=True,
            workers=workers,
            prefetch=2,
        ) as loader:
            started = time.perf_counter()
            for _ in loader:
                pass
            best = max(best, steps * BATCH.batch_size * length / (time.perf_counter() - started))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in all token files")
    parser.add_argument(
        "--document", type=int, default=400, help="tokens of a document, on average"
    )
    parser.add_argument("--sigma", type=float, default=0.0, help="of log-normal lengths")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--shards", type=int, default=8)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}:"
        f" {wanted.tokens:,} tokens in"
        f" {wanted.shards} files, documents of {wanted.document}, sequences of {wanted.length}\n"
    )
    print(
        "| sources | packing | open, ms | find, µs | read, M tokens/s | batches, workers 0 | 1 | 2,"
        " M tokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for edited in (False, True):
            path = write(
                Path(folder), wanted.tokens, wanted.document, wanted.sigma, wanted.shards, edited
            )
            compare(path, wanted.length)


def compare(path: Path, length: int) -> None:
    """Print a row for each way of packing."""
    packings: list[Packing] = ["concatenate", "best_fit"]
    datasets, opening = [], []
    for packing in packings:
        started = time.perf_counter()
        datasets.append(open_(path, length, packing))
        opening.append(time.perf_counter() - started)
    rates = read_rates(datasets, length)
    for packing, dataset, seconds, (best, worst, finding) in zip(
        packings, datasets, opening, rates, strict=True
    ):
        batches = [batch_rate(dataset, length, workers) for workers in (0, 1, 2)]
        print(
            f"| {len(dataset.splits['training'].sources)} | {packing} | {seconds * 1e3:.1f} |"
            f" {finding * 1e6:.1f} | {worst / 1e6:.0f} to {best / 1e6:.0f} | "
            + " | ".join(f"{batch / 1e6:.0f}" for batch in batches)
            + " |"
        )


if __name__ == "__main__":
    main()
