"""Which documents are trained on, and which ones validation and test have.

By hash (`"split": "hash-1"` in dataset.json): documents d = 0 … N - 1 are numbered through all
token files, in the order of dataset.json. They are ranked by h(d) = mix(d + KEY mod 2^64), with mix
of sampling.py. The lowest round(share · N) belong to training's share, the next ones to
validation's, the rest to test's. h is a bijection of 64-bit numbers, so no two are equal.
Every split has documents from everywhere and its exact share of them, and keeps its documents when
its share grows.

By position (token files without dataset.json, and those that version 0.1 prepared): of each token
file the first documents are trained on, the next ones are validation's, the last ones test's.

Hashing takes a few seconds for 100 million documents, in blocks of a million.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.sampling import mix_many
from fast_llm.data.tokenfile import TokenFile

HASH = "hash-1"
VERSIONS = (HASH,)
_KEY = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64; any would do, but it must never change
_BLOCK = 2**20  # documents hashed at a time
_BUCKETS = 2**16


class FileSubset:
    """The documents of a token file that belong to one split: runs of adjacent documents, as ranges
    of tokens.
    """

    def __init__(
        self,
        file: TokenFile,
        documents: int,
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        identity: Sequence[Any],
    ):
        """`begins`, `ends`: the tokens [begin, end) of each run. `identity`: what tells this subset
        from others of the file, for fingerprints.
        """
        nonempty = ends > begins
        self.file, self.documents, self.identity = file, documents, tuple(identity)
        self.begins, self.ends = begins[nonempty], ends[nonempty]


def all_documents(file: TokenFile) -> FileSubset:
    """All documents of a file."""
    return split_by_position(file, [1.0], 0)


def split_by_position(file: TokenFile, shares: Sequence[float], position: int) -> FileSubset:
    """The documents of the split at `position`, counted from the front of the file."""
    cumulative = np.cumsum(shares) / sum(shares)
    edges = [0, *(round(float(edge) * file.documents) for edge in cumulative)]
    first, last = edges[position], edges[position + 1]
    begin, end = (np.array([file.start_of(document)]) for document in (first, last))
    return FileSubset(file, last - first, begin, end, (first, last))


def split_by_hash(files: Sequence[TokenFile], shares: Sequence[float]) -> list[list[FileSubset]]:
    """For each file of a dataset, in its order, the documents of each split."""
    count = sum(file.documents for file in files)
    cumulative = np.cumsum(shares) / sum(shares)
    ranks = [0, *(round(float(share) * count) for share in cumulative)]
    bounds = _hashes_of_ranks(count, ranks[1:])
    found, first = [], 0
    for file in files:
        found.append(_subsets_of_file(file, first, bounds, ranks))
        first += file.documents
    return found


def _subsets_of_file(
    file: TokenFile, first: int, bounds: NDArray[np.uint64], ranks: Sequence[int]
) -> list[FileSubset]:
    """The documents of each split in a file whose documents are numbered from `first` on."""
    splits = len(bounds)
    tokens: list[list[NDArray[np.int64]]] = [[] for _ in range(splits)]
    documents = [0] * splits
    previous = -1  # the split of the previous document
    for begin in range(0, file.documents, _BLOCK):
        end = min(begin + _BLOCK, file.documents)
        split = np.searchsorted(bounds, _hash(first + begin, first + end), "right").astype(np.int8)
        starts = file.starts_of(begin, end)
        changes = np.flatnonzero(np.diff(split, prepend=np.int8(previous)))
        earlier = np.append(np.int8(previous), split)[changes]
        for position in range(splits):
            documents[position] += int(np.count_nonzero(split == position))
            own = (split[changes] == position) | (earlier == position)
            tokens[position].append(starts[changes[own]])  # alternately the begin and end of a run
        previous = int(split[-1])
    subsets = []
    for position, (low, high) in enumerate(pairwise(ranks)):
        last = [np.array([file.tokens])] if previous == position else []
        edges = np.concatenate([np.zeros(0, np.int64), *tokens[position], *last])
        identity = (HASH, first, low, high)
        subsets.append(FileSubset(file, documents[position], edges[0::2], edges[1::2], identity))
    return subsets


def _hash(begin: int, end: int) -> NDArray[np.uint64]:
    return mix_many(np.arange(begin, end, dtype=np.uint64) + _KEY)


def _hash_blocks(count: int) -> Iterator[NDArray[np.uint64]]:
    for begin in range(0, count, _BLOCK):
        yield _hash(begin, min(begin + _BLOCK, count))


def _hashes_of_ranks(count: int, ranks: Sequence[int]) -> NDArray[np.uint64]:
    """The hashes that have these ranks among `count` documents; the largest 64-bit number for rank
    `count`.

    Sorting all of them would take gigabytes. They are counted by their first 16 bits, and only the
    buckets that hold a wanted rank are sorted.
    """
    shift = np.uint64(64 - 16)
    histogram = np.zeros(_BUCKETS, np.int64)
    for hashes in _hash_blocks(count):
        histogram += np.bincount((hashes >> shift).astype(np.int64), minlength=_BUCKETS)
    before = np.concatenate([[0], np.cumsum(histogram)])
    buckets = np.searchsorted(before, ranks, "right") - 1
    wanted = np.unique(buckets[buckets < _BUCKETS]).astype(np.uint64)
    kept = [hashes[np.isin(hashes >> shift, wanted)] for hashes in _hash_blocks(count)]
    hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *kept]))
    smaller = np.searchsorted(hashes >> shift, buckets.astype(np.uint64))
    places = smaller + np.asarray(ranks) - before[buckets]
    top = np.array([2**64 - 1], np.uint64)
    return np.append(hashes, top)[np.where(buckets < _BUCKETS, places, len(hashes))]
