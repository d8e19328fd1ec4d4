"""Waste and truncation of best-fit packing, and its time and memory.

    python benchmarks/packing.py DATASET_JSON… [--lengths 2048 4096 8192 32768]
    python benchmarks/packing.py --documents 100_000_000 [--lengths 4096]

The first form compares `data.packing: concatenate` and `best_fit` on prepared data: the documents
that would fit a sequence and are cut, and the share of padding. The second makes an index of that
many documents, whose lengths are log-normal (median 450 tokens, as of web pages), over a sparse
file, and measures: opening with all documents for training, packing, ordering the documents, and
reading. Prints Markdown.
"""

import argparse
import multiprocessing
import platform
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from fast_llm.data.inspect.dataset import open_data
from fast_llm.data.source import Source
from fast_llm.data.tokenfile import TokenFileWriter

MEDIAN, SIGMA = 450, 1.2
CHUNK = 2**20


def compare(paths: list[str], lengths: list[int]) -> None:
    """Print a table: what both ways of packing do to the documents."""
    data = open_data(DataConfig(path=paths, split=[1]))
    sizes = np.concatenate([file.lengths_of(0, file.documents) for file in data.files]).astype(int)
    ends = np.cumsum(sizes)
    begins = ends - sizes
    print(f"{data.documents:,} documents, {data.tokens:,} tokens, median {np.median(sizes):,.0f}\n")
    print("| L | fit | cut when concatenated | their tokens | sequences | best_fit | padding |")
    print("|---|---|---|---|---|---|---|")
    for length in lengths:
        fits = sizes <= length + 1
        # A document is cut if its first and last target lie in different sequences.
        cut = fits & (sizes > 1) & (begins // length != (ends - 2) // length)
        config = DataConfig(path=paths[:1], split=[1], packing="best_fit")
        source = open_dataset(config, length, 0, 2**31).splits["training"].sources[0]
        print(
            f"| {length:,} | {fits.mean():.1%} | {cut.sum() / max(1, fits.sum()):.1%} |"
            f" {sizes[cut].sum() / sizes.sum():.1%} | {(sizes.sum() - 1) // length:,} |"
            f" {source.sequences:,} | {source.padding:.2%} |"
        )


def write_index(folder: Path, documents: int) -> None:
    """A pair of files with this many documents; the tokens are a hole of the file system."""
    random = np.random.default_rng(0)
    writer = TokenFileWriter(folder / "s", np.dtype("uint16"))
    for first in range(0, documents, CHUNK):
        some = random.lognormal(np.log(MEDIAN), SIGMA, min(CHUNK, documents - first))
        lengths = np.clip(some, 1, 2**20).astype(np.int32)
        writer.lengths.append(lengths)
        writer.tokens += int(lengths.sum())
        writer.documents += len(lengths)
    writer.close()
    with (folder / "s.bin").open("r+b") as file:
        file.truncate(2 * writer.tokens)


def measure(documents: int, length: int) -> None:
    """Print times and memory of a large dataset."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        # In a process of its own: writing takes more memory than what is measured.
        writing = multiprocessing.get_context("spawn").Process(
            target=write_index, args=(Path(folder), documents)
        )
        writing.start()
        writing.join()
        marks = [("", time.perf_counter())]
        plain = open_dataset(DataConfig(path=[str(path)], split=[1]), length, 0, 2**31)
        marks.append(("open, concatenate", time.perf_counter()))
        config = DataConfig(path=[str(path)], split=[1], packing="best_fit")
        split = open_dataset(config, length, 0, 2**31).splits["training"]
        source = split.sources[0]
        assert isinstance(source, Source)
        packing = source.pack(split.orders[0].samplers[0].all, length)
        marks.append(("open and pack, best_fit", time.perf_counter()))
        packing.open()
        marks.append(("order documents", time.perf_counter()))
        for (_, begin), (name, end) in pairwise(marks):
            print(f"- {name}: {end - begin:.2f} s")
        ordered = 4 * int(packing.counts.sum()) + 16 * len(packing.long)
        print(f"- {source.tokens:,} tokens, {plain.sequences('training'):,} sequences when joined")
        print(f"- {packing.sequences:,} sequences in {len(packing.groups.rests):,} groups and")
        print(f"  {packing.full:,} full ones; padding {source.padding:.4%}")
        print(f"- memory kept: {ordered / 1e6:,.0f} MB, {ordered / documents:.2f} bytes a document")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"- peak resident memory, the mapped index included: {peak:.2f} GB")
        began = time.perf_counter()
        documents_read = 0
        for index in range(2000):
            found, number, _ = split.find(index)
            documents_read += len(found.read(number).starts)
        each = (time.perf_counter() - began) / 2000
        print(f"- reading: {each * 1e6:.0f} µs a sequence of {documents_read / 2000:.1f} documents")


def main() -> None:
    """Compare or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="dataset.json files")
    parser.add_argument("--documents", type=int, help="make an index of this many")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 32768])
    wanted = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}\n")
    for path in wanted.paths:
        compare([path], wanted.lengths)
        print()
    for length in wanted.lengths if wanted.documents else []:
        print(f"{wanted.documents:,} documents, sequences of {length:,}:")
        measure(wanted.documents, length)


if __name__ == "__main__":
    main()
