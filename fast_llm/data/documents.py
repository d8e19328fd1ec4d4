"""Where documents come from: tables on the Hugging Face Hub or here, and files of which each is one document.

Tables (parquet, jsonl, arrow) are read through `datasets`, which maps them into memory: any row is at hand in any process
at once, and nothing is loaded. Parquet and jsonl are converted for that once, into its cache (HF_HOME), which takes as
much disk as the text; `loading_workers` processes do it. Files of any other kind are documents as they are, and need no
`datasets`.

A document that can not be used does not end a preparation of hours. It is passed over, for one of these reasons:

    empty          no text, or none that the tokenizer makes tokens of
    not_text       null, a number, a list
    not_utf8       text or a file with bytes that are no UTF-8, such as images
    unreadable     a file that has gone, or may not be read
    too_large      more than 64 MiB; tokenizing needs a hundred times that
    untokenizable  the tokenizer itself fails on it, e.g. on millions of blanks in a row
    ends_itself    its tokens contain BOS or EOS, although special tokens' spellings are plain text

NUL and all other characters are text. A byte order mark at the start of a file is not.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.config.prepare import SourceConfig
from fast_llm.errors import DataError, MissingPackage

REASONS = ("empty", "not_text", "not_utf8", "unreadable", "too_large", "untokenizable", "ends_itself")
LARGEST = 2**26  # bytes; tokenizing takes 110 times as much memory
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TABLES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_SPLITS = {
    "train": re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)"),
    "test": re.compile(r"(^|[^a-z])(test(ing)?|eval(uation)?)([^a-z]|$)"),
    "validation": re.compile(r"(^|[^a-z])(valid(ation)?|val|dev)([^a-z]|$)"),
}


@dataclass(frozen=True)
class Odd:
    """Stands where a document can not be used."""

    reason: str


@dataclass(frozen=True)
class Source:
    """What the configuration names, found but not opened."""

    config: SourceConfig
    kind: str
    """`file`: each is a document; `saved`: a folder of Dataset.save_to_disk; `hub`; else a builder of `datasets`."""
    files: dict[str, list[str]]
    """Sorted, by split; empty for `saved` and `hub`."""
    sizes: NDArray[np.int64] | None
    """Bytes of each file that is a document."""
    digest: str | None
    """Of the files' names and sizes; None for what can only be known once it is open."""


