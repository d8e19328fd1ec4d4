"""Which tokens sequence i of a run holds: arithmetic on sizes, seeds and counts, without index
files or state.

One source. A source of T tokens has T - 1 inputs, each followed by its target. With sequences of L
tokens an epoch has n = (T - 1) // L of them; number k holds the inputs [k·L, k·L + L). The u-th
sequence that a source gives is its number π(u mod n) in epoch e = u // n. So each sequence comes
once an epoch, in an order that differs between epochs. π is a permutation of 0 … n - 1: a Feistel
network (Black & Rogaway 2002).

    a = ⌈√n⌉,  b = ⌈n / a⌉
    k_0 … k_7 = the 64 bytes of sha512("<seed> <s> <e>") as u64, little endian;
                s: the source's key number
    mix(x)    = the finalizer of splitmix64 (Steele et al. 2014), in u64: x ^= x >> 30;
                x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31
    π(x):  l, r = x // b, x mod b
           for j = 0, 2, 4, 6:  l = (l + mix(r ^ k_j)) mod a;  r = (r + mix(l ^ k_j+1)) mod b
           y = l·b + r; if y ≥ n (fewer than a values are), repeat with x = y

Mixtures. Weighted sources share the sequences by repeated halving. Let W_s = round(2⁵³ · (sum of
the weights of the sources before s) / (sum of all weights)). For sources lo … hi - 1 and the t-th
sequence that goes to any of them (at first all of them, and t = i): mid = (lo + hi) // 2, g(t) =
⌊t·(W_mid - W_lo)/(W_hi - W_lo) + ½⌋. If g(t + 1) > g(t), it is the g(t)-th sequence of sources lo …
mid - 1, else the (t - g(t))-th of the others. When one source is left, t counts its sequences and
is its u above. So every source has its share of any number of sequences, also of a single batch, to
within half a sequence per halving. Weights may be arbitrarily small.

Changes. When weights or sources change at sequence i, the mixture starts again with t = 0 at i, and
each source continues from its own count. Its key number never changes: the first sources of a run
are numbered from 0 by their place; a new source takes the next number that no other has had.

L or the seed may change after c > 0 of the n sequences of an epoch, or of what remains of one. Then
the unused inputs are joined in ascending order, including those after n·L. These M inputs are the
rest of the epoch: n' = M // L' sequences. Number k holds the joined inputs [k·L', k·L' + L'). Their
order is π over n' with the keys of "<seed> <s> <e> <g>"; g counts how often the epoch was
interrupted, this time included. The next epoch is complete.

Best-fit packing (best_fit.py) makes other sequences of the inputs, and also interrupts an epoch
when it begins or ends. Their number is then that of its groups and full sequences, their order is π
as above, and the unused inputs are those that no used sequence holds.
"""

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fast_llm.data.best_fit import BestFit, PackedStream

UNIT = 2**53  # the sum of all weights
_MASK = 2**64 - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BLOCK = 512  # sequences that share a count in RemainingStream
_CHUNK = 2**18  # numbers permuted together
_THREADS = 4

Range = tuple[int, int]  # [begin, end)
# L, seed, and how many sequences a source gave with these; "best_fit" if they were packed so
Drawn = tuple[int, int, int] | tuple[int, int, int, Literal["best_fit"]]


@functools.lru_cache(maxsize=256)
def keys(seed: int, source: int, epoch: int, cut: int = 0, use: str = "") -> tuple[int, ...]:
    """The keys of a source's permutation in an epoch that was interrupted `cut` times. `use`: what
    is permuted, if not sequences.
    """
    text = f"{seed} {source} {epoch}" + (f" {cut}" if cut else "") + (f" {use}" if use else "")
    data = hashlib.sha512(text.encode()).digest()
    return tuple(int.from_bytes(data[8 * j : 8 * j + 8], "little") for j in range(8))


def permute(value: int, count: int, keys: Sequence[int]) -> int:
    """π(value) for n = `count`; the formula is at the top."""
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    left, right = divmod(value, b)
    while True:
        for j in range(0, len(keys), 2):
            left = (left + mix(right ^ keys[j])) % a
            right = (right + mix(left ^ keys[j + 1])) % b
        if left * b + right < count:
            return left * b + right


