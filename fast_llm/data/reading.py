"""What a worker process reads: files of text, lines of JSON, columns of text.

A task names some rows and carries what is needed to read them. `Reader.texts` gives one result per
row: the text exactly as it was written, a SkippedDocument for a row that cannot be used, or None
for a blank line.

Only the field is looked at. What other columns hold, and how other rows are written, does not
matter. A line that is not JSON ends the preparation with its file and line number, unless
`dataset.max_bad_lines` allows to skip it.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.masks import masked_text
from fast_llm.data.object_store import StoredObject, open_object
from fast_llm.errors import DataError, MissingPackage, lfs_problem

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
NOT_JSON = "not_json"  # the reason for which a bad line is skipped
WRONG_SPANS = "wrong_spans"
_BOM = "\ufeff"
_BLANK = object()  # takes the place of a row
_NESTING = {dict, list}
_DEEP = 500  # braces and brackets of a line that may be nested too deeply for Python's json


@dataclass(frozen=True)
class SkippedDocument:
    """Takes the place of a document that cannot be used."""

    reason: str  # one of documents.REASONS


@dataclass(frozen=True)
class FilesTask:
    """Files; each is a document."""

    first: int
    last: int
    paths: list[str]


@dataclass(frozen=True)
class LinesTask:
    """Lines of JSON, one per row: some lines of a block of a file."""

    first: int
    last: int
    path: str
    number: int
    """The number of the block's first line, from 1."""
    skip: int
    """Lines of the block before row `first`."""
    offset: int
    size: int
    """The block is the bytes [offset, offset + size) of the file."""
    content: bytes | None
    """The block itself, if the file is compressed: a worker cannot seek in it."""


@dataclass(frozen=True)
class ColumnTask:
    """Part of a column of text."""

    first: int
    last: int
    lengths: NDArray[np.int64]
    """[rows]: bytes of each; -1 if it is not text."""
    data: bytes
    json: bool
    """Whether the values are JSON, which may hold text."""
    spans: list[Any] | None = None
    """[rows]: the masked spans of each; None if the file has no such column."""


@dataclass(frozen=True)
class ItemsTask:
    """Documents from a file that is one JSON array or object."""

    first: int
    last: int
    values: list[str | SkippedDocument]


@dataclass(frozen=True)
class RowsTask:
    """Rows of the table in the Reader."""

    first: int
    last: int
    begin: int
    """The number of `first` in the table."""


Task = FilesTask | LinesTask | ColumnTask | ItemsTask | RowsTask


