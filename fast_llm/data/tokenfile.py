"""Tokens of many documents on disk: the `.bin`/`.idx` pair of Megatron-LM and Fast-LLM.

<prefix>.bin holds the tokens of all documents one after the other, nothing else. <prefix>.idx, little endian:

    offset     size      content
    0          9         b"MMIDIDX\\0\\0"
    9          8         u64 version: 1 is written, 1 and 2 are read
    17         1         u8 type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    18         8         u64 documents N
    26         8         u64 N + 1
    34         4·N       i32 tokens of each document
    34+4N      8·N       i64 first byte of each document in .bin
    34+12N     8·(N+1)   i64 0 … N

Version 2 has one more byte at 17 that says whether loss-masking spans follow the first bytes: i32 [N] how
many, then i32 [that many, 2]. Files are memory mapped: opening one costs nothing, however large. Every length
and offset is checked against the files' sizes before anything is mapped or allocated.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fast_llm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34
TYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODES = {np.dtype(kind): code for code, kind in TYPES.items()}
Tokens = NDArray[Any]
_STRETCH = 2**20  # documents checked at a time


@dataclass(frozen=True)
class TokenFileInfo:
    """A finished pair of files."""

    documents: int
    tokens: int
    sha256_bin: str
    sha256_idx: str


class TokenFileWriter:
    """Writes a pair of files that is whole or absent: under other names until `close` renames them, .idx last."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]):
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.code = CODES[np.dtype(dtype)]
        self.lengths: list[NDArray[np.int32]] = []
        self.tokens = 0
        self.documents = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = _partial(prefix, ".bin").open("wb", buffering=2**20)

    def append(self, tokens: Tokens) -> None:
        """One document."""
        self.append_many(tokens, np.array([len(tokens)]))

    def append_many(self, tokens: Tokens, lengths: NDArray[Any]) -> None:
        """Several documents, one after the other in `tokens`."""
        assert lengths.sum() == len(tokens)
        data = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.lengths.append(lengths.astype("<i4"))
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def close(self) -> TokenFileInfo:
        """Flush to disk and publish."""
        _flush(self._file)
        lengths = np.concatenate([np.zeros(0, "<i4"), *self.lengths])
        starts = np.zeros(self.documents, "<i8")
        np.cumsum(lengths[:-1], out=starts[1:], dtype=np.int64)
        parts = (
            MAGIC,
            np.array(1, "<u8").tobytes(),
            bytes([self.code]),
            np.array([self.documents, self.documents + 1], "<u8").tobytes(),
            lengths.tobytes(),
            (starts * self.dtype.itemsize).tobytes(),
            np.arange(self.documents + 1, dtype="<i8").tobytes(),
        )
        digest = hashlib.sha256()
        with _partial(self.prefix, ".idx").open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            _flush(file)
        for suffix in (".bin", ".idx"):
            _partial(self.prefix, suffix).replace(_named(self.prefix, suffix))
        folder = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return TokenFileInfo(self.documents, self.tokens, self._digest.hexdigest(), digest.hexdigest())

    def abandon(self) -> None:
        """Close and delete what was written."""
        self._file.close()
        for suffix in (".bin", ".idx"):
            _partial(self.prefix, suffix).unlink(missing_ok=True)


class TokenFile:
    """A pair of files, memory mapped."""

    def __init__(self, prefix: Path):
        """Raises DataError, naming the file and the field that is wrong."""
        self.prefix = prefix
        self.idx, self.bin = _named(prefix, ".idx"), _named(prefix, ".bin")
        size, bin_size = _size(self.idx), _size(self.bin)
        with self.idx.open("rb") as file:
            head = file.read(HEADER + 1)
        if head.startswith(b"version https://git-lfs"):
            raise DataError(f"{self.idx}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        if head[:9] != MAGIC:
            raise DataError(f"{self.idx}: not an index of tokens (it begins with {head[:9]!r}, not {MAGIC!r})")
        if size < HEADER:
            raise DataError(f"{self.idx}: {size} bytes, cut off inside its header; prepare the data again")
        version = int.from_bytes(head[9:17], "little")
        if version not in (1, 2):
            raise DataError(f"{self.idx}: version {version}; versions 1 and 2 can be read")
        shift = version - 1
        code = head[17 + shift]
        if code not in TYPES:
            raise DataError(f"{self.idx}: token type {code}; known are {sorted(TYPES)}")
        self.dtype = np.dtype(TYPES[code]).newbyteorder("<")
        begin = HEADER + shift
        self.documents = int.from_bytes(head[18 + shift : 26 + shift], "little")
        bounds = int.from_bytes(head[26 + shift : 34 + shift].ljust(8, b"\0"), "little")
        if bounds != self.documents + 1:
            raise DataError(f"{self.idx}: {bounds} document boundaries, must be {self.documents} + 1")
        needed = begin + 12 * self.documents
        if size < needed or (version == 1 and size != needed + 8 * (self.documents + 1)):
            raise DataError(
                f"{self.idx}: {size} bytes, which does not fit its {self.documents} documents; it is cut off or damaged"
            )
        self.lengths = _map(self.idx, np.dtype("<i4"), begin, self.documents)
        offsets = _map(self.idx, np.dtype("<i8"), begin + 4 * self.documents, self.documents)
        itemsize = self.dtype.itemsize
        if self.documents and int(self.lengths.min()) < 0:
            raise DataError(f"{self.idx}: document {int(self.lengths.argmin())} has a negative length")
        self.tokens = int(self.lengths.sum(dtype=np.int64))
        self.starts = offsets
        """First byte of each document in .bin."""
        if bin_size != self.tokens * itemsize:
            raise DataError(
                f"{self.bin}: {bin_size} bytes, but its index tells of {self.tokens} tokens of {itemsize} bytes;"
                " it is cut off, damaged or another index's"
            )
        expected = 0
        for first in range(0, self.documents, _STRETCH):  # never the whole of it in memory
            lengths = self.lengths[first : first + _STRETCH].astype(np.int64) * itemsize
            ends = expected + np.cumsum(lengths)
            found = offsets[first : first + _STRETCH]
            if not np.array_equal(found, ends - lengths):
                wrong = first + int(np.argmax(found != ends - lengths))
                raise DataError(f"{self.idx}: document {wrong} does not begin where the one before it ends")
            expected = int(ends[-1])
        self._map = _map(self.bin, self.dtype, 0, self.tokens)

    def tokens_at(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of the whole file, read from the map."""
        return self._map[begin:end]

    def document_at(self, token: int) -> int:
        """The number of the document that holds a token."""
        # Of documents without tokens that begin at the same place, the one that holds it is the last.
        return int(np.searchsorted(self.starts, token * self.dtype.itemsize, side="right")) - 1

    def start_of(self, document: int) -> int:
        """The first token of a document; behind the last one, the number of all tokens."""
        return self.tokens if document >= self.documents else int(self.starts[document]) // self.dtype.itemsize


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _partial(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix + ".partial")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; is data.path right, and was the data prepared?") from error
    except OSError as error:
        raise DataError(f"{path}: can not be read: {error.strerror}") from error


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Tokens:
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
