"""The documents of a preparation: rows of local tables, local text files, or a dataset on the
Hugging Face Hub.

files.py finds the files and `open_documents` counts their rows. tables.py reads local files;
columns.py reads parquet and arrow, with pyarrow. `datasets` reads the Hub and folders of
Dataset.save_to_disk: it converts a dataset into its cache (HF_HOME) once and maps it into memory.
Opening costs one pass over JSON files, and the metadata of others.

A document that cannot be used is skipped, so that it does not end a job of hours. The reasons:

    empty          no text, or text of which the tokenizer makes no tokens
    not_text       null, a number, a list; no such column in the row or file
    not_json       a bad line, if dataset.max_bad_lines allows to skip it
    not_utf8       bytes that are not UTF-8, such as images, or half of a surrogate pair
    unreadable     a file that is gone, may not be read, or is compressed and damaged; a row nested
                   thousands of levels deep
    too_large      more than dataset.max_document_bytes; tokenizing needs 12 to 110 times that
    untokenizable  the tokenizer fails on it, e.g. on millions of spaces in a row
    ends_itself    its tokens contain BOS or EOS, although the spellings of special tokens are
                   encoded as plain text
    filtered       dropped by dataset.filter
    duplicate      equal to an earlier document, if dataset.deduplicate is set

NUL and all other characters are text. A byte order mark at the start of a file is not.
"""

import contextlib
import errno
import hashlib
import itertools
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm import hub
from fast_llm.data.columns import (
    ArrowTable,
    column_names,
    explain_missing_field,
    has_spans,
    missing_spans,
    open_arrow,
)
from fast_llm.data.files import HUB, DatasetFiles, parse_split
from fast_llm.data.reading import (
    COMPRESSED,
    NOT_JSON,
    WRONG_SPANS,
    Reader,
    Task,
    too_many_bad_lines,
)
from fast_llm.data.tables import HubTable, JsonLines, JsonValue, TextFiles, open_json
from fast_llm.errors import DataError, MissingPackage
from fast_llm.storage import similar

logger = logging.getLogger("fast_llm")

DUPLICATE = "duplicate"
FILTERED = "filtered"
CONTAINS_EOS = "ends_itself"  # the name that dataset.json has had since version 0.1
# The reasons as records and dataset.json name them, and in words.
REASONS = {
    "empty": "empty",
    "not_text": "not text",
    NOT_JSON: "not JSON",
    "not_utf8": "not UTF-8",
    "unreadable": "unreadable",
    "too_large": "too large",
    "untokenizable": "the tokenizer failed",
    CONTAINS_EOS: "contains BOS or EOS",
    WRONG_SPANS: "with wrong spans",
    FILTERED: "dropped by dataset.filter",
    DUPLICATE: "duplicate",
}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Table = TextFiles | HubTable | JsonLines | JsonValue | ArrowTable
OpenTable = Callable[[str], Table]
OpenShared = Callable[
    [DatasetFiles, list[str], OpenTable, int, threading.Event], list[Table] | None
]
_COMPRESSION_RATIO = 4  # assumed, to estimate the size of compressed text


