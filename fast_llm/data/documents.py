"""Where documents come from: files here of which each is one document or a table of them, and the Hugging Face Hub.

files.py says which files those are, `open_documents` counts their rows. Local files are read by tables.py and, with
pyarrow, columns.py. `datasets` reads what is on the Hub, and folders of Dataset.save_to_disk: it maps
tables into memory, after it has converted them into its cache (HF_HOME) once.

A document that can not be used does not end a preparation of hours. It is left out, for one of these reasons:

    empty          no text, or none that the tokenizer makes tokens of
    not_text       null, a number, a list; no such column in the row or file
    not_utf8       text or a file with bytes that are no UTF-8, such as images, or with half of a surrogate pair
    unreadable     a file that has gone, may not be read, or is compressed and damaged; a row nested thousands of levels deep
    too_large      more than dataset.max_document_bytes; tokenizing needs a hundred times that
    untokenizable  the tokenizer itself fails on it, e.g. on millions of blanks in a row
    ends_itself    its tokens contain BOS or EOS, although special tokens' spellings are plain text

NUL and all other characters are text. A byte order mark at the start of a file is not.
"""

import contextlib
import errno
import hashlib
import logging
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.columns import ArrowTable, explain_missing_field, open_arrow
from fast_llm.data.files import HUB, DatasetFiles, parse_split, similar
from fast_llm.data.reading import COMPRESSED, Reader, Task
from fast_llm.data.tables import HubTable, JsonLines, JsonValue, TextFiles, open_json
from fast_llm.errors import DataError, MissingPackage

logger = logging.getLogger("fast_llm")

