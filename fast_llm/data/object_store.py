"""Documents in an object store: `s3://bucket/prefix` and `gs://bucket/prefix`, through fsspec.

The listing gives address, size and version (the ETag) of each object. A StoredObject carries them
to the processes that read it. Opening compares the version, and S3 is asked for that version with
every range, so an object that is replaced during a preparation is never read in part.

Objects are streamed, never stored: text and JSON through a buffer of some megabytes, blocks of
JSON lines and pages of parquet as single byte ranges. s3fs repeats failed requests; a failure that
lasts is retried here for at least half a minute, then raises DataError. It never skips a document.

Credentials and endpoints come from the environment, as the libraries of the stores read them.
"""

import io
import logging
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from fast_llm.errors import DataError, MissingPackage

logger = logging.getLogger("fast_llm")

T = TypeVar("T")
# Scheme → the package that reads it, and how it gets credentials.
_STORES = {
    "s3": (
        "s3fs",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every node; for a"
        " public bucket set FSSPEC_S3_ANON=true",
    ),
    "gs": (
        "gcsfs",
        "set GOOGLE_APPLICATION_CREDENTIALS on every node; for a public bucket set"
        " FSSPEC_GS_TOKEN=anon",
    ),
}
_WAITS = (1, 2, 4, 8, 16)  # seconds before each retry
_READ_AHEAD = 2**22  # bytes, of a file that is read from its beginning
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, TypeError)


class StoredObject(str):
    """The address of an object, with its size in bytes and its version when it was listed."""

    size: int
    version: str

    def __new__(cls, address: str, size: int = 0, version: str = "") -> "StoredObject":
        """Pickling calls this with the address alone, then restores the attributes."""
        found = super().__new__(cls, address)
        found.size, found.version = size, version
        return found


def is_address(path: str) -> bool:
    """Whether a path names something in an object store."""
    return path.partition("://")[0] in _STORES and "://" in path


def list_objects(address: str) -> list[StoredObject]:
    """The object of this name, or all objects below it; sorted. Raises DataError."""
    base = address.rstrip("/")
    name = base.partition("://")[2]
    return [
        each
        for each in _listed(address, lambda store: store.find(base, detail=True))
        if each == base or each.partition("://")[2].startswith(name + "/")
    ]


def match_objects(pattern: str) -> list[StoredObject]:
    """The objects that match a pattern; sorted. Raises DataError.

    As for local files, a name with a leading dot matches only a pattern with one.
    """
    found = _listed(pattern, lambda store: store.glob(pattern, detail=True))
    if "/." in pattern:
        return found
    return [each for each in found if "/." not in each]


def _listed(address: str, listing: Callable[[Any], dict[str, Any]]) -> list[StoredObject]:
    scheme = address.partition("://")[0]

    def listed() -> dict[str, Any]:
        store = _store(address)
        store.invalidate_cache()  # of an earlier listing
        return listing(store)

    try:
        found = _retried(address, listed)
    except FileNotFoundError:
        return []
    return sorted(
        StoredObject(f"{scheme}://{name}", int(info["size"]), _version(info))
        for name, info in found.items()
        if info["type"] == "file" and not name.endswith("/")
    )


def _version(info: dict[str, Any]) -> str:
    """What changes with the content of an object: its ETag, or its generation."""
    for key in ("ETag", "etag", "generation"):
        if info.get(key):
            return str(info[key])
    raise DataError(
        f"{info.get('name')}: the object store gives no ETag, so that a change of it"
        " would not be noticed; copy the files to a local folder"
    )


def open_object(path: StoredObject, ranges: bool = False) -> BinaryIO:
    """Open an object for reading. `ranges`: read exactly the ranges that are asked for, no more.

    Opening and reading raise DataError.
    """
    stream = _ObjectStream(path, ranges)
    return cast(BinaryIO, stream if ranges else io.BufferedReader(stream, 2**17))


class _ObjectStream(io.RawIOBase):
    """An object as a file. Every failure becomes a DataError."""

    def __init__(self, path: StoredObject, ranges: bool):
        self.path = path
        kind = {"cache_type": "none"} if ranges else {"cache_type": "readahead"}

        def opened() -> Any:
            return _store(path).open(path, "rb", block_size=_READ_AHEAD, **kind)

        try:
            self.file: Any = _retried(path, opened)
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: is gone since it was listed; put it back, or start anew with"
                " another output_path"
            ) from error
        if _version(self.file.details) != path.version or self.file.size != path.size:
            self.file.close()
            raise _changed(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        place = self.tell()
        wanted = min(len(buffer), self.path.size - place)
        if wanted <= 0:
            return 0

        def read() -> bytes:
            self.file.seek(place)
            data: bytes = self.file.read(wanted)
            if len(data) != wanted:
                raise OSError(f"{len(data)} of {wanted} bytes at byte {place}")
            return data

        try:
            buffer[:wanted] = _retried(self.path, read)
        except FileNotFoundError as error:
            raise _changed(self.path) from error
        return wanted

    def close(self) -> None:
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


def _changed(path: str) -> DataError:
    return DataError(
        f"{path}: changed since it was listed; restore it, or delete the output folder and prepare"
        " all documents again"
    )


def _store(address: str) -> Any:
    """The file system of an address; fsspec keeps one for each process."""
    scheme = address.partition("://")[0]
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise MissingPackage(_STORES[scheme][0], f"reading {address}") from error


def _retried(path: str, action: Callable[[], T]) -> T:
    """Call `action`; wait and retry if it fails in a way that may pass.

    Raises DataError, or FileNotFoundError.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except (FileNotFoundError, DataError, MissingPackage):
            raise
        except Exception as error:
            causes = [each for each in (error, error.__cause__) if each is not None]
            names = [type(each).__name__ for each in causes]
            if any(name in _NO_CREDENTIALS for name in names):
                advice = _STORES[path.partition("://")[0]][1]
                raise DataError(f"{path}: no credentials for the object store; {advice}") from error
            if "FileExpired" in names:  # S3 no longer has the version that was opened
                raise _changed(path) from error
            reason = (str(error).strip().splitlines() or [names[0]])[0].rstrip(".")
            if isinstance(error, PermissionError):
                raise DataError(
                    f"{path}: refused by the object store: {reason}; check the credentials and"
                    " their right to list and read the bucket"
                ) from error
            lasts = isinstance(error, _LASTING) or "ParamValidationError" in names
            if lasts or wait is None:
                raise DataError(
                    f"{path}: cannot be read from the object store: {reason}; run the same command"
                    " again to resume"
                ) from error
            logger.warning(f"{path}: {reason}. Trying again in {wait} s.")
            time.sleep(wait)
    raise AssertionError  # the last wait is None