@dataclass(frozen=True)
class Corpus:
    """All documents. Rows are numbered from 0 in the order of the files; a file of text is one
    row.
    """

    parts: list[tuple[Table, int, int]]
    """Tables, each with the rows [first, last) that are read of it."""
    starts: NDArray[np.int64]
    """[parts + 1]: rows before each part, and the total."""
    reader: Reader
    """Reads the rows of a task, in any process."""
    digest: str
    """Identifies the documents by what can be known without reading them: names and sizes, or the
    revision."""
    kind: str
    left_out: list[tuple[str, str]]
    """Files that are not read, each with the reason."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def reading_changed(self) -> bool:
        """Whether version 0.1 read some of them differently: it guessed types in JSON and did not
        decompress text files.
        """
        return self.kind == "json" or any(
            path.lower().endswith(COMPRESSED)
            for table, _, _ in self.parts
            if isinstance(table, TextFiles)
            for path in table.paths
        )

    @property
    def filters(self) -> bool:
        """Whether the user's filter is called."""
        return self.reader.filter is not None

    @property
    def tables_without_field(self) -> list[JsonLines | JsonValue | ArrowTable]:
        """Files that have no text in the column, in any row."""
        found = {
            id(table): table
            for table, _, _ in self.parts
            if not isinstance(table, TextFiles | HubTable)
        }
        return [table for table in found.values() if table.missing_field is not None]

    @property
    def blank_rows(self) -> int:
        """Number of rows that are blank lines, which are not documents."""
        return sum(table.blank_rows for table, _, _ in self.parts)

    @property
    def bytes(self) -> int:
        """Estimated bytes of text."""
        return sum(
            table.bytes * (last - first) // max(1, table.rows) for table, first, last in self.parts
        )

    def tasks(self, first: int, last: int, target: int) -> Iterator[Task]:
        """Rows [first, last) in order, in tasks of about `target` bytes of text."""
        begin = int(np.searchsorted(self.starts, first, "right")) - 1
        for start, (table, before, _), stop in zip(
            self.starts[begin:].tolist(),
            self.parts[begin:],
            self.starts[begin + 1 :].tolist(),
            strict=False,
        ):
            if start >= last:
                return
            one, end = max(first, start), min(last, stop)
            if one < end:
                yield from table.tasks(before + one - start, before + end - start, one, target)

    def sample(self, count: int) -> Iterator[str]:
        """Texts of about `count` rows, evenly spread. Of parquet, the first ones of row groups."""
        found: dict[tuple[int, int], int] = {}  # part and row → rows from there on
        for row in np.linspace(0, len(self) - 1, min(len(self), count)).astype(np.int64).tolist():
            part = int(np.searchsorted(self.starts, row, "right")) - 1
            table, before, _ = self.parts[part]
            near = table.nearby_row(before + row - int(self.starts[part]))
            found[part, near] = found.get((part, near), 0) + 1
        for (part, near), rows in found.items():  # once each: opening and decoding take a while
            table, _, last = self.parts[part]
            for task in table.tasks(near, max(near + 1, min(near + rows, last)), 0, 1):
                yield from (text for text in self.reader.texts(task) if isinstance(text, str))

    def name(self, row: int) -> str:
        """Where a row is, for messages: `file`, `file:line`, or file and row."""
        part = int(np.searchsorted(self.starts, row, "right")) - 1
        table, before, _ = self.parts[part]
        return table.name(before + row - int(self.starts[part]))


def open_documents(
    found: DatasetFiles, loading_workers: int, open_shared: OpenShared | None = None
) -> Corpus:
    """Open the files that were found and count their rows.

    `open_shared`: opens them together with other ranks, if that is worthwhile (counting.py).
    Raises DataError if they cannot be read or have no such column, MissingPackage if the package
    that reads them is missing, OSError if the disk is full.
    """
    config = found.config
    max_bytes = config.max_document_bytes
    bad, spans = config.max_bad_lines, config.loss_masking_spans
    if spans is not None and found.kind == "file":
        raise DataError(
            f"dataset.loss_masking_spans: given {spans}, but {config.path} has files of text, which"
            f" have no columns; write its documents to JSON Lines or parquet, with columns"
            f" {config.field} and {spans}"
        )
    if found.kind in ("saved", "hub"):
        rows, digest = _open_hub(found, loading_workers)
        table = HubTable(rows, config.field, config.path)
        parts: list[tuple[Table, int, int]] = [(table, 0, table.rows)]
        reader = Reader(config.field, max_bytes, 0, rows, config.deduplicate, config.filter, spans)
        return _corpus(parts, reader, digest, found)
    assert found.digest is not None
    reader = Reader(config.field, max_bytes, bad, None, config.deduplicate, config.filter, spans)
    if found.kind == "file":
        files = found.files["train"]
        sizes = [
            found.sizes[path] * (_COMPRESSION_RATIO if path.lower().endswith(COMPRESSED) else 1)
            for path in files
        ]
        return _corpus(
            [(TextFiles(files, np.array(sizes, np.int64)), 0, len(files))],
            reader,
            found.digest,
            found,
        )
    parts_of = parse_split(config.split)
    wanted = {split: found.files[split] for split, _, _ in parts_of}
    tables = _open_tables(
        found,
        reader,
        [path for files in wanted.values() for path in files],
        loading_workers,
        open_shared,
    )
    _check_field(config.path, list(tables.values()))
    if spans is not None:
        _check_spans(spans, list(tables.values()))
    parts = [
        part
        for split, first, last in parts_of
        for part in _slice([tables[path] for path in wanted[split]], first, last)
    ]
    _check_bad_rows(parts, config.max_bad_lines)
    return _corpus(parts, reader, found.digest, found)