REASONS = (
    "empty",
    "not_text",
    "not_utf8",
    "unreadable",
    "too_large",
    "untokenizable",
    "ends_itself",
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Table = TextFiles | HubTable | JsonLines | JsonValue | ArrowTable
_COMPRESSION_RATIO = 4  # how much larger compressed text is


@dataclass(frozen=True)
class Corpus:
    """Rows of tables, or files. Rows are numbered from 0 in the order of the files; their numbers never change."""

    parts: list[tuple[Table, int, int]]
    """Tables, and which rows of them."""
    starts: NDArray[np.int64]
    """Rows before each part, and in all."""
    reader: Reader
    """What reads the tasks."""
    digest: str
    """Equal if the documents are, as far as can be said without reading them."""
    kind: str
    left_out: list[tuple[str, str]]
    """Files that are not read, and why."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def reading_changed(self) -> bool:
        """Whether earlier versions made other texts of some: they guessed types of JSON, and did not decompress files."""
        return self.kind == "json" or any(
            path.lower().endswith(COMPRESSED)
            for table, _, _ in self.parts
            if isinstance(table, TextFiles)
            for path in table.paths
        )

    @property
    def tables_without_field(self) -> list[JsonLines | JsonValue | ArrowTable]:
        """Files that have no text under the field, in any row."""
        found = {
            id(table): table
            for table, _, _ in self.parts
            if not isinstance(table, TextFiles | HubTable)
        }
        return [table for table in found.values() if table.missing_field is not None]

    @property
    def blank_rows(self) -> int:
        """Rows that are none: blank lines."""
        return sum(table.blank_rows for table, _, _ in self.parts)

    @property
    def bytes(self) -> int:
        """About how much text there is."""
        return sum(
            table.bytes * (last - first) // max(1, table.rows) for table, first, last in self.parts
        )

    def tasks(self, first: int, last: int, target: int) -> Iterator[Task]:
        """Rows [first, last) in pieces of about `target` bytes of text, in order."""
        begin = int(np.searchsorted(self.starts, first, "right")) - 1
        for start, (table, before, _), behind in zip(
            self.starts[begin:].tolist(),
            self.parts[begin:],
            self.starts[begin + 1 :].tolist(),
            strict=False,
        ):
            if start >= last:
                return
            one, end = max(first, start), min(last, behind)
            if one < end:
                yield from table.tasks(before + one - start, before + end - start, one, target)

    def sample(self, count: int) -> Iterator[str]:
        """Texts of some rows from all over."""
        for row in np.linspace(0, len(self) - 1, min(len(self), count)).astype(np.int64).tolist():
            part = int(np.searchsorted(self.starts, row, "right")) - 1
            table, before, _ = self.parts[part]
            near = table.nearby_row(before + row - int(self.starts[part]))
            for task in table.tasks(near, near + 1, 0, 1):
                yield from (text for text in self.reader.texts(task) if isinstance(text, str))

    def name(self, row: int) -> str:
        """Where a row is, for people: `file`, `file:line`, or file and row."""
        part = int(np.searchsorted(self.starts, row, "right")) - 1
        table, before, _ = self.parts[part]
        return table.name(before + row - int(self.starts[part]))


def open_documents(source: DatasetFiles, loading_workers: int) -> Corpus:
    """Open what was found and count its rows.

    Raises DataError if it can not be read or has no such column, MissingPackage without what reads it, OSError if the
    disk is full.
    """
    config = source.config
    max_bytes = config.max_document_bytes
    if source.kind in ("saved", "hub"):
        rows, digest = _open_hub(source, loading_workers)
        table = HubTable(rows, config.field, config.path)
        whole: list[tuple[Table, int, int]] = [(table, 0, table.rows)]
        return _documents(whole, Reader(config.field, max_bytes, rows), digest, source)
    assert source.digest is not None
    reader = Reader(config.field, max_bytes)
    if source.kind == "file":
        files = source.files["train"]
        sizes = [
            source.sizes[path] * (_COMPRESSION_RATIO if path.lower().endswith(COMPRESSED) else 1)
            for path in files
        ]
        return _documents(
            [(TextFiles(files, np.array(sizes, np.int64)), 0, len(files))],
            reader,
            source.digest,
            source,
        )
    parts_of = parse_split(config.split)
    wanted = {split: source.files[split] for split, _, _ in parts_of}
    tables = _open_tables(
        source, [path for files in wanted.values() for path in files], loading_workers
    )
    tables_without_field = [table for table in tables.values() if table.missing_field is not None]
    if tables_without_field and all(
        table.missing_field is not None or table.rows == table.blank_rows
        for table in tables.values()
    ):
        raise DataError(f"dataset.field: {config.path} {tables_without_field[0].missing_field}")
    parts = [
        part
        for split, first, last in parts_of
        for part in _slice([tables[path] for path in wanted[split]], first, last)
    ]
    return _documents(parts, reader, source.digest, source)


def _documents(
    parts: list[tuple[Table, int, int]], reader: Reader, digest: str, source: DatasetFiles
) -> Corpus:
    starts = np.cumsum([0, *(last - first for _, first, last in parts)], dtype=np.int64)
    return Corpus(parts, starts, reader, digest, source.kind, source.left_out)


def _open_tables(source: DatasetFiles, paths: list[str], workers: int) -> dict[str, Table]:
    """Threads are enough: libraries decompress, and the disk reads, outside Python's lock."""
    config = source.config
    size = sum(source.sizes[path] for path in paths)
    if source.kind == "json" and size > 2**30:
        logger.info(
            f"{config.path}: counting the rows of {len(paths):,} files, {size / 1e9:.1f} GB."
        )
    stop = threading.Event()

    def opened(path: str) -> Table:
        if source.kind == "json":
            return open_json(path, config.field, config.max_document_bytes, stop)
        return open_arrow(path, config.field, source.kind == "parquet")

    threads = ThreadPoolExecutor(workers)
    try:
        return dict(zip(paths, threads.map(opened, paths), strict=True))
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


def _slice(
    tables: list[Table], first: str | None, last: str | None
) -> Iterator[tuple[Table, int, int]]:
    """Rows [first, last) of tables, one after the other. Bounds are numbers or percents, negative ones count from the end."""
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


def _open_hub(source: DatasetFiles, workers: int) -> tuple[Any, str]:
    """A datasets.Dataset that gives Arrow tables of one column, and a digest of it."""
    config = source.config
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets zstandard", f"reading {config.path}") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if source.kind == "hub":
        logger.info(f"{config.path} is no file or folder here: asking the Hugging Face Hub for it.")
    with _captured_errors() as said:
        try:
            rows = _load(datasets, source, workers if workers > 1 else None)
        except Exception as error:
            if any(
                isinstance(cause, OSError) and cause.errno in _DISK_FULL for cause in _causes(error)
            ):
                raise DataError(
                    f"dataset.path: {config.path}: no room for it in the cache of `datasets`,"
                    f" {datasets.config.HF_CACHE_HOME}; set HF_HOME to a folder on a larger disk"
                ) from error
            where = (
                "no such file or folder here, and not from the Hugging Face Hub: "
                if source.kind == "hub"
                else ""
            )
            # What it logs names the file, what it raises does not.
            reason = said[-1] if said and source.kind != "hub" else _reason(error)
            near = similar(Path(config.path)) if source.kind == "hub" else ""
            raise DataError(
                f"dataset.path: {config.path}: {where}{reason.rstrip('. ')}{near}"
            ) from error
    if (missing_field := explain_missing_field(rows.data.schema, config.field)) is not None:
        raise DataError(f"dataset.field: {config.path} {missing_field}")
    # The fingerprint follows from the files' revision on the Hub, and is noted by save_to_disk.
    digest = hashlib.sha256(f"{rows._fingerprint} {rows.split}".encode()).hexdigest()
    return rows.select_columns([config.field]).with_format("arrow"), digest


def _load(datasets: Any, source: DatasetFiles, processes: int | None) -> Any:
    """A datasets.Dataset."""
    config = source.config
    if source.kind == "saved":
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
    return datasets.load_dataset(
        config.path.removeprefix(HUB),
        name=config.config_name,
        data_dir=config.data_directory,
        data_files=config.data_files,
        split=config.split,
        num_proc=processes,
    )


@contextlib.contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """Collects the errors that `datasets` logs; it and the Hub's client print theirs once, not twice, and no retries."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().splitlines()[0])

    collector = Collector(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    loggers[0].addHandler(collector)
    for logger in loggers:
        logger.propagate = False
    loggers[1].setLevel(logging.ERROR)
    try:
        yield said
    finally:
        loggers[0].removeHandler(collector)
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.setLevel(level)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it wraps, innermost last."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: `datasets` wraps it, and its processes send it as text."""
    for cause in _causes(error):
        name, lines = type(cause).__name__, str(cause).strip().splitlines()
        if name == "RemoteTraceback":
            lines = [line for line in lines if re.match(r"[\w.]+: ", line)]
        if lines and name != "DatasetGenerationError":
            return lines[0]
    return repr(error)
