"""Best-fit packing: documents that fit a sequence are never cut (`data.packing: best_fit`).

Ding et al., "Fewer Truncations Improve Language Modeling", 2024. A sequence of L inputs is read as
L + 1 tokens; the last one is only a target. A *piece* is a document, or what remains of it after a
change of settings. A piece of t tokens gives (t - 1) // L full sequences. They overlap by one
token: the last target of one is the first input of the next. A *rest* of (t - 1) mod L + 1 tokens
follows, unless that is one token of a longer piece, which has been a target already. So a document
of L + 1 tokens fills a sequence. Each token but the first of a document is a target once an epoch.

Rests share sequences of L + 1 tokens: the longest first, each into the fullest sequence that has
room (best-fit decreasing). Rests of one length are placed together, as in Krell et al., "Efficient
Sequence Packing without Cross-contamination", 2021. So the work grows with the number of different
lengths, at most L, not with the number of documents. Sequences with the same lengths are a *group*.

Groups depend on the lengths alone, the rests in them also on the epoch. Sequence j of a group holds
as copy c of length r the rest number π_r(first + j·copies + c) of this length. π_r is the
permutation of sampling.py, with the keys of "<seed> <s> <e> best_fit", or "<seed> <s> <e> <g>
best_fit" in an interrupted epoch, each xor mix(r). Parts of a sequence are in the order of
mix(piece xor k_0).

Memory: the numbers of the pieces in the order of their rests' lengths, 4 bytes each (8 from 2^32
documents on), and 16 bytes for each piece that is longer than a sequence. What remains of an
interrupted epoch takes 17 bytes a piece.
"""

import bisect
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.sampling import Stream, mix, permute, permute_many
from fast_llm.data.split import FileSubset
from fast_llm.data.tokenfile import TokenFile

Ints = NDArray[np.int64]
Rests = tuple[int, int, int]  # tokens of each; copies in each sequence; number of the first one
_BLOCK = 2**20  # documents or sequences looked at together


class Block(NamedTuple):
    """Adjacent pieces. `ends`: where a piece's inputs end, as the source's tokens: one token before
    the piece if its last token is still to be an input of what follows.
    """

    numbers: Ints
    begins: Ints  # the source's token at which each begins
    sizes: Ints  # tokens of each, at least 1
    ends: Ints


class Part(NamedTuple):
    """Part of a document in a sequence."""

    file: TokenFile
    document: int
    begin: int  # the first token, counted in the document
    tokens: int
    size: int  # of the document


class Pieces(Protocol):
    """Pieces of a source, in its order."""

    numbers: int  # above all numbers of pieces

    def blocks(self) -> Iterator[Block]:
        """All pieces, some at a time."""
        ...

    def part(self, piece: int, begin: int, tokens: int) -> Part:
        """Tokens [begin, begin + tokens) of a piece; a negative `begin` counts from its end."""
        ...


class Documents:
    """All documents of a source. They are numbered through the token files, empty ones too."""

    def __init__(self, subsets: Sequence[FileSubset]):
        self.subsets = subsets
        sizes = (subset.file.documents for subset in subsets)
        self.before = list(accumulate(sizes, initial=0))  # documents before each file
        self.numbers = self.before[-1]

    def blocks(self) -> Iterator[Block]:
        """The documents with tokens that the source has, a million at a time."""
        at = 0
        for subset, before in zip(self.subsets, self.before, strict=False):
            file = subset.file
            for first in range(0, file.documents, _BLOCK):
                last = min(first + _BLOCK, file.documents)
                starts, sizes = file.starts_of(first, last), file.lengths_of(first, last)
                run = np.searchsorted(subset.begins, starts, "right") - 1
                own = (run >= 0) & (starts < subset.ends[run]) & (sizes > 0)
                tokens = sizes[own].astype(np.int64)
                ends = at + np.cumsum(tokens)
                if len(ends):
                    at = int(ends[-1])
                yield Block(np.flatnonzero(own) + (before + first), ends - tokens, tokens, ends)

    def part(self, piece: int, begin: int, tokens: int) -> Part:
        """As in `Pieces`."""
        place = bisect.bisect_right(self.before, piece) - 1
        file, document = self.subsets[place].file, piece - self.before[place]
        size = file.start_of(document + 1) - file.start_of(document)
        return Part(file, document, begin if begin >= 0 else size + begin, tokens, size)