def _check_field(path: str, tables: Sequence[Table]) -> None:
    """Raise DataError if no table with rows has the field of the documents."""
    without = [table for table in tables if table.missing_field is not None]
    if without and all(
        table.missing_field is not None or table.rows == table.blank_rows for table in tables
    ):
        raise DataError(f"dataset.field: {path} {without[0].missing_field}")


def _check_spans(column: str, tables: Sequence[Table]) -> None:
    """Raise DataError if no file with rows has the column of masked spans. What JSON holds is known
    once it is read.
    """
    filled = [table for table in tables if isinstance(table, ArrowTable) and table.rows]
    if filled and all(table.masks is None for table in filled):
        raise missing_spans(filled[0].path, column, column_names(filled[0].path, filled[0].parquet))


def _check_bad_rows(parts: list[tuple[Table, int, int]], allowed: int) -> None:
    """Raises DataError if more lines than allowed are known not to be JSON, in all files."""
    if (where := next(itertools.islice(bad_lines(parts), allowed, None), None)) is not None:
        raise too_many_bad_lines(where, allowed)


def bad_lines(parts: Sequence[tuple[Table, int, int]]) -> Iterator[str]:
    """Lines that were seen not to be JSON while rows were counted."""
    for table, first, last in parts:
        if isinstance(table, JsonLines):
            yield from (table.name(row) for row in table.bad_rows if first <= row < last)


def _corpus(
    parts: list[tuple[Table, int, int]], reader: Reader, digest: str, found: DatasetFiles
) -> Corpus:
    starts = np.cumsum([0, *(last - first for _, first, last in parts)], dtype=np.int64)
    return Corpus(parts, starts, reader, digest, found.kind, found.left_out)


def _open_tables(
    found: DatasetFiles,
    reader: Reader,
    paths: list[str],
    workers: int,
    open_shared: OpenShared | None,
) -> dict[str, Table]:
    """Open tables in threads: reading and decompressing do not hold Python's lock."""
    config = found.config
    size = sum(found.sizes[path] for path in paths)
    if found.kind == "json" and size > 2**30:
        logger.info(
            f"{config.path}: counting the rows of {len(paths):,} files, {size / 1e9:.1f} GB."
        )
    stop = threading.Event()

    def opened(path: str) -> Table:
        if found.kind == "json":
            table = open_json(path, reader, stop)
            if stop.is_set():  # it was not read to its end
                raise CancelledError
            return table
        spans = config.loss_masking_spans
        return open_arrow(path, config.field, found.kind == "parquet", spans)

    if open_shared is not None:
        tables = open_shared(found, paths, opened, workers, stop)
        if tables is not None:
            return dict(zip(paths, tables, strict=True))
        stop.clear()
    threads = ThreadPoolExecutor(workers)
    try:
        return dict(zip(paths, threads.map(opened, paths), strict=True))
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


def _slice(
    tables: list[Table], first: str | None, last: str | None
) -> Iterator[tuple[Table, int, int]]:
    """Rows [first, last) of tables laid end to end. Bounds are numbers or percentages; negative
    ones count from the end.
    """
    rows = [table.rows - table.blank_rows for table in tables]
    total = sum(rows)

    def bound(text: str | None, default: int) -> int:
        if text is None:
            return default
        number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
        return min(max(number + total if number < 0 else number, 0), total)

    begin, end = bound(first, 0), bound(last, total)
    before = 0
    for table, count in zip(tables, rows, strict=True):
        one, other = max(begin - before, 0), min(end - before, count)
        if (one, other) == (0, count):
            yield table, 0, table.rows
        elif one < other:
            line = table.line if isinstance(table, JsonLines) else int
            yield table, line(one), line(other - 1) + 1
        before += count


