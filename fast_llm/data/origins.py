"""Which file and row each document of a prepared dataset came from.

`prepare` keeps two kinds of side files next to its token files:

    <prefix>.rows.npy   int64 [2, runs]: documents, rows. The documents of a token file from
                        documents[i] on are the rows of the preparation from rows[i] on, up to the
                        next run. A new run begins where documents were skipped: 16 bytes each.
    files.jsonl.gz      a line for each file that was read, in order: "row", its first row among
                        all rows; "path"; "unit", what a row of it is; "first", its number in the
                        file (lines and items from 1, rows from 0, null for a file of text)

They depend on the documents alone, not on workers. Datasets without them have documents of unknown
origin. Finding origins reads files.jsonl.gz once, about a microsecond a file, and keeps none of it.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.documents import Corpus
from fast_llm.data.tables import JsonLines, JsonValue, TextFiles
from fast_llm.data.tokenfile import file_digest

FILES = "files.jsonl.gz"
_SUFFIX = ".rows.npy"


@dataclass(frozen=True)
class Origin:
    """Where a document came from."""

    path: str
    unit: str
    """What `number` counts: line, item or row; `file` if the file is the document."""
    number: int | None

    def __str__(self) -> str:
        if self.number is None:
            return self.path
        if self.unit == "line":
            return f"{self.path}:{self.number}"
        return f"{self.path}, {self.unit} {self.number}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"path": self.path, "unit": self.unit, "number": self.number}


class RowRuns:
    """The rows of a token file's documents and their bytes of text, while it is written."""

    def __init__(self) -> None:
        self.runs: list[NDArray[np.int64]] = []
        self.documents = 0
        self.text_bytes = 0
        self.next_row = -1  # no row has this number

    def add(self, rows: NDArray[np.int64], text_bytes: NDArray[np.int64]) -> None:
        """The rows of the next documents, in order, and their bytes of text."""
        if not len(rows):
            return
        self.text_bytes += int(text_bytes.sum())
        breaks = np.flatnonzero(np.diff(rows, prepend=self.next_row - 1) != 1)
        self.runs.append(np.stack([self.documents + breaks, rows[breaks]]))
        self.documents, self.next_row = self.documents + len(rows), int(rows[-1]) + 1

    def write(self, prefix: Path, rank: int) -> str:
        """Write the file, which is complete or absent. Returns its sha256."""
        path = rows_path(prefix)
        partial = path.with_name(f"{path.name}.{rank}.partial")
        with partial.open("wb") as file:
            np.save(file, np.concatenate([np.zeros((2, 0), np.int64), *self.runs], axis=1))
            file.flush()
            os.fsync(file.fileno())
        digest = file_digest(partial)
        partial.replace(path)
        return digest


def rows_path(prefix: Path) -> Path:
    """The file of a token file's rows."""
    return prefix.with_name(prefix.name + _SUFFIX)


def write_files(folder: Path, rank: int, corpus: Corpus) -> str:
    """Write the table of files, the same from all ranks. Returns the sha256 of its lines: versions
    of zlib compress them to other bytes.
    """
    partial = folder / f"{FILES}.{rank}.partial"
    digest = hashlib.sha256()
    with partial.open("wb") as raw:
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            for entry in _entries(corpus):
                line = json.dumps(entry).encode() + b"\n"
                file.write(line)
                digest.update(line)
        raw.flush()
        os.fsync(raw.fileno())
    partial.replace(folder / FILES)
    return digest.hexdigest()


def files_problem(folder: Path, digest: str) -> str | None:
    """What is wrong with the table of files in a folder, if anything is."""
    path = folder / FILES
    try:
        with gzip.open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"{path}: no such file, so that no document's origin is known"
    except (OSError, EOFError, zlib.error):
        found = ""
    if found != digest:
        return f"{path}: its content is not what was prepared (sha256 differs)"
    return None


def _entries(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for start, (table, first, last) in zip(corpus.starts.tolist(), corpus.parts, strict=False):
        if isinstance(table, TextFiles):
            for at in range(first, last):
                row = start + at - first
                yield {"row": row, "path": table.paths[at], "unit": "file", "first": None}
            continue
        unit = {JsonLines: "line", JsonValue: "item"}.get(type(table), "row")
        number = first if unit == "row" else first + 1
        yield {"row": start, "path": table.path, "unit": unit, "first": number}


def find_origins(documents: Sequence[tuple[str, int]]) -> list[Origin | None]:
    """Where documents came from: (prefix of a token file, number in it) each.

    None for those of datasets that have no record of it.
    """
    found: list[Origin | None] = [None] * len(documents)
    rows: dict[Path, list[tuple[int, int]]] = {}  # folder → (row, place in `documents`)
    runs: dict[str, NDArray[np.int64] | None] = {}
    for place, (prefix, document) in enumerate(documents):
        if prefix not in runs:
            runs[prefix] = _read_runs(Path(prefix))
        known = runs[prefix]
        if known is None or not known.shape[1]:
            continue
        run = int(np.searchsorted(known[0], document, "right")) - 1
        row = int(known[1, run]) + document - int(known[0, run])
        rows.setdefault(Path(prefix).parent, []).append((row, place))
    for folder, wanted in rows.items():
        for place, origin in _look_up(folder / FILES, sorted(wanted)):
            found[place] = origin
    return found


def add_origins(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to parts of documents where each came from: `origin`, null if unknown, and `name`.

    `file` and `document` of a part say which document it is of.
    """
    places = [(part["file"], part["document"]) for part in parts]
    for part, origin in zip(parts, find_origins(places), strict=True):
        part["origin"] = None if origin is None else origin.as_json()
        unknown = f"{part['file']} document {part['document']:,}"
        part["name"] = unknown if origin is None else str(origin)
    return parts


def _read_runs(prefix: Path) -> NDArray[np.int64] | None:
    try:
        found: NDArray[np.int64] = np.load(rows_path(prefix), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # an older dataset, or a damaged file
        return None
    return found if found.ndim == 2 and len(found) == 2 else None


def _look_up(path: Path, wanted: list[tuple[int, int]]) -> Iterator[tuple[int, Origin]]:
    """The origins of rows, in ascending order, each with its place."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            entry, at = json.loads(next(file)), 0
            for line in file:
                following = json.loads(line)
                while at < len(wanted) and wanted[at][0] < following["row"]:
                    yield wanted[at][1], _origin(entry, wanted[at][0])
                    at += 1
                if at == len(wanted):
                    return
                entry = following
            for row, place in wanted[at:]:
                yield place, _origin(entry, row)
    except (OSError, ValueError, EOFError, KeyError, StopIteration):  # missing or damaged
        return


def _origin(entry: dict[str, Any], row: int) -> Origin:
    first = entry["first"]
    number = None if first is None else first + row - entry["row"]
    return Origin(entry["path"], entry["unit"], number)