@dataclass(frozen=True)
class Reader:
    """Reads tasks, in the same way in all processes."""

    field: str
    max_bytes: int
    """A document with more bytes of UTF-8 is skipped."""
    max_bad_lines: int = 0
    """0: a line that is not JSON raises BadLine. Else it is skipped; the caller counts them."""
    table: Any | None = None
    """A datasets.Dataset whose rows come as Arrow tables, or None."""
    deduplicate: bool = False
    """Whether documents get a digest of their text."""
    filter: str | None = None
    """The user's filter (filtering.py), as module:function."""
    masks: str | None = None
    """The column with spans of characters that are masked (masks.py)."""

    def texts(self, task: Task) -> Iterator[str | SkippedDocument | None]:
        """The text of each row, in order; None for a blank line.

        Raises DataError for a line that is not JSON, and if the disk fails.
        """
        if isinstance(task, FilesTask):
            for path in task.paths:
                yield self.file(path)
        elif isinstance(task, LinesTask):
            yield from self._lines(task)
        elif isinstance(task, ItemsTask):
            yield from task.values
        elif isinstance(task, ColumnTask):
            yield from self._column(task)
        else:
            assert self.table is not None
            last = task.begin + task.last - task.first
            rows = self.table[task.begin : last]
            column = rows.column(self.field)
            json_inside = is_json_column(column.type)
            spans = itertools.repeat(None) if self.masks is None else rows.column(self.masks)
            for value, given in zip(column, spans, strict=False):
                masked = None if given is None else given.as_py()
                yield self._masked(self._scalar(value, json_inside), masked)

    def document(self, content: Any) -> str | SkippedDocument:
        """The content of a field as a document."""
        if not isinstance(content, str):
            return SkippedDocument("not_text")
        try:
            size = len(content) if content.isascii() else len(content.encode())
        except UnicodeEncodeError:  # half of a surrogate pair, or bytes that are not UTF-8
            return SkippedDocument("not_utf8")
        if size > self.max_bytes:
            return SkippedDocument("too_large")
        return content or SkippedDocument("empty")

    def file(self, path: str) -> str | SkippedDocument:
        """A text file as a document. Its name says whether it is compressed."""
        try:
            if not path.lower().endswith(COMPRESSED) and size_of(path) > self.max_bytes:
                return SkippedDocument("too_large")
            with open_binary(path) as file:
                content = file.read(self.max_bytes + 1)
            return (
                SkippedDocument("too_large")
                if len(content) > self.max_bytes
                else content.decode("utf-8-sig") or SkippedDocument("empty")
            )
        except UnicodeDecodeError:
            return SkippedDocument("not_utf8")
        except (FileNotFoundError, PermissionError, IsADirectoryError, DamagedFile):
            return SkippedDocument("unreadable")
        except (
            OSError
        ) as error:  # of the disk or network: skipping the file would lose its document
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; run the same command again to resume"
            ) from error

    def values(self, parsed: Any) -> str | SkippedDocument:
        """A parsed row of JSON as a document."""
        if isinstance(parsed, SkippedDocument):
            return parsed
        row = parsed if isinstance(parsed, dict) else {}
        spans = None if self.masks is None else row.get(self.masks)
        return self._masked(self.document(row.get(self.field)), spans)

    def _masked(self, found: str | SkippedDocument, spans: Any) -> str | SkippedDocument:
        """A document with the spans that its row has in the column of masks."""
        if self.masks is None or not isinstance(found, str):
            return found
        return masked_text(found, spans) or SkippedDocument(WRONG_SPANS)

    def _lines(self, task: LinesTask) -> Iterator[str | SkippedDocument | None]:
        content = task.content
        if content is None:
            try:
                with open_ranges(task.path) as file:
                    file.seek(task.offset)
                    content = file.read(task.size)
            except OSError as error:
                raise DataError(
                    f"{task.path}: cannot be read: {error.strerror}; run the same command again to"
                    " resume"
                ) from error
        lines = split_lines(content)[task.skip : task.skip + task.last - task.first]
        if len(lines) != task.last - task.first:
            raise DataError(f"{task.path}: changed while it was read; run the same command again")
        parse = _fast_parser()
        for number, line in enumerate(lines, task.number + task.skip):
            try:
                row = parse(line)
            except ValueError:
                row = self.parse(line, task.path, number) if line.strip() else _BLANK
            yield None if row is _BLANK else self.values(row)

    def parse(self, line: bytes, path: str, number: int) -> Any:
        """`parse_line`, with a SkippedDocument for a bad line that may be skipped."""
        try:
            return parse_line(line, path, number)
        except BadLine:
            if not self.max_bad_lines:
                raise
            return SkippedDocument(NOT_JSON)

    def _column(self, task: ColumnTask) -> Iterator[str | SkippedDocument]:
        at = 0
        spans = task.spans or itertools.repeat(None)
        for length, masked in zip(task.lengths.tolist(), spans, strict=False):
            if length < 0:
                yield SkippedDocument("not_text")
                continue
            try:
                text: Any = task.data[at : at + length].decode()
                yield self._masked(self.document(parse(text) if task.json else text), masked)
            except UnicodeDecodeError:
                yield SkippedDocument("not_utf8")
            at += length

    def _scalar(self, value: Any, json_inside: bool) -> str | SkippedDocument:
        """An Arrow scalar as a document."""
        try:
            content = value.as_py()
            if json_inside and content is not None:
                content = parse(content)
            if isinstance(content, bytes):
                content = content.decode()
        except UnicodeDecodeError:
            return SkippedDocument("not_utf8")
        return self.document(content)


def _fast_parser() -> Callable[[bytes], Any]:
    """`orjson`, which gives the values of Python's `json` where it gives any.

    It raises ValueError for lines that `parse_line` must read: blank or damaged ones, bytes that
    are not UTF-8, lone surrogates, NaN and large integers.
    """
    try:
        import orjson
    except ImportError:
        return _leave_to_json

    def parse(line: bytes) -> Any:
        value = orjson.loads(line)
        # Python's limit of nesting is a little lower, and rows beyond it are `unreadable`.
        inside = value.values() if type(value) is dict else (value,)
        nests = not _NESTING.isdisjoint(map(type, inside))
        if nests and line.count(b"{") + line.count(b"[") > _DEEP:
            raise ValueError
        return value

    return parse


def _leave_to_json(line: bytes) -> Any:
    raise ValueError


def is_json_column(kind: Any) -> bool:
    """Whether an Arrow column holds JSON, as `datasets` stores values of several types."""
    return str(getattr(kind, "extension_name", "")) == "arrow.json"


