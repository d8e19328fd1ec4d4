"""Documents before they are prepared: which files are read, what is in them, and some of them.

Local files are opened as `prepare` opens them, which reads JSON once to count its rows. The first
documents of each file are then read, of at most a thousand files, so that a file without usable
text is found before hours of tokenizing.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fast_llm.data.columns import ArrowTable, column_names
from fast_llm.data.documents import REASONS, Corpus, Table, bad_lines
from fast_llm.data.encode import Encoder
from fast_llm.data.files import DatasetFiles
from fast_llm.data.reading import SkippedDocument, open_binary
from fast_llm.data.tables import HubTable, JsonLines, JsonValue, TextFiles
from fast_llm.terminal import short_duration

BAD_LINES = 1000  # lines that are not JSON, with which documents are still shown
SHOWN = 3  # documents, unless more are asked for
_FIRST = 3  # documents of each file that are read
_FILES = 1000  # files whose first documents are read
_LISTED = 20  # files and names that are listed
_LONG = 60  # seconds that are worth more processes
_TEXT = 60  # characters of a text that is shown in part


def describe(found: DatasetFiles, corpus: Corpus, shown: int) -> dict[str, Any]:
    """What is read, with `shown` documents."""
    paths = [path for files in found.files.values() for path in files]
    tables = list({id(table): table for table, _, _ in corpus.parts}.values())
    rows = len(corpus) - corpus.blank_rows
    bad = list(bad_lines(corpus.parts))
    return {
        "kind": "raw",
        "path": found.config.path,
        "format": found.kind,
        "split": found.config.split,
        "field": None if found.kind == "file" else found.config.field,
        "columns": columns(tables[0]) if tables else [],
        "documents": rows,
        "text_bytes": corpus.bytes,
        "files": len(paths),
        "file_bytes": sum(found.sizes.values()),
        "listed_files": [
            {"path": path, "bytes": found.sizes[path], "documents": _rows_of(path, tables)}
            for path in paths[:_LISTED]
        ],
        "left_out": [list(each) for each in found.left_out[:_LISTED]],
        "left_out_files": len(found.left_out),
        "unusable": unusable_files(corpus),
        "not_json": bad[:_LISTED],
        "not_json_lines": len(bad),
        "sample": [
            {"name": name, "text": text}
            if isinstance(text, str)
            else {"name": name, "skipped": text.reason}
            for name, text in sample(corpus, shown)
        ],
    }


def columns(table: Table) -> list[str]:
    """The columns of a table; of JSON, the keys of its first object."""
    if isinstance(table, TextFiles):
        return []
    if isinstance(table, HubTable):
        return [str(name) for name in table.table.column_names]
    if isinstance(table, ArrowTable):
        return column_names(table.path, table.parquet)
    with open_binary(table.path) as file:
        start = file.read(2**20).decode("utf-8", "replace").lstrip("\ufeff \t\r\n[")
    with contextlib.suppress(ValueError, RecursionError):
        value, _ = json.JSONDecoder().raw_decode(start)
        return [str(key) for key in value] if isinstance(value, dict) else []
    return []


def _rows_of(path: str, tables: Sequence[Table]) -> int | None:
    for table in tables:
        if isinstance(table, TextFiles):
            return 1
        if table.path == path:
            return table.rows - table.blank_rows
    return None


def sample(corpus: Corpus, count: int) -> Iterator[tuple[str, str | SkippedDocument]]:
    """Names and texts of about `count` rows, evenly spread.

    Of parquet and compressed files, from places that can be read fast.
    """
    used: dict[tuple[int, int], int] = {}
    for row in np.linspace(0, len(corpus) - 1, min(len(corpus), count)).astype(np.int64).tolist():
        part = int(np.searchsorted(corpus.starts, row, "right")) - 1
        table, before, _ = corpus.parts[part]
        near = table.nearby_row(before + row - int(corpus.starts[part]))
        near += (again := used.get((part, near), 0))
        used[part, near - again] = again + 1
        yield from _texts(corpus, table, near, near + 1)


def _texts(
    corpus: Corpus, table: Table, first: int, last: int
) -> Iterator[tuple[str, str | SkippedDocument]]:
    """Rows [first, last) of a table, without blank lines."""
    at = first
    for task in table.tasks(first, last, 0, 1):
        for text in corpus.reader.texts(task):
            if text is not None:
                yield table.name(at), text
            at += 1


def unusable_files(corpus: Corpus) -> list[dict[str, str]]:
    """Files whose first documents are all unusable, each with the reason.

    Of text files, some that are evenly spread. Raises DataError for a line that is not JSON.
    """
    found = []
    for table, first, last in _first_rows(corpus):
        texts = list(itertools.islice(_texts(corpus, table, first, last), _FIRST))
        skipped = [text for _, text in texts if isinstance(text, SkippedDocument)]
        if texts and len(skipped) == len(texts):
            path = table.paths[first] if isinstance(table, TextFiles) else table.path
            found.append({"path": path, "reason": REASONS[skipped[0].reason]})
    return found


def _first_rows(corpus: Corpus) -> Iterator[tuple[Table, int, int]]:
    parts = [part for part in corpus.parts if part[1] < part[2]]
    for at in np.linspace(0, len(parts) - 1, min(len(parts), _FILES)).astype(int).tolist():
        table, first, last = parts[at]
        if isinstance(table, TextFiles):
            for row in np.linspace(first, last - 1, min(last - first, _FILES)).astype(int).tolist():
                yield table, row, row + 1
        elif isinstance(table, JsonLines | ArrowTable | HubTable):
            yield table, first, min(first + _FIRST, last)
        elif isinstance(table, JsonValue):  # was parsed completely when it was opened
            continue


@dataclass(frozen=True)
class Estimate:
    """What tokenizing all documents will take, by a sample."""

    file_bytes: float
    """Of the token files."""
    tokens: int
    seconds: float
    """Of one worker that tokenizes with `tokenizers`."""


def estimate(corpus: Corpus, encoder: Encoder, texts: list[str]) -> Estimate:
    """Tokenize a sample of the documents, and scale to the size of all."""
    size = sum(len(text.encode()) for text in texts)
    encoder.encode(texts[:1])  # the first call loads and allocates
    started = time.perf_counter()
    encoded = sum(len(content or b"") for content in encoder.encode(texts))
    seconds = time.perf_counter() - started
    scale, itemsize = corpus.bytes / max(size, 1), encoder.dtype.itemsize
    # An index has 20 bytes a document (tokenfile.py); BOS and EOS are two tokens.
    tokens = encoded * scale / itemsize + 2 * len(corpus)
    file_bytes = tokens * itemsize + 20 * len(corpus)
    return Estimate(file_bytes, int(float(f"{tokens:.3g}")), seconds * scale)


def summary(corpus: Corpus, seconds: float, workers: int) -> list[tuple[str, str]]:
    """Some documents, files without usable text, and the time of tokenizing, as labelled lines.

    `seconds`: that one worker needs.
    """
    lines = [
        ("sample", f"{name}: {_short(text)}")
        for name, text in sample(corpus, SHOWN)
        if isinstance(text, str)
    ]
    unusable = unusable_files(corpus)
    lines += [
        ("no text", f"{each['path']}: its first documents are {each['reason']}")
        for each in unusable[:_LISTED]
    ]
    if (more := len(unusable) - _LISTED) > 0:
        lines.append(("no text", f"the first documents of {more:,} more files cannot be used"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"at most about {short_duration(max(1, seconds / workers))} to tokenize with"
    more_cores = cores is not None and cores > workers and seconds / workers > _LONG
    hint = f"; this machine has {cores} cores: tokenize_workers={cores}" if more_cores else ""
    lines.append(("time", f"{text} tokenize_workers={workers}{hint}"))
    return lines


def _short(text: str) -> str:
    shown = text if len(text) <= _TEXT else text[:_TEXT] + "…"
    return f"{shown!r}, {len(text.encode()):,} bytes"
