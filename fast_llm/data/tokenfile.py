r"""Tokens of many documents on disk: the `.bin`/`.idx` pair of Megatron-LM and Fast-LLM.

<prefix>.bin holds the tokens of all documents one after the other, nothing else. <prefix>.idx,
little endian:

    offset     size      content
    0          9         b"MMIDIDX\0\0"
    9          8         u64 version: 1 is written, 1 and 2 are read
    17         1         u8 type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    18         8         u64 documents N
    26         8         u64 N + 1
    34         4·N       i32 tokens of each document
    34+4N      8·N       i64 first byte of each document in .bin
    34+12N     8·(N+1)   i64 0 … N

Version 2 has one more byte at offset 17. If it is 1, the ranges that are masked in the loss follow
the first bytes: i32 [N] numbers of ranges, then i32 [ranges, 2]. They are ignored; masks.py has
those of `prepare`.

Every length and offset is checked against the sizes of the files before anything is mapped or
allocated. Opening reads the index once (12 bytes a document) and copies none of it: it is
memory-mapped, shared by all processes of a machine. Tokens are read with `pread`, not through a
map: if a file shrinks or a disk fails, that raises an error that names the file instead of killing
the process (SIGBUS). A pair uses one file descriptor while it is open.

datatrove.py reads the same from datatrove's files.
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import mmap
import os
import resource
import stat
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from fast_llm.errors import DataError, lfs_problem

if TYPE_CHECKING:
    from fast_llm.data.masks import Masks

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
LONGEST = 2**31 - 1  # tokens of one document
Tokens = NDArray[Any]
T = TypeVar("T")
_CHUNK = 2**20  # documents checked at a time
_ENDS = 2**20  # bytes at the beginning and end of a file that identify it
_MAX_OPEN_FILES = 2**16  # if the system allows it


@dataclass(frozen=True)
class TokenFileInfo:
    """Sizes and digests of a finished pair of files."""

    documents: int
    tokens: int
    sha256_bin: str
    sha256_idx: str


class TokenFileWriter:
    """Writes a pair of files that is complete or absent: `close` renames the finished files, .idx
    last.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], tag: str = ""):
        """`tag`: part of the names of the partial files, for processes that may write one pair."""
        self.prefix = prefix
        self.partial = f".{tag}.partial" if tag else ".partial"
        self.code = CODES[np.dtype(dtype)]
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.lengths: list[NDArray[np.int32]] = []
        self.tokens = 0
        self.documents = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = self._partial(".bin").open("wb", buffering=2**20)

    def _partial(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix + self.partial)

    def append(self, tokens: Tokens) -> None:
        """Append one document."""
        self.append_many(tokens, np.array([len(tokens)]))

    def append_many(self, tokens: Tokens, lengths: NDArray[Any]) -> None:
        """Append several documents, which follow each other in `tokens`.

        Raises DataError for a document that the format cannot hold, ValueError for tokens that the
        dtype cannot hold.
        """
        assert lengths.sum() == len(tokens) and (lengths >= 0).all()
        if (lengths > LONGEST).any():
            number = self.documents + int(np.argmax(lengths > LONGEST))
            raise DataError(
                f"{self.prefix}: document {number} has {int(lengths.max()):,} tokens; a token file"
                f" holds documents of up to {LONGEST:,}: split it"
            )
        if len(tokens) and not np.can_cast(tokens.dtype, self.dtype):
            smallest, largest, fits = int(tokens.min()), int(tokens.max()), np.iinfo(self.dtype)
            if smallest < fits.min or largest > fits.max:  # would wrap around to another token
                raise ValueError(f"tokens {smallest} … {largest} do not fit {self.dtype}")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.lengths.append(lengths.astype("<i4"))
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def close(self) -> TokenFileInfo:
        """Flush to disk and give the files their names."""
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
        with self._partial(".idx").open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            _flush(file)
        # An older index must never be next to the new tokens.
        _named(self.prefix, ".idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            self._partial(suffix).replace(_named(self.prefix, suffix))
        folder = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return TokenFileInfo(
            self.documents, self.tokens, self._digest.hexdigest(), digest.hexdigest()
        )

    def abandon(self) -> None:
        """Close and delete the partial files."""
        self._file.close()
        for suffix in (".bin", ".idx"):
            self._partial(suffix).unlink(missing_ok=True)


class TokenFile:
    """A pair of files, open for reading from any thread."""

    masks: "Masks | None" = None  # of tokens that are no targets

    def __init__(self, prefix: Path):
        """Open the pair. Raises DataError that names the file and what is wrong with it."""
        self.prefix = prefix
        self.idx, self.bin = _named(prefix, ".idx"), _named(prefix, ".bin")
        with open_file(self.idx) as (descriptor, size):
            head = os.pread(descriptor, HEADER + 1, 0)
            if not head.startswith(MAGIC):
                raise DataError(
                    f"{self.idx}: not an index of tokens (it begins with {head[:9]!r}, not"
                    f" {MAGIC!r}); prepare the data again"
                )
            content = with_file_limit(lambda: mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
        begin = self._read_header(head, content, size)
        count = self.documents
        self.lengths: NDArray[np.int32] = np.frombuffer(content, "<i4", count, begin)
        """[documents]: tokens of each."""
        self.starts: NDArray[np.int64] = np.frombuffer(content, "<i8", count, begin + 4 * count)
        """[documents]: first byte of each in .bin. Not aligned in memory, so NumPy copies it before
        computing."""
        self.tokens = self._check_documents()
        with open_file(self.bin) as (descriptor, bin_size):
            if bin_size != self.tokens * self.dtype.itemsize:
                raise DataError(
                    f"{self.bin}: {bin_size} bytes, but its index lists {self.tokens} tokens of"
                    f" {self.dtype.itemsize} bytes; it is truncated, damaged or belongs to another"
                    " index: prepare the data again"
                )
            self._bin = with_file_limit(lambda: os.dup(descriptor))
        weakref.finalize(self, os.close, self._bin)

    def _read_header(self, head: bytes, content: mmap.mmap, size: int) -> int:
        """Set dtype and number of documents; where the lengths begin. `head`: the first bytes of
        the index.
        """
        version = int.from_bytes(head[9:17], "little")
        if version not in (1, 2):
            raise DataError(f"{self.idx}: version {version}, must be 1 or 2")
        begin = HEADER + version - 1  # of the lengths
        if size < begin:
            raise DataError(
                f"{self.idx}: {size} bytes, truncated inside its header; prepare the data again"
            )
        code = head[begin - 17]
        if code not in TYPES:
            raise DataError(f"{self.idx}: token type {code}, must be one of {sorted(TYPES)}")
        self.dtype = np.dtype(TYPES[code]).newbyteorder("<")
        count = self.documents = int.from_bytes(head[begin - 16 : begin - 8], "little")
        bounds = int.from_bytes(head[begin - 8 : begin], "little")
        if bounds != count + 1:
            raise DataError(
                f"{self.idx}: {bounds} document boundaries, must be {count} + 1; documents split"
                " into sentences cannot be read"
            )
        ahead = begin + 12 * count  # where the masked ranges begin
        if version == 2 and head[17] > 1:
            raise DataError(
                f"{self.idx}: its flag for masked ranges is {head[17]}, must be 0 or 1; it is"
                " damaged"
            )
        spans = 4 * count if version == 2 and head[17] else 0
        if size >= ahead + spans and spans:
            numbers = np.frombuffer(content, "<i4", count, ahead)
            spans += 8 * int(numbers.sum(dtype=np.int64)) if int(numbers.min()) >= 0 else 0
        if count and version == 1 and size == ahead + 8 * (count + 1) + count:
            raise DataError(
                f"{self.idx}: a multimodal index of Megatron-LM, with a mode for each sequence;"
                " only indices of text are read"
            )
        if size != ahead + spans + 8 * (count + 1):
            raise DataError(
                f"{self.idx}: {size} bytes, but its {count} documents need"
                f" {ahead + spans + 8 * (count + 1)}; it is truncated or damaged: prepare the data"
                " again"
            )
        return begin

    def _check_documents(self) -> int:
        """The total number of tokens. Raises DataError unless each document begins where the
        previous one ends.
        """
        itemsize = self.dtype.itemsize
        expected = 0
        for first in range(0, self.documents, _CHUNK):  # copies only a part of the index
            lengths = self.lengths[first : first + _CHUNK].astype(np.int64)
            if (lengths < 0).any():
                wrong = first + int(np.argmax(lengths < 0))
                raise DataError(
                    f"{self.idx}: document {wrong} has a negative length; it is damaged"
                )
            ends = expected + np.cumsum(lengths * itemsize)
            different = self.starts[first : first + _CHUNK] != ends - lengths * itemsize
            if different.any():
                wrong = first + int(np.argmax(different))
                raise DataError(
                    f"{self.idx}: document {wrong} begins at byte {int(self.starts[wrong])}, which"
                    " is not where the previous one ends; it is damaged"
                )
            expected = int(ends[-1])
        return expected // itemsize

    def lengths_of(self, first: int, last: int) -> NDArray[np.integer[Any]]:
        """The tokens of each of the documents [first, last)."""
        return self.lengths[first:last]

    def starts_of(self, first: int, last: int) -> NDArray[np.int64]:
        """The first token of each of the documents [first, last)."""
        starts: NDArray[np.int64] = self.starts[first:last] // self.dtype.itemsize
        return starts

    @functools.cached_property
    def identity(self) -> tuple[int, int, str, str, str]:
        """Identifies the content, wherever the files are: sizes, and digests of the first and last
        mebibyte of both.
        """
        return (
            self.documents,
            self.tokens,
            self.dtype.str,
            ends_digest(self.idx),
            ends_digest(self.bin),
        )

    def tokens_at(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of the file.

        Raises DataError if the file can no longer be read.
        """
        if not 0 <= begin <= end <= self.tokens:
            raise IndexError(f"{self.bin}: tokens {begin} … {end} of {self.tokens}")
        itemsize = self.dtype.itemsize
        place, stop = begin * itemsize, end * itemsize
        parts = []
        while place < stop:  # one call reads at most 2 GiB, possibly less
            try:
                part = os.pread(self._bin, stop - place, place)
            except OSError as error:
                raise DataError(
                    f"{self.bin}: cannot be read at byte {place}: {error.strerror}"
                ) from error
            if not part:
                raise DataError(
                    f"{self.bin}: ends at byte {place}; it was truncated after it was opened"
                )
            parts.append(part)
            place += len(part)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self.dtype)

    def document_at(self, token: int, first: int = 0) -> int:
        """The number of the document, `first` or a later one, that contains a token."""
        # Empty documents begin at the same place as the document after them, which contains the
        # token. np.searchsorted would copy all starts, since they are not aligned.
        return bisect.bisect_right(self.starts, token * self.dtype.itemsize, lo=first) - 1

    def start_of(self, document: int) -> int:
        """The first token of a document; the total number of tokens if there is no such
        document.
        """
        return (
            self.tokens
            if document >= self.documents
            else int(self.starts[document]) // self.dtype.itemsize
        )


def ends_digest(path: Path) -> str:
    """The sha256 of the beginning and the end of a file."""
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        return hashlib.sha256(head + file.read()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor of a file, and its size. An OSError in the block becomes a DataError."""
    try:
        # Without O_NONBLOCK, opening a pipe without a writer would hang.
        descriptor = with_file_limit(
            lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        )
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path}: not a file")
            if problem := lfs_problem(path, os.pread(descriptor, 64, 0)):
                raise DataError(problem)
            yield descriptor, found.st_size
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; is the path right, and was the data prepared?"
        ) from error
    except OSError as error:
        advice = "; raise the limit with `ulimit -n`, or prepare fewer, larger shards"
        advice = advice if error.errno == errno.EMFILE else ""
        raise DataError(f"{path}: cannot be read: {error.strerror}{advice}") from error


def with_file_limit(action: Callable[[], T]) -> T:
    """Call `action`, which opens a file. If too many are open, raise the shell's limit (often
    1,024) and retry.
    """
    try:
        return action()
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
        if error.errno != errno.EMFILE or soft == resource.RLIM_INFINITY or soft >= most:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return action()
