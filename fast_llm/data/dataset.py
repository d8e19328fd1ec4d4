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
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_llm.config.train import DataConfig
from fast_llm.data.metadata import read_metadata, resolve_prefix, size_of, verify
from fast_llm.data.sampling import Drawn, Mixture, SourceSampler
from fast_llm.data.source import DocumentSpan, PackedSample, RandomSource, Source
from fast_llm.data.split import (
    VERSIONS,
    FileSubset,
    all_documents,
    split_by_hash,
    split_by_position,
)
from fast_llm.data.tokenfile import TokenFile
from fast_llm.errors import DataError

logger = logging.getLogger("fast_llm")

SPLITS = ("training", "validation", "test")
Metadata = dict[str, dict[str, Any]]  # path of a dataset → its dataset.json; {} for a bare prefix


class Split:
    """Weighted sources, and the order in which sequences are drawn from them."""

    def __init__(
        self,
        name: str,
        sources: Sequence[Source | RandomSource],
        weights: Sequence[float],
        seed: int,
    ):
        self.name, self.sources, self.seed = name, sources, seed
        self.mixture = Mixture.of(weights)
        self.first = 0  # the sequence at which this order begins
        self.samplers = [
            SourceSampler(source.inputs, source.length, seed, key)
            for key, source in enumerate(sources)
        ]

    def continue_from(
        self,
        first: int,
        edges: Sequence[int],
        keys: Sequence[int],
        drawn: Sequence[Sequence[Drawn]],
    ) -> None:
        """Continue the order of a run whose settings changed at sequence `first`.

        `edges`: of the mixture. `keys` and `drawn`: for each source, its key number and what it had
        given by then.
        """
        self.mixture, self.first = Mixture(edges), first
        self.samplers = [
            SourceSampler(source.inputs, source.length, self.seed, key, given)
            for source, key, given in zip(self.sources, keys, drawn, strict=True)
        ]

    def open(self) -> None:
        """Compute what is left of interrupted epochs, so that no step waits for it."""
        for sampler in self.samplers:
            sampler.stream.open()

    def find(self, index: int) -> tuple[Source | RandomSource, int, int]:
        """The source of sequence `index`, its number in that source, and its epoch."""
        if index < self.first:
            raise IndexError(
                f"sequence {index} belongs to an earlier order, which ended at {self.first}"
            )
        place, inside = self.mixture.find(index - self.first)
        stream, number, epoch = self.samplers[place].find(inside)
        return self.sources[place].with_stream(stream), number, epoch

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` sequences of this order each source has."""
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
        self.validation_sets = [name for name in splits if name not in SPLITS]

    def read(self, split: str, index: int) -> PackedSample:
        """Sequence `index` of a split, L + 1 tokens. Raises DataError for a file that can no longer
        be read.
        """
        source, number, _ = self.splits[split].find(index)
        return source.read(number)

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

    def documents(self, split: str) -> int:
        """Number of documents in a split."""
        return sum(source.documents for source in self._sources(split))

    def _sources(self, split: str) -> Sequence[Source | RandomSource]:
        return self.splits[split].sources if split in self.splits else ()

    def epochs(self, split: str, sequences: int) -> list[tuple[Source | RandomSource, float]]:
        """How many epochs of each source are in the first `sequences` sequences of a run."""
        found = self.splits[split]
        counts = found.counts(max(0, sequences - found.first))
        samplers = zip(found.sources, found.samplers, counts, strict=True)
        return [(source, sampler.epochs(count)) for source, sampler, count in samplers]

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

    def check_vocabulary(self, vocab_size: int, model_tokenizer: str | None) -> None:
        """Raises DataError for data made with another tokenizer, or with tokens that the model does
        not have.

        `model_tokenizer`: the fingerprint of the model's tokenizer.
        """
        for path, metadata in self.metadata.items():
            fingerprint = metadata.get("tokenizer", {}).get("fingerprint")
            if fingerprint and model_tokenizer and fingerprint != model_tokenizer:
                raise DataError(
                    f"{path}: made with another tokenizer than the model's (fingerprint"
                    f" {fingerprint[:12]}…, the model's is {model_tokenizer[:12]}…); prepare the"
                    " data again with tokenizer.path set to the model's folder"
                )
            largest = metadata.get("max_token_id")
            if isinstance(largest, int) and largest >= vocab_size:
                raise DataError(
                    f"{path}: holds token {largest}, but the model's vocab_size is {vocab_size};"
                    " prepare the data with the model's own tokenizer"
                )

    def check_digests(self, max_bytes: int = 2**30) -> None:
        """Compare the token files with the digests in their dataset.json, unless they are larger
        than `max_bytes`.

        That takes about a second a gigabyte. `fast-llm verify` does it for data of any size. Raises
        DataError naming every damaged file.
        """
        if size_of(list(self.metadata.values())) <= max_bytes:
            for path, metadata in self.metadata.items():
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
            content.append("source")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_dataset(config: DataConfig, length: int, seed: int, vocab_size: int) -> Dataset:
    """The data that the configuration names, in sequences of `length` tokens.

    Raises DataError for files that are missing, damaged or hold nothing to train on.
    """
    metadata: Metadata = {}
    single = len(config.path) == 1
    weighted = (
        [(1.0, config.path[0])]
        if single
        else list(zip(config.path[::2], config.path[1::2], strict=True))
    )
    subsets: dict[TokenFile, list[FileSubset]] = {}
    opened = []
    for weight, path in weighted:
        groups, files = _open_path(path, config.format == "file", metadata)
        version = metadata[str(Path(path).expanduser())].get("split")
        subsets |= _split_documents(path, files, version, config.split)
        opened += [(float(weight) * share, name, group) for share, name, group in groups]
    splits = {}
    for position, split in enumerate(SPLITS):
        if not config.split[position]:
            continue
        if config.format == "random":
            random = RandomSource(length, vocab_size, seed + position)
            splits[split] = Split(split, [random], [1.0], seed)
            continue
        weighted_sources = [
            (weight, Source(name, [subsets[file][position] for file in files], length))
            for weight, name, files in opened
        ]
        if found := _without_empty(split, weighted_sources):
            weights, sources = zip(*found, strict=True)
            splits[split] = Split(split, sources, weights, seed)
    for name, path in config.validation_sets.items():
        source = _open_validation_set(name, path, subsets, config.split, length)
        splits[name] = Split(name, [source], [1.0], seed)
    return Dataset(splits, metadata, length, seed)


def _without_empty(
    split: str, sources: Sequence[tuple[float, Source]]
) -> list[tuple[float, Source]]:
    """The weighted sources that have a sequence. Raises DataError if one of training has none."""
    empty = [source for _, source in sources if not source.sequences]
    if empty and split == "training":
        first = empty[0]
        raise DataError(
            f"{first.name}: {first.tokens:,} tokens for training, fewer than one sequence of"
            f" {first.length} + 1; lower batch.sequence_length, prepare more data, or leave it out"
        )
    if empty and len(empty) < len(sources):
        names = ", ".join(source.name for source in empty[:3])
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        logger.warning(
            f"data.split leaves {split} less than one sequence of {names}{more}; its loss is"
            " measured without them."
        )
    return [(weight, source) for weight, source in sources if source.sequences]


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
    shares: Sequence[float],
    length: int,
) -> Source:
    """A further validation set. Of token files that are also trained on, it has validation's
    documents only.
    """
    by_size: dict[tuple[int, int], list[TokenFile]] = {}
    for file in training:
        by_size.setdefault((file.documents, file.tokens), []).append(file)
    _, files = _open_path(path, False, {})
    subsets, shared = [], False
    for file in files:
        same = [
            other
            for other in by_size.get((file.documents, file.tokens), [])
            if other.identity == file.identity
        ]
        shared |= bool(same)
        subsets.append(training[same[0]][1] if same else all_documents(file))
    source, setting = Source(path, subsets, length), f"data.validation_sets.{name}"
    if source.sequences:
        return source
    if not shared:
        raise DataError(
            f"{setting}: {path} has {source.tokens:,} tokens, fewer than one sequence of {length} +"
            " 1"
        )
    shown = ", ".join(f"{share:g}" for share in shares)
    raise DataError(
        f"{setting}: {path} is trained on (data.path), so its loss can only be measured on"
        f" validation's share of it; data.split [{shown}] leaves that {source.documents:,}"
        f" documents with {source.tokens:,} tokens, fewer than one sequence of {length} + 1; give"
        " validation a larger share (data.split=[99,1,0]), or leave the set out"
    )


def _open_path(
    path: str, is_metadata: bool, metadata: Metadata
) -> tuple[list[tuple[float, str, list[TokenFile]]], list[TokenFile]]:
    """The sources of a dataset (share of the dataset, name, token files), and all its token files
    in order.

    Token files weighted by their number of tokens, as `prepare` does it, form one source; those
    with other weights form others. `is_metadata`: the path is a dataset.json, whatever its name.
    Adds its content to `metadata`.
    """
    place = Path(path).expanduser()
    if not is_metadata and place.suffix != ".json":
        if place.suffix in (".bin", ".idx"):
            raise DataError(f"data.path: given {path}, must be without {place.suffix}: {path[:-4]}")
        metadata.setdefault(str(place), {})
        file = TokenFile(place)
        return [(1.0, path, [file])], [file]
    metadata[str(place)] = content = read_metadata(place)
    groups: dict[str, list[tuple[float, TokenFile]]] = {}
    files = []
    for entry in content["datasets"]:
        file = _open_entry(place, entry)
        files.append(file)
        weight = float(entry.get("weight", file.tokens))
        if file.tokens and weight:
            groups.setdefault(f"{weight / file.tokens:.3e}", []).append((weight, file))
    total = math.fsum(weight for group in groups.values() for weight, _ in group)
    if not groups:
        raise DataError(f"{place}: holds no tokens, or gives all of them the weight 0")
    return [
        (
            math.fsum(weight for weight, _ in group) / total,
            path if len(groups) == 1 else f"{path} ({_names(group)})",
            [file for _, file in group],
        )
        for group in groups.values()
    ], files


def _open_entry(path: Path, entry: Mapping[str, Any]) -> TokenFile:
    """A token file of the dataset.json at `path`. Raises DataError if its sizes are not those
    listed.
    """
    file = TokenFile(resolve_prefix(path, entry["prefix"]))
    for key, found in (
        ("num_tokens", file.tokens),
        ("num_documents", file.documents),
        ("dtype", file.dtype.name),
    ):
        if entry.get(key, found) != found:
            raise DataError(
                f"{file.prefix}: its {key} is {found}, but {path} says {entry[key]}; it was"
                " replaced or belongs to another dataset: prepare the data again"
            )
    return file


def _names(group: Sequence[tuple[float, TokenFile]]) -> str:
    first = group[0][1].prefix.name
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"