class RemainingPieces:
    """The pieces of documents that remain in a stream of inputs."""

    def __init__(
        self,
        documents: Documents,
        stream: Stream,
        locate: Callable[[int, int], Iterator[tuple[TokenFile, int, int]]],
    ):
        """`locate`: the ranges of token files that make up a range of the source's tokens."""
        self.locate = locate
        ranges = np.array(stream.ranges(0, stream.size), np.int64).reshape(-1, 2)
        found = [_split_by_document(ranges, block) for block in documents.blocks()]
        self.begins, self.sizes, self.goes_on = (
            np.concatenate([one[place] for one in found]) for place in range(3)
        )
        self.numbers = len(self.begins)

    def blocks(self) -> Iterator[Block]:
        """As in `Pieces`: one block."""
        ends = self.begins + self.sizes - self.goes_on
        yield Block(np.arange(self.numbers), self.begins, self.sizes, ends)

    def part(self, piece: int, begin: int, tokens: int) -> Part:
        """As in `Pieces`."""
        place = int(self.begins[piece]) + (begin if begin >= 0 else int(self.sizes[piece]) + begin)
        ((file, first, _),) = self.locate(place, place + tokens)
        document = file.document_at(first)
        start = file.start_of(document)
        return Part(file, document, first - start, tokens, file.start_of(document + 1) - start)


