"""What prepared data holds: sources, lengths, duplicates, splits, epochs.

The result is a dictionary with the keys that `fast-llm inspect --json` prints (docs/inspecting.md).
It costs one pass over the index files (12 bytes a document); duplicates cost a pass over all
tokens, and are counted without being asked for up to a gibibyte of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_llm.config.train import DataConfig
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset
from fast_llm.data.entries import Metadata, open_entries
from fast_llm.data.inspect.statistics import Lengths, count_duplicates
from fast_llm.data.metadata import text_sizes
from fast_llm.data.tokenfile import TokenFile
from fast_llm.data.tokenizer import Loaded
from fast_llm.errors import DataError

_SMALL = 2**30  # bytes of tokens


@dataclass(frozen=True)
class PreparedData:
    """Token files of one or several datasets, in their order."""

    paths: list[str]
    files: list[TokenFile]
    sources: list[tuple[str, float, list[TokenFile]]]
    """Name, share of the mixture, token files."""
    metadata: Metadata
    """Path → dataset.json; {} for a bare prefix."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(file.documents for file in self.files)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(file.tokens for file in self.files)

    def tokenizer(self) -> Loaded | None:
        """The tokenizer that the first dataset with one was prepared with."""
        for path, content in self.metadata.items():
            place = content.get("tokenizer", {}).get("path")
            if isinstance(place, str) and ".." not in Path(place).parts:
                try:
                    return tokenizer.load(str(Path(path).parent / place))
                except DataError:  # it was deleted
                    continue
        return None


def open_data(config: DataConfig) -> PreparedData:
    """Open the datasets of a configuration. Raises DataError as `open_dataset` does."""
    metadata: Metadata = {}
    entries = open_entries(config, metadata)
    total = sum(entry.weight for entry in entries)
    sources = [
        (name, entry.weight / total * share, group)
        for entry in entries
        for share, name, group in entry.groups
    ]
    files = [file for entry in entries for file in entry.files]
    return PreparedData([entry.path for entry in entries], files, sources, metadata)


def describe(data: PreparedData, length: int | None, duplicates: bool) -> dict[str, Any]:
    """Statistics of data. `length`: of a sequence; `duplicates`: count them whatever the size."""
    lengths = Lengths.of(data.files)
    summary = lengths.summary()
    size = sum(file.tokens * file.dtype.itemsize for file in data.files)
    found = count_duplicates(data.files) if duplicates or size <= _SMALL else None
    size_of_text = {prefix: size.bytes for prefix, size in text_sizes(data.metadata).items()}
    skipped: dict[str, int] = {}
    for content in data.metadata.values():
        for reason, count in content.get("skipped", {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    return {
        "kind": "dataset",
        "paths": data.paths,
        "documents": data.documents,
        "tokens": data.tokens,
        "bytes": _sum_bytes(data.files, size_of_text),
        "token_files": len(data.files),
        "skipped": skipped,
        "sources": [
            {
                "name": name,
                "share": share,
                "documents": sum(file.documents for file in files),
                "tokens": sum(file.tokens for file in files),
                "bytes": _sum_bytes(files, size_of_text),
            }
            for name, share, files in data.sources
        ],
        "lengths": {
            key: value for key, value in summary.items() if key not in ("documents", "tokens")
        },
        "sequence_length": length,
        "longer": None if length is None else lengths.longer_than(length),
        "duplicates": None
        if found is None
        else {"documents": found.documents, "tokens": found.tokens, "groups": found.groups},
    }


def describe_run(
    dataset: Dataset, steps: int | None, batch_size: int | None, sequences: int
) -> dict[str, Any]:
    """Splits of a run, and the epochs of each source after all of its steps, which take
    `sequences` sequences.
    """
    splits = {
        name: {
            "documents": dataset.documents(name),
            "tokens": dataset.tokens(name),
            "sequences": dataset.sequences(name),
            "padding": dataset.padding(name, sequences if name == "training" else 0),
        }
        for name in dataset.splits
    }
    if steps is None or batch_size is None or "training" not in dataset.splits:
        return {"splits": splits}
    epochs = dataset.epochs("training", sequences)
    shares = dataset.splits["training"].shares(0, sequences)
    inputs = sum(count for _, count in dataset.splits["training"].inputs(0, sequences))
    inputs *= sequences > 0  # of no sequence, `inputs` has those of the mixture
    return {
        "splits": splits,
        "run": {
            "steps": steps,
            "batch_size": batch_size,
            "tokens": round(inputs * (1 - splits["training"]["padding"])),
            "epochs": [
                {
                    "source": source.name,
                    "share": share,
                    "epochs": count,
                    "padding": source.padding,
                }
                for share, (source, count) in zip(shares, epochs, strict=True)
            ],
        },
    }


def _sum_bytes(files: Sequence[TokenFile], sizes: Mapping[str, int]) -> int | None:
    """Bytes of text of some token files; None if one does not say."""
    found = [sizes.get(str(file.prefix)) for file in files]
    known = [size for size in found if size is not None]
    return sum(known) if len(known) == len(found) else None
