"""From token files to "the i-th sequence of the run", by arithmetic alone.

A *source* is one dataset: the documents of a phase (training, validation, test) of all its token files, one
after the other, T tokens. With sequences of L tokens it has n = (T - 1) // L of them; number k holds tokens
[k·L, k·L + L], the last of which is only predicted. Nothing is indexed or cached: opening takes no time,
and nothing can be out of date.

Order. Sequence i of a run depends on the seed and i alone. In a single source it is number
permutation(seed, source, epoch = i // n)(i mod n): a Feistel network over the smallest even number of bits that
holds n, eight rounds keyed by sha256("<seed> <source> <epoch>"), walked until it lands below n. So each
sequence comes once per epoch, in an order that differs between epochs.

Mixtures. Several sources with weights are dealt in blocks of 4096 sequences: source j has q_j slots of each
(its weight, rounded), and the slots of block b are permuted as above under the name "mixture". Slot s of
source j in block b is that source's sequence b·q_j + (s - slots of the sources before j).
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.config.train import DataConfig
from fast_llm.data.tokenfile import TokenFile, digest
from fast_llm.errors import DataError

PHASES = ("training", "validation", "test")
BLOCK = 4096  # sequences
_ROUNDS = 8
_MASK = 2**64 - 1
LARGEST_METADATA = 2**30  # bytes


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

    @property
    def begin(self) -> int:
        """First token in the file."""
        return self.file.start_of(self.first)

    @property
    def end(self) -> int:
        """Behind the last token in the file."""
        return self.file.start_of(self.last)


class Source:
    """Documents of several token files, one after the other, cut into sequences."""

    def __init__(self, name: str, slices: Sequence[Slice], length: int):
        self.name = name
        self.slices = [part for part in slices if part.end > part.begin]
        self.length = length
        self.ends = np.cumsum([part.end - part.begin for part in self.slices], dtype=np.int64)
        self.tokens = int(self.ends[-1]) if self.slices else 0
        self.documents = sum(part.last - part.first for part in self.slices)
        self.sequences = max(0, (self.tokens - 1) // length)

    def parts(self, number: int) -> Iterator[tuple[Slice, int, int]]:
        """The stretches [begin, end) of token files that sequence `number` consists of."""
        begin, left = number * self.length, self.length + 1
        which = int(np.searchsorted(self.ends, begin, side="right"))
        while left:
            part = self.slices[which]
            ahead = int(self.ends[which]) - begin
            take = min(left, ahead)
            end = part.end - ahead + take
            yield part, end - take, end
            begin, left, which = begin + take, left - take, which + 1

    def read(self, number: int) -> Packed:
        """Sequence `number`, below `sequences`."""
        tokens = np.empty(self.length + 1, np.int64)
        starts = [np.zeros(1, np.int64)]
        filled = 0
        for part, begin, end in self.parts(number):
            file = part.file
            tokens[filled : filled + end - begin] = file.tokens_at(begin, end)
            first = file.document_at(begin)
            last = file.document_at(end - 1)
            inside = np.asarray(file.starts[first + 1 : last + 1], np.int64) // file.dtype.itemsize
            starts += [np.array([filled]), inside - begin + filled]
            filled += end - begin
        return Packed(tokens, np.unique(np.concatenate(starts)))

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
        self.slots = _slots(weights, [source.name for source in sources])
        self.edges = np.cumsum([0, *self.slots])

    def find(self, index: int) -> tuple[Source | RandomSource, int, int]:
        """The source of sequence `index`, its number there, and its epoch."""
        which, inside = 0, index
        if len(self.sources) > 1:
            block, place = divmod(index, BLOCK)
            slot = permute(place, BLOCK, _key(self.seed, "mixture", block))
            which = int(np.searchsorted(self.edges, slot, side="right")) - 1
            inside = block * self.slots[which] + slot - int(self.edges[which])
        source = self.sources[which]
        epoch, place = divmod(inside, source.sequences)
        return source, permute(place, source.sequences, _key(self.seed, source.name, epoch)), epoch

    @property
    def sequences(self) -> int:
        """How many come before any is repeated."""
        if len(self.sources) == 1:
            return self.sources[0].sequences
        return min(source.sequences * BLOCK // slots for source, slots in zip(self.sources, self.slots, strict=True))


class Dataset:
    """All phases of a run's data."""

    def __init__(self, phases: dict[str, Phase], described: dict[str, dict[str, Any]], length: int, seed: int):
        self.phases = phases
        self.described = described  # path of each dataset → what its dataset.json says ({} for a bare prefix)
        self.length = length
        self.seed = seed
        self.validation_sets = [name for name in phases if name not in PHASES]

    def read(self, phase: str, index: int) -> Packed:
        """Sequence `index` of a phase, L + 1 tokens."""
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

    def epochs(self, phase: str, sequences: int) -> dict[str, float]:
        """How often each source is gone through in so many sequences."""
        found = self.phases[phase]
        if len(found.sources) == 1:
            return {found.sources[0].name: sequences / found.sources[0].sequences}
        return {
            source.name: sequences * slots / BLOCK / source.sequences
            for source, slots in zip(found.sources, found.slots, strict=True)
        }

    def require(self, phase: str, iterations: int, batch_size: int, setting: str, split: Sequence[float]) -> None:
        """Raises DataError if a phase has fewer sequences than its losses are measured on."""
        needed, there = iterations * batch_size, self.sequences(phase)
        if there >= needed:
            return
        possible = there // batch_size
        advice = f"lower {setting} to {possible}, or " if possible else ""
        shares = ", ".join(f"{share:g}" for share in split)
        raise DataError(
            f"data.split: {phase} needs {iterations} batches × {batch_size} sequences = {needed:,} sequences of"
            f" {self.length} tokens, but [{shares}] of the documents leaves {there:,}; {advice}give {phase} a larger"
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

    def fingerprint(self) -> str:
        """What may not change on resume: the training documents, in their order, and their shares."""
        phase = self.phases.get("training")
        content: list[Any] = [self.length, self.seed]
        for source, slots in zip(phase.sources, phase.slots, strict=True) if phase else ():
            if isinstance(source, RandomSource):
                content.append(["random", source.vocab_size])
                continue
            for part in source.slices:
                file = part.file
                content.append([slots, part.first, part.last, file.documents, file.tokens, _ends(file.idx)])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ends(path: Path) -> str:
    """A digest of the first and last mebibyte of a file: enough to tell one index from another."""
    with path.open("rb") as file:
        head = file.read(2**20)
        file.seek(max(0, path.stat().st_size - 2**20))
        return hashlib.sha256(head + file.read()).hexdigest()


def open_dataset(config: DataConfig, length: int, seed: int, vocab_size: int) -> Dataset:
    """The data that the configuration names, in sequences of `length` tokens.

    Raises DataError for files that are missing, damaged or hold nothing to train on.
    """
    if config.format == "random":
        phases = {
            name: Phase(name, [RandomSource(length, vocab_size, seed + position)], [1.0], seed)
            for position, (name, share) in enumerate(zip(PHASES, config.split, strict=True))
            if share
        }
        return Dataset(phases, {}, length, seed)
    described: dict[str, dict[str, Any]] = {}
    alone = len(config.path) == 1
    weighted = [(1.0, config.path[0])] if alone else list(zip(config.path[::2], config.path[1::2], strict=True))
    opened = [(float(weight), path, _shards(path, described)) for weight, path in weighted]
    phases = {}
    for position, name in enumerate(PHASES):
        if not config.split[position]:
            continue
        sources: list[Source | RandomSource] = []
        weights: list[float] = []
        for weight, path, groups in opened:
            for number, (share, files) in enumerate(groups):
                label = path if len(groups) == 1 else f"{path} ({number})"
                source = Source(label, [_part(file, config.split, position) for file in files], length)
                if source.sequences:
                    sources.append(source)
                    weights.append(weight * share)
                elif name == "training":
                    raise DataError(
                        f"{label}: {source.tokens} tokens for {name}, fewer than one sequence of"
                        f" {length} + 1; lower batch.sequence_length, or prepare more data"
                    )
        if sources:
            phases[name] = Phase(name, sources, weights, seed)
    for name, path in config.validation_sets.items():
        files = [file for _, group in _shards(path, described) for file in group]
        source = Source(path, [Slice(file, 0, file.documents) for file in files], length)
        if not source.sequences:
            raise DataError(f"data.validation_sets.{name}: {path} has {source.tokens} tokens, fewer than one sequence")
        phases[name] = Phase(name, [source], [1.0], seed)
    return Dataset(phases, described, length, seed)


def _part(file: TokenFile, split: Sequence[float], position: int) -> Slice:
    """The documents of a token file that belong to one phase."""
    edges = [0, *(round(float(edge) * file.documents) for edge in np.cumsum(split) / sum(split))]
    return Slice(file, edges[position], edges[position + 1])


def _shards(path: str, described: dict[str, dict[str, Any]]) -> list[tuple[float, list[TokenFile]]]:
    """Groups of token files with their shares. Files whose weight is their share of tokens form one group."""
    if not path.endswith(".json"):
        described.setdefault(path, {})
        return [(1.0, [TokenFile(Path(path))])]
    entries = _describe(Path(path), described)
    groups: dict[float, list[tuple[float, TokenFile]]] = {}
    for entry in entries:
        file = TokenFile(_inside(Path(path), entry["prefix"]))
        tokens = entry.get("num_tokens", file.tokens)
        if tokens != file.tokens:
            raise DataError(
                f"{file.prefix}: {file.tokens} tokens, but {path} says {tokens}; the token file is another one's"
            )
        if not file.tokens:
            continue
        weight = float(entry.get("weight", file.tokens))
        groups.setdefault(float(f"{weight / file.tokens:.3e}"), []).append((weight, file))
    if not groups:
        raise DataError(f"{path}: holds no tokens")
    total = sum(weight for group in groups.values() for weight, _ in group)
    return [(sum(w for w, _ in group) / total, [file for _, file in group]) for group in groups.values()]


def _describe(path: Path, described: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > LARGEST_METADATA:
            raise DataError(f"{path}: larger than 1 GiB; this is no dataset.json")
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; `fast-llm prepare` writes it beside its output_path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset.json: {error}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a dataset.json: it has no list `datasets`")
    for entry in entries:
        right = isinstance(entry, dict) and isinstance(entry.get("prefix"), str)
        if not right or not all(
            isinstance(entry.get(name, 1), int | float) and entry.get(name, 1) >= 0 for name in ("weight", "num_tokens")
        ):
            raise DataError(f"{path}: `datasets` must list prefix, num_tokens and weight; given {str(entry)[:80]}")
    described[str(path)] = content
    return entries


def _inside(path: Path, prefix: str) -> Path:
    """A prefix of a dataset.json, which may not leave its folder."""
    if Path(prefix).is_absolute() or ".." in Path(prefix).parts:
        raise DataError(f"{path}: the prefix {prefix} leaves the folder of the file; it must lie inside")
    return path.parent / prefix


def verify(path: Path) -> int:
    """Compare all token files of a dataset.json with their digests; how many bytes were read.

    Raises DataError naming every file that is damaged.
    """
    read, wrong = 0, []
    for entry in _describe(path, {}):
        file = TokenFile(_inside(path, entry["prefix"]))
        for suffix, name in (("bin", file.bin), ("idx", file.idx)):
            expected = entry.get("sha256", {}).get(suffix)
            read += name.stat().st_size
            if expected is not None and digest(name) != expected:
                wrong.append(f"{name}: its content is not what was prepared (sha256 differs)")
    if wrong:
        raise DataError("\n".join(wrong))
    return read


def _slots(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """BLOCK slots dealt by weight, largest remainders first."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    slots = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda j: slots[j] - exact[j])
    for j in order[: BLOCK - sum(slots)]:
        slots[j] += 1
    if 0 in slots:
        name = names[slots.index(0)]
        raise DataError(f"data.path: the weight of {name} is below 1/{BLOCK} of all; leave it out or raise it")
    return slots


@functools.lru_cache(maxsize=256)
def _key(seed: int, name: str, number: int) -> tuple[int, ...]:
    data = (
        hashlib.sha256(f"{seed} {name} {number}".encode()).digest()
        + hashlib.sha256(f"{seed} {name} {number} ".encode()).digest()
    )
    return tuple(int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def permute(value: int, count: int, key: Sequence[int]) -> int:
    """A permutation of 0 … count - 1 (Black & Rogaway 2002, "Ciphers with arbitrary finite domains")."""
    half = max(2, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = value >> half, value & mask
        for k in key:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        value = left << half | right
        if value < count:
            return value


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
