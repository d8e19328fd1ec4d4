"""From token files to "the i-th sequence of the run", by arithmetic alone.

A *source* is one dataset: the documents of a phase (training, validation, test) of all its token files, one
after the other, T tokens. With sequences of L tokens it has n = (T - 1) // L of them; number k holds tokens
[k·L, k·L + L], the last of which is only predicted. Nothing is indexed or cached: opening reads the index files
once, and nothing can be out of date. Reading a sequence takes some 50 µs, whatever the size of the data.

Order. Sequence i of a run depends on the seed and i alone; what follows is all there is to it. If there is a
single source, it is the source's number π(i mod n) in epoch e = i // n, so that each comes once an epoch, in an
order that differs between epochs. π is a permutation of 0 … n - 1: a Feistel network (Black & Rogaway 2002).

    a = ⌈√n⌉,  b = ⌈n / a⌉
    k_0 … k_7 = the 64 bytes of sha512("<seed> <s> <e>") as u64, little endian; s: the source's place, from 0
    mix(x)    = the finalizer of splitmix64 (Steele et al. 2014): x ^= x >> 30; x *= 0xBF58476D1CE4E5B9;
                x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31, in u64
    π(x):  l, r = x // b, x mod b;  for j = 0, 2, 4, 6:  l = (l + mix(r ^ k_j)) mod a;  r = (r + mix(l ^ k_j+1)) mod b
           y = l·b + r, and if y ≥ n (there are fewer than a such) the same again with x = y

Mixtures. Several sources with weights share the sequences by halving. With W_s = round(2⁵³ · (the weights of the
sources before s) / (all weights)), sources lo … hi - 1 and the t-th sequence that goes to any of them (in the
beginning all of them, and t = i): mid = (lo + hi) // 2, g(t) = ⌊t·(W_mid - W_lo)/(W_hi - W_lo) + ½⌋; if
g(t + 1) > g(t) it is the g(t)-th of sources lo … mid - 1, else the (t - g(t))-th of the others. The t that a
source is left with counts its sequences and takes the place of i above. So of any number of sequences, of each
single batch too, every source has its share, to within half a sequence a halving; weights may be as small as they like.
"""

import bisect
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
from fast_llm.data.tokenfile import TokenFile, digest
from fast_llm.errors import DataError

logger = logging.getLogger("fast_llm")

PHASES = ("training", "validation", "test")
UNIT = 2**53  # all weights together
LARGEST_METADATA = 2**30  # bytes
_MASK = 2**64 - 1
_ENDS = 2**20  # bytes of a file's beginning and end that tell it from others


@dataclass(frozen=True)
class Stretch:
    """Part of a document inside a sequence."""

    prefix: str
    document: int  # in its token file
    begin: int  # in the document, in tokens
    tokens: int


@dataclass(frozen=True)
class Packed:
    """One sequence: L + 1 tokens, and where in them documents begin (0 is always among these)."""

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """Documents [first, last) of a token file."""

    file: TokenFile
    first: int
    last: int

    @functools.cached_property
    def begin(self) -> int:
        """First token in the file."""
        return self.file.start_of(self.first)

    @functools.cached_property
    def end(self) -> int:
        """Behind the last token in the file."""
        return self.file.start_of(self.last)


