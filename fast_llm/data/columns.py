"""Parquet and arrow files. Only the columns of text and masked spans are read, with pyarrow.

Opening a file reads its metadata. The parent process decodes rows, a few at a time, and sends them
to the workers. So workers need no pyarrow, and a row group may be larger than memory.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.object_store import StoredObject
from fast_llm.data.reading import ColumnTask, Task, is_json_column, open_ranges
from fast_llm.data.tables import BLOCK, ranges_by_size
from fast_llm.errors import DataError, MissingPackage, lfs_problem

_BATCH = 1024  # most rows of parquet decoded at a time


@dataclass(frozen=True)
class ArrowTable:
    """A parquet or arrow file."""

    path: str
    field: str
    parquet: bool
    rows: int
    bytes: int
    missing_field: str | None
    groups: NDArray[np.int64]
    """[groups + 1]: rows before each row group or record batch, and in all."""
    blank_rows: int = 0
    masks: str | None = None
    """The column with masked spans, if the file has it."""

    def name(self, row: int) -> str:
        return f"{self.path}, row {row}"

    def nearby_row(self, row: int) -> int:
        return (
            int(self.groups[np.searchsorted(self.groups, row, "right") - 1])
            if self.parquet
            else row
        )

    def tasks(self, first: int, last: int, begin: int, target: int) -> Iterator[Task]:
        if self.missing_field is not None:
            for at in range(first, last, 2**16):
                end = min(at + 2**16, last)
                lengths = np.full(end - at, -1, np.int64)
                yield ColumnTask(begin + at - first, begin + end - first, lengths, b"", False)
            return
        for at, array, spans in self._arrays(first, last):
            one, end = max(first - at, 0), min(last - at, len(array))
            if one >= end:
                continue
            lengths, data, json_inside = _values_as_bytes(array.slice(one, end - one))
            masked = None if spans is None else spans.slice(one, end - one).to_pylist()
            ends = np.cumsum(np.maximum(lengths, 0))
            row = begin + at + one - first
            for begin_row, end_row in ranges_by_size(np.maximum(lengths, 0), target):
                part = data[int(ends[begin_row - 1]) if begin_row else 0 : int(ends[end_row - 1])]
                yield ColumnTask(
                    row + begin_row,
                    row + end_row,
                    lengths[begin_row:end_row],
                    bytes(part),
                    json_inside,
                    None if masked is None else masked[begin_row:end_row],
                )

    def _arrays(self, first: int, last: int) -> Iterator[tuple[int, Any, Any]]:
        """The columns of text and masks (or None) in pieces, each with the number of its first row.
        May leave out pieces before `first`.
        """
        at = first
        columns = [self.field] if self.masks is None else [self.field, self.masks]
        try:
            with contextlib.ExitStack() as stack:
                if not self.parquet:
                    for number, batch in enumerate(_batches(stack, self.path, columns)):
                        if self.groups[number + 1] > first:
                            at = int(self.groups[number])
                            yield at, *self._columns(batch)
                        if self.groups[number + 1] >= last:
                            return
                    return
                file = _open_parquet(stack, self.path)
                rows = max(1, min(_BATCH, BLOCK * self.rows // max(1, self.bytes)))
                for group in range(len(self.groups) - 1):
                    if self.groups[group + 1] <= first or self.groups[group] >= last:
                        continue
                    at = int(self.groups[group])
                    for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                        yield at, *self._columns(batch)
                        at += batch.num_rows
                        if at >= last:
                            break
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}, row {at}: cannot be read: {_first_line(error)}"
            ) from error

    def _columns(self, batch: Any) -> tuple[Any, Any]:
        """The columns of text and masks of a record batch."""
        place = batch.schema.get_field_index
        masks = None if self.masks is None else batch.column(place(self.masks))
        return batch.column(place(self.field)), masks


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", f"reading {path}") from error
    return pyarrow


def _open_parquet(stack: contextlib.ExitStack, path: str) -> Any:
    # Read pages when they are needed: a row group may be larger than memory.
    source: Any = path
    if isinstance(path, StoredObject):
        source = stack.enter_context(open_ranges(path))
    return stack.enter_context(
        _pyarrow(path).parquet.ParquetFile(source, buffer_size=BLOCK, pre_buffer=False)
    )


def _batches(stack: contextlib.ExitStack, path: str, columns: Sequence[str] = ()) -> Iterator[Any]:
    """The record batches of an arrow file, with only these columns if there is one of them."""
    pyarrow = _pyarrow(path)
    source = stack.enter_context(
        pyarrow.PythonFile(stack.enter_context(open_ranges(path)), "r")
        if isinstance(path, StoredObject)
        else pyarrow.memory_map(path)
    )
    options = None

    def opened() -> tuple[Any, bool]:
        with contextlib.suppress(pyarrow.ArrowInvalid):
            return pyarrow.ipc.open_file(source, options=options), True
        source.seek(0)
        return pyarrow.ipc.open_stream(source, options=options), False

    reader, indexed = opened()
    if places := [
        reader.schema.get_field_index(name) for name in columns if name in reader.schema.names
    ]:
        options = pyarrow.ipc.IpcReadOptions(included_fields=places)
        source.seek(0)
        reader, indexed = opened()
    if indexed:
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader


def open_arrow(path: str, field: str, parquet: bool, masks: str | None = None) -> ArrowTable:
    """Read the metadata of a file. Raises DataError if it is damaged or has no spans in the column
    `masks`, MissingPackage without pyarrow.
    """
    pyarrow = _pyarrow(path)
    try:
        with contextlib.ExitStack() as stack:
            if parquet:
                file = _open_parquet(stack, path)
                schema, metadata = file.schema_arrow, file.metadata
                groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
                counts = [group.num_rows for group in groups]
                size = sum(
                    group.column(at).total_uncompressed_size
                    for group in groups
                    for at in range(group.num_columns)
                    if group.column(at).path_in_schema == field
                )
            else:
                counts, size, schema = [], 0, None
                for batch in _batches(stack, path):
                    schema = schema or batch.schema
                    counts.append(batch.num_rows)
                    size += batch.nbytes
                schema = schema or pyarrow.schema([])
    except (OSError, ValueError) as error:
        with open_ranges(path) as beginning:
            if problem := lfs_problem(path, beginning.read(64)):
                raise DataError(problem) from None
        raise DataError(
            f"{path}: damaged, or not a {'parquet' if parquet else 'arrow'} file:"
            f" {_first_line(error)}"
        ) from error
    edges = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    rows = int(edges[-1])
    return ArrowTable(
        path,
        field,
        parquet,
        rows,
        size,
        explain_missing_field(schema, field) if rows else None,
        edges,
        masks=masks if masks is not None and has_spans(schema, masks, path) else None,
    )


def column_names(path: str, parquet: bool) -> list[str]:
    """The columns of a file that `open_arrow` has opened."""
    with contextlib.ExitStack() as stack:
        if parquet:
            return list(_open_parquet(stack, path).schema_arrow.names)
        batch = next(_batches(stack, path), None)
        return [] if batch is None else list(batch.schema.names)


def explain_missing_field(schema: Any, field: str) -> str | None:
    """Why a schema has no text under a field; None if it has."""
    import pyarrow.types as types

    if field not in schema.names:
        return f"has no column {field}; it has {', '.join(schema.names[:20]) or 'none'}"
    kind = schema.field(field).type
    inside = kind.value_type if types.is_dictionary(kind) else kind
    readable = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "null",
    )
    if is_json_column(kind) or any(getattr(types, f"is_{name}")(inside) for name in readable):
        return None
    return f"holds {kind} in column {field}, must be text"


def has_spans(schema: Any, column: str, path: str) -> bool:
    """Whether a schema has the column of masked spans. Raises DataError if it holds others."""
    import pyarrow.types as types

    if column not in schema.names:
        return False
    kind = inside = schema.field(column).type
    for _ in range(2):  # lists of lists; of empty lists alone, no type is known
        lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
        if any(getattr(types, f"is_{name}")(inside) for name in lists):
            inside = inside.value_type
        elif not types.is_null(inside):
            break
    else:
        if types.is_null(inside) or types.is_integer(inside):
            return True
    raise DataError(
        f"dataset.loss_masking_spans: {path} holds {kind} in column {column}, must be a list of"
        " [begin, end], both integers, for each document"
    )


def missing_spans(path: str, column: str, names: Sequence[str]) -> DataError:
    """The error for a dataset without the column of masked spans."""
    return DataError(
        f"dataset.loss_masking_spans: {path} has no column {column}; it has"
        f" {', '.join(names[:20]) or 'none'}"
    )


def _values_as_bytes(array: Any) -> tuple[NDArray[np.int64], memoryview, bool]:
    """[rows] bytes of each value (-1 for null), the bytes of all values, and whether they are
    JSON.
    """
    import pyarrow

    json_inside = is_json_column(array.type)
    if json_inside:
        array = array.storage
    if pyarrow.types.is_null(array.type):
        return np.full(len(array), -1, np.int64), memoryview(b""), False
    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    array = array.cast(pyarrow.large_binary())
    _, offsets, data = array.buffers()
    edges = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    lengths = np.diff(edges)
    null = np.asarray(array.is_null().to_numpy(zero_copy_only=False), bool)
    # A null may cover arbitrary bytes.
    if lengths[null].any():
        array = array.fill_null(b"")
        lengths, data, _ = _values_as_bytes(array)
        return np.where(null, -1, lengths), data, json_inside
    view = memoryview(data)[int(edges[0]) : int(edges[-1])] if data is not None else memoryview(b"")
    return np.where(null, -1, lengths), view, json_inside
