"""A run's data: "sequence i of training" from token files, found by arithmetic.

A dataset has splits (training, validation, test, and further validation sets). A split draws
sequences from weighted sources (source.py), in the order of sampling.py. split.py decides which
documents each split has. Opening reads the index files once (12 bytes a document) and stores
nothing, so nothing can be out of date.
"""

import bisect
import functools
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fast_llm.config.train import DataConfig
from fast_llm.data.datatrove import DatatroveFile
from fast_llm.data.entries import Metadata, open_entries, open_path
from fast_llm.data.fim import Fim
from fast_llm.data.metadata import resolve_prefix, size_of, verify
from fast_llm.data.sampling import Drawn, Mixture, SourceSampler
from fast_llm.data.source import DocumentSpan, PackedSample, RandomSource, Source, short_names
from fast_llm.data.split import (
    VERSIONS,
    FileSubset,
    all_documents,
    split_by_hash,
    split_by_position,
)
from fast_llm.data.tokenfile import TokenFile
from fast_llm.data.tokenizer import Loaded, fingerprint_for, same_ids
from fast_llm.errors import DataError

logger = logging.getLogger("fast_llm")

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Order:
    """An order of sequences, from sequence `first` on: until the next one begins."""

    first: int
    mixture: Mixture
    samplers: list[SourceSampler]  # one for each source
    sources: Sequence[Source | RandomSource]  # in sequences of this order's length

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.sources[0].length

    def epochs(self, index: int) -> list[float]:
        """How many epochs of each source are complete before sequence `index`."""
        counts = self.mixture.counts(max(0, index - self.first))
        pairs = zip(self.samplers, counts, strict=True)
        return [sampler.epochs(count) for sampler, count in pairs]


