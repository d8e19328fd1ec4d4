"""Tables of rows: text files, JSON lines, files that are one JSON value, and tables of `datasets`.

Opening JSON counts its rows in one pass, at about a gigabyte a second. Rows of a file are numbered
from 0. In JSON lines a row is a line; a blank line has a number but is not a document.

Every table, also ArrowTable in columns.py, has

    rows, blank_rows                   number of rows, and how many of them are blank lines
    bytes                              estimated bytes of text
    missing_field                      why no row has text in the column; None if some may
    name(row)                          where a row is, for messages
    nearby_row(row)                    a row close by that can be read fast
    tasks(first, last, begin, target)  rows [first, last) in tasks of about `target` bytes; row
                                       `first` has the number `begin` among all documents

Workers read plain JSON lines themselves. Compressed files and single JSON values can only be read
from their beginning, so the parent process reads them, once, and sends their content.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.reading import (
    COMPRESSED,
    NOT_JSON,
    BadLine,
    DamagedFile,
    FilesTask,
    ItemsTask,
    LinesTask,
    Reader,
    RowsTask,
    SkippedDocument,
    Task,
    invalid_json,
    is_json_column,
    open_binary,
    parse_line,
    split_lines,
    too_many_bad_lines,
)
from fast_llm.errors import DataError

BLOCK = 2**20  # bytes of JSON lines between two recorded offsets
_LARGEST_JSON = 2**31  # bytes of a file that is one JSON value, all of which is read at once
_OPENING = b"{"[0]
_CLOSING = b"}"[0]
_RETURN, _NEWLINE = b"\r"[0], b"\n"[0]


@dataclass(frozen=True)
class TextFiles:
    """Files; each is a document."""

    paths: list[str]
    sizes: NDArray[np.int64]
    """[files]: bytes of text, an estimate for compressed files."""
    blank_rows: int = 0
    missing_field: str | None = None

    @property
    def rows(self) -> int:
        return len(self.paths)

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    def name(self, row: int) -> str:
        return self.paths[row]

    def nearby_row(self, row: int) -> int:
        return row

    def tasks(self, first: int, last: int, begin: int, target: int) -> Iterator[Task]:
        for at in range(first, last, 8192):
            sizes = self.sizes[at : min(at + 8192, last)]
            for one, end in ranges_by_size(sizes, target):
                yield FilesTask(
                    begin + at - first + one,
                    begin + at - first + end,
                    self.paths[at + one : at + end],
                )


@dataclass(frozen=True)
class HubTable:
    """A dataset from the Hub or from Dataset.save_to_disk, mapped into memory by `datasets`."""

    table: Any
    field: str
    path: str
    blank_rows: int = 0
    missing_field: str | None = None

    @property
    def rows(self) -> int:
        return len(self.table)

    @property
    def bytes(self) -> int:
        data = self.table.data
        return int(data.column(self.field).nbytes * len(self.table) / max(1, data.num_rows))

    def name(self, row: int) -> str:
        return f"{self.path}, row {row}"

    def nearby_row(self, row: int) -> int:
        return row

    def tasks(self, first: int, last: int, begin: int, target: int) -> Iterator[Task]:
        for at in range(first, last, 8192):
            for one, end in ranges_by_size(self._sizes(at, min(at + 8192, last)), target):
                yield RowsTask(begin + at - first + one, begin + at - first + end, at + one)

    def _sizes(self, first: int, last: int) -> NDArray[np.int64]:
        import pyarrow.compute

        column = self.table[first:last].column(self.field)
        if pyarrow.types.is_null(column.type):
            return np.zeros(len(column), np.int64)
        if is_json_column(column.type):
            column = pyarrow.chunked_array(
                [chunk.storage for chunk in column.chunks], pyarrow.string()
            )
        # Reads only the offsets, not the text.
        lengths = pyarrow.compute.binary_length(column)
        return np.asarray(lengths.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


@dataclass(frozen=True)
class JsonLines:
    """A file of JSON lines."""

    path: str
    rows: int
    """Lines, including blank ones."""
    blank_rows: int
    bytes: int
    missing_field: str | None
    offsets: NDArray[np.int64]
    """[blocks + 1]: where each block begins in the decompressed file, in bytes, and where the last
    one ends."""
    lines: NDArray[np.int64]
    """[blocks + 1]: lines before each block, and the total."""
    bad_rows: tuple[int, ...] = ()
    """Rows that were seen not to be JSON while rows were counted; others may be bad too."""

    def name(self, row: int) -> str:
        return f"{self.path}:{row + 1}"

    def nearby_row(self, row: int) -> int:
        if not self.path.lower().endswith(COMPRESSED):
            return row
        return row % int(self.lines[1])

    def tasks(self, first: int, last: int, begin: int, target: int) -> Iterator[Task]:
        packed = self.path.lower().endswith(COMPRESSED)
        with contextlib.ExitStack() as stack:
            with _readable(self.path):
                file = stack.enter_context(open_binary(self.path)) if packed else None
                blocks = None if file is None else _blocks(file, self.path)
            for number in range(len(self.lines) - 1):
                before, behind = int(self.lines[number]), int(self.lines[number + 1])
                if before >= last:
                    return
                content = _next(blocks, self.path) if blocks is not None else None
                if behind <= first:
                    continue
                offset, size = (
                    int(self.offsets[number]),
                    int(self.offsets[number + 1] - self.offsets[number]),
                )
                pieces = max(1, min(size // target, behind - before))
                edges = [
                    before + (behind - before) * piece // pieces for piece in range(pieces + 1)
                ]
                for one, end in itertools.pairwise(edges):
                    one, end = max(one, first), min(end, last)
                    if one < end:
                        rows = (begin + one - first, begin + end - first)
                        yield LinesTask(
                            *rows, self.path, before + 1, one - before, offset, size, content
                        )

    def line(self, row: int) -> int:
        """The line of row `row`, not counting blank lines."""
        if not self.blank_rows:
            return row
        before = 0
        with open_binary(self.path) as file:
            for at, line in enumerate(file):
                if line.strip():
                    if before == row:
                        return at
                    before += 1
        return self.rows


def _blocks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """Blocks of a file, each of complete lines. Raises DataError for a line that is too long to be
    read, before it fills the memory.
    """
    before = 0
    while block := file.read(BLOCK):
        rest = file.readline(_LARGEST_JSON)
        if len(rest) == _LARGEST_JSON and not rest.endswith(b"\n"):
            raise DataError(
                f"{path}: the line at byte {before + len(block):,} is longer than"
                f" {_LARGEST_JSON / 2**30:.3g} GiB; write one document in each line"
            )
        before += len(block) + len(rest)
        yield block + rest


def _next(blocks: Iterator[bytes], path: str) -> bytes:
    try:
        return next(blocks)
    except (DamagedFile, StopIteration) as error:
        raise DataError(f"{path}: changed while it was read; run the same command again") from error


@dataclass(frozen=True)
class JsonValue:
    """A file that is one JSON array, or objects that span several lines."""

    path: str
    field: str
    max_bytes: int
    rows: int
    bytes: int
    missing_field: str | None
    blank_rows: int = 0
    masks: str | None = None
    """The column with spans of characters that are masked."""

    def name(self, row: int) -> str:
        return f"{self.path}, item {row + 1}"

    def nearby_row(self, row: int) -> int:
        return row % 64

    def tasks(self, first: int, last: int, begin: int, target: int) -> Iterator[Task]:
        reader = Reader(self.field, self.max_bytes, masks=self.masks)
        values, size, at = list[str | SkippedDocument](), 0, begin
        for row, value in enumerate(_values(self.path)):
            if row < first:
                continue
            if row >= last:
                break
            # A list of texts is read as a table with the single column `text`.
            found = (
                reader.document(value)
                if isinstance(value, str) and self.field == "text"
                else reader.values(value)
            )
            values.append(found)
            size += len(found) if isinstance(found, str) else 0
            if size >= target:
                yield ItemsTask(at, at + len(values), values)
                at, values, size = at + len(values), [], 0
        if values:
            yield ItemsTask(at, at + len(values), values)


_SPACE = re.compile(r"[ \t\n\r]*")


def _values(path: str) -> Iterator[Any]:
    """The elements of an array, or the objects in a file, one at a time: parsed values take ten
    times the memory of text.
    """
    with _readable(path), open_binary(path) as file:
        content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise DataError(
            f"{path}: larger than 2 GiB, and not one JSON object per line; convert it to jsonl"
        )
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    decoder = json.JSONDecoder(parse_int=_integer)
    at = _skip(text, 0)
    array = text.startswith("[", at)
    try:
        at = _skip(text, at + 1) if array else at
        while at < len(text) and not (array and text.startswith("]", at)):
            value, at = decoder.raw_decode(text, at)
            yield value
            at = _skip(text, at)
            if array and not text.startswith("]", at):
                if not text.startswith(",", at):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
                at = _skip(text, at + 1)
        if array and at == len(text):
            raise json.JSONDecodeError("Expecting ']'", text, at)
        if array and _skip(text, at + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, _skip(text, at + 1))
    except json.JSONDecodeError as error:
        raise invalid_json(path, error.lineno, error, content[:64]) from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be read; convert it to jsonl") from None


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _integer(digits: str) -> float:
    """Python refuses to parse integers of thousands of digits, whose value does not matter here."""
    return int(digits) if len(digits) < 4000 else float(digits)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except DamagedFile as error:
        raise DataError(
            f"{path}: damaged, or not the format that its name says: {error}; download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def open_json(path: str, reader: Reader, stop: Any) -> "JsonLines | JsonValue":
    """Count the rows of a file. `stop`: an Event that ends it early. Raises DataError if it is not
    JSON.
    """
    with _readable(path), open_binary(path) as file:
        blocks = _blocks(file, path)
        block = next(blocks, b"")
        found = block.removeprefix(b"\xef\xbb\xbf").lstrip()
        if found.startswith(b"["):
            return _open_value(path, reader)
        lines = split_lines(block)
        number = next((number for number, line in enumerate(lines) if line.strip()), None)
        if number is not None:
            try:
                parse_line(lines[number], path, number + 1)
            except DataError as error:
                # Perhaps one object that spans several lines. If it is not JSON either, report the
                # first line.
                with contextlib.suppress(DataError):
                    return _open_value(path, reader)
                if not (reader.max_bad_lines and isinstance(error, BadLine)):
                    raise error from None
        return _count_lines(path, reader, block, blocks, stop)


def _open_value(path: str, reader: Reader) -> JsonValue:
    rows = size = 0
    seen: dict[str, None] = {}
    has, field = False, reader.field
    for value in _values(path):
        rows += 1
        if isinstance(value, dict):
            has = has or field in value
            if len(seen) < 100:
                seen |= dict.fromkeys(value)
        has = has or (field == "text" and isinstance(value, str))
        text = value if isinstance(value, str) else reader.values(value)
        size += len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0
    missing = None if has else _columns_text(seen, field)
    return JsonValue(path, field, reader.max_bytes, rows, size, missing, masks=reader.masks)


def _columns_text(seen: dict[str, None], field: str) -> str:
    has = f"it has {', '.join(list(seen)[:20])}" if seen else "its rows are not JSON objects"
    return f"has no column {field}; {has}"


def _count_lines(
    path: str, reader: Reader, block: bytes, blocks: Iterator[bytes], stop: Any
) -> JsonLines:
    """Count lines, and parse those that do not look like an object: most damaged lines are
    truncated.
    """
    # The name of the field, as JSON may spell it.
    spellings = {json.dumps(reader.field, ensure_ascii=ascii).encode() for ascii in (False, True)}
    offsets, lines, blank_rows, has = [0], [0], 0, False
    seen: dict[str, None] = {}
    bad: list[int] = []
    sampled = text = 0
    while block and not stop.is_set():
        has = has or any(spelling in block for spelling in spellings)
        for number, line in _suspicious_lines(block, lines[-1] + 1):
            if line.strip():
                if reader.parse(line, path, number) == SkippedDocument(NOT_JSON):
                    bad.append(number - 1)
                if len(bad) > reader.max_bad_lines:
                    raise too_many_bad_lines(f"{path}:{number}", reader.max_bad_lines)
            else:
                blank_rows += 1
        first = block[: block.find(b"\n") + 1] or block
        if first.strip():  # a sample, to estimate the bytes of text
            row = reader.parse(first, path, lines[-1] + 1)
            seen |= dict.fromkeys(row) if isinstance(row, dict) and len(seen) < 100 else {}
            document = reader.values(row)
            sampled += len(first)
            text += len(document.encode()) if isinstance(document, str) else 0
        lines.append(lines[-1] + block.count(b"\n") + (not block.endswith(b"\n")))
        offsets.append(offsets[-1] + len(block))
        block = next(blocks, b"")
    return JsonLines(
        path,
        lines[-1],
        blank_rows,
        int(offsets[-1] * text / max(1, sampled)),
        None if has or lines[-1] == blank_rows else _columns_text(seen, reader.field),
        np.array(offsets, np.int64),
        np.array(lines, np.int64),
        tuple(bad),
    )


def _suspicious_lines(block: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    """Lines that do not begin with { and end with }, with their numbers."""
    content = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(content == _NEWLINE)
    if content[-1] != _NEWLINE:
        ends = np.append(ends, len(content))
    begins = np.concatenate([[0], ends[:-1] + 1])
    # For an empty line at the start this is the last byte of the block, which does no harm.
    last = ends - 1
    last = last - (content[last] == _RETURN)
    usual = (
        (content[np.minimum(begins, len(content) - 1)] == _OPENING)
        & (content[last] == _CLOSING)
        & (ends > begins)
    )
    for line in np.flatnonzero(~usual).tolist():
        yield number + line, block[begins[line] : ends[line]]


def ranges_by_size(sizes: NDArray[np.int64], target: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [begin, end) of items with these sizes, of about `target` bytes each."""
    total = np.cumsum(sizes)
    at = 0
    while at < len(sizes):
        before = int(total[at - 1]) if at else 0
        until = min(int(np.searchsorted(total, before + target)) + 1, len(sizes))
        yield at, until
        at = until
