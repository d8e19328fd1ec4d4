"""Units of work: a corpus divided by bytes, each unit prepared independently of the others.

A unit is a range of rows of 1 to 64 MiB of text; of more in corpora above 4 TiB, which have 65,536
units, and where the documents cannot be divided. Uncompressed JSON lines are divided at line ends,
parquet at row groups, arrow at record batches; small files are joined. Compressed files and single
JSON values cannot be divided. Units depend on the documents only, so that all processes and all
starts see the same ones.

A unit's result is these files below `<output_path>/units/`, each complete or absent. `.npz` is
renamed last. Two processes that do the same unit write the same bytes.

    <number>.bin           tokens of its documents
    <number>.npz           arrays: lengths, rows and bytes of documents; rows and reasons of skipped
                           ones; the engine
    <number>.digests.npy   digests of its documents, with dataset.deduplicate (duplicates.py)
    <number>.copies.npy    which of them are copies, when all units are done

assemble.py cuts the results into token files. So preparation in units writes and reads the tokens
one more time than one process does, and needs their size twice on the disk until it ends.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.columns import ArrowTable
from fast_llm.data.documents import DUPLICATE, FILTERED, REASONS, Corpus, Table
from fast_llm.data.duplicates import sorted_digests, write_array
from fast_llm.data.engine import NAME
from fast_llm.data.masks import DocumentMasks
from fast_llm.data.progress import NAMED
from fast_llm.data.reading import COMPRESSED, NOT_JSON
from fast_llm.data.shards import LARGE_DOCUMENT
from fast_llm.data.tables import HubTable, JsonLines, TextFiles, ranges_by_size
from fast_llm.data.workers import RANGE_BYTES, RangeTokenizer, TokenizedRange

_SMALLEST, _USUAL = 2**20, 2**26  # bytes of text of a unit
_UNITS = 4096  # of a small corpus, so that many workers share it
_MOST_UNITS = 2**16
_CHUNK = 2**22  # tokens read at a time
_REASONS = list(REASONS)


@dataclass(frozen=True)
class Unit:
    """Rows [first, last) of a corpus."""

    number: int
    first: int
    last: int
    bytes: int  # of text, an estimate


@dataclass(frozen=True)
class UnitSummary:
    """What a finished unit reports to the process that started it."""

    unit: Unit
    documents: int
    tokens: int
    bad_lines: list[int]
    """Rows of lines that are not JSON."""
    skipped: list[tuple[int, str]]
    """The first skipped documents that are worth a name: row and reason."""
    large: list[tuple[int, int]]
    """The first documents that are large files: row and tokens."""


def divide(corpus: Corpus) -> list[Unit]:
    """All units, in the order of the rows."""
    total = corpus.bytes
    target = max(min(_USUAL, total // _UNITS), total // _MOST_UNITS, _SMALLEST)
    edges, sizes = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
    for start, (table, first, last) in zip(corpus.starts.tolist(), corpus.parts, strict=False):
        if first < last:
            ends, some = _pieces(table, first, last, target)
            edges.append(ends + (start - first))
            sizes.append(some)
    rows, bytes_of = np.concatenate(edges), np.concatenate(sizes)
    return [
        Unit(number, int(rows[begin]), int(rows[end]), int(bytes_of[begin:end].sum()))
        for number, (begin, end) in enumerate(ranges_by_size(bytes_of, target))
    ]


def _pieces(
    table: Table, first: int, last: int, target: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where rows [first, last) of a table can be divided: the end of each piece, and its bytes."""
    if isinstance(table, TextFiles):
        ends = [first + end for _, end in ranges_by_size(table.sizes[first:last], target)]
        inside, before = np.array(ends, np.int64), np.append(0, np.cumsum(table.sizes))
        rows = np.arange(table.rows + 1)
    elif isinstance(table, JsonLines):
        packed = table.path.lower().endswith(COMPRESSED)
        inside = np.zeros(0, np.int64) if packed else table.lines
        rows, before = table.lines, table.offsets
    else:
        rows, before = np.array([0, max(1, table.rows)]), np.array([0, table.bytes])
        if isinstance(table, ArrowTable):
            inside = table.groups
        elif isinstance(table, HubTable):
            inside = np.linspace(0, table.rows, 2 + table.bytes // target).astype(np.int64)
        else:
            inside = np.zeros(0, np.int64)
    inside = np.unique(inside[(inside > first) & (inside < last)])
    ends_of = np.append(inside, last).astype(np.int64)
    at = np.interp(np.append(first, ends_of), rows, before)
    return ends_of, np.diff(at).astype(np.int64)


class UnitTokenizer:
    """Tokenizes units into a folder, in any process that sees the documents and the folder."""

    def __init__(self, corpus: Corpus, range_tokenizer: RangeTokenizer, folder: Path, tag: str):
        """`tag`: part of the names of partial files, so that processes never share one."""
        self.corpus, self.range_tokenizer = corpus, range_tokenizer
        self.folder, self.tag = folder, tag

    def __call__(self, unit: Unit) -> UnitSummary:
        """Write the result of a unit. Raises DataError as RangeTokenizer.tokenize does."""
        tokens = result_path(self.folder, unit, "bin")
        partial = tokens.with_name(f"{tokens.name}.{self.tag}.partial")
        parts: list[TokenizedRange] = []
        try:
            with partial.open("wb", buffering=2**20) as file:
                for task in self.corpus.tasks(unit.first, unit.last, RANGE_BYTES):
                    part = self.range_tokenizer(task)
                    file.write(part.tokens)
                    parts.append(part.without_tokens())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(tokens)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        arrays = _arrays(parts) | {"engine": np.array([self.range_tokenizer.engine])}
        if self.corpus.reader.deduplicate:
            digests = sorted_digests(b"".join(part.digests for part in parts))
            write_array(result_path(self.folder, unit, "digests.npy"), self.tag, digests)
        write_arrays(result_path(self.folder, unit, "npz"), self.tag, arrays)
        return self._summary(unit, arrays)

    @property
    def may_fork(self) -> bool:
        """Whether a forked process can do this work: without pyarrow, which may have threads."""
        tables = (table for table, _, _ in self.corpus.parts)
        return self.range_tokenizer.may_fork and not any(
            isinstance(table, ArrowTable) for table in tables
        )

    def _summary(self, unit: Unit, arrays: dict[str, NDArray[Any]]) -> UnitSummary:
        lengths = arrays["lengths"]
        is_large = (lengths >= LARGE_DOCUMENT) & (self.corpus.kind == "file")
        large = [(int(arrays["rows"][at]), int(lengths[at])) for at in np.flatnonzero(is_large)]
        unnamed = [_REASONS.index(reason) for reason in ("empty", FILTERED)]
        named = np.flatnonzero(~np.isin(arrays["reasons"], unnamed))[:NAMED].tolist()
        skipped = [(int(arrays["skipped"][at]), _REASONS[arrays["reasons"][at]]) for at in named]
        bad_lines = arrays["skipped"][arrays["reasons"] == _REASONS.index(NOT_JSON)].tolist()
        tokens = int(lengths.sum())
        return UnitSummary(unit, len(lengths), tokens, bad_lines, skipped, large[:NAMED])


def result_path(folder: Path, unit: Unit, suffix: str) -> Path:
    """A file of a unit's result."""
    return folder / f"{unit.number}.{suffix}"


def is_done(folder: Path, unit: Unit, refused: bool = False) -> bool:
    """Whether a unit's result is complete. `refused`: the fast engine's results do not count."""
    path = result_path(folder, unit, "npz")
    return path.exists() and not (refused and _engine(path).startswith(NAME))


def _engine(path: Path) -> str:
    with np.load(path) as arrays:
        return str(arrays["engine"][0])


def _arrays(parts: list[TokenizedRange]) -> dict[str, NDArray[Any]]:
    skipped = [each for part in parts for each in part.skipped_rows]
    empty = np.zeros(0, np.int64)
    lengths = np.concatenate([empty, *(part.lengths for part in parts)])
    masks = DocumentMasks.joined([part.masks for part in parts])
    of_masks = {"mask_counts": masks.counts, "mask_spans": masks.spans}
    return (of_masks if len(masks.counts) else {}) | {
        "counts": np.array([len(lengths), lengths.sum()], np.int64),
        "lengths": lengths,
        "rows": np.concatenate([empty, *(part.rows for part in parts)]),
        "text_bytes": np.concatenate([empty, *(part.text_bytes for part in parts)]),
        "skipped": np.array([row for row, _ in skipped], np.int64),
        "reasons": np.array([_REASONS.index(reason) for _, reason in skipped], np.uint8),
    }


def write_arrays(path: Path, tag: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a file of arrays that is complete or absent, also after a power failure."""
    partial = path.with_name(f"{path.name}.{tag}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class UnitResult:
    """The result of a unit, as it is cut into token files."""

    def __init__(self, folder: Path, unit: Unit, dtype: np.dtype[Any]):
        self.unit, self.dtype = unit, dtype
        self.tokens_path = result_path(folder, unit, "bin")
        self._load = functools.partial(np.load, result_path(folder, unit, "npz"))
        with self._load() as arrays:
            self.documents, self.tokens = map(int, arrays["counts"])
            self.engine = str(arrays["engine"][0])
        self.copies = np.zeros(0, np.int64)
        if result_path(folder, unit, "digests.npy").exists():  # duplicates have been found
            self.copies = np.load(result_path(folder, unit, "copies.npy"))
        if len(self.copies):
            self.documents -= len(self.copies)
            self.tokens -= int(self.arrays["lengths"][self.copies].sum())
            self._load = functools.partial(np.load, result_path(folder, unit, "npz"))

    @functools.cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """`lengths`, `rows` and `text_bytes` of documents, `skipped` rows with their `reasons`."""
        with self._load() as arrays:
            return {name: arrays[name] for name in arrays.files}

    @functools.cached_property
    def is_kept(self) -> NDArray[np.bool_]:
        """[documents]: False for copies of earlier documents."""
        kept = np.ones(len(self.arrays["lengths"]), bool)
        kept[self.copies] = False
        return kept

    @functools.cached_property
    def masks(self) -> DocumentMasks:
        """Of all documents; nothing if the data has no masks."""
        if "mask_counts" not in self.arrays:
            return DocumentMasks.of()
        return DocumentMasks(self.arrays["mask_counts"], self.arrays["mask_spans"])

    @property
    def rows(self) -> NDArray[np.int64]:
        """[documents that are kept]: the row of each."""
        return self.arrays["rows"][self.is_kept]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents that are kept]: the tokens of each."""
        return self.arrays["lengths"][self.is_kept]

    def ranges(self, first: int, last: int) -> Iterator[TokenizedRange]:
        """The documents of rows [first, last), some megabytes at a time."""
        first, last = max(first, self.unit.first), min(last, self.unit.last)
        rows, lengths = self.arrays["rows"], self.arrays["lengths"]
        at, end = np.searchsorted(rows, (first, last)).tolist()
        ends = np.cumsum(lengths)
        with self.tokens_path.open("rb") as file:
            while first < last:
                before = int(ends[at - 1]) if at else 0
                until = min(int(np.searchsorted(ends, before + _CHUNK)) + 1, end)
                stop = last if until >= end else int(rows[until])
                size = (int(ends[until - 1]) - before) if until > at else 0
                file.seek(before * self.dtype.itemsize)
                tokens = file.read(size * self.dtype.itemsize)
                skipped = self._skipped(first, stop)
                kept = self.is_kept[at:until]
                if not kept.all():
                    of_tokens = np.repeat(kept, lengths[at:until])
                    tokens = np.frombuffer(tokens, self.dtype)[of_tokens].tobytes()
                lengths_of, rows_of, bytes_of = (
                    self.arrays[name][at:until][kept] for name in ("lengths", "rows", "text_bytes")
                )
                masks = self.masks.some(at, until).kept(kept)
                yield TokenizedRange(
                    first, stop, tokens, lengths_of, rows_of, skipped, bytes_of, masks=masks
                )
                first, at = stop, until

    def _skipped(self, first: int, last: int) -> list[tuple[int, str]]:
        rows = self.arrays["skipped"]
        some = slice(*np.searchsorted(rows, (first, last)).tolist())
        reasons = (_REASONS[number] for number in self.arrays["reasons"][some].tolist())
        found = list(zip(rows[some].tolist(), reasons, strict=True))
        copies = self.arrays["rows"][self.copies]
        of_range = copies[(copies >= first) & (copies < last)].tolist()
        return sorted(found + [(row, DUPLICATE) for row in of_range]) if of_range else found
