"""A source of training data: the documents of several token files, one after the other, cut into
sequences.

T tokens make n = (T - 1) // L sequences of L tokens. Sequence k holds tokens [k·L, k·L + L]; the
last one is only a target. Nothing is indexed or cached. Reading a sequence takes some 50 µs,
whatever the size of the data.
"""

import bisect
import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.sampling import RemainingStream, Stream
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


class Source:
    """Documents of several token files as sequences of `length` tokens."""

    def __init__(self, name: str, subsets: Sequence[FileSubset], length: int):
        self.name = name
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
        # The number of runs before each file.
        self.runs = list(accumulate((len(subset.begins) for subset in self.subsets), initial=0))
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.inputs = max(0, self.tokens - 1)
        self.stream: RemainingStream | None = None  # the inputs that are cut; None means all

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return (self.inputs if self.stream is None else self.stream.size) // self.length

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the content, wherever the files are."""
        content = [(subset.identity, subset.file.identity) for subset in self.subsets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_stream(self, stream: Stream) -> "Source":
        """This source with sequences cut from a stream of its inputs."""
        if not isinstance(stream, RemainingStream):
            return self
        other = copy.copy(self)
        other.stream = stream
        return other

    def input_ranges(self, number: int) -> list[tuple[int, int]]:
        """The inputs of sequence `number`, as ranges [begin, end) of this source's tokens."""
        begin, end = number * self.length, (number + 1) * self.length
        return [(begin, end)] if self.stream is None else self.stream.ranges(begin, end)

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
        ranges = self.input_ranges(number)
        if len(ranges) == 1:
            tokens, starts = self._read(ranges[0][0], ranges[0][1] + 1)
            return PackedSample(tokens, starts, tokens[1:], starts[1:] - 1)
        tokens, targets = np.empty(self.length + 1, np.int64), np.empty(self.length, np.int64)
        all_starts, all_ends, filled = [], [], 0
        for begin, end in ranges:  # the last input of each range has its own target
            part, starts = self._read(begin, end + 1)
            size = end - begin
            tokens[filled : filled + size + 1] = part
            targets[filled : filled + size] = part[1:]
            all_starts.append(filled + starts[starts < size])
            all_ends.append(filled + starts[1:] - 1)
            filled += size
        return PackedSample(tokens, np.concatenate(all_starts), targets, np.concatenate(all_ends))

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
            inside = file.starts[first : last + 1] // file.dtype.itemsize
            inside[0] = first_token  # the document may have begun before the range
            starts.append(inside + (filled - first_token))
            filled += stop - first_token
        found = starts[0] if len(starts) == 1 else np.concatenate(starts)
        # A document without tokens begins where the next one does.
        different = found[1:] != found[:-1]
        return tokens, found if different.all() else found[np.append(True, different)]

    def locate(self, number: int) -> list[DocumentSpan]:
        """The parts of documents that make up sequence `number` and its last target: L + 1
        tokens.
        """
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
    tokens = documents = 0
    sequences = 2**62

    def __init__(self, length: int, vocab_size: int, seed: int):
        self.length, self.vocab_size, self.seed = length, vocab_size, seed
        self.inputs = self.sequences * length
        self.digest = f"random {length} {vocab_size} {seed}"

    def with_stream(self, stream: Stream) -> "RandomSource":
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
