"""Texts of evaluations that the training data holds.

A score on examples that were trained on says little. Two texts count as overlapping if they share
13 tokens in a row, as words did for GPT-3 (Brown et al. 2020, appendix C). Of each task is counted
how many examples overlap with the data anywhere, and in how many of these most tokens (80 %) lie in
shared n-grams, which Llama 2 calls dirty (Touvron et al. 2023, appendix A.6).

The text of an example is its question with each of its answers, without examples of few-shot
prompts and without the task's description. N-grams that more than 10 examples and more than 1 % of
them have are the task's template, and do not count. Texts with fewer tokens than an n-gram cannot
be found; they are counted.

The token files are read once, a chunk at a time. Hashes of all windows are differences of one
running sum, modulo 2^64; hits are compared token by token. Memory holds the evaluations' n-grams
and 20 MB. Documents of validation and test in the same files count as trained on.

As a program it scans for a run: `python -m fast_llm.evaluation.contamination JOB`, at low priority;
it ends when its input does.
"""

import hashlib
import json
import os
import select
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.datatrove import open_token_file
from fast_llm.data.tokenfile import TokenFile

LENGTH = 13  # tokens of an n-gram
MOSTLY = 0.8  # share of a text's tokens from which on an example counts as dirty
_TEMPLATE = 10, 0.01  # examples, and share of them
_CHUNK = 2**18  # tokens
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_WORD = 2**64

Hashes = NDArray[np.uint64]
Texts = Sequence[Sequence[Sequence[int]]]  # of each example, the tokens of its texts


@dataclass(frozen=True)
class Overlap:
    """How many examples of a task share text with the training data."""

    examples: int  # those that are long enough
    found: int  # with an n-gram that the data holds
    mostly: int  # of these: 80 % of the tokens of a text are in such n-grams
    short: int  # examples that are too short to be found

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


class Ngrams:
    """The distinct n-grams of the texts of evaluations."""

    def __init__(self, tasks: Mapping[str, Texts]):
        """`tasks`: the texts of each task, as token ids."""
        self.tasks = tasks
        every = [_windows(text) for texts in tasks.values() for one in texts for text in one]
        rows = np.concatenate([np.zeros((0, LENGTH), np.int64), *every])
        self.tokens = np.unique(rows, axis=0)

    @property
    def digest(self) -> str:
        """Identifies the n-grams."""
        content = np.ascontiguousarray(self.tokens).tobytes()
        return hashlib.sha256(b"%d " % LENGTH + content).hexdigest()

    def overlaps(self, seen: NDArray[np.bool_]) -> dict[str, Overlap]:
        """What of each task is in the data. `seen`: which n-grams are."""
        place = {row.tobytes(): number for number, row in enumerate(self.tokens)}
        return {name: self._overlap(texts, seen, place) for name, texts in self.tasks.items()}

    def _overlap(
        self, texts: Texts, seen: NDArray[np.bool_], place: Mapping[bytes, int]
    ) -> Overlap:
        numbers = [
            [np.array([place[row.tobytes()] for row in _windows(text)], np.int64) for text in one]
            for one in texts
        ]
        frequency = Counter(
            number for one in numbers for number in set().union(*(each.tolist() for each in one))
        )
        most = max(_TEMPLATE[0], _TEMPLATE[1] * len(texts))
        counts = seen.copy()
        counts[[number for number, times in frequency.items() if times > most]] = False
        found = mostly = short = 0
        for one in numbers:
            shares = [_covered(counts[each]) for each in one if len(each)]
            short += not shares
            found += any(shares)
            mostly += any(share >= MOSTLY for share in shares)
        return Overlap(len(texts) - short, found, mostly, short)


def _windows(text: Sequence[int]) -> NDArray[np.int64]:
    """All n-grams of a text, [windows, LENGTH]."""
    tokens = np.asarray(text, np.int64)
    if len(tokens) < LENGTH:
        return np.zeros((0, LENGTH), np.int64)
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(tokens, LENGTH))


def _covered(hits: NDArray[np.bool_]) -> float:
    """The share of a text's tokens that lie in an n-gram with a hit."""
    covered = np.zeros(len(hits) + LENGTH - 1, bool)
    for shift in range(LENGTH):
        covered[shift : shift + len(hits)] |= hits
    return float(covered.mean())