def _split_by_document(ranges: Ints, documents: Block) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Of the pieces of documents in unused inputs: the source's token at which each begins, its
    tokens, and whether the document continues after it.

    `ranges` [n, 2]: the inputs, ascending. A document's last token is no piece of its own: it has
    no target in the document.
    """
    ends = documents.begins + documents.sizes
    first = np.searchsorted(ranges[:, 1], documents.begins, "right")
    counts = np.searchsorted(ranges[:, 0], ends, "left") - first
    owner = np.repeat(np.arange(len(ends)), counts)
    place = np.arange(len(owner)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    begins = np.maximum(ranges[place, 0], documents.begins[owner])
    stops = np.minimum(ranges[place, 1], ends[owner])
    goes_on = stops < ends[owner]
    sizes = stops + goes_on - begins  # with the target of the last input
    useful = (sizes > 1) | (documents.sizes[owner] == 1)
    return begins[useful], sizes[useful], goes_on[useful]


class Groups(NamedTuple):
    """Sequences of rests: group g has the sequences [first[g], first[g + 1])."""

    first: Ints
    rests: list[tuple[Rests, ...]]


def pack(counts: Ints, capacity: int) -> Groups:
    """Pack rests into sequences of `capacity` tokens. `counts[r]`: number of rests of r tokens."""
    rooms: list[int] = []  # tokens that some sequences have left, ascending
    by_room: dict[int, list[tuple[int, tuple[Rests, ...]]]] = {}

    def add(room: int, sequences: int, rests: tuple[Rests, ...]) -> None:
        if not sequences:
            return
        if room not in by_room:
            bisect.insort(rooms, room)
            by_room[room] = []
        by_room[room].append((sequences, rests))

    for size in np.flatnonzero(counts)[::-1].tolist():
        left, placed = int(counts[size]), 0
        while left:
            at = bisect.bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms[at]
                sequences, rests = by_room[room].pop()
                if not by_room[room]:
                    del by_room[rooms.pop(at)]
            else:
                room, rests = capacity, ()
                sequences = -(-left // (capacity // size))
            copies = room // size
            full = min(sequences, left // copies)
            add(room - copies * size, full, (*rests, (size, copies, placed)))
            placed, left = placed + full * copies, left - full * copies
            if full < sequences:
                if left:  # fewer than `copies`
                    some = (*_skip(rests, full), (size, left, placed))
                    add(room - left * size, 1, some)
                    full, left = full + 1, 0
                add(room, sequences - full, _skip(rests, full))
    groups = [group for room in rooms for group in by_room[room]]
    first = np.cumsum([0, *(sequences for sequences, _ in groups)], dtype=np.int64)
    return Groups(first, [rests for _, rests in groups])


def _skip(rests: tuple[Rests, ...], sequences: int) -> tuple[Rests, ...]:
    """The rests of a group without its first sequences."""
    return tuple((size, copies, first + sequences * copies) for size, copies, first in rests)


class BestFit:
    """The sequences of an epoch, or of what remains of one: first the full ones, then groups."""

    def __init__(self, pieces: Pieces, length: int):
        self.pieces, self.length = pieces, length
        self.counts: Ints = np.zeros(length + 1, np.int64)
        self.full = 0  # sequences that hold one long piece's tokens
        for block in pieces.blocks():
            full, rests = self._cut(block.sizes)
            self.full += int(full.sum())
            self.counts += np.bincount(rests, minlength=length + 1)
        self.counts[0] = 0
        self.groups = pack(self.counts, length + 1)
        self.sequences = self.full + int(self.groups.first[-1])
        self._lock = threading.Lock()
        self._by_length: NDArray[np.unsignedinteger] | None = None

    def _cut(self, sizes: Ints) -> tuple[Ints, Ints]:
        """For pieces of these sizes: full sequences, and tokens of the rest; 0 without one."""
        full, rests = np.divmod(sizes - 1, self.length)
        rests += 1
        rests[(rests == 1) & (full > 0)] = 0
        return full, rests

    @functools.cached_property
    def padding(self) -> int:
        """Number of inputs, in all sequences, that hold no token."""
        used = [sum(size * copies for size, copies, _ in rests) for rests in self.groups.rests]
        unused = np.maximum(self.length - np.array(used, np.int64), 0)
        return int(unused @ np.diff(self.groups.first))

    def open(self) -> None:
        """Order the pieces by the lengths of their rests: a counting sort, in blocks."""
        with self._lock:
            if self._by_length is not None:
                return
            self.before = np.cumsum(self.counts) - self.counts  # rests shorter than each length
            kind = "u4" if self.pieces.numbers < 2**32 else "u8"
            by_length: NDArray[np.unsignedinteger] = np.empty(int(self.counts.sum()), kind)
            filled = self.before.copy()
            long, many = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
            for block in self.pieces.blocks():
                full, rests = self._cut(block.sizes)
                long.append(block.numbers[full > 0])
                many.append(full[full > 0])
                order = np.argsort(rests, kind="stable")
                order = order[np.count_nonzero(rests == 0) :]
                rests = rests[order]
                counts = np.bincount(rests, minlength=self.length + 1)
                inside = np.arange(len(rests)) - (np.cumsum(counts) - counts)[rests]
                by_length[filled[rests] + inside] = block.numbers[order]
                filled += counts
            self.long: Ints = np.concatenate(long)
            self.full_before: Ints = np.cumsum(np.concatenate(many))  # before each long piece
            self._by_length = by_length

    def in_epoch(self, deal: tuple[int, ...]) -> "PackedStream":
        """The sequences of one epoch. `deal`: the keys of π_r."""
        return PackedStream(self, deal)

    def parts(self, number: int, deal: Sequence[int]) -> list[Part]:
        """The parts of documents in sequence `number`. `deal`: the keys of π_r."""
        self.open()
        assert self._by_length is not None
        if number < self.full:
            place = int(np.searchsorted(self.full_before, number, "right")) - 1
            begin = (number - int(self.full_before[place])) * self.length
            return [self.pieces.part(int(self.long[place]), begin, self.length + 1)]
        number -= self.full
        group = bisect.bisect_right(self.groups.first, number) - 1
        inside = number - int(self.groups.first[group])
        found = []
        for size, copies, first in self.groups.rests[group]:
            keys, count = _keys_of(deal, size), int(self.counts[size])
            before, begin = int(self.before[size]), first + inside * copies
            for rest in range(begin, begin + copies):
                piece = int(self._by_length[before + permute(rest, count, keys)])
                found.append((mix(piece ^ deal[0]), piece, size))
        return [self.pieces.part(piece, -size, size) for _, piece, size in sorted(found)]

    def remaining(self, used: int, order: Sequence[int], deal: Sequence[int]) -> Ints:
        """The inputs [n, 2] that remain after `used` sequences, in the order of the keys `order`:
        ascending ranges of the source's tokens.
        """
        self.open()
        is_used = np.zeros(self.sequences, bool)
        for begin in range(0, used, _BLOCK):
            values = np.arange(begin, min(begin + _BLOCK, used), dtype=np.uint64)
            is_used[permute_many(values, self.sequences, order)] = True
        rest_used = self._used_rests(is_used[self.full :], deal)
        at, found = 0, []
        for block in self.pieces.blocks():
            full, rests = self._cut(block.sizes)
            counts = full + (rests > 0)
            owner = np.repeat(np.arange(len(full)), counts)
            place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            begins = block.begins[owner] + place * self.length
            is_last = place == counts[owner] - 1
            ends = np.where(is_last, block.ends[owner], begins + self.length)
            is_full, unused = place < full[owner], ~rest_used[block.numbers[owner]]
            many = int(full.sum())
            unused[is_full] = ~is_used[at : at + many]
            at += many
            found.append(_join(np.stack([begins[unused], ends[unused]], 1)))
        return _join(np.concatenate(found))

    def _used_rests(self, is_used: NDArray[np.bool_], deal: Sequence[int]) -> NDArray[np.bool_]:
        """For each number of a piece, whether a used sequence has its rest."""
        assert self._by_length is not None
        by_place = np.zeros(len(self._by_length), bool)
        for rests, begin, end in zip(
            self.groups.rests, self.groups.first[:-1], self.groups.first[1:], strict=True
        ):
            for size, copies, first in rests:
                place = int(self.before[size]) + first
                many = int(end - begin) * copies
                by_place[place : place + many] = np.repeat(is_used[begin:end], copies)
        found = np.zeros(self.pieces.numbers, bool)
        for size in np.flatnonzero(self.counts).tolist():
            before, count = int(self.before[size]), int(self.counts[size])
            some = np.flatnonzero(by_place[before : before + count]).astype(np.uint64)
            images = permute_many(some, count, _keys_of(deal, size))
            found[self._by_length[before : before + count][images]] = True
        return found


def _keys_of(deal: Sequence[int], size: int) -> list[int]:
    """The keys of π_r for r = `size`."""
    own = mix(size)
    return [key ^ own for key in deal]


def _join(ranges: Ints) -> Ints:
    """Ascending ranges [n, 2], adjacent ones merged."""
    gaps = np.flatnonzero(ranges[1:, 0] != ranges[:-1, 1])
    if not len(ranges):
        return ranges
    begins = ranges[np.append(0, gaps + 1), 0]
    return np.stack([begins, ranges[np.append(gaps, len(ranges) - 1), 1]], 1)


@dataclass(frozen=True)
class PackedStream:
    """The sequences of one epoch."""

    packing: BestFit
    deal: tuple[int, ...]

    def parts(self, number: int) -> list[Part]:
        """The parts of documents in sequence `number`."""
        return self.packing.parts(number, self.deal)
