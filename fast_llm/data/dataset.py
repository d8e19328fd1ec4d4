"""From token files to "the i-th sequence of the run", by arithmetic alone.

A *source* is one dataset: the documents of a phase (training, validation, test) of all its token files, one
after the other, T tokens. With sequences of L tokens it has n = (T - 1) // L of them; number k holds tokens
[k·L, k·L + L], the last of which is only predicted. Nothing is indexed or cached: opening reads the index files
once, and nothing can be out of date. Reading a sequence takes some 50 µs, whatever the size of the data.

The order of a run's sequences is in sampling.py, which documents each phase has in split.py.
"""

import bisect
import copy
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.config.train import DataConfig
from fast_llm.data import split as splitting
from fast_llm.data.sampling import Drawn, Mixture, RemainingStream, SourceSampler, Stream
from fast_llm.data.split import FileSubset
from fast_llm.data.tokenfile import TokenFile, digest
from fast_llm.errors import DataError

logger = logging.getLogger("fast_llm")

SPLITS = ("training", "validation", "test")
LARGEST_METADATA = 2**30  # bytes


@dataclass(frozen=True)
class DocumentSpan:
    """FileSubset of a document inside a sequence."""

    prefix: str
    document: int  # in its token file
    begin: int  # in the document, in tokens
    tokens: int


@dataclass(frozen=True)
class PackedSample:
    """One sequence of L inputs, each followed by its target."""

    tokens: NDArray[np.int64]  # [L + 1]: the inputs, and the last one's target
    starts: NDArray[
        np.int64
    ]  # where in them documents, or parts of some, begin; 0 is always among these
    targets: NDArray[
        np.int64
    ]  # [L]: mostly tokens[1:], but not where a sequence is made of several parts
    ends: NDArray[np.int64]  # inputs whose target belongs to another document


