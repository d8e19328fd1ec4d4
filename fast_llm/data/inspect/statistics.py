"""Lengths of documents and exact duplicates, in bounded memory.

Lengths come from the index files alone (4 bytes a document), a million documents at a time:
`fast-llm inspect` reads no token for them. Lengths below 2^20 tokens are counted one by one (8 MiB)
and longer documents are listed, so medians and percentiles are exact. Duplicates need every token:
digests of 8 bytes are written to 256 temporary files and sorted one file at a time.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.tokenfile import TokenFile

_COUNTED = 2**20  # tokens; longer documents are listed
_DOCUMENTS = 2**20  # read from an index at a time
_READ = 2**24  # bytes of tokens read at a time
_PARTS = 256  # temporary files of digests


class Lengths:
    """How many documents have each number of tokens."""

    def __init__(self) -> None:
        self.counts = np.zeros(_COUNTED, np.int64)
        self.longer: list[NDArray[np.int64]] = []

    @classmethod
    def of(cls, files: Iterable[TokenFile]) -> "Lengths":
        """The lengths of all documents of token files."""
        found = cls()
        for file in files:
            for begin in range(0, file.documents, _DOCUMENTS):
                found.add(file.lengths_of(begin, begin + _DOCUMENTS))
        return found

    def add(self, lengths: NDArray[Any]) -> None:
        """Count some documents."""
        long = lengths >= _COUNTED
        if long.any():
            self.longer.append(lengths[long].astype(np.int64))
            lengths = lengths[~long]
        self.counts += np.bincount(lengths, minlength=_COUNTED)

    def distinct(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lengths that occur, ascending, and how many documents have each."""
        lengths = np.flatnonzero(self.counts)
        longer, counts = np.unique(
            np.concatenate([np.zeros(0, np.int64), *self.longer]), return_counts=True
        )
        return np.append(lengths, longer), np.append(self.counts[lengths], counts)

    def summary(self) -> dict[str, Any]:
        """Mean, percentiles, and a histogram by powers of two."""
        lengths, counts = self.distinct()
        documents = int(counts.sum())
        if not documents:
            return {"documents": 0, "tokens": 0, "histogram": []}
        ranks = np.cumsum(counts)

        def percentile(share: float) -> int:
            """The shortest length that `share` of the documents do not exceed."""
            return int(lengths[np.searchsorted(ranks, share * documents)])

        tokens = int((lengths * counts).sum())
        return {
            "documents": documents,
            "tokens": tokens,
            "mean": tokens / documents,
            "shortest": int(lengths[0]),
            "median": percentile(0.5),
            "p90": percentile(0.9),
            "p99": percentile(0.99),
            "longest": int(lengths[-1]),
            "histogram": _histogram(lengths, counts),
        }

    def longer_than(self, limit: int) -> dict[str, Any]:
        """Documents of more than `limit` tokens: their number, tokens, and shares of all."""
        lengths, counts = self.distinct()
        tokens = lengths * counts
        over = lengths > limit
        documents = int(counts[over].sum())
        return {
            "documents": documents,
            "share_of_documents": documents / max(1, int(counts.sum())),
            "tokens": int(tokens[over].sum()),
            "share_of_tokens": int(tokens[over].sum()) / max(1, int(tokens.sum())),
        }


def _histogram(lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents and tokens by length: 0, 1, 2 to 3, 4 to 7, …, without empty ends."""
    powers = np.where(lengths > 0, np.frexp(lengths.astype(np.float64))[1], 0)
    documents = np.bincount(powers, counts)
    tokens = np.bincount(powers, counts * lengths)
    return [
        {
            "from": 2 ** (power - 1) if power else 0,
            "to": 2**power - 1,
            "documents": int(documents[power]),
            "tokens": int(tokens[power]),
        }
        for power in range(int(powers.min()), int(powers.max()) + 1)
    ]


@dataclass(frozen=True)
class Duplicates:
    """Documents whose tokens equal those of another document."""

    documents: int
    """How many could be left out: all but one of each group."""
    tokens: int
    """Their tokens."""
    groups: int
    """Number of different documents that occur more than once."""


def count_duplicates(files: Sequence[TokenFile]) -> Duplicates:
    """Count exact duplicates. Reads all tokens; temporary files take 16 bytes a document."""
    with tempfile.TemporaryDirectory(prefix="fast-llm-inspect-") as folder:
        parts = [Path(folder) / str(number) for number in range(_PARTS)]
        for digests in _digests(files):
            order = np.argsort(digests[:, 0] >> np.uint64(56), kind="stable")
            digests = digests[order]
            edges = np.searchsorted(digests[:, 0] >> np.uint64(56), np.arange(_PARTS + 1))
            for number, path in enumerate(parts):
                if edges[number] < edges[number + 1]:
                    with path.open("ab") as file:
                        file.write(digests[edges[number] : edges[number + 1]].tobytes())
        found = [_repeated(path) for path in parts if path.exists()]
    return Duplicates(*(sum(each[place] for each in found) for place in range(3)))


def _digests(files: Sequence[TokenFile]) -> Iterator[NDArray[np.uint64]]:
    """[documents, 2]: digest and number of tokens of the documents that are not empty, in parts."""
    for file in files:
        size, begin = file.dtype.itemsize, 0
        while begin < file.documents:
            first = file.start_of(begin)
            end = max(begin + 1, file.document_at(min(first + _READ // size, file.tokens)))
            end = min(end, file.documents)
            lengths = file.lengths_of(begin, end).astype(np.int64)
            data = file.tokens_at(first, file.start_of(end)).tobytes()
            edges = [0, *(np.cumsum(lengths) * size).tolist()]
            found = [
                (int.from_bytes(hashlib.blake2b(data[low:high], digest_size=8).digest()), length)
                for low, high, length in zip(edges[:-1], edges[1:], lengths.tolist(), strict=True)
                if length
            ]
            if found:
                yield np.array(found, np.uint64)
            begin = end


def _repeated(path: Path) -> tuple[int, int, int]:
    """Documents, tokens and groups of the duplicates in a temporary file."""
    digests = np.frombuffer(path.read_bytes(), np.uint64).reshape(-1, 2)
    _, first, counts = np.unique(digests[:, 0], return_index=True, return_counts=True)
    again = counts - 1
    lengths = digests[first, 1].astype(np.int64)
    return int(again.sum()), int((again * lengths).sum()), int((counts > 1).sum())