def _open_hub(found: DatasetFiles, workers: int) -> tuple[Any, str]:
    """A datasets.Dataset that gives Arrow tables of the columns that are read, and its digest."""
    config = found.config
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets zstandard", f"reading {config.path}") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if found.kind == "hub":
        logger.info(
            f"{config.path} is not a local file or folder: loading it from the Hugging Face Hub."
        )
    with _captured_errors() as logged:
        try:
            rows = _load(datasets, found, workers if workers > 1 else None)
        except Exception as error:
            if any(
                isinstance(cause, OSError) and cause.errno in _DISK_FULL for cause in _causes(error)
            ):
                raise DataError(
                    f"dataset.path: {config.path}: no room for it in the cache of `datasets`,"
                    f" {datasets.config.HF_CACHE_HOME}; set HF_HOME to a folder on a larger disk"
                ) from error
            where = (
                "no such local file or folder, and not loaded from the Hugging Face Hub: "
                if found.kind == "hub"
                else ""
            )
            # Its log names the file, its exception does not.
            reason = logged[-1] if logged and found.kind != "hub" else _reason(error)
            if "OfflineModeIsEnabled" in reason:
                reason = f"{hub.why_unreachable()}, and it is not in the cache of `datasets`"
            near = similar(Path(config.path)) if found.kind == "hub" else ""
            raise DataError(
                f"dataset.path: {config.path}: {where}{reason.rstrip('. ')}{near}"
            ) from error
    if (missing_field := explain_missing_field(rows.data.schema, config.field)) is not None:
        raise DataError(f"dataset.field: {config.path} {missing_field}")
    # The fingerprint depends on the revision on the Hub; save_to_disk stores it.
    digest = hashlib.sha256(f"{rows._fingerprint} {rows.split}".encode()).hexdigest()
    columns, spans = [config.field], config.loss_masking_spans
    if spans is not None:
        if not has_spans(rows.data.schema, spans, config.path):
            raise missing_spans(config.path, spans, rows.data.schema.names)
        columns.append(spans)
    return rows.select_columns(columns).with_format("arrow"), digest


def _load(datasets: Any, found: DatasetFiles, processes: int | None) -> Any:
    """A datasets.Dataset."""
    config = found.config
    if found.kind == "saved":
        saved = datasets.load_from_disk(str(Path(config.path).expanduser()))
        if not isinstance(saved, datasets.DatasetDict):
            if config.split not in ("train", str(saved.split)):
                raise DataError(
                    f"it has no split {config.split}; it is {saved.split or 'not split'}"
                )
            return saved
        if config.split not in saved:
            raise DataError(f"it has no split {config.split}; it has {', '.join(saved)}")
        return saved[config.split]
    with contextlib.nullcontext() if hub.is_reachable() else _from_the_cache(datasets):
        return datasets.load_dataset(
            config.path.removeprefix(HUB),
            name=config.config_name,
            data_dir=config.data_directory,
            data_files=config.data_files,
            split=config.split,
            num_proc=processes,
        )


@contextlib.contextmanager
def _from_the_cache(datasets: Any) -> Iterator[None]:
    """Keep `datasets` from asking a Hub that cannot be reached, which it does for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """The errors that `datasets` logs in the block. Keeps it and the Hub's client from printing
    them twice.
    """
    logged: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage().splitlines()[0])

    collector = Collector(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    loggers[0].addHandler(collector)
    for logger in loggers:
        logger.propagate = False
    loggers[1].setLevel(logging.ERROR)
    try:
        yield logged
    finally:
        loggers[0].removeHandler(collector)
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.setLevel(level)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, innermost last."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps it, and its processes send it as
    text.
    """
    for cause in _causes(error):
        name, lines = type(cause).__name__, str(cause).strip().splitlines()
        if name == "RemoteTraceback":
            lines = [line for line in lines if re.match(r"[\w.]+: ", line)]
        if lines and name != "DatasetGenerationError":
            return lines[0]
    return repr(error)
