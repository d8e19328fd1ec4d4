"""What a worker process reads: files of text, lines of JSON, columns of text.

Tasks name some rows and carry what is needed to read them; `Reader.texts` gives one result for each row: the text as it
was written, an `SkippedDocument` where the row is no usable document, or None for a blank line, which is no row.

Only the field is looked at: what other columns hold, and how other rows are written, never matters. A line that is no
JSON ends the preparation with its file and line number, since nobody knows what else is wrong with such a file.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from fast_llm.errors import DataError, MissingPackage

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_BOM = "\ufeff"


@dataclass(frozen=True)
class SkippedDocument:
    """Stands where a document can not be used."""

    reason: str


@dataclass(frozen=True)
class FilesTask:
    """Files of which each is a document."""

    first: int
    last: int
    paths: list[str]


@dataclass(frozen=True)
class LinesTask:
    """Lines of JSON, one a row: a few of those in a block of a file."""

    first: int
    last: int
    path: str
    number: int
    """Of the block's first line, from 1."""
    skip: int
    """So many lines of the block come before row `first`."""
    offset: int
    size: int
    """Where the block is in the file, in bytes."""
    content: bytes | None
    """The block itself, where a worker cannot reach it: in compressed files."""


@dataclass(frozen=True)
class ColumnTask:
    """A part of a column of text."""

    first: int
    last: int
    lengths: NDArray[np.int64]
    """Bytes of each row; -1 for what is not text."""
    data: bytes
    json: bool
    """Whether each is JSON that may hold text."""


@dataclass(frozen=True)
class ItemsTask:
    """Values of the field in a file that is one JSON array or object."""

    first: int
    last: int
    values: list[str | SkippedDocument]


@dataclass(frozen=True)
class RowsTask:
    """Rows of the table that the reader holds."""

    first: int
    last: int
    begin: int
    """The number of `first` in the table."""


Task = FilesTask | LinesTask | ColumnTask | ItemsTask | RowsTask


@dataclass(frozen=True)
class Reader:
    """How documents are read; the same in all processes."""

    field: str
    max_bytes: int
    """Bytes of UTF-8; a document with more is left out."""
    table: Any | None = None
    """A datasets.Dataset whose rows come as Arrow tables, or None."""

    def texts(self, task: Task) -> Iterator[str | SkippedDocument | None]:
        """One for each row, in order; None where a line is blank_rows.

        Raises DataError for a line that is no JSON, and for disks that fail.
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
            column = self.table[task.begin : last].column(self.field)
            json_inside = is_json_column(column.type)
            for value in column:
                yield self._scalar(value, json_inside)

    def document(self, content: Any) -> str | SkippedDocument:
        """What was found in a row, as a document."""
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
        """A file of text; compressed ones by their names."""
        try:
            if not path.lower().endswith(COMPRESSED) and os.stat(path).st_size > self.max_bytes:
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
        except OSError as error:  # of a disk or network: skipping the file would lose what is in it
            raise DataError(
                f"{path}: can not be read: {error.strerror}; start the same command again to go on"
            ) from error

    def values(self, parsed: Any) -> str | SkippedDocument:
        """The document in a row of JSON."""
        if isinstance(parsed, SkippedDocument):
            return parsed
        return self.document(parsed.get(self.field) if isinstance(parsed, dict) else None)

    def _lines(self, task: LinesTask) -> Iterator[str | SkippedDocument | None]:
        content = task.content
        if content is None:
            try:
                with open(task.path, "rb") as file:
                    file.seek(task.offset)
                    content = file.read(task.size)
            except OSError as error:
                raise DataError(
                    f"{task.path}: can not be read: {error.strerror}; start the same command again to go on"
                ) from error
        lines = split_lines(content)[task.skip : task.skip + task.last - task.first]
        if len(lines) != task.last - task.first:
            raise DataError(
                f"{task.path}: has changed while it was read; start the same command again"
            )
        for number, line in enumerate(lines, task.number + task.skip):
            yield self.values(parse_line(line, task.path, number)) if line.strip() else None

    def _column(self, task: ColumnTask) -> Iterator[str | SkippedDocument]:
        at = 0
        for length in task.lengths.tolist():
            if length < 0:
                yield SkippedDocument("not_text")
                continue
            try:
                text: Any = task.data[at : at + length].decode()
                yield self.values({self.field: parse(text)}) if task.json else self.document(text)
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


def is_json_column(kind: Any) -> bool:
    """Whether an Arrow column has values of several kinds, which `datasets` keeps as JSON."""
    return str(getattr(kind, "extension_name", "")) == "arrow.json"


def split_lines(block: bytes) -> list[bytes]:
    """Lines of a block that ends with one, or with the file."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_line(line: bytes, path: str, number: int) -> Any:
    """A line of JSON that is not blank_rows. Bytes that are not UTF-8 become surrogates, so that they only matter in the field.

    Raises DataError with file and line.
    """
    try:
        return parse(line.decode("utf-8", "surrogateescape").removeprefix(_BOM))
    except json.JSONDecodeError as error:
        raise invalid_json(path, number, error, line) from None


def parse(text: str) -> Any:
    """JSON to values; an SkippedDocument for what is JSON and beyond Python's reader. Raises json.JSONDecodeError."""
    try:
        return json.loads(text)
    except RecursionError:
        return SkippedDocument("unreadable")
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of thousands of digits
        return json.loads(text, parse_int=float)


def invalid_json(path: str, number: int, error: json.JSONDecodeError, line: bytes) -> DataError:
    """The error for a line that is no JSON."""
    if line.startswith(b"version https://git-lfs"):
        return DataError(
            f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return DataError(
            f"{path}: is in UTF-16, must be UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`"
        )
    return DataError(
        f"{path}:{number}: not JSON: {error.msg}, at character {error.colno} of the line; mend the line or delete it"
    )


class DamagedFile(Exception):
    """A compressed file that is not what its name says, or is cut off."""


def open_binary(path: str) -> BinaryIO:
    """A file, decompressed if its name says it is compressed. Reading it raises DamagedFile where that fails."""
    suffix = os.path.splitext(path.lower())[1]
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise MissingPackage("zstandard", f"reading {path}") from error
        return cast(
            BinaryIO,
            io.BufferedReader(_NormalizedErrors(_ZstdStream(open(path, "rb"), zstandard)), 2**17),
        )
    if suffix in COMPRESSED:
        library: Any = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix]
        return cast(BinaryIO, io.BufferedReader(_NormalizedErrors(library.open(path, "rb")), 2**17))
    return open(path, "rb")


class _NormalizedErrors(io.RawIOBase):
    """Each library has errors of its own for damaged files."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found: int = self.stream.readinto(buffer)
            return found
        except OSError as error:
            if error.errno is not None:  # of the disk
                raise
            raise DamagedFile(str(error)) from error
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise DamagedFile(str(error)) from error

    def close(self) -> None:
        self.stream.close()
        super().close()


class _ZstdStream(io.RawIOBase):
    """Frames one after the other. The library's own reader takes a file that is cut off for a complete one."""

    def __init__(self, file: BinaryIO, library: Any):
        self.file, self.library = file, library
        # Files may say that they need more memory than the library allows by default: those of `zstd --long=31` do.
        self.decompressor = library.ZstdDecompressor(max_window_size=2**31)
        self.frame: Any | None = None
        self.input = b""
        self.output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            self.input = self.input or self.file.read(
                2**13
            )  # which may become 10,000 times as much
            if not self.input:
                if self.frame is not None:
                    raise EOFError("it is cut off")
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