class Source:
    """Documents of several token files, one after the other, cut into sequences."""

    def __init__(self, name: str, slices: Sequence[Slice], length: int):
        self.name = name
        self.slices = [part for part in slices if part.end > part.begin]
        self.length = length
        self.ends = list(accumulate(part.end - part.begin for part in self.slices))
        self.tokens = self.ends[-1] if self.ends else 0
        self.documents = sum(part.last - part.first for part in self.slices)
        self.sequences = max(0, (self.tokens - 1) // length)

    def parts(self, number: int) -> Iterator[tuple[Slice, int, int]]:
        """The stretches [begin, end) of token files that sequence `number` consists of."""
        begin, left = number * self.length, self.length + 1
        which = bisect.bisect_right(self.ends, begin)
        while left:
            part = self.slices[which]
            ahead = self.ends[which] - begin
            take = min(left, ahead)
            end = part.end - ahead + take
            yield part, end - take, end
            begin, left, which = begin + take, left - take, which + 1

    def read(self, number: int) -> Packed:
        """Sequence `number`, below `sequences`."""
        tokens = np.empty(self.length + 1, np.int64)
        starts: list[NDArray[np.int64]] = []
        filled = 0
        for part, begin, end in self.parts(number):
            file = part.file
            tokens[filled : filled + end - begin] = file.tokens_at(begin, end)
            first = file.document_at(begin)
            last = file.document_at(end - 1, first)
            inside = file.starts[first : last + 1] // file.dtype.itemsize
            inside[0] = begin  # a document that begins further ahead goes on here
            starts.append(inside + (filled - begin))
            filled += end - begin
        all_starts = starts[0] if len(starts) == 1 else np.concatenate(starts)
        different = all_starts[1:] != all_starts[:-1]  # documents without tokens begin where the next one does
        return Packed(tokens, all_starts if different.all() else all_starts[np.append(True, different)])

    def locate(self, number: int) -> list[Stretch]:
        """Which documents sequence `number` is made of."""
        found = []
        for part, begin, end in self.parts(number):
            while begin < end:
                document = part.file.document_at(begin)
                stop = min(end, part.file.start_of(document + 1))
                found.append(
                    Stretch(str(part.file.prefix), document, begin - part.file.start_of(document), stop - begin)
                )
                begin = stop
        return found


class RandomSource:
    """Random tokens that follow from seed and number; for trying things out."""

    name = "random"
    tokens = documents = 0
    sequences = 2**62

    def __init__(self, length: int, vocab_size: int, seed: int):
        self.length, self.vocab_size, self.seed = length, vocab_size, seed

    def read(self, number: int) -> Packed:
        """Sequence `number`: one document."""
        tokens = np.random.default_rng((self.seed, number)).integers(self.vocab_size, size=self.length + 1)
        return Packed(tokens, np.zeros(1, np.int64))

    def locate(self, number: int) -> list[Stretch]:
        """It comes from no file."""
        return [Stretch("random", number, 0, self.length + 1)]


class Phase:
    """The sources of training, of validation or of test, and their shares of the sequences."""

    def __init__(self, name: str, sources: Sequence[Source | RandomSource], weights: Sequence[float], seed: int):
        self.name, self.sources, self.seed = name, sources, seed
        sums = list(accumulate(weights, initial=0.0))
        self.edges = [round(before / sums[-1] * UNIT) for before in sums]

    def find(self, index: int) -> tuple[Source | RandomSource, int, int]:
        """The source of sequence `index`, its number there, and its epoch."""
        low, high, inside = 0, len(self.sources), index
        while high - low > 1:
            middle = (low + high) // 2
            before = self._left(low, middle, high, inside)
            if self._left(low, middle, high, inside + 1) > before:
                high, inside = middle, before
            else:
                low, inside = middle, inside - before
        source = self.sources[low]
        epoch, place = divmod(inside, source.sequences)
        return source, permute(place, source.sequences, _keys(self.seed, low, epoch)), epoch

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` sequences are each source's."""
        counts = [0] * len(self.sources)
        waiting = [(0, len(self.sources), sequences)]
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
        """How many of the first `share` sequences of sources low … high - 1 are of those below middle."""
        left, whole = self.edges[middle] - self.edges[low], self.edges[high] - self.edges[low]
        # Weights that round to nothing beside others never get here, but `counts` visits them.
        return (2 * share * left + whole) // (2 * whole) if whole else share

    @functools.cached_property
    def sequences(self) -> int:
        """How many come before any is repeated."""
        largest = sum(source.sequences for source in self.sources)

        def repeats(index: int) -> bool:
            shares = zip(self.counts(index), self.sources, strict=True)
            return any(count > source.sequences for count, source in shares)

        return bisect.bisect_left(range(largest + 1), True, key=repeats) - 1


class Dataset:
    """All phases of a run's data."""

    def __init__(self, phases: dict[str, Phase], described: dict[str, dict[str, Any]], length: int, seed: int):
        self.phases = phases
        self.described = described  # path of each dataset → what its dataset.json says ({} for a bare prefix)
        self.length = length
        self.seed = seed
        self.validation_sets = [name for name in phases if name not in PHASES]

    def read(self, phase: str, index: int) -> Packed:
        """Sequence `index` of a phase, L + 1 tokens.

        Raises DataError for a file that can no longer be read.
        """
        source, number, _ = self.phases[phase].find(index)
        return source.read(number)

    def locate(self, phase: str, index: int) -> list[Stretch]:
        """Which documents that sequence is made of."""
        source, number, _ = self.phases[phase].find(index)
        return source.locate(number)

    def sequences(self, phase: str) -> int:
        """How many different sequences a phase has."""
        return self.phases[phase].sequences if phase in self.phases else 0

    def tokens(self, phase: str) -> int:
        """How many tokens a phase has."""
        return sum(source.tokens for source in self.phases[phase].sources) if phase in self.phases else 0

    def documents(self, phase: str) -> int:
        """How many documents a phase has."""
        return sum(source.documents for source in self.phases[phase].sources) if phase in self.phases else 0

    def epochs(self, phase: str, sequences: int) -> dict[str, float]:
        """How often each source is gone through in so many sequences."""
        found = self.phases[phase]
        shares = zip(found.counts(sequences), found.sources, strict=True)
        return {source.name: count / source.sequences for count, source in shares}

    def require(self, phase: str, iterations: int, batch_size: int, setting: str, split: Sequence[float]) -> None:
        """Raises DataError if a phase has fewer sequences than its losses are measured on."""
        needed, there = iterations * batch_size, self.sequences(phase)
        if there >= needed:
            return
        possible = there // batch_size
        advice = f"lower {setting} to {possible}, or " if possible else ""
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
        raise DataError(
            f"data.split: {phase} {needs}, but [{shares}] of the documents leaves {there:,}; {advice}give {phase} a larger"
            " share, or prepare more data"
        )

    def check_vocabulary(self, vocab_size: int, model_tokenizer: str | None) -> None:
        """Raises DataError for data made with another tokenizer, or with tokens that the model does not have."""
        for path, described in self.described.items():
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
        entries = [entry for content in self.described.values() for entry in content.get("datasets", [])]
        size = sum(entry.get("num_tokens", 0) * np.dtype(entry.get("dtype", "int64")).itemsize for entry in entries)
        if size <= most:
            for path, content in self.described.items():
                if content:
                    verify(Path(path))

    def fingerprint(self) -> str:
        """What may not change on resume: the training documents, in their order, and their shares.

        Of each token file its sizes and the first and last mebibyte: enough to tell it from any other, not to find
        every damaged byte (that is what `verify` does). Where the files lie does not matter.
        """
        phase = self.phases.get("training")
        content: list[Any] = [self.length, self.seed]
        if phase is not None:
            content.append(phase.edges)
        for source in phase.sources if phase else ():
            if isinstance(source, RandomSource):
                content.append(["random", source.vocab_size])
                continue
            for part in source.slices:
                file = part.file
                sizes = (part.first, part.last, file.documents, file.tokens, file.dtype.str)
                content.append([*sizes, _ends(file.idx), _ends(file.bin)])
            content.append("source")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ends(path: Path) -> str:
    """A digest of the beginning and the end of a file."""
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        return hashlib.sha256(head + file.read()).hexdigest()


def open_dataset(config: DataConfig, length: int, seed: int, vocab_size: int) -> Dataset:
    """The data that the configuration names, in sequences of `length` tokens.

    Raises DataError for files that are missing, damaged or hold nothing to train on.
    """
    described: dict[str, dict[str, Any]] = {}
    alone = len(config.path) == 1
    weighted = [(1.0, config.path[0])] if alone else list(zip(config.path[::2], config.path[1::2], strict=True))
    opened = [
        (float(weight) * share, name, files)
        for weight, path in weighted
        for share, name, files in _groups(path, config.format == "file", described)
    ]
    phases = {}
    for position, phase in enumerate(PHASES):
        if not config.split[position]:
            continue
        if config.format == "random":
            phases[phase] = Phase(phase, [RandomSource(length, vocab_size, seed + position)], [1.0], seed)
            continue
        sources: list[Source | RandomSource] = []
        weights: list[float] = []
        missing = []
        for weight, name, files in opened:
            source = Source(name, [_part(file, config.split, position) for file in files], length)
            if source.sequences:
                sources.append(source)
                weights.append(weight)
            elif phase == "training":
                raise DataError(
                    f"{name}: {source.tokens:,} tokens for training, fewer than one sequence of {length} + 1; lower"
                    " batch.sequence_length, prepare more data, or leave it out"
                )
            else:
                missing.append(name)
        if sources and missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            logger.warning(
                f"data.split leaves {phase} less than a sequence of {', '.join(missing[:3])}{more}; its loss is of the others."
            )
        if sources:
            phases[phase] = Phase(phase, sources, weights, seed)
    for name, path in config.validation_sets.items():
        files = [file for _, _, group in _groups(path, False, described) for file in group]
        whole = Source(path, [Slice(file, 0, file.documents) for file in files], length)
        if not whole.sequences:
            raise DataError(
                f"data.validation_sets.{name}: {path} has {whole.tokens:,} tokens, fewer than one sequence of {length} + 1"
            )
        phases[name] = Phase(name, [whole], [1.0], seed)
    return Dataset(phases, described, length, seed)


def _part(file: TokenFile, split: Sequence[float], position: int) -> Slice:
    """The documents of a token file that belong to one phase."""
    edges = [0, *(round(float(edge) * file.documents) for edge in np.cumsum(split) / sum(split))]
    return Slice(file, edges[position], edges[position + 1])


def _groups(
    path: str, metadata: bool, described: dict[str, dict[str, Any]]
) -> list[tuple[float, str, list[TokenFile]]]:
    """The sources of a dataset: share of the dataset, name, token files.

    Token files that are weighted by their tokens, as `prepare` does it, are one source; those with weights of their
    own are others. `metadata`: the path is a dataset.json, whatever its name.
    """
    place = Path(path).expanduser()
    if not metadata and place.suffix != ".json":
        if place.suffix in (".bin", ".idx"):
            raise DataError(f"data.path: given {path}, must be without {place.suffix}: {path[:-4]}")
        described.setdefault(str(place), {})
        return [(1.0, path, [TokenFile(place)])]
    groups: dict[str, list[tuple[float, TokenFile]]] = {}
    for entry in _describe(place, described):
        file = TokenFile(_inside(place, entry["prefix"]))
        for key, found in (("num_tokens", file.tokens), ("num_documents", file.documents), ("dtype", file.dtype.name)):
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
    ]


def _names(group: Sequence[tuple[float, TokenFile]]) -> str:
    first = group[0][1].prefix.name
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"


def _next_to(folder: Path) -> str:
    """Where the dataset.json of a folder is: `prepare` writes it next to the folder."""
    beside = folder.resolve().with_name(folder.resolve().name + ".json")
    inside = folder / "dataset.json"
    if inside.is_file() or not beside.is_file():
        return f" in it, {inside}" if inside.is_file() else " that `fast-llm prepare` wrote, not a folder"
    return f" next to it, {folder.parent / beside.name if folder.name else beside}"


def _describe(path: Path, described: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Read a dataset.json; its list of token files."""
    try:
        if path.stat().st_size > LARGEST_METADATA:
            raise DataError(f"{path}: larger than 1 GiB; this is no dataset.json")
        if path.is_dir():
            raise DataError(f"{path}: a folder; give the dataset.json{_next_to(path)}")
        if not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path}: not a file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; `fast-llm prepare` writes it beside its output_path") from error
    except OSError as error:
        raise DataError(f"{path}: can not be read: {error.strerror}") from error
    if data.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset.json: {error}") from error
    if isinstance(content, dict) and content.get("sha256", seal(content)) != seal(content):
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
            raise DataError(f"{path}: `datasets` must list objects with a prefix; given {str(entry)[:80]}")
        for key in ("weight", "num_tokens", "num_documents"):
            value = entry.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
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
        raise DataError(f"{path}: `tokenizer` must be an object with a fingerprint; given {str(tokenizer)[:80]}")
    described[str(path)] = content
    return entries


def seal(content: Mapping[str, Any]) -> str:
    """The sha256 of a dataset.json's content, which stands in it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _inside(path: Path, prefix: str) -> Path:
    """A prefix of a dataset.json, which may not leave its folder."""
    parts = Path(prefix).parts
    odd = any(c == "\0" or "\ud800" <= c <= "\udfff" for c in prefix)  # no file can be named so
    if not parts or Path(prefix).is_absolute() or ".." in parts or odd:
        raise DataError(f"{path}: the prefix {prefix!r} must name files inside the folder of the file")
    return path.parent / prefix


def verify(path: Path) -> int:
    """Compare all token files of a dataset.json with their digests; how many bytes were read.

    Raises DataError naming every file that is damaged or missing.
    """
    read, wrong = 0, []
    for entry in _describe(path, {}):
        prefix = _inside(path, entry["prefix"])
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


@functools.lru_cache(maxsize=256)
def _keys(seed: int, source: int, epoch: int) -> tuple[int, ...]:
    data = hashlib.sha512(f"{seed} {source} {epoch}".encode()).digest()
    return tuple(int.from_bytes(data[8 * j : 8 * j + 8], "little") for j in range(8))


def permute(value: int, count: int, keys: Sequence[int]) -> int:
    """Where a permutation of 0 … count - 1 puts a value. The formula is at the top."""
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    left, right = divmod(value, b)
    while True:
        for j in range(0, len(keys), 2):
            left = (left + _mix(right ^ keys[j])) % a
            right = (right + _mix(left ^ keys[j + 1])) % b
        if left * b + right < count:
            return left * b + right


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