class Split:
    """Weighted sources, and the orders in which sequences are drawn from them."""

    def __init__(
        self,
        name: str,
        sources: Sequence[Source | RandomSource],
        weights: Sequence[float],
        seed: int,
        labels: Sequence[str] = (),
    ):
        """`labels`: for each source, its entry of `data.sources`."""
        self.name, self.sources, self.weights, self.seed = name, sources, weights, seed
        self.labels = labels
        self.mixture = Mixture.of(weights)  # without stages
        samplers = [source.sampler(seed, key) for key, source in enumerate(sources)]
        # The first in force, and later ones.
        self.orders = [Order(0, self.mixture, samplers, sources)]

    def order(
        self,
        first: int,
        edges: Sequence[int],
        keys: Sequence[int],
        drawn: Sequence[Sequence[Drawn]],
        length: int | None = None,
    ) -> Order:
        """The order of a run whose settings or stage change at sequence `first`.

        `edges`: of the mixture. `keys` and `drawn`: for each source, its key number and what it
        has given by then. `length`: tokens in a sequence, if not that of the sources.
        """
        sources = [source.with_length(length or source.length) for source in self.sources]
        samplers = [
            source.sampler(self.seed, key, given)
            for source, key, given in zip(sources, keys, drawn, strict=True)
        ]
        return Order(first, Mixture(edges), samplers, sources)

    def edges(self, weights: Mapping[str, float]) -> list[int]:
        """The edges of the mixture in a stage with these weights of the entries of `data.sources`;
        without any, those of the configuration.
        """
        if not weights:
            return self.mixture.edges
        totals: dict[str, float] = defaultdict(float)
        for label, weight in zip(self.labels, self.weights, strict=True):
            totals[label] += weight
        pairs = zip(self.labels, self.weights, strict=True)
        shares = [weights.get(label, 0) * (weight / totals[label]) for label, weight in pairs]
        return Mixture.of(shares).edges

    def open(self) -> None:
        """Compute what is left of interrupted epochs, so that no step waits for it."""
        for order in self.orders:
            for sampler in order.samplers:
                sampler.open()

    def order_at(self, index: int) -> Order:
        """The order in force at sequence `index`."""
        place = bisect.bisect_right(self.orders, index, key=lambda order: order.first) - 1
        if place < 0:
            raise IndexError(
                f"sequence {index} belongs to an earlier order, which ended at"
                f" {self.orders[0].first}"
            )
        return self.orders[place]

    def order_after(self, sequences: int) -> Order:
        """The order in force at the last of the first `sequences` sequences."""
        return self.order_at(max(self.orders[0].first, sequences - 1))

    def find(self, index: int) -> tuple[Source | RandomSource, int, int]:
        """The source of sequence `index`, its number in that source, and its epoch."""
        order = self.order_at(index)
        place, inside = order.mixture.find(index - order.first)
        stream, number, epoch = order.samplers[place].find(inside)
        return order.sources[place].with_stream(stream), number, epoch

    def inputs(self, first: int, last: int) -> list[tuple[Source | RandomSource, int]]:
        """The inputs of the sequences [first, last), padding included, of each order and source;
        without any, those of a part of the mixture.
        """
        if last <= first:
            edges = self.mixture.edges
            widths = (high - low for low, high in pairwise(edges))
            return list(zip(self.sources, widths, strict=True))
        found = list[tuple[Source | RandomSource, int]]()
        for order, counts in self._counts(first, last):
            given = zip(order.sources, counts, strict=True)
            found += [(source, count * order.length) for source, count in given]
        return found

    def _counts(self, first: int, last: int) -> Iterator[tuple[Order, list[int]]]:
        """Of each order, how many of the sequences [first, last) each source has."""
        ends = [*(order.first for order in self.orders[1:]), last]
        for order, end in zip(self.orders, ends, strict=True):
            low, high = (max(0, min(at, end, last) - order.first) for at in (first, end))
            before, after = order.mixture.counts(low), order.mixture.counts(high)
            yield order, [b - a for a, b in zip(before, after, strict=True)]

    def shares(self, first: int, last: int) -> list[float]:
        """The share of each source in the sequences [first, last); without any, in the mixture."""
        if last <= first:
            edges = self.mixture.edges
            return [(high - low) / edges[-1] for low, high in pairwise(edges)]
        totals = [0] * len(self.sources)
        for _, counts in self._counts(first, last):
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
        return [total / sum(totals) for total in totals]

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` sequences each source has, without stages."""
        return self.mixture.counts(sequences)

    @functools.cached_property
    def sequences(self) -> int:
        """How many sequences there are before any of them repeats."""
        total = sum(source.sequences for source in self.sources)

        def repeats(index: int) -> bool:
            counts = zip(self.counts(index), self.sources, strict=True)
            return any(count > source.sequences for count, source in counts)

        return bisect.bisect_left(range(total + 1), True, key=repeats) - 1


class Dataset:
    """All splits of a run's data. `metadata`: path of each dataset → its dataset.json ({} for a
    bare prefix).
    """

    def __init__(self, splits: dict[str, Split], metadata: Metadata, length: int, seed: int):
        self.splits = splits
        self.metadata = metadata
        self.length = length
        self.seed = seed
        self.fim: Fim | None = None  # of training
        self.source_names: list[str] = []  # of training, validation and test, by number
        self.token_files: list[TokenFile] = []  # of all splits
        self.validation_metadata: Metadata = {}  # of the further validation sets
        self.validation_sets = [name for name in splits if name not in SPLITS]

    def read(self, split: str, index: int) -> PackedSample:
        """Sequence `index` of a split, L + 1 tokens. Raises DataError for a file that can no longer
        be read.
        """
        source, number, _ = self.splits[split].find(index)
        packed = source.read(number)
        if source.number:
            packed = replace(packed, source=source.number)
        # Rearranging would move masked tokens.
        if self.fim is not None and split == "training" and not source.masked:
            return self.fim.sequence(packed, index)
        return packed

    def locate(self, split: str, index: int) -> list[DocumentSpan]:
        """The parts of documents that make up that sequence."""
        source, number, _ = self.splits[split].find(index)
        return source.locate(number)

    def sequences(self, split: str) -> int:
        """Number of different sequences in a split; 0 if the data has no such split."""
        return self.splits[split].sequences if split in self.splits else 0

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(source.tokens for source in self._sources(split))

    def padding(self, split: str, sequences: int = 0) -> float:
        """Expected share of a split's inputs that hold no token (`data.packing`): of the first
        `sequences` sequences, or 0 for a split without stages.
        """
        if split not in self.splits:
            return 0.0
        inputs = self.splits[split].inputs(0, sequences)
        padding = sum(count * source.padding for source, count in inputs)
        return padding / sum(count for _, count in inputs)

    def masked(self, first: int, last: int) -> float:
        """Expected share of the tokens of sequences [first, last) of training that are masked."""
        inputs = self.splits["training"].inputs(first, last)
        tokens = [(count * (1 - source.padding), source) for source, count in inputs]
        hidden = sum(n * source.masked_tokens / max(1, source.tokens) for n, source in tokens)
        return hidden / sum(n for n, _ in tokens)

    def documents(self, split: str) -> int:
        """Number of documents in a split."""
        return sum(source.documents for source in self._sources(split))

    def _sources(self, split: str) -> Sequence[Source | RandomSource]:
        return self.splits[split].sources if split in self.splits else ()

    @property
    def masked_sources(self) -> list[Source | RandomSource]:
        """The sources of training with tokens that are masked."""
        return [source for source in self._sources("training") if source.masked]

    @property
    def all_masked(self) -> list[str]:
        """The names of training's sources, if each has tokens that are masked."""
        names = [source.name for source in self.masked_sources]
        return names if len(names) == len(self._sources("training")) else []

    def epochs(self, split: str, sequences: int) -> list[tuple[Source | RandomSource, float]]:
        """How many epochs of each source are in the first `sequences` sequences of a run."""
        found = self.splits[split]
        order = found.order_after(sequences)
        return list(zip(found.sources, order.epochs(sequences), strict=True))

    def inputs_by_source(self, split: str, sequences: int) -> list[int]:
        """How many inputs of each source are in the first `sequences` sequences of a run, padding
        included.
        """
        found = self.splits[split]
        order = found.order_after(sequences)
        counts = order.mixture.counts(max(0, sequences - order.first))
        return [
            count * order.length + sum(entry[0] * entry[2] for entry in sampler.drawn)
            for sampler, count in zip(order.samplers, counts, strict=True)
        ]

    def require_sequences(
        self, split: str, iterations: int, batch_size: int, setting: str, shares: Sequence[float]
    ) -> None:
        """Raises DataError if a split has fewer than `iterations` batches of sequences.

        `setting`: the setting that asks for them; `shares`: data.split.
        """
        needed, available = iterations * batch_size, self.sequences(split)
        if available >= needed:
            return
        possible = available // batch_size
        if possible:
            advice = f"lower {setting} to {possible}, or "
        elif iterations > 1:
            advice = f"lower {setting} (one batch already needs {batch_size:,} sequences), and "
        else:
            advice = ""
        needs = (
            f"needs {iterations} batches × {batch_size} sequences = {needed:,} sequences of"
            f" {self.length} tokens"
            if iterations > 1
            else f"needs one batch of {batch_size} sequences of {self.length} tokens"
        )
        if split in self.validation_sets:
            raise DataError(
                f"data.validation_sets.{split}: {needs}, but it has {available:,}; {advice}prepare"
                " more of it, or leave it out"
            )
        shown = ", ".join(f"{share:g}" for share in shares)
        none = "" if self.documents(split) else ", because its share contains no document"
        raise DataError(
            f"data.split: {split} {needs}, but [{shown}] of the documents leaves"
            f" {available:,}{none}; {advice}give {split} a larger share, or prepare more data"
        )

    def check_vocabulary(self, vocab_size: int, model_tokenizer: Loaded | None) -> None:
        """Raises DataError for data made with another tokenizer, or with tokens that the model does
        not have.
        """
        for file in self.token_files:
            if isinstance(file, DatatroveFile) and model_tokenizer is not None:
                file.check_tokenizer(model_tokenizer)
        for path, metadata in (self.metadata | self.validation_metadata).items():
            described = metadata.get("tokenizer", {})
            fingerprint = described.get("fingerprint")
            copy = described.get("path")
            place = resolve_prefix(Path(path), copy) if isinstance(copy, str) else None
            if fingerprint and model_tokenizer and not same_ids(model_tokenizer, described, place):
                raise DataError(
                    f"{path}: made with another tokenizer than the model's (fingerprint"
                    f" {fingerprint[:12]}…, the model's is"
                    f" {fingerprint_for(model_tokenizer, described)[:12]}…); prepare the"
                    " data again with tokenizer.path set to the model's folder"
                )
            largest = metadata.get("max_token_id")
            if isinstance(largest, int) and largest >= vocab_size:
                raise DataError(
                    f"{path}: holds token {largest}, but the model's vocab_size is {vocab_size};"
                    " prepare the data with the model's own tokenizer, or, if this is it, give the"
                    " model rows for its new tokens: fast-llm extend-vocabulary MODEL OUT"
                )

    def check_digests(self, max_bytes: int = 2**30) -> None:
        """Compare the token files with the digests in their dataset.json, unless they are larger
        than `max_bytes`.

        That takes about a second a gigabyte. `fast-llm verify` does it for data of any size. Raises
        DataError naming every damaged file.
        """
        described = self.metadata | self.validation_metadata
        if size_of(list(described.values())) <= max_bytes:
            for path, metadata in described.items():
                if metadata:
                    verify(Path(path))

    def fingerprint(self) -> str:
        """What may not change when a run resumes: the training documents, their order, and their
        shares.

        Of each token file its sizes and its first and last mebibyte: enough to tell it from any
        other file, not to find every damaged byte (`verify` does). Where the files are does not
        matter.
        """
        training = self.splits.get("training")
        content: list[Any] = [self.length, self.seed]
        if training is not None:
            content.append(training.mixture.edges)
        for source in training.sources if training else ():
            if isinstance(source, RandomSource):
                content.append(["random", source.vocab_size])
                continue
            content += [[*subset.identity, *subset.file.identity] for subset in source.subsets]
            content.append("source" if not source.best_fit else "best_fit")
            if source.masked:
                content.append(["masks", *source.mask_digests])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_dataset(config: DataConfig, length: int, seed: int, vocab_size: int) -> Dataset:
    """The data that the configuration names, in sequences of `length` tokens.

    Raises DataError for files that are missing, damaged or hold nothing to train on.
    """
    metadata: Metadata = {}
    subsets: dict[TokenFile, list[FileSubset]] = {}
    best_fit = config.packing == "best_fit"
    entries = open_entries(config, metadata)
    for entry in entries:
        version = metadata[str(Path(entry.path).expanduser())].get("split")
        subsets |= _split_documents(entry.path, entry.files, version, config.split)
    opened = [
        (entry.weight * share, name, files, entry.label)
        for entry in entries
        for share, name, files in entry.groups
    ]
    splits = {}
    for position, split in enumerate(SPLITS):
        if not config.split[position]:
            continue
        if config.format == "random":
            random = RandomSource(length, vocab_size, seed + position)
            splits[split] = Split(split, [random], [1.0], seed)
            continue
        labelled = [
            (
                weight,
                Source(
                    name,
                    [subsets[f][position] for f in files],
                    length,
                    best_fit,
                    number,
                    config.use_loss_masking_spans,
                ),
                label,
            )
            for number, (weight, name, files, label) in enumerate(opened)
        ]
        if found := _without_empty(split, labelled):
            weights, sources, labels = zip(*found, strict=True)
            splits[split] = Split(split, sources, weights, seed, labels)
    further: Metadata = {}
    token_files = list(subsets)
    for name, path in config.validation_sets.items():
        source, files = _open_validation_set(name, path, subsets, config, length, further)
        token_files += files
        splits[name] = Split(name, [source], [1.0], seed)
    dataset = Dataset(splits, metadata, length, seed)
    dataset.source_names = short_names([name for _, name, _, _ in opened]) or ["random"]
    dataset.validation_metadata, dataset.token_files = further, token_files
    return dataset


def _without_empty(
    split: str, sources: Sequence[tuple[float, Source, str]]
) -> list[tuple[float, Source, str]]:
    """The weighted sources that have a sequence. Raises DataError if one of training has none."""
    empty = [source for _, source, _ in sources if not source.sequences]
    if empty and split == "training":
        first = empty[0]
        label = next(label for _, source, label in sources if source is first)
        raise DataError(
            f"{f'data.sources.{label}' if label else first.name}: {first.tokens:,} tokens for"
            " training, fewer than one sequence of"
            f" {first.length} + 1; lower batch.sequence_length, prepare more data, or leave it out"
        )
    if empty and len(empty) < len(sources):
        names = ", ".join(source.name for source in empty[:3])
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        logger.warning(
            f"data.split leaves {split} less than one sequence of {names}{more}; its loss is"
            " measured without them."
        )
    return [one for one in sources if one[1].sequences]


def _split_documents(
    path: str, files: Sequence[TokenFile], version: Any, shares: Sequence[float]
) -> dict[TokenFile, list[FileSubset]]:
    """For each token file of a dataset, the documents of training, validation and test.

    `version`: how the dataset.json says that documents are split.
    """
    if version is None:
        return {
            file: [split_by_position(file, shares, position) for position in range(len(SPLITS))]
            for file in files
        }
    if version not in VERSIONS:
        raise DataError(
            f"{path}: its `split` is {json.dumps(version)[:80]}, which this version does not know"
            f" ({', '.join(VERSIONS)}); use the version of Fast-LLM that prepared it, or a later"
            " one"
        )
    return dict(zip(files, split_by_hash(files, shares), strict=True))


def _open_validation_set(
    name: str,
    path: str,
    training: Mapping[TokenFile, list[FileSubset]],
    config: DataConfig,
    length: int,
    metadata: Metadata,
) -> tuple[Source, list[TokenFile]]:
    """A further validation set and its files. Of token files that are also trained on, it has
    validation's documents only. Adds the content of a dataset.json to `metadata`.
    """
    by_size: dict[tuple[int, int], list[TokenFile]] = {}
    for file in training:
        by_size.setdefault((file.documents, file.tokens), []).append(file)
    setting = f"data.validation_sets.{name}"
    _, files = open_path(path, False, metadata, setting)
    subsets, shared = [], False
    for file in files:
        same = [
            other
            for other in by_size.get((file.documents, file.tokens), [])
            if other.identity == file.identity
        ]
        shared |= bool(same)
        subsets.append(training[same[0]][1] if same else all_documents(file))
    best_fit, masked = config.packing == "best_fit", config.use_loss_masking_spans
    source = Source(path, subsets, length, best_fit, masked=masked)
    if source.sequences:
        return source, files
    if not shared:
        raise DataError(
            f"{setting}: {path} has {source.tokens:,} tokens, fewer than one sequence of {length} +"
            " 1"
        )
    shown = ", ".join(f"{share:g}" for share in config.split)
    trained = "data.sources" if config.format == "mixture" else "data.path"
    raise DataError(
        f"{setting}: {path} is trained on ({trained}), so its loss can only be measured on"
        f" validation's share of it; data.split [{shown}] leaves that {source.documents:,}"
        f" documents with {source.tokens:,} tokens, fewer than one sequence of {length} + 1; give"
        " validation a larger share (data.split=[99,1,0]), or leave the set out"
    )
