"""Which documents are trained on, and which validation and test have.

By hash (`"split": "hash-1"` in dataset.json): of N documents, counted from 0 through all token files in the order of
dataset.json, document d is ranked by h(d) = mix(d + KEY mod 2^64), mix as in sampling.py. The lowest
round(share · N) of training's share are trained on, the next are validation's, and so on. h is a bijection of 64-bit
numbers, so that no two are alike. Every phase has documents from everywhere, its share to the document, and with a
larger share those that it had before.

By place (token files without dataset.json, and those that version 0.1 prepared): of each token file the first
documents are trained on, the next are validation's, the last test's.
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
_KEY = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64: any would do, but it must never change
_BLOCK = 2**20  # documents at a time
_BUCKETS = 2**16


class FileSubset:
    """Documents of a token file that belong to one phase: runs of neighbours, as ranges of tokens."""

    def __init__(
        self,
        file: TokenFile,
        documents: int,
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        described: Sequence[Any],
    ):
        """`described`: what tells this part of the file from others, for fingerprints."""
        filled = ends > begins
        self.file, self.documents, self.described = file, documents, tuple(described)
        self.begins, self.ends = begins[filled], ends[filled]


def all_documents(file: TokenFile) -> FileSubset:
    """All documents of a file."""
    return split_by_position(file, [1.0], 0)


def split_by_position(file: TokenFile, split: Sequence[float], position: int) -> FileSubset:
    """The documents of a token file that the split gives to one phase, from front to back."""
    shares = np.cumsum(split) / sum(split)
    edges = [0, *(round(float(edge) * file.documents) for edge in shares)]
    first, last = edges[position], edges[position + 1]
    begin, end = (np.array([file.start_of(document)]) for document in (first, last))
    return FileSubset(file, last - first, begin, end, (first, last))


def split_by_hash(files: Sequence[TokenFile], split: Sequence[float]) -> list[list[FileSubset]]:
    """For each file of a dataset, in its order, the documents that the split gives to each phase."""
    count = sum(file.documents for file in files)
    shares = np.cumsum(split) / sum(split)
    ranks = [0, *(round(float(share) * count) for share in shares)]
    bounds = _hashes_of_ranks(count, ranks[1:])
    found, first = [], 0
    for file in files:
        found.append(_subsets_of_file(file, first, bounds, ranks))
        first += file.documents
    return found


def _subsets_of_file(
    file: TokenFile, first: int, bounds: NDArray[np.uint64], ranks: Sequence[int]
) -> list[FileSubset]:
    """A file whose documents are numbered from `first` on."""
    splits = len(bounds)
    tokens: list[list[NDArray[np.int64]]] = [[] for _ in range(splits)]
    documents = [0] * splits
    before = -1  # the phase of the document before
    for begin in range(0, file.documents, _BLOCK):
        end = min(begin + _BLOCK, file.documents)
        phase = np.searchsorted(bounds, _hash(first + begin, first + end), "right").astype(np.int8)
        starts = file.starts[begin:end].astype(np.int64) // file.dtype.itemsize
        changes = np.flatnonzero(np.diff(phase, prepend=np.int8(before)))
        earlier = np.append(np.int8(before), phase)[changes]
        for position in range(splits):
            documents[position] += int(np.count_nonzero(phase == position))
            ours = (phase[changes] == position) | (earlier == position)
            tokens[position].append(starts[changes[ours]])  # by turns where a run begins and ends
        before = int(phase[-1])
    parts = []
    for position, (low, high) in enumerate(pairwise(ranks)):
        last = [np.array([file.tokens])] if before == position else []
        edges = np.concatenate([np.zeros(0, np.int64), *tokens[position], *last])
        described = (HASH, first, low, high)
        parts.append(FileSubset(file, documents[position], edges[0::2], edges[1::2], described))
    return parts


def _hash(begin: int, end: int) -> NDArray[np.uint64]:
    return mix_many(np.arange(begin, end, dtype=np.uint64) + _KEY)


def _blocks(count: int) -> Iterator[NDArray[np.uint64]]:
    for begin in range(0, count, _BLOCK):
        yield _hash(begin, min(begin + _BLOCK, count))


def _hashes_of_ranks(count: int, ranks: Sequence[int]) -> NDArray[np.uint64]:
    """The hash with each of these ranks among `count` documents; the largest number of all for rank `count`.

    Not sorted as a whole, which would take gigabytes: counted by their first bits, then sorted where a rank lies.
    """
    shift = np.uint64(64 - 16)
    histogram = np.zeros(_BUCKETS, np.int64)
    for hashes in _blocks(count):
        histogram += np.bincount((hashes >> shift).astype(np.int64), minlength=_BUCKETS)
    before = np.concatenate([[0], np.cumsum(histogram)])
    buckets = np.searchsorted(before, ranks, "right") - 1
    wanted = np.unique(buckets[buckets < _BUCKETS]).astype(np.uint64)
    kept = [hashes[np.isin(hashes >> shift, wanted)] for hashes in _blocks(count)]
    hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *kept]))
    skipped = np.searchsorted(hashes >> shift, buckets.astype(np.uint64))
    places = skipped + np.asarray(ranks) - before[buckets]
    top = np.array([2**64 - 1], np.uint64)
    return np.append(hashes, top)[np.where(buckets < _BUCKETS, places, len(hashes))]