@dataclass(frozen=True)
class Documents:
    """Rows of a table, or files. Rows are numbered from 0; their order never changes."""

    table: Any | None
    """A datasets.Dataset whose rows come as Arrow tables, or None."""
    files: list[str]
    sizes: NDArray[np.int64] | None
    field: str
    digest: str
    """Equal if the documents are, as far as can be said without reading them."""

    def __len__(self) -> int:
        return len(self.files) if self.table is None else len(self.table)

    @property
    def bytes(self) -> int:
        """About how much text there is."""
        if self.table is None:
            assert self.sizes is not None
            return int(self.sizes.sum())
        data = self.table.data
        return int(data.column(self.field).nbytes * len(self.table) / max(1, data.num_rows))

    def ranges(self, first: int, last: int, target: int) -> Iterator[tuple[int, int]]:
        """Rows [first, last) in ranges of about `target` bytes of text."""
        for block in range(first, last, 8192):
            end = min(block + 8192, last)
            total = np.cumsum(self._sizes(block, end))
            at = block
            while at < end:
                before = int(total[at - block - 1]) if at > block else 0
                until = block + int(np.searchsorted(total, before + target)) + 1
                yield at, min(until, end)
                at = min(until, end)

    def task(self, first: int, last: int) -> "Task":
        """What a process that has the table needs to know to read rows [first, last)."""
        return Task(first, last, self.files[first:last])

    def name(self, row: int) -> str:
        """Where a row is, for people."""
        return self.files[row] if self.table is None else f"row {row}"

    def _sizes(self, first: int, last: int) -> NDArray[np.int64]:
        if self.table is None:
            assert self.sizes is not None
            return self.sizes[first:last]
        import pyarrow.compute

        column = self.table[first:last].column(self.field)
        if pyarrow.types.is_null(column.type):
            return np.zeros(len(column), np.int64)
        if _is_json(column.type):
            column = pyarrow.chunked_array([chunk.storage for chunk in column.chunks], pyarrow.string())
        # From the offsets alone, without touching the text.
        lengths = pyarrow.compute.binary_length(column)
        return np.asarray(lengths.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


@dataclass(frozen=True)
class Task:
    """A range of rows; with the files that they are, if they are files."""

    first: int
    last: int
    files: list[str]

    def read(self, table: Any | None, field: str) -> Iterator[str | Odd]:
        """The documents, one for each row."""
        if table is None:
            for path in self.files:
                yield _read_file(path)
            return
        column = table[self.first : self.last].column(field)
        json_inside = _is_json(column.type)
        for value in column:
            yield _text(value, json_inside)


def _text(value: Any, json_inside: bool) -> str | Odd:
    """An Arrow scalar as text."""
    try:
        content = value.as_py()
        if json_inside and content is not None:
            content = json.loads(content)
        if isinstance(content, bytes):
            content = content.decode()
    except UnicodeDecodeError:
        return Odd("not_utf8")
    if not isinstance(content, str):
        return Odd("not_text")
    if len(content) > LARGEST:
        return Odd("too_large")
    return content or Odd("empty")


def _read_file(path: str) -> str | Odd:
    try:
        if os.stat(path).st_size > LARGEST:
            return Odd("too_large")
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig") or Odd("empty")
    except UnicodeDecodeError:
        return Odd("not_utf8")
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return Odd("unreadable")
    except OSError as error:  # a disk or network that fails: to go on would lose what is there
        raise DataError(f"{path}: can not be read: {error.strerror}; start the same command again to go on") from error


def find(config: SourceConfig) -> Source:
    """Look for the documents. Raises DataError if the configuration names nothing, or kinds that do not go together."""
    place = Path(config.path).expanduser()
    if place.exists() and config.config_name is not None:
        raise DataError(
            f"dataset.config_name: given {config.config_name}, but {config.path} is here, not on the Hub; leave it out"
        )
    if place.is_dir():
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            if config.data_files is not None or config.data_directory is not None:
                raise DataError(
                    f"dataset.data_files: {config.path} is a saved dataset; leave data_files and data_directory out"
                )
            return Source(config, "saved", {}, None, None)
        return _in_folder(config, place)
    if place.is_file() or any(sign in config.path for sign in "*?["):
        if config.data_files is not None or config.data_directory is not None:
            raise DataError(
                f"dataset.data_files: dataset.path {config.path} names files already; give the folder there, or leave"
                " data_files and data_directory out"
            )
        found = [str(place)] if place.is_file() else glob.glob(str(place), recursive=True)
        return _of_files(config, sorted(path for path in found if os.path.isfile(path)))
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or _kind(config.path) != "file":
        raise DataError(f"dataset.path: {config.path}: no such file or folder")
    return Source(config, "hub", {}, None, None)


def _in_folder(config: SourceConfig, place: Path) -> Source:
    root = place / config.data_directory if config.data_directory else place
    patterns = config.data_files if config.data_files is not None else "**/*"
    found = {
        path
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        for path in glob.glob(str(root / pattern), recursive=True)
        if os.path.isfile(path)
    }
    files = sorted(found)
    if config.data_files is None:
        # Beside tables, a folder has a README, a licence and the like.
        files = [path for path in files if _kind(path) != "file"] or files
    return _of_files(config, files, root)


def _of_files(config: SourceConfig, files: list[str], root: Path | None = None) -> Source:
    if not files:
        where = f"{config.path} with dataset.data_files {config.data_files}" if config.data_files else config.path
        raise DataError(f"dataset.path: {where}: no files there")
    kinds: dict[str, str] = {}
    for path in files:
        kinds.setdefault(_kind(path), path)
    if len(kinds) > 1:
        examples = ", ".join(f"{os.path.basename(path)} ({kind})" for kind, path in sorted(kinds.items()))
        raise DataError(
            f"dataset.path: {config.path} has files of several kinds: {examples}; choose some with dataset.data_files"
        )
    (kind,) = kinds
    if kind == "csv":
        raise DataError(f"dataset.path: {files[0]}: csv is not read; convert it to jsonl or parquet")
    if kind == "file" and config.split != "train":
        raise DataError(f"dataset.split: given {config.split}, but files of text are all `train`")
    if kind != "file":
        files = [path for path in files if os.path.getsize(path)] or files  # `datasets` stumbles over empty ones
    names = [os.path.relpath(path, root) if root else os.path.basename(path) for path in files]
    sizes = np.array([os.path.getsize(path) for path in files], np.int64)
    if not sizes.any():
        raise DataError(f"dataset.path: {config.path}: nothing but empty files")
    digest = hashlib.sha256()
    for name, size in zip(names, sizes, strict=True):
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
    splits = _by_split(names, files) if config.data_files is None and kind != "file" else {"train": files}
    return Source(config, kind, splits, sizes if kind == "file" else None, digest.hexdigest())


def _by_split(names: list[str], files: list[str]) -> dict[str, list[str]]:
    """As the Hub's folders name them: train-00000-of-00002.parquet, test/0.jsonl. All is `train` if none says so."""
    found: dict[str, list[str]] = {}
    for name, path in zip(names, files, strict=True):
        for split, words in _SPLITS.items():
            if words.search(name.lower()):
                found.setdefault(split, []).append(path)
                break
    return found if "train" in found else {"train": files}


def _kind(path: str) -> str:
    """Which builder of `datasets` reads a file; `file` for a document of plain text."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
        return "json" if _TABLES.get(suffix) == "json" else "file"
    return "csv" if suffix in (".csv", ".tsv") else _TABLES.get(suffix, "file")


def open_documents(source: Source, loading_workers: int) -> Documents:
    """Open what was found.

    Raises DataError if it can not be read or has no such column, MissingPackage without `datasets`, OSError if the
    disk is full.
    """
    config = source.config
    if source.kind == "file":
        assert source.digest is not None
        return Documents(None, source.files["train"], source.sizes, config.field, source.digest)
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise MissingPackage("datasets", "data", f"reading {config.path}") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _said_by_datasets() as said:
        try:
            rows = _load(datasets, source, loading_workers if loading_workers > 1 else None)
        except Exception as error:
            if any(isinstance(cause, OSError) and cause.errno in _FULL for cause in _causes(error)):
                raise DataError(
                    f"dataset.path: {config.path}: no room for it in the cache of `datasets`,"
                    f" {datasets.config.HF_CACHE_HOME}; set HF_HOME to a folder on a larger disk"
                ) from error
            where = "no such file or folder here, and not from the Hugging Face Hub: " if source.kind == "hub" else ""
            # What it logs names the file, what it raises does not.
            reason = said[-1] if said and source.kind != "hub" else _reason(error)
            raise DataError(f"dataset.path: {config.path}: {where}{reason}") from error
    if config.field not in rows.column_names:
        raise DataError(
            f"dataset.field: {config.path} has no column {config.field}; it has {', '.join(rows.column_names)}"
        )
    kind = rows.data.schema.field(config.field).type
    readable = ("is_string", "is_large_string", "is_binary", "is_large_binary", "is_null")
    if not any(getattr(pyarrow.types, check)(kind) for check in readable) and not _is_json(kind):
        raise DataError(f"dataset.field: column {config.field} of {config.path} holds {kind}, must be text")
    # The fingerprint follows from the files' revision on the Hub, and is noted by save_to_disk.
    digest = source.digest or hashlib.sha256(f"{rows._fingerprint} {rows.split}".encode()).hexdigest()
    return Documents(rows.select_columns([config.field]).with_format("arrow"), [], None, config.field, digest)


def _load(datasets: Any, source: Source, processes: int | None) -> Any:
    """A datasets.Dataset."""
    config = source.config
    if source.kind == "saved":
        saved = datasets.load_from_disk(str(Path(config.path).expanduser()))
        if not isinstance(saved, datasets.DatasetDict):
            if config.split not in ("train", str(saved.split)):
                raise DataError(f"it has no split {config.split}; it is {saved.split or 'not split'}")
            return saved
        if config.split not in saved:
            raise DataError(f"it has no split {config.split}; it has {', '.join(saved)}")
        return saved[config.split]
    if source.kind == "hub":
        return datasets.load_dataset(
            config.path,
            name=config.config_name,
            data_dir=config.data_directory,
            data_files=config.data_files,
            split=config.split,
            num_proc=processes,
        )
    return datasets.load_dataset(source.kind, data_files=source.files, split=config.split, num_proc=processes)


def _is_json(kind: Any) -> bool:
    """Whether a column has values of several kinds, which `datasets` keeps as JSON."""
    return str(getattr(kind, "extension_name", "")) == "arrow.json"


@contextlib.contextmanager
def _said_by_datasets() -> Iterator[list[str]]:
    """Collects the errors that `datasets` logs; it and the Hub's client print theirs once, not twice."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().splitlines()[0])

    collector = Collector(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [logger.propagate for logger in loggers]
    loggers[0].addHandler(collector)
    for logger in loggers:
        logger.propagate = False
    try:
        yield said
    finally:
        loggers[0].removeHandler(collector)
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate


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