def mix(x: int) -> int:
    """The hash of a number; the formula is at the top."""
    x = (x ^ (x >> 30)) * _MULTIPLIERS[0] & _MASK
    x = (x ^ (x >> 27)) * _MULTIPLIERS[1] & _MASK
    return x ^ (x >> 31)


def mix_many(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """mix(x) for many numbers."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(_MULTIPLIERS[0])
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MULTIPLIERS[1])
    x ^= x >> np.uint64(31)
    return x


def permute_many(values: NDArray[np.uint64], count: int, keys: Sequence[int]) -> NDArray[np.uint64]:
    """`permute` for many values below `count` (at most 2^62)."""
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    size_a, size_b = np.uint64(a), np.uint64(b)
    left, right = values // size_b, values % size_b
    for j in range(0, len(keys), 2):
        # Both terms are below the size, so the sum does not wrap around, as a sum of two 64-bit
        # numbers could.
        left = (left + mix_many(right ^ np.uint64(keys[j])) % size_a) % size_a
        right = (right + mix_many(left ^ np.uint64(keys[j + 1])) % size_b) % size_b
    images = left * size_b + right
    outside = images >= np.uint64(count)
    if outside.any():
        images[outside] = permute_many(images[outside], count, keys)
    return images


class Mixture:
    """How sources share sequences. `edges`: W_0 … W_n at the top."""

    def __init__(self, edges: Sequence[int]):
        self.edges = list(edges)

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Mixture":
        """The mixture of sources with these weights, all above 0."""
        sums = list(accumulate(weights, initial=0.0))
        return cls([round(before / sums[-1] * UNIT) for before in sums])

    def find(self, index: int) -> tuple[int, int]:
        """The source of sequence `index`, and the number of that sequence among those of the
        source.
        """
        low, high, inside = 0, len(self.edges) - 1, index
        while high - low > 1:
            middle = (low + high) // 2
            before = self._left(low, middle, high, inside)
            if self._left(low, middle, high, inside + 1) > before:
                high, inside = middle, before
            else:
                low, inside = middle, inside - before
        return low, inside

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` sequences each source has."""
        counts = [0] * (len(self.edges) - 1)
        waiting = [(0, len(counts), sequences)]
        while waiting:
            low, high, share = waiting.pop()
            if high - low == 1:
                counts[low] = share
                continue
            middle = (low + high) // 2
            left = self._left(low, middle, high, share)
            waiting += [(low, middle, left), (middle, high, share - left)]
        return counts

    def _left(self, low: int, middle: int, high: int, share: int) -> int:
        """g(share): how many of the first `share` sequences of sources low … high - 1 go to those
        below `middle`.
        """
        left, total = self.edges[middle] - self.edges[low], self.edges[high] - self.edges[low]
        # `counts` also visits sources whose weights round to 0, which never get a sequence.
        return (2 * share * left + total) // (2 * total) if total else share


class FullStream:
    """All inputs of a source: a complete epoch."""

    cut = 0

    def __init__(self, size: int):
        self.size = size

    def ranges(self, begin: int, end: int) -> list[Range]:
        """The source's inputs that are [begin, end) of this stream."""
        return [(begin, end)]

    def open(self) -> None:
        """Does nothing: there is nothing to compute."""


class RemainingStream:
    """The inputs that remain of a stream after some of its sequences were used. Keeps one bit per
    sequence.
    """

    cut: int
    size: int

    def __init__(self, parent: "Stream", length: int, used: int, keys: Sequence[int]):
        """`used`: how many sequences of `length` inputs were used, in the order of `keys`."""
        self.parent, self.length, self.used, self.keys = parent, length, used, keys
        self.sequences = parent.size // length
        self.left = self.sequences - used
        self.size = parent.size - used * length
        self.cut = parent.cut + 1
        self._lock = threading.Lock()
        self._bits: NDArray[np.uint8] | None = None

    def open(self) -> None:
        """Compute which sequences are left. Takes about a second for ten million of them."""
        self.parent.open()
        with self._lock:
            if self._bits is not None:
                return
            # π is a bijection: the remaining sequences are the images of the other indices. Compute
            # the fewer ones.
            few = self.used <= self.left
            first, last = (0, self.used) if few else (self.used, self.sequences)
            is_left = np.full(self.sequences, few)

            def mark(begin: int) -> None:
                values = np.arange(begin, min(begin + _CHUNK, last), dtype=np.uint64)
                is_left[permute_many(values, self.sequences, self.keys)] = not few

            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(mark, range(first, last, _CHUNK)))
            blocks = np.add.reduceat(is_left, np.arange(0, self.sequences, _BLOCK), dtype=np.int64)
            self._before: NDArray[np.int64] = np.concatenate([[0], np.cumsum(blocks)])
            self._bits = np.packbits(is_left)

    def _select(self, begin: int, end: int) -> NDArray[np.int64]:
        """The numbers of the begin-th to the (end - 1)-th remaining sequence, in ascending
        order.
        """
        first = int(np.searchsorted(self._before, begin, "right")) - 1
        last = int(np.searchsorted(self._before, end, "left"))
        assert self._bits is not None
        bits = np.unpackbits(self._bits[first * _BLOCK // 8 : last * _BLOCK // 8])
        offset = begin - int(self._before[first])
        return np.flatnonzero(bits)[offset : offset + end - begin] + first * _BLOCK

    def ranges(self, begin: int, end: int) -> list[Range]:
        """The source's inputs that are [begin, end) of this stream: ascending ranges, adjacent ones
        merged.
        """
        self.open()
        length, inside = self.length, self.left * self.length
        places: list[Range] = []
        if begin < inside:
            stop = min(end, inside)
            numbers = self._select(begin // length, (stop - 1) // length + 1)
            gaps = np.flatnonzero(np.diff(numbers) > 1) + 1
            firsts, lasts = numbers[np.append(0, gaps)], numbers[np.append(gaps, 0) - 1]
            places = [
                (int(first) * length, (int(last) + 1) * length)
                for first, last in zip(firsts, lasts, strict=True)
            ]
            places[0] = (places[0][0] + begin % length, places[0][1])
            places[-1] = (places[-1][0], places[-1][1] - -stop % length)
        if end > inside:  # the inputs after the last sequence of the parent
            shift = self.sequences * length - inside
            places.append((max(begin, inside) + shift, end + shift))
        found: list[Range] = []
        for place in places:
            for low, high in self.parent.ranges(*place):
                if found and found[-1][1] == low:
                    low = found.pop()[0]
                found.append((low, high))
        return found


class ListedStream:
    """Remaining inputs that are listed. Keeps 24 bytes per range."""

    def __init__(self, ranges: NDArray[np.int64], cut: int):
        """`ranges` [n, 2]: the source's inputs [begin, end) that remain, ascending. `cut`: how
        often the epoch was interrupted.
        """
        self.places, self.cut = ranges, cut
        self.filled = np.cumsum(np.append(0, ranges[:, 1] - ranges[:, 0]))
        self.size = int(self.filled[-1])

    def open(self) -> None:
        """Does nothing: all is computed."""

    def ranges(self, begin: int, end: int) -> list[Range]:
        """As of `RemainingStream`."""
        first = int(np.searchsorted(self.filled, begin, "right")) - 1
        last = int(np.searchsorted(self.filled, end, "left"))
        found: list[Range] = [(low, high) for low, high in self.places[first:last].tolist()]
        if found:
            low, high = found[0]
            found[0] = low + begin - int(self.filled[first]), high
            low, high = found[-1]
            found[-1] = low, high - (int(self.filled[last]) - end)
        return found


Stream = FullStream | RemainingStream | ListedStream


class SourceSampler:
    """The order in which one source gives its sequences, from a given point of a run on."""

    def __init__(
        self,
        inputs: int,
        length: int,
        seed: int,
        key: int,
        drawn: Sequence[Drawn] = (),
        pack: "Callable[[Stream, int], BestFit] | None" = None,
        packed: bool = False,
    ):
        """`inputs`: number of inputs of the source. `key`: its key number. `drawn`: what it gave
        before, the oldest first. `pack`: makes packed sequences of a length from a stream, if the
        source has documents; `packed`: it gives such.
        """
        self.length, self.seed, self.key = length, seed, key
        self.pack, self.packed = pack, packed
        self.drawn = list(drawn)
        self.all = FullStream(inputs)
        before = list(drawn)
        self.base = 0  # sequences given before with this length, seed and packing
        if before and way_of(before[-1]) == (length, seed, packed):
            self.base = before.pop()[2]
        self.epoch = 0  # at the last change
        self.stream: Stream = self.all
        for entry in before:
            self._advance(*way_of(entry), entry[2])
        streams: list[Stream] = [self.all, self.stream]
        self.packings = {stream: self._packing(stream, length, packed) for stream in streams}
        # It holds the source, which may hold this: files would stay open until the cycle is found.
        self.pack = None

    def open(self) -> None:
        """Compute what is needed to read, so that no step waits for it."""
        self.stream.open()
        for packing in self.packings.values():
            if packing is not None:
                packing.open()

    def _packing(self, stream: Stream, length: int, packed: bool) -> "BestFit | None":
        return self.pack(stream, length) if packed and self.pack is not None else None

    def _advance(self, length: int, seed: int, packed: bool, count: int) -> None:
        """Move on by `count` sequences of another length, seed or packing."""
        packing = self._packing(self.stream, length, packed)
        available = _sequences(self.stream, length, packing)
        if self.stream is not self.all and count >= available:
            count -= available
            self.epoch, self.stream = self.epoch + 1, self.all
            packing = self._packing(self.stream, length, packed) if count else None
        if self.stream is self.all and count:
            more, count = divmod(count, _sequences(self.all, length, packing))
            self.epoch += more
        if not count:
            return
        order = keys(seed, self.key, self.epoch, self.stream.cut)
        if packing is None:
            self.stream = RemainingStream(self.stream, length, count, order)
        else:
            deal = keys(seed, self.key, self.epoch, self.stream.cut, "best_fit")
            # The source's last token has no target.
            left = np.minimum(packing.remaining(count, order, deal), self.all.size)
            self.stream = ListedStream(left[left[:, 0] < left[:, 1]], self.stream.cut + 1)

    def find(self, index: int) -> "tuple[Stream | PackedStream, int, int]":
        """The stream that has the index-th sequence, its number in that stream, and its epoch."""
        index, stream, epoch = index + self.base, self.stream, self.epoch
        available = self._available(stream)
        if stream is self.all or index >= available:
            if stream is not self.all:
                index, epoch, stream = index - available, epoch + 1, self.all
                available = self._available(stream)
            more, index = divmod(index, available)
            epoch += more
        number = permute(index, available, keys(self.seed, self.key, epoch, stream.cut))
        packing = self.packings[stream]
        if packing is None:
            return stream, number, epoch
        deal = keys(self.seed, self.key, epoch, stream.cut, "best_fit")
        return packing.in_epoch(deal), number, epoch

    def _available(self, stream: Stream) -> int:
        return _sequences(stream, self.length, self.packings[stream])

    def epochs(self, count: int) -> float:
        """How many epochs of the source are complete after `count` more sequences, with a
        fraction.
        """
        if not self.base + count:  # an epoch may have no sequence, of a source that is not used
            done = 0.0 if self.stream is self.all else 1 - self.stream.size / self.all.size
            return self.epoch + done
        if self.stream is self.all:
            return self.epoch + (self.base + count) / self._available(self.all)
        available = self._available(self.stream)
        if self.base + count >= available:
            later = self.base + count - available
            return self.epoch + 1 + later / self._available(self.all)
        unused = self.stream.size - (self.base + count) * self.length
        if self.packed:
            unused = round(self.stream.size * (1 - (self.base + count) / available))
        return self.epoch + 1 - unused / self.all.size


def _sequences(stream: Stream, length: int, packing: "BestFit | None") -> int:
    """Number of sequences of a stream."""
    return stream.size // length if packing is None else packing.sequences


def way_of(entry: Drawn) -> tuple[int, int, bool]:
    """Length and seed of sequences that a source gave, and whether they were packed."""
    return entry[0], entry[1], len(entry) == 4


def add_drawn(drawn: Sequence[Drawn], more: Drawn) -> list[Drawn]:
    """What a source has given, with one more entry; merged with the last one if length, seed and
    packing are the same.
    """
    found = list(drawn)
    if not more[2]:
        return found
    if found and way_of(found[-1]) == way_of(more):
        before = found.pop()[2]
        more = (more[0], more[1], before + more[2], *more[3:])
    return [*found, more]