def split_lines(block: bytes) -> list[bytes]:
    """The lines of a block, which ends with a line or with the file."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_line(line: bytes, path: str, number: int) -> Any:
    """A non-blank line of JSON. Bytes that are not UTF-8 become surrogates, so that they matter
    only in the field.

    Raises DataError with file and line: BadLine, unless the complete file has another format.
    """
    try:
        return parse(line.decode("utf-8", "surrogateescape").removeprefix(_BOM))
    except json.JSONDecodeError as error:
        found = invalid_json(path, number, error, line)
        if not isinstance(found, BadLine):
            raise found from None
        advice = f"{found}, or set dataset.max_bad_lines to skip such lines"
        raise BadLine(advice) from None


def too_many_bad_lines(where: str, allowed: int) -> DataError:
    """The error for a bad line after as many as dataset.max_bad_lines allows."""
    return DataError(
        f"{where}: not JSON, after {allowed:,} other such line{'' if allowed == 1 else 's'};"
        f" dataset.max_bad_lines allows {allowed:,}: fix the lines or delete them, or raise it and"
        " run the same command again"
    )


def parse(text: str) -> Any:
    """JSON to values; a SkippedDocument for JSON that Python cannot read. Raises
    json.JSONDecodeError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        return SkippedDocument("unreadable")
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of thousands of digits
        return json.loads(text, parse_int=float)


def invalid_json(path: str, number: int, error: json.JSONDecodeError, line: bytes) -> DataError:
    """The error for a line that is not JSON."""
    if problem := lfs_problem(path, line):
        return DataError(problem)
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return DataError(
            f"{path}: encoded as UTF-16, must be UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`"
        )
    return BadLine(
        f"{path}:{number}: not JSON: {error.msg}, at character {error.colno} of the line; fix the"
        " line or delete it"
    )


class BadLine(DataError):
    """A line that is not JSON, in a file that may have others."""


class DamagedFile(Exception):
    """A compressed file is truncated, or is not what its name says."""


def open_binary(path: str) -> BinaryIO:
    """A file, decompressed if its name says that it is compressed. Reading it raises DamagedFile if
    that fails.
    """
    suffix = os.path.splitext(path.lower())[1]
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise MissingPackage("zstandard", f"reading {path}") from error
        return cast(
            BinaryIO,
            io.BufferedReader(_NormalizedErrors(_ZstdStream(_open(path), zstandard)), 2**17),
        )
    if suffix in COMPRESSED:
        library: Any = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix]
        source: Any = open_object(path) if isinstance(path, StoredObject) else path
        return cast(
            BinaryIO, io.BufferedReader(_NormalizedErrors(library.open(source, "rb")), 2**17)
        )
    return _open(path)


def _open(path: str) -> BinaryIO:
    return open_object(path) if isinstance(path, StoredObject) else open(path, "rb")


def open_ranges(path: str) -> BinaryIO:
    """A file of which some ranges are read, as it is stored."""
    return open_object(path, ranges=True) if isinstance(path, StoredObject) else open(path, "rb")


def size_of(path: str) -> int:
    """The size of a file in bytes."""
    return path.size if isinstance(path, StoredObject) else os.stat(path).st_size


class _NormalizedErrors(io.RawIOBase):
    """A stream whose library's errors for damaged data become DamagedFile."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found: int = self.stream.readinto(buffer)
            return found
        except OSError as error:
            if error.errno is not None:  # a failure of the disk
                raise
            raise DamagedFile(str(error)) from error
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise DamagedFile(str(error)) from error

    def close(self) -> None:
        self.stream.close()
        super().close()


class _ZstdStream(io.RawIOBase):
    """Decompresses all frames of a file. The library's own reader accepts a truncated file as
    complete.
    """

    def __init__(self, file: BinaryIO, library: Any):
        self.file, self.library = file, library
        # Files of `zstd --long=31` need a larger window than the library allows by default.
        self.decompressor = library.ZstdDecompressor(max_window_size=2**31)
        self.frame: Any | None = None
        self.input = b""
        self.output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            # Small pieces: they may decompress to 10,000 times their size.
            self.input = self.input or self.file.read(2**13)
            if not self.input:
                if self.frame is not None:
                    raise EOFError("it is truncated")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.output = memoryview(self.frame.decompress(self.input))
            except self.library.ZstdError as error:
                raise EOFError(str(error)) from error
            self.input = b""
            if self.frame.eof:
                self.input, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.output))
        buffer[:size] = self.output[:size]
        self.output = self.output[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
