"""A source of training data: the documents of several token files, one after the other, cut into
sequences.

T tokens make n = (T - 1) // L sequences of L tokens. Sequence k holds tokens [k·L, k·L + L]; the
last one is only a target. Nothing is indexed or cached. Reading a sequence takes some 50 µs,
whatever the size of the data.

With `data.packing: best_fit`, best_fit.py says which documents a sequence holds.
"""

import bisect
import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.best_fit import BestFit, Documents, PackedStream, RemainingPieces
from fast_llm.data.sampling import Drawn, FullStream, SourceSampler, Stream, way_of
from fast_llm.data.split import FileSubset
from fast_llm.data.tokenfile import TokenFile


@dataclass(frozen=True)
class DocumentSpan:
    """Part of a document inside a sequence."""

    prefix: str  # of the token file
    document: int  # its number in the token file
    begin: int  # the first token of the span, counted in the document
    tokens: int


@dataclass(frozen=True)
class PackedSample:
    """One sequence of L inputs, each with its target."""

    tokens: NDArray[np.int64]  # [L + 1]: the inputs, and the target of the last one
    starts: NDArray[
        np.int64
    ]  # indices in `tokens` where documents or parts of them begin, 0 included
    targets: NDArray[np.int64]  # [L]: tokens[1:], unless the sequence is joined from several ranges
    ends: NDArray[np.int64]  # indices of inputs whose target belongs to another document
    padding: int = 0  # tokens at the end that are no targets (fim.py, best_fit.py)
    # Those of `ends` where a document is not followed by the beginning of another one.
    breaks: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    source: int = 0  # the number of its source among those of the run
    fim: tuple[int, int, int, int] = (0, 0, 0, 0)  # FIM_COUNTS of fim.py
    # Indices of inputs whose target is masked (masks.py).
    masked: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class Source:
    """Documents of several token files as sequences of `length` tokens."""

    def __init__(
        self,
        name: str,
        subsets: Sequence[FileSubset],
        length: int,
        best_fit: bool = False,
        number: int = 0,
        masked: bool = True,
    ):
        """`best_fit`: how documents are packed. `number`: of this source among those of the run.
        `masked`: leave out targets that the files mask.
        """
        self.name, self.best_fit, self.number = name, best_fit, number
        self.subsets = [subset for subset in subsets if len(subset.begins)]
        self.length = length
        self.documents = sum(subset.documents for subset in subsets)
        # Runs of adjacent documents: the token of its file at which each begins, and the token of
        # this source at which each ends.
        empty = np.zeros(0, np.int64)
        self.begins = np.concatenate([empty, *(subset.begins for subset in self.subsets)])
        sizes = [subset.ends - subset.begins for subset in self.subsets]
        self.ends = np.cumsum(np.concatenate([empty, *sizes]))
        self.files = [subset.file for subset in self.subsets]
        self.masked = masked and any(file.masks is not None for file in self.files)
        # The number of runs before each file.
        self.runs = list(accumulate((len(subset.begins) for subset in self.subsets), initial=0))
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.inputs = max(0, self.tokens - 1)
        # The inputs that are cut, or how they are packed.
        self.stream: Stream | PackedStream = FullStream(self.inputs)
        self._packings: dict[int, BestFit] = {}  # of all documents, by sequence length
        self._samplers: dict[tuple[Any, ...], SourceSampler] = {}  # by what was given before
        self._others: dict[int, Source] = {}  # this source with sequences of other lengths

    def with_length(self, length: int) -> "Source":
        """This source in sequences of `length` tokens."""
        if length == self.length:
            return self
        if length not in self._others:
            other = copy.copy(self)
            other.length, other._samplers, other._others = length, {}, {}
            self._others[length] = other
        return self._others[length]

    @property
    def sequences(self) -> int:
        """Number of sequences in an epoch."""
        if self.best_fit:
            return self.pack(FullStream(self.inputs), self.length).sequences
        return self.inputs // self.length

    @property
    def padding(self) -> float:
        """Share of the inputs of an epoch that hold no token."""
        if not self.best_fit:
            return 0.0
        packing = self.pack(FullStream(self.inputs), self.length)
        return packing.padding / max(1, packing.sequences * self.length)

    def pack(self, stream: Stream, length: int) -> BestFit:
        """The packed sequences of a stream of inputs."""
        if not isinstance(stream, FullStream):
            return BestFit(RemainingPieces(self._documents, stream, self.file_ranges), length)
        if length not in self._packings:
            self._packings[length] = BestFit(self._documents, length)
        return self._packings[length]

    @functools.cached_property
    def _documents(self) -> Documents:
        return Documents(self.subsets)

    def sampler(self, seed: int, key: int, drawn: Sequence[Drawn] = ()) -> SourceSampler:
        """The order in which this source gives its sequences, as in `SourceSampler`.

        Stages differ in the last count alone, so they share what is left of an interrupted epoch.
        """
        before, now = list(drawn), (self.length, seed, self.best_fit)
        base = before.pop()[2] if before and way_of(before[-1]) == now else 0
        identity = (seed, key, *before)
        if identity not in self._samplers:
            self._samplers[identity] = SourceSampler(
                self.inputs, self.length, seed, key, before, pack=self.pack, packed=self.best_fit
            )
        found = copy.copy(self._samplers[identity])
        found.drawn, found.base = list(drawn), base
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the tokens, wherever the files are. Masks change no order of data, so they are
        not part of it.
        """
        content: list[Any] = [(subset.identity, subset.file.identity) for subset in self.subsets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def mask_digests(self) -> list[str]:
        """What tells the masks of the files from others."""
        return ["" if file.masks is None else file.masks.digest for file in self.files]

    @functools.cached_property
    def masked_tokens(self) -> int:
        """How many of the tokens are masked."""
        if not self.masked:
            return 0
        return sum(
            subset.file.masks.count(subset.begins, subset.ends)
            for subset in self.subsets
            if subset.file.masks is not None
        )

    def with_stream(self, stream: Stream | PackedStream) -> "Source":
        """This source with the sequences of a stream."""
        if isinstance(stream, FullStream):
            return self
        other = copy.copy(self)
        other.stream = stream
        return other

    def input_ranges(self, number: int) -> list[tuple[int, int]]:
        """The inputs of sequence `number`, which is not packed, as ranges [begin, end) of this
        source's tokens.
        """
        assert not isinstance(self.stream, PackedStream)
        return self.stream.ranges(number * self.length, (number + 1) * self.length)

    def file_ranges(self, begin: int, end: int) -> Iterator[tuple[TokenFile, int, int]]:
        """The ranges of token files that make up the source's tokens [begin, end)."""
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
        """Sequence `number`, below `sequences`. Raises DataError for a file that can no longer be
        read.
        """
        if isinstance(self.stream, PackedStream):
            return self._read_packed(self.stream, number)
        ranges = self.input_ranges(number)
        if len(ranges) == 1:
            tokens, starts = self._read(ranges[0][0], ranges[0][1] + 1)
            masked = self._masked_targets(*ranges[0])
            return PackedSample(tokens, starts, tokens[1:], starts[1:] - 1, masked=masked)
        tokens, targets = np.empty(self.length + 1, np.int64), np.empty(self.length, np.int64)
        all_starts, all_ends, all_masked, filled = [], [], [], 0
        for place, (begin, end) in enumerate(ranges):  # the last input of each has its own target
            part, starts = self._read(begin, end + 1)
            size = end - begin
            tokens[filled : filled + size + 1] = part
            targets[filled : filled + size] = part[1:]
            # As of a single range, the last target may begin a document.
            is_last = place == len(ranges) - 1
            all_starts.append(filled + starts[starts < size + is_last])
            all_ends.append(filled + starts[1:] - 1)
            all_masked.append(filled + self._masked_targets(begin, end))
            filled += size
        found = (np.concatenate(each) for each in (all_starts, all_ends, all_masked))
        starts, ends, masked = found
        return PackedSample(tokens, starts, targets, ends, masked=masked)

    def _masked_targets(self, begin: int, end: int) -> NDArray[np.int64]:
        """The inputs of [begin, end), counted from `begin`, whose targets are masked."""
        found, at = [np.zeros(0, np.int64)], 0
        for file, first, stop in self.file_ranges(begin + 1, end + 1) if self.masked else ():
            if file.masks is not None:
                found.append(at + file.masks.within(first, stop))
            at += stop - first
        return np.concatenate(found)

    def _read_packed(self, stream: PackedStream, number: int) -> PackedSample:
        parts = stream.parts(number)
        tokens = np.zeros(self.length + 1, np.int64)
        starts, breaks, filled, ended = list[int](), list[int](), 0, True
        masked = [np.zeros(0, np.int64)]
        for part in parts:
            first = part.file.start_of(part.document) + part.begin
            stop = filled + part.tokens
            tokens[filled:stop] = part.file.tokens_at(first, first + part.tokens)
            if self.masked and part.file.masks is not None:
                masked.append(part.file.masks.within(first, first + part.tokens) + filled - 1)
            if filled and (part.begin or not ended):
                breaks.append(filled - 1)
            starts.append(filled)
            filled, ended = stop, part.begin + part.tokens == part.size
        ends = np.array(starts[1:], np.int64) - 1
        targets = np.concatenate(masked)  # the first token of a sequence is no target
        padding = self.length + 1 - filled
        if padding:  # attends to nothing else
            starts.append(filled)
        return PackedSample(
            tokens,
            np.array(starts, np.int64),
            tokens[1:],
            ends,
            padding,
            np.array(breaks, np.int64),
            masked=targets[targets >= 0],
        )

    def _read(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source's tokens [begin, end), and the indices at which documents begin in them, 0
        included.
        """
        tokens = np.empty(end - begin, np.int64)
        starts: list[NDArray[np.int64]] = []
        filled = 0
        for file, first_token, stop in self.file_ranges(begin, end):
            tokens[filled : filled + stop - first_token] = file.tokens_at(first_token, stop)
            first = file.document_at(first_token)
            last = file.document_at(stop - 1, first)
            inside = file.starts_of(first, last + 1)
            inside[0] = first_token  # the document may have begun before the range
            starts.append(inside + (filled - first_token))
            filled += stop - first_token
        found = starts[0] if len(starts) == 1 else np.concatenate(starts)
        # A document without tokens begins where the next one does.
        different = found[1:] != found[:-1]
        return tokens, found if different.all() else found[np.append(True, different)]

    def locate(self, number: int) -> list[DocumentSpan]:
        """The parts of documents that make up sequence `number` and its last target: L + 1 tokens,
        or fewer with padding.
        """
        if isinstance(self.stream, PackedStream):
            return [
                DocumentSpan(str(part.file.prefix), part.document, part.begin, part.tokens)
                for part in self.stream.parts(number)
            ]
        ranges = self.input_ranges(number)
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        spans = []
        for file, begin, end in (piece for each in ranges for piece in self.file_ranges(*each)):
            at = begin
            while at < end:
                document = file.document_at(at)
                stop = min(end, file.start_of(document + 1))
                first = at - file.start_of(document)
                spans.append(DocumentSpan(str(file.prefix), document, first, stop - at))
                at = stop
        return spans


class RandomSource:
    """Random tokens that depend only on a seed and the number of the sequence. For trying things
    out.
    """

    name = "random"
    tokens = documents = number = masked_tokens = 0
    masked = False
    sequences = 2**62

    def __init__(self, length: int, vocab_size: int, seed: int):
        self.length, self.vocab_size, self.seed = length, vocab_size, seed
        self.inputs = self.sequences * length
        self.digest = f"random {length} {vocab_size} {seed}"

    padding, best_fit = 0.0, False

    def with_length(self, length: int) -> "RandomSource":
        """Random tokens in sequences of `length` tokens: another source."""
        return self if length == self.length else RandomSource(length, self.vocab_size, self.seed)

    def sampler(self, seed: int, key: int, drawn: Sequence[Drawn] = ()) -> SourceSampler:
        """As of `Source`; there are no documents to pack."""
        given = [(length, with_seed, count) for length, with_seed, count, *_ in drawn]
        return SourceSampler(self.inputs, self.length, seed, key, given)

    def with_stream(self, stream: Stream | PackedStream) -> "RandomSource":
        """This source: another length or seed makes another source, so nothing of it ever
        remains.
        """
        return self

    def read(self, number: int) -> PackedSample:
        """Sequence `number`: one document."""
        random = np.random.default_rng((self.seed, number))
        tokens = random.integers(self.vocab_size, size=self.length + 1)
        return PackedSample(tokens, np.zeros(1, np.int64), tokens[1:], np.zeros(0, np.int64))

    def locate(self, number: int) -> list[DocumentSpan]:
        """One span, of no file."""
        return [DocumentSpan("random", number, 0, self.length + 1)]


def short_names(names: Sequence[str]) -> list[str]:
    """Names of sources that are paths, as short as they are unique: `code` for
    corpora/code/dataset.json.
    """
    # A name may end with token files in brackets.
    split = [name.partition(" (") for name in names]
    paths = [PurePath(path.removesuffix(".json")).parts for path, *_ in split]
    paths = [each[:-1] if len(each) > 1 and each[-1] == "dataset" else each for each in paths]
    further = [bracket + files for _, bracket, files in split]
    found = list(names)
    for size in range(max(map(len, paths), default=0), 0, -1):
        ends = ["/".join(each[-size:]) + more for each, more in zip(paths, further, strict=True)]
        if len(set(ends)) < len(set(names)):
            break
        found = ends
    # The same path twice.
    return [
        name if found.count(name) == 1 else f"{name} {found[: place + 1].count(name)}"
        for place, name in enumerate(found)
    ]