class Source:
    """Documents of several token files, one after the other, cut into sequences."""

    def __init__(self, name: str, parts: Sequence[FileSubset], length: int):
        self.name = name
        self.parts = [part for part in parts if len(part.begins)]
        self.length = length
        self.documents = sum(part.documents for part in parts)
        # Runs of neighbouring documents, as ranges of tokens of a file: where they begin, and where they end in all.
        empty = np.zeros(0, np.int64)
        self.begins = np.concatenate([empty, *(part.begins for part in self.parts)])
        sizes = [part.ends - part.begins for part in self.parts]
        self.ends = np.cumsum(np.concatenate([empty, *sizes]))
        self.files = [part.file for part in self.parts]
        self.runs = list(accumulate((len(part.begins) for part in self.parts), initial=0))
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.inputs = max(0, self.tokens - 1)
        self.stream: RemainingStream | None = (
            None  # what sequences are cut from, if not from all of it
        )

    @property
    def sequences(self) -> int:
        """How many it has."""
        return (self.inputs if self.stream is None else self.stream.size) // self.length

    @functools.cached_property
    def digest(self) -> str:
        """What tells its content from any other's, wherever the files lie."""
        content = [(part.described, part.file.identity) for part in self.parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_stream(self, stream: Stream) -> "Source":
        """The same, with sequences that are cut from a stream of its inputs."""
        if not isinstance(stream, RemainingStream):
            return self
        other = copy.copy(self)
        other.stream = stream
        return other

    def input_ranges(self, number: int) -> list[tuple[int, int]]:
        """The inputs of sequence `number`: [begin, end) in the source's tokens."""
        begin, end = number * self.length, (number + 1) * self.length
        return [(begin, end)] if self.stream is None else self.stream.ranges(begin, end)

    def file_ranges(self, begin: int, end: int) -> Iterator[tuple[TokenFile, int, int]]:
        """The pieces [begin, end) of token files that the source's tokens [begin, end) consist of."""
        run = int(np.searchsorted(self.ends, begin, "right"))
        file = bisect.bisect_right(self.runs, run) - 1
        while begin < end:
            while run >= self.runs[file + 1]:
                file += 1
            stop = min(end, int(self.ends[run]))
            last = int(self.begins[run]) + stop - (int(self.ends[run - 1]) if run else 0)
            yield self.files[file], last - (stop - begin), last
            begin, run = stop, run + 1

    def read(self, number: int) -> PackedSample:
        """Sequence `number`, below `sequences`."""
        ranges = self.input_ranges(number)
        if len(ranges) == 1:
            tokens, starts = self._read(ranges[0][0], ranges[0][1] + 1)
            return PackedSample(tokens, starts, tokens[1:], starts[1:] - 1)
        tokens, targets = np.empty(self.length + 1, np.int64), np.empty(self.length, np.int64)
        begun, ends, filled = [], [], 0
        for begin, end in ranges:  # each part with a target of its own for its last input
            part, begins = self._read(begin, end + 1)
            size = end - begin
            tokens[filled : filled + size + 1] = part
            targets[filled : filled + size] = part[1:]
            begun.append(filled + begins[begins < size])
            ends.append(filled + begins[1:] - 1)
            filled += size
        return PackedSample(tokens, np.concatenate(begun), targets, np.concatenate(ends))

    def _read(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source's tokens [begin, end), and where in them documents begin, 0 included."""
        tokens = np.empty(end - begin, np.int64)
        starts: list[NDArray[np.int64]] = []
        filled = 0
        for file, first_token, stop in self.file_ranges(begin, end):
            tokens[filled : filled + stop - first_token] = file.tokens_at(first_token, stop)
            first = file.document_at(first_token)
            last = file.document_at(stop - 1, first)
            inside = file.starts[first : last + 1] // file.dtype.itemsize
            inside[0] = first_token  # a document that begins further ahead continues here
            starts.append(inside + (filled - first_token))
            filled += stop - first_token
        found = starts[0] if len(starts) == 1 else np.concatenate(starts)
        # Documents without tokens begin where the next one does.
        different = found[1:] != found[:-1]
        return tokens, found if different.all() else found[np.append(True, different)]

    def locate(self, number: int) -> list[DocumentSpan]:
        """Which documents sequence `number` is made of, its last target included: L + 1 tokens."""
        ranges = self.input_ranges(number)
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        found = []
        for piece in (piece for one in ranges for piece in self.file_ranges(*one)):
            file, begin, end = piece
            while begin < end:
                document = file.document_at(begin)
                stop = min(end, file.start_of(document + 1))
                at = begin - file.start_of(document)
                found.append(DocumentSpan(str(file.prefix), document, at, stop - begin))
                begin = stop
        return found


class RandomSource:
    """Random tokens that follow from seed and number; for trying things out."""

    name = "random"
    tokens = documents = 0
    sequences = 2**62

    def __init__(self, length: int, vocab_size: int, seed: int):
        self.length, self.vocab_size, self.seed = length, vocab_size, seed
        self.inputs = self.sequences * length
        self.digest = f"random {length} {vocab_size} {seed}"

    def with_stream(self, stream: Stream) -> "RandomSource":
        """Another length or seed makes it another source, so it never has a rest."""
        return self

    def read(self, number: int) -> PackedSample:
        """Sequence `number`: one document."""
        random = np.random.default_rng((self.seed, number))
        tokens = random.integers(self.vocab_size, size=self.length + 1)
        return PackedSample(tokens, np.zeros(1, np.int64), tokens[1:], np.zeros(0, np.int64))

    def locate(self, number: int) -> list[DocumentSpan]:
        """It comes from no file."""
        return [DocumentSpan("random", number, 0, self.length + 1)]


class Split:
    """The sources of training, of validation or of test, and their shares of the sequences."""

    def __init__(
        self,
        name: str,
        sources: Sequence[Source | RandomSource],
        weights: Sequence[float],
        seed: int,
    ):
        self.name, self.sources, self.seed = name, sources, seed
        self.mixture = Mixture.of(weights)
        self.first = 0  # the sequence with which this order begins
        self.samplers = [
            SourceSampler(source.inputs, source.length, seed, place)
            for place, source in enumerate(sources)
        ]

    def follow(
        self,
        first: int,
        edges: Sequence[int],
        keys: Sequence[int],
        drawn: Sequence[Sequence[Drawn]],
    ) -> None:
        """Continue as a run whose settings changed at sequence `first`.

        `edges`: of the mixture; of each source the number of its keys, and what it had given then.
        """
        self.mixture, self.first = Mixture(edges), first
        self.samplers = [
            SourceSampler(source.inputs, source.length, self.seed, key, given)
            for source, key, given in zip(self.sources, keys, drawn, strict=True)
        ]

    def open(self) -> None:
        """Find out what is left of epochs that were cut, so that no step has to wait for it."""
        for sampler in self.samplers:
            sampler.stream.open()

    def find(self, index: int) -> tuple[Source | RandomSource, int, int]:
        """The source of sequence `index`, its number there, and its epoch."""
        if index < self.first:
            raise IndexError(
                f"sequence {index} is of an earlier order, which ended at {self.first}"
            )
        place, inside = self.mixture.find(index - self.first)
        stream, number, epoch = self.samplers[place].find(inside)
        return self.sources[place].with_stream(stream), number, epoch

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` sequences of this order are each source's."""
        return self.mixture.counts(sequences)

    @functools.cached_property
    def sequences(self) -> int:
        """How many come before any is repeated."""
        largest = sum(source.sequences for source in self.sources)

        def repeats(index: int) -> bool:
            shares = zip(self.counts(index), self.sources, strict=True)
            return any(count > source.sequences for count, source in shares)

        return bisect.bisect_left(range(largest + 1), True, key=repeats) - 1


class Dataset:
    """All splits of a run's data."""

    def __init__(
        self, splits: dict[str, Split], described: dict[str, dict[str, Any]], length: int, seed: int
    ):
        self.splits = splits
        self.metadata = (
            described  # path of each dataset → what its dataset.json says ({} for a bare prefix)
        )
        self.length = length
        self.seed = seed
        self.validation_sets = [name for name in splits if name not in SPLITS]

    def read(self, phase: str, index: int) -> PackedSample:
        """Sequence `index` of a phase, L + 1 tokens.

        Raises DataError for a file that can no longer be read.
        """
        source, number, _ = self.splits[phase].find(index)
        return source.read(number)

    def locate(self, phase: str, index: int) -> list[DocumentSpan]:
        """Which documents that sequence is made of."""
        source, number, _ = self.splits[phase].find(index)
        return source.locate(number)

    def sequences(self, phase: str) -> int:
        """How many different sequences a phase has."""
        return self.splits[phase].sequences if phase in self.splits else 0

    def tokens(self, phase: str) -> int:
        """How many tokens a phase has."""
        return (
            sum(source.tokens for source in self.splits[phase].sources)
            if phase in self.splits
            else 0
        )

    def documents(self, phase: str) -> int:
        """How many documents a phase has."""
        return (
            sum(source.documents for source in self.splits[phase].sources)
            if phase in self.splits
            else 0
        )

    def epochs(self, phase: str, sequences: int) -> list[tuple[Source | RandomSource, float]]:
        """How often each source was gone through after the first `sequences` sequences of a run."""
        found = self.splits[phase]
        counts = found.counts(max(0, sequences - found.first))
        places = zip(found.sources, found.samplers, counts, strict=True)
        return [(source, sampler.epochs(count)) for source, sampler, count in places]

    def require_sequences(
        self, phase: str, iterations: int, batch_size: int, setting: str, split: Sequence[float]
    ) -> None:
        """Raises DataError if a phase has fewer sequences than its losses are measured on."""
        needed, there = iterations * batch_size, self.sequences(phase)
        if there >= needed:
            return
        possible = there // batch_size
        if possible:
            advice = f"lower {setting} to {possible}, or "
        elif iterations > 1:
            advice = f"lower {setting}, of which even one needs {batch_size:,} sequences, and "
        else:
            advice = ""
        needs = (
            f"needs {iterations} batches × {batch_size} sequences = {needed:,} sequences of {self.length} tokens"
            if iterations > 1
            else f"needs one batch of {batch_size} sequences of {self.length} tokens"
        )
        if phase in self.validation_sets:
            raise DataError(
                f"data.validation_sets.{phase}: {needs}, but it has {there:,}; {advice}prepare more of it, or leave it out"
            )
        shares = ", ".join(f"{share:g}" for share in split)
        none = "" if self.documents(phase) else ", for its share is no document"
        raise DataError(
            f"data.split: {phase} {needs}, but [{shares}] of the documents leaves {there:,}{none}; {advice}give {phase} a"
            " larger share, or prepare more data"
        )

    def check_vocabulary(self, vocab_size: int, model_tokenizer: str | None) -> None:
        """Raises DataError for data made with another tokenizer, or with tokens that the model does not have."""
        for path, described in self.metadata.items():
            made_with = described.get("tokenizer", {}).get("fingerprint")
            if made_with and model_tokenizer and made_with != model_tokenizer:
                raise DataError(
                    f"{path}: made with another tokenizer than the model's (fingerprint {made_with[:12]}…, the model's"
                    f" is {model_tokenizer[:12]}…); prepare the data again with tokenizer.path set to the model's folder"
                )
            largest = described.get("max_token_id")
            if isinstance(largest, int) and largest >= vocab_size:
                raise DataError(
                    f"{path}: holds token {largest}, but the model's vocab_size is {vocab_size}; prepare the data"
                    " with the model's own tokenizer"
                )

    def check_digests(self, most: int = 2**30) -> None:
        """Compare token files with the digests in their dataset.json, which takes a second for `most` bytes; if there are more,
        `fast-llm verify` does it when asked. Raises DataError naming every file that is damaged.
        """
        entries = [
            entry for content in self.metadata.values() for entry in content.get("datasets", [])
        ]
        size = sum(
            entry.get("num_tokens", 0) * np.dtype(entry.get("dtype", "int64")).itemsize
            for entry in entries
        )
        if size <= most:
            for path, content in self.metadata.items():
                if content:
                    verify(Path(path))

    def fingerprint(self) -> str:
        """What may not change on resume: the training documents, in their order, and their shares.

        Of each token file its sizes and the first and last mebibyte: enough to tell it from any other, not to find
        every damaged byte (that is what `verify` does). Where the files lie does not matter.
        """
        phase = self.splits.get("training")
        content: list[Any] = [self.length, self.seed]
        if phase is not None:
            content.append(phase.mixture.edges)
        for source in phase.sources if phase else ():
            if isinstance(source, RandomSource):
                content.append(["random", source.vocab_size])
                continue
            content += [[*part.described, *part.file.identity] for part in source.parts]
            content.append("source")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_dataset(config: DataConfig, length: int, seed: int, vocab_size: int) -> Dataset:
    """The data that the configuration names, in sequences of `length` tokens.

    Raises DataError for files that are missing, damaged or hold nothing to train on.
    """
    described: dict[str, dict[str, Any]] = {}
    alone = len(config.path) == 1
    weighted = (
        [(1.0, config.path[0])]
        if alone
        else list(zip(config.path[::2], config.path[1::2], strict=True))
    )
    members: dict[TokenFile, list[FileSubset]] = {}
    opened = []
    for weight, path in weighted:
        groups, files = _open_path(path, config.format == "file", described)
        members |= _split_documents(path, files, described, config.split)
        opened += [(float(weight) * share, name, group) for share, name, group in groups]
    splits = {}
    for position, phase in enumerate(SPLITS):
        if not config.split[position]:
            continue
        if config.format == "random":
            random = RandomSource(length, vocab_size, seed + position)
            splits[phase] = Split(phase, [random], [1.0], seed)
            continue
        cut = [
            (weight, Source(name, [members[file][position] for file in files], length))
            for weight, name, files in opened
        ]
        if found := _without_empty(phase, cut):
            weights, sources = zip(*found, strict=True)
            splits[phase] = Split(phase, sources, weights, seed)
    for name, path in config.validation_sets.items():
        splits[name] = Split(
            name, [_open_validation_set(name, path, members, config.split, length)], [1.0], seed
        )
    return Dataset(splits, described, length, seed)


def _without_empty(
    phase: str, sources: Sequence[tuple[float, Source]]
) -> list[tuple[float, Source]]:
    """The sources that a phase has a sequence of, with their weights. Raises DataError if training has none of one."""
    missing = [source for _, source in sources if not source.sequences]
    if missing and phase == "training":
        first = missing[0]
        raise DataError(
            f"{first.name}: {first.tokens:,} tokens for training, fewer than one"
            f" sequence of {first.length} + 1; lower batch.sequence_length, prepare more data, or leave it out"
        )
    if missing and len(missing) < len(sources):
        names = ", ".join(source.name for source in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        logger.warning(
            f"data.split leaves {phase} less than a sequence of {names}{more}; its loss is of the others."
        )
    return [(weight, source) for weight, source in sources if source.sequences]


def _split_documents(
    path: str,
    files: Sequence[TokenFile],
    described: Mapping[str, Mapping[str, Any]],
    split: Sequence[float],
) -> dict[TokenFile, list[FileSubset]]:
    """For each token file of a dataset the documents of training, validation and test."""
    version = described[str(Path(path).expanduser())].get("split")
    if version is None:
        return {
            file: [splitting.split_by_position(file, split, phase) for phase in range(3)]
            for file in files
        }
    if version not in splitting.VERSIONS:
        raise DataError(
            f"{path}: its `split` is {json.dumps(version)[:80]}, which this version does not know"
            f" ({', '.join(splitting.VERSIONS)}); use the version of Fast-LLM that prepared it, or a later one"
        )
    return dict(zip(files, splitting.split_by_hash(files, split), strict=True))


def _open_validation_set(
    name: str,
    path: str,
    trained: Mapping[TokenFile, list[FileSubset]],
    split: Sequence[float],
    length: int,
) -> Source:
    """A dataset that a loss is measured on: of token files that are trained on, validation's documents."""
    alike: dict[tuple[int, int], list[TokenFile]] = {}
    for file in trained:
        alike.setdefault((file.documents, file.tokens), []).append(file)
    _, files = _open_path(path, False, {})
    parts, shared = [], False
    for file in files:
        same = [
            other
            for other in alike.get((file.documents, file.tokens), [])
            if other.identity == file.identity
        ]
        shared |= bool(same)
        parts.append(trained[same[0]][1] if same else splitting.all_documents(file))
    source, setting = Source(path, parts, length), f"data.validation_sets.{name}"
    if source.sequences:
        return source
    if not shared:
        raise DataError(
            f"{setting}: {path} has {source.tokens:,} tokens, fewer than one sequence of {length} + 1"
        )
    shares = ", ".join(f"{share:g}" for share in split)
    raise DataError(
        f"{setting}: {path} is trained on (data.path), so that its loss can only be measured on validation's share of"
        f" it; data.split [{shares}] leaves that {source.documents:,} documents with {source.tokens:,} tokens, fewer than"
        f" one sequence of {length} + 1; give validation a larger share (data.split=[99,1,0]), or leave the set out"
    )


def _open_path(
    path: str, metadata: bool, described: dict[str, dict[str, Any]]
) -> tuple[list[tuple[float, str, list[TokenFile]]], list[TokenFile]]:
    """The sources of a dataset (share of the dataset, name, token files), and all its token files in order.

    Token files that are weighted by their tokens, as `prepare` does it, are one source; those with weights of their
    own are others. `metadata`: the path is a dataset.json, whatever its name.
    """
    place = Path(path).expanduser()
    if not metadata and place.suffix != ".json":
        if place.suffix in (".bin", ".idx"):
            raise DataError(f"data.path: given {path}, must be without {place.suffix}: {path[:-4]}")
        described.setdefault(str(place), {})
        file = TokenFile(place)
        return [(1.0, path, [file])], [file]
    groups: dict[str, list[tuple[float, TokenFile]]] = {}
    files = []
    for entry in read_metadata(place, described):
        file = TokenFile(resolve_prefix(place, entry["prefix"]))
        files.append(file)
        for key, found in (
            ("num_tokens", file.tokens),
            ("num_documents", file.documents),
            ("dtype", file.dtype.name),
        ):
            if entry.get(key, found) != found:
                raise DataError(
                    f"{file.prefix}: its {key} is {found}, but {place} says {entry[key]}; it was replaced or belongs to"
                    " another dataset: prepare the data again"
                )
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


def _names(group: Sequence[tuple[float, TokenFile]]) -> str:
    first = group[0][1].prefix.name
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"


def _suggested_metadata(folder: Path) -> str:
    """Where the dataset.json of a folder is: `prepare` writes it next to the folder."""
    beside = folder.resolve().with_name(folder.resolve().name + ".json")
    inside = folder / "dataset.json"
    if inside.is_file() or not beside.is_file():
        return (
            f" in it, {inside}"
            if inside.is_file()
            else " that `fast-llm prepare` wrote, not a folder"
        )
    return f" next to it, {folder.parent / beside.name if folder.name else beside}"


def read_metadata(path: Path, described: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Read a dataset.json; its list of token files."""
    try:
        if path.stat().st_size > LARGEST_METADATA:
            raise DataError(f"{path}: larger than 1 GiB; this is no dataset.json")
        if path.is_dir():
            raise DataError(f"{path}: a folder; give the dataset.json{_suggested_metadata(path)}")
        if not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path}: not a file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; `fast-llm prepare` writes it beside its output_path"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: can not be read: {error.strerror}") from error
    if data.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset.json: {error}") from error
    if isinstance(content, dict) and content.get(
        "sha256", content_digest(content)
    ) != content_digest(content):
        raise DataError(
            f"{path}: its sha256 does not fit its content: it is damaged, or was edited; in the latter case delete its line"
            " `sha256`"
        )
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a dataset.json: it has no list `datasets`")
    seen = set()
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("prefix"), str):
            raise DataError(
                f"{path}: `datasets` must list objects with a prefix; given {str(entry)[:80]}"
            )
        for key in ("weight", "num_tokens", "num_documents"):
            value = entry.get(key, 0)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < 2**63
            ):
                raise DataError(
                    f"{path}: {key} of {entry['prefix']}: given {str(value)[:80]}, must be a number from 0 on"
                )
        if not isinstance(entry.get("sha256", {}), dict):
            raise DataError(f"{path}: sha256 of {entry['prefix']}: must have bin and idx")
        if entry["prefix"] in seen:
            raise DataError(f"{path}: lists {entry['prefix']} twice; add up the weights")
        seen.add(entry["prefix"])
    tokenizer = content.get("tokenizer", {})
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("fingerprint", ""), str):
        raise DataError(
            f"{path}: `tokenizer` must be an object with a fingerprint; given {str(tokenizer)[:80]}"
        )
    described[str(path)] = content
    return entries


def content_digest(content: Mapping[str, Any]) -> str:
    """The sha256 of a dataset.json's content, which stands in it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def resolve_prefix(path: Path, prefix: str) -> Path:
    """A prefix of a dataset.json, which may not leave its folder."""
    parts = Path(prefix).parts
    odd = any(c == "\0" or "\ud800" <= c <= "\udfff" for c in prefix)  # no file can be named so
    if not parts or Path(prefix).is_absolute() or ".." in parts or odd:
        raise DataError(
            f"{path}: the prefix {prefix!r} must name files inside the folder of the file"
        )
    return path.parent / prefix


def verify(path: Path) -> int:
    """Compare all token files of a dataset.json with their digests; how many bytes were read.

    Raises DataError naming every file that is damaged or missing.
    """
    read, wrong = 0, []
    for entry in read_metadata(path, {}):
        prefix = resolve_prefix(path, entry["prefix"])
        try:
            file = TokenFile(prefix)
        except DataError as error:
            wrong.append(str(error))
            continue
        for suffix, name in (("bin", file.bin), ("idx", file.idx)):
            expected = entry.get("sha256", {}).get(suffix)
            if expected is None:
                continue
            read += name.stat().st_size
            if digest(name) != expected:
                wrong.append(f"{name}: its content is not what was prepared (sha256 differs)")
    if wrong:
        raise DataError("\n".join(wrong))
    return read