class _Scanner:
    """Looks for n-grams in chunks of tokens."""

    def __init__(self, ngrams: NDArray[np.int64]):
        """`ngrams`: distinct, [count, LENGTH]."""
        size = int(ngrams.max(initial=0)) + 2  # the last one stands for all tokens above
        self.values = np.random.default_rng(0).integers(_WORD, size=size, dtype=np.uint64)
        count = _CHUNK + LENGTH
        self.powers, self.inverses = _powers(_BASE, count), _powers(pow(_BASE, -1, _WORD), count)
        hashes = self._hash(ngrams.reshape(-1))[::LENGTH]
        self.order = np.argsort(hashes)
        self.hashes = hashes[self.order]
        self.ngrams = ngrams[self.order]
        bits = min(27, max(16, int(len(ngrams) * 16).bit_length()))
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(2**bits, bool)
        self.filter[self.hashes >> self.shift] = True

    def _hash(self, tokens: NDArray[np.int64]) -> Hashes:
        """The hash of each window, of any number of tokens."""
        if len(tokens) > _CHUNK + LENGTH - 1:
            step = _CHUNK
            starts = range(0, len(tokens) - LENGTH + 1, step)
            return np.concatenate([self._hash(tokens[a : a + step + LENGTH - 1]) for a in starts])
        if len(tokens) < LENGTH:
            return np.zeros(0, np.uint64)
        windows = len(tokens) - LENGTH + 1
        known = np.minimum(tokens, len(self.values) - 1)
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(self.values[known] * self.powers[: len(tokens)], out=sums[1:])
        return (sums[LENGTH:] - sums[:windows]) * self.inverses[:windows]

    def find(self, tokens: NDArray[np.int64], seen: NDArray[np.bool_]) -> None:
        """Mark the n-grams that occur in a chunk."""
        hashes = self._hash(tokens)
        at = np.flatnonzero(self.filter[hashes >> self.shift])
        places = np.searchsorted(self.hashes, hashes[at])
        places = np.minimum(places, len(self.hashes) - 1)
        same = self.hashes[places] == hashes[at]
        at, places = at[same], places[same]
        for first in range(0, len(at), _CHUNK // LENGTH):
            some, rows = at[first:][: _CHUNK // LENGTH], places[first:][: _CHUNK // LENGTH]
            windows = tokens[some[:, None] + np.arange(LENGTH)]
            equal = (windows == self.ngrams[rows]).all(1)
            seen[self.order[rows[equal]]] = True


def _powers(base: int, count: int) -> Hashes:
    """base^0, base^1, … modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def scan(
    ngrams: NDArray[np.int64],
    files: Iterable[TokenFile],
    go_on: Callable[[], bool] = lambda: True,
) -> NDArray[np.bool_] | None:
    """Which of the n-grams [count, LENGTH] the token files hold; None if `go_on` ended it.

    Raises DataError for a file that cannot be read.
    """
    seen = np.zeros(len(ngrams), bool)
    if not len(ngrams):
        return seen
    scanner = _Scanner(ngrams)
    for file in files:
        for begin in range(0, file.tokens, _CHUNK):
            if not go_on():
                return None
            end = min(file.tokens, begin + _CHUNK + LENGTH - 1)
            scanner.find(file.tokens_at(begin, end).astype(np.int64), seen)
    return seen


def fingerprint(ngrams: Ngrams, files: Sequence[TokenFile]) -> str:
    """Identifies a result: the n-grams, and the content of the files wherever they are."""
    content = [ngrams.digest, sorted(map(list, (file.identity for file in files)), key=str)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# The program.


def write_job(path: Path, ngrams: Ngrams, files: Sequence[TokenFile]) -> None:
    """Write what the program needs."""
    with path.open("wb") as file:
        np.savez(file, tokens=ngrams.tokens, prefixes=np.array([str(f.prefix) for f in files]))


def write_result(path: Path, seen: NDArray[np.bool_]) -> None:
    """Write a result, as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, seen)
    partial.replace(path)


def read_result(path: Path, ngrams: Ngrams) -> NDArray[np.bool_] | None:
    """A result that was written for these n-grams; None if there is none."""
    try:
        seen: NDArray[np.bool_] = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return seen if seen.dtype == bool and seen.shape == (len(ngrams.tokens),) else None


def main(job: str) -> int:
    """Scan for a job file; the result gets its name with the suffix .npy."""
    os.nice(19)

    def parent_lives() -> bool:
        return not select.select([sys.stdin], [], [], 0)[0]

    with np.load(job, allow_pickle=False) as content:
        tokens, prefixes = content["tokens"], content["prefixes"].tolist()
    seen = scan(tokens, (open_token_file(Path(p)) for p in prefixes), parent_lives)
    if seen is None:
        return 1
    write_result(Path(job).with_suffix(".npy"), seen)
    Path(job).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
