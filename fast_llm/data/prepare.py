"""Documents in, token files out.

`output_path: X` gives

    X/shard_<rank>_<i>.bin, .idx   tokens, whole or absent (tokenfile.py)
    X/shard_<rank>_<i>.json        record: which rows, how many tokens, digests, settings
    X/rank_<rank>.json             record: this rank is done
    X/tokenizer/                   the tokenizer's files
    X.json                         the metadata that training reads; written last, by the rank that is done last

Rows are cut into ranges of about a megabyte of text. Worker processes read and tokenize them; this process writes what
comes back, in the rows' order. A token file ends with the document that brings it to `tokens_per_shard`. So the bytes
depend on documents, tokenizer and settings alone, not on the number of workers, and a preparation that was broken
off at any moment does only the token files that have no record, and ends with the same bytes. Several nodes each take
a contiguous part of the rows and meet in the folder alone.

A document is [BOS] text [EOS]. What is inside the text never becomes BOS or EOS. Documents that can not be used are
passed over and counted; documents.py lists the reasons.

It costs what tokenizing costs (encode.py); memory is three results per worker in flight, some MB each, unless
documents are huge. Killed workers and parents leave nothing behind.
"""

import contextlib
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import documents, files, tokenizer
from fast_llm.data.dataset import content_digest
from fast_llm.data.documents import Corpus
from fast_llm.data.encode import Encoder
from fast_llm.data.reading import Reader, SkippedDocument, Task
from fast_llm.data.split import HASH
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import DataError

logger = logging.getLogger("fast_llm")

FORMAT = "fast_llm dataset 1"
_RANGE = 2**20  # bytes of text that a worker is given at a time
_AHEAD = 3  # ranges in flight for each worker
_EXAMPLES = 10  # documents passed over that are named
_SAMPLE = 2**18  # bytes of text tokenized to estimate the whole
_LARGE_DOCUMENT = 2**20  # tokens; a file that makes so many is likely a collection of documents
_LARGE_CORPUS = 2**26  # bytes of text that keep one worker busy for some time
# What records say that have no such line, since they are of a version that had no such setting.
_OLD_DEFAULTS = {"dataset.max_document_bytes": 2**26, "reading": 1}
_READING_VERSION = 2  # how JSON and compressed texts are read: 1 guessed types from rows, and did not decompress texts


def prepare(config: PrepareConfig) -> Path:
    """Write token files and, if this is the last rank to finish, their metadata, whose path is returned.

    Started again, it goes on where it stopped. Raises DataError for documents, tokenizers, disks and folders that do not
    fit, MissingPackage without `datasets` or huggingface_hub where they are needed.
    """
    rank, world = _rank(config)
    output = Path(config.output_path).expanduser()
    loaded = tokenizer.load(config.tokenizer.path)
    dtype = _dtype(config, loaded)
    bos, eos = _bos_and_eos(config, loaded)
    settings = {
        "dataset.split": config.dataset.split,
        "dataset.field": config.dataset.field,
        "tokenizer": loaded.fingerprint,
        "tokenizer.bos": bos,
        "tokenizer.eos": eos,
        "dataset.data_type": str(dtype),
        "dataset.max_document_bytes": config.dataset.max_document_bytes,
        "tokens_per_shard": config.tokens_per_shard,
        "distributed.world_size": world,
    }
    job = _Job(config, output, rank, world, loaded, dtype, bos, eos, settings)
    try:
        with _remove_new_folders_if_empty(job), _exclusive_lock(job):
            _remove_partial_files(job)
            if _is_finished(job):
                logger.info(
                    f"{job.metadata}: finished already, nothing to do. To make it anew, delete {output}."
                )
                return job.metadata
            source = documents.open_documents(files.find(config.dataset), config.loading_workers)
            settings |= _identity(source)
            _report(job, source)
            for record in [*output.glob("shard_*_*.json"), *output.glob("rank_*.json")]:
                _check_settings(record, settings)
            job.metadata.unlink(
                missing_ok=True
            )  # of files that are gone: like them, it is whole or absent
            _write_shards(job, source)
            _write_metadata(job, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{output}: the disk is full; make room and start the same command again, it goes on where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(
                f"output_path: {output}: can not be written to: {error.strerror}"
            ) from error
        raise
    return job.metadata


def check(config: PrepareConfig) -> str:
    """What `prepare` would do, in lines: documents and the tokenizer are looked at, nothing is written.

    Raises as `prepare` does. Datasets on the Hub are not fetched.
    """
    rank, world = _rank(config)
    loaded = tokenizer.load(config.tokenizer.path)
    dtype = _dtype(config, loaded)
    bos, eos = _bos_and_eos(config, loaded)
    output = Path(config.output_path).expanduser()
    lines: list[tuple[str, str]] = []
    found = files.find(config.dataset)
    if found.kind == "hub":
        lines.append(
            (
                "documents",
                f"{config.dataset.path} on the Hugging Face Hub, which is not fetched for a check",
            )
        )
    else:
        lines += _described(
            config, documents.open_documents(found, config.loading_workers), loaded, dtype
        )
    tokens = [
        f"{place} {name} {token} {loaded.tokenizer.id_to_token(token)}"
        if token is not None
        else f"{place} no {name}"
        for place, name, token in (("begins with", "BOS", bos), ("ends with", "EOS", eos))
    ]
    lines.append(("tokenizer", f"{loaded.path}: {loaded.vocab_size:,} tokens, stored as {dtype}"))
    lines.append(("a document", " and ".join(tokens)))
    part = f", of which this is rank {rank} of {world}" if world > 1 else ""
    there = "; finished already" if output.with_name(output.name + ".json").exists() else ""
    lines.append(("written to", f"{output}/ and {output}.json{part}{there}"))
    return "".join(f"{name:<12}{text}\n" for name, text in lines)


def _described(
    config: PrepareConfig, source: Corpus, loaded: tokenizer.Loaded, dtype: np.dtype[Any]
) -> list[tuple[str, str]]:
    """Documents, how many tokens they make, and what is left out."""
    number = len(source) - source.blank_rows
    lines = [
        (
            "documents",
            f"{number:,} in {config.dataset.path}, about {source.bytes / 1e6:,.3g} MB of text",
        )
    ]
    if number:
        needed = _estimate(source, Encoder(loaded.tokenizer, dtype))
        folder = Path(config.output_path).expanduser().resolve()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        tokens = int(float(f"{needed / dtype.itemsize:.3g}"))
        space = f"{needed / 1e6:,.3g} MB, {free / 1e9:,.4g} GB free"
        lines.append(("tokens", f"about {tokens:,} with BOS and EOS: {space}"))
    if source.left_out:
        lines.append(("left out", _files(source.left_out)))
    lines += [
        (
            "left out",
            f"{table.rows - table.blank_rows:,} rows of {table.path}, which {table.missing_field}",
        )
        for table in source.tables_without_field[:_EXAMPLES]
    ]
    return lines


@dataclass(frozen=True)
class _Job:
    """What does not change on the way."""

    config: PrepareConfig
    output: Path
    rank: int
    world: int
    loaded: tokenizer.Loaded
    dtype: np.dtype[Any]
    bos: int | None  # the token before each document
    eos: int | None  # and behind it
    settings: dict[str, Any]
    """All that decides the bytes of the token files; grows by the documents' identity once they are open."""

    @property
    def metadata(self) -> Path:
        return self.output.with_name(self.output.name + ".json")

    def prefix(self, number: int, rank: int | None = None) -> Path:
        return self.output / f"shard_{self.rank if rank is None else rank}_{number}"

    @property
    def lock(self) -> Path:
        return self.output / f".lock_{self.rank}"

    def done(self, rank: int) -> Path:
        return self.output / f"rank_{rank}.json"


def _rank(config: PrepareConfig) -> tuple[int, int]:
    """This node's number, and how many there are."""
    found = {}
    for name, given, default in (
        ("rank", config.distributed.rank, None),
        ("world_size", config.distributed.world_size, 1),
    ):
        text = os.environ.get(name.upper(), "")
        if given is None and text and not text.isdecimal():
            raise DataError(
                f"distributed.{name}: {name.upper()} of the environment is {text!r}, must be a number"
            )
        found[name] = given if given is not None else int(text) if text else default
    rank, world = found["rank"], found["world_size"] or 1
    if rank is None and world > 1:
        raise DataError(
            f"distributed.rank: missing, with distributed.world_size {world}; give each node its own, from 0 to {world - 1}"
        )
    if (rank or 0) >= world:
        raise DataError(
            f"distributed.rank: given {rank}, must be below distributed.world_size {world}"
        )
    return rank or 0, world


def _dtype(config: PrepareConfig, loaded: tokenizer.Loaded) -> np.dtype[Any]:
    """The smallest integer type for the vocabulary, or the one asked for."""
    largest = loaded.vocab_size - 1
    smallest = next(
        name for name in ("uint8", "uint16", "int32", "int64") if largest <= np.iinfo(name).max
    )
    wanted = config.dataset.data_type or smallest
    if largest > np.iinfo(wanted).max:
        raise DataError(
            f"dataset.data_type: given {wanted}, which holds numbers up to {np.iinfo(wanted).max}, but the tokenizer's"
            f" largest token is {largest}; {smallest} holds it"
        )
    return np.dtype(wanted)


def _bos_and_eos(config: PrepareConfig, loaded: tokenizer.Loaded) -> tuple[int | None, int | None]:
    """The tokens before and behind each document."""
    wanted, folder = config.tokenizer, loaded.path.parent
    if wanted.bos == "yes" and loaded.bos is None:
        raise DataError(
            f"tokenizer.bos: given yes, but {folder} names no BOS token; add bos_token to its tokenizer_config.json, or"
            " set tokenizer.bos: no"
        )
    if wanted.eos != "no" and loaded.eos is None:
        raise DataError(
            f"tokenizer.eos: {folder} names no EOS token, without which documents run together; add eos_token to its"
            " tokenizer_config.json, or set tokenizer.eos: no"
        )
    bos = loaded.bos if wanted.bos == "yes" or (wanted.bos == "auto" and loaded.adds_bos) else None
    return bos, None if wanted.eos == "no" else loaded.eos


def _identity(source: Corpus) -> dict[str, Any]:
    """Which documents these are. The path of local ones may change: their names and sizes may not."""
    reading = {"reading": _READING_VERSION} if source.reading_changed else {}
    return {"documents": len(source), "digest of the documents": source.digest, **reading}


def _report(job: _Job, source: Corpus) -> None:
    """What is left out, and what would be faster."""
    if source.left_out:
        logger.warning(f"{job.config.dataset.path}: left out {_files(source.left_out)}.")
    for table in source.tables_without_field[:_EXAMPLES]:
        logger.warning(
            f"{table.path} {table.missing_field}: its {table.rows - table.blank_rows:,} rows are left out."
        )
    if (more := len(source.tables_without_field) - _EXAMPLES) > 0:
        logger.warning(f"So are the rows of {more:,} more such files.")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if job.config.tokenize_workers == 1 and cores > 1 and source.bytes >= _LARGE_CORPUS:
        logger.info(
            f"tokenize_workers is 1, and this machine has {cores} cores: tokenize_workers={cores} is up to {cores} times"
            " as fast."
        )


def _files(left_out: list[tuple[str, str]]) -> str:
    return f"{len(left_out):,} file{'s' if len(left_out) > 1 else ''}: {files.describe(left_out)}"


@contextlib.contextmanager
def _remove_new_folders_if_empty(job: _Job) -> Iterator[None]:
    """Makes the folder; if nothing comes of it, it goes again."""
    made = [folder for folder in (job.output, *job.output.parents) if not folder.exists()]
    job.output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if job.output in made and not any(
            path for path in job.output.iterdir() if path != job.lock
        ):
            with contextlib.suppress(OSError):
                job.lock.unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        raise


@contextlib.contextmanager
def _exclusive_lock(job: _Job) -> Iterator[None]:
    """Two processes must not write the same files."""
    job.output.mkdir(
        parents=True, exist_ok=True
    )  # another rank that failed may have just removed it
    with job.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{job.output}: another process is preparing rank {job.rank} of it; wait for it"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                f"{job.output}: can not be locked ({error.strerror}); never start two at once."
            )
        yield


def _remove_partial_files(job: _Job) -> None:
    """Delete what this rank was writing when it was broken off: others may have finished without it."""
    strays = [job.metadata.with_name(f"{job.metadata.name}.{job.rank}.partial")]
    for folder in (job.output, job.output / "tokenizer"):
        strays += [
            *folder.glob(f"shard_{job.rank}_*.partial"),
            *folder.glob(f"*.{job.rank}.partial"),
        ]
    for stray in strays:
        stray.unlink(missing_ok=True)


def _is_finished(job: _Job) -> bool:
    """Whether there is nothing left to do. Raises DataError if it was finished with other settings."""
    if not job.metadata.exists():
        return False
    if _load(job.metadata).get("format") != FORMAT:
        raise DataError(
            f"output_path: {job.output}: its metadata would overwrite {job.metadata}; choose another output_path"
        )
    if not (job.output / "tokenizer").is_dir() or not all(
        job.done(rank).exists() for rank in range(job.world)
    ):
        return False
    settings = dict(job.settings)
    with contextlib.suppress(DataError):  # the documents may have been deleted since
        source = files.find(job.config.dataset)
        if source.digest is not None:
            settings["digest of the documents"] = source.digest
        if source.kind == "json" and "reading" not in _load(job.done(job.rank))["settings"]:
            logger.warning(
                f"{job.metadata}: was made by an earlier version, which could change texts that look like dates or"
                " numbers, and could leave files out for their names (CHANGELOG.md)."
            )
    for rank in range(job.world):
        _check_settings(job.done(rank), settings)
    return all(_is_done(job, rank) for rank in range(job.world))


def _is_done(job: _Job, rank: int) -> bool:
    """Whether a rank has done all it has to, and nothing has become of it."""
    path = job.done(rank)
    return path.exists() and all(
        _intact_record(job, rank, number) for number in range(_load(path)["shards"])
    )


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises DataError if a record was made with other settings."""
    before = _load(path)["settings"]
    for name, value in settings.items():
        begun = before.get(name, _OLD_DEFAULTS.get(name, value))
        if begun == value:
            continue
        difference = f"{name} {json.dumps(begun)}, now it is {json.dumps(value)}"
        if name == "tokenizer":
            difference = "another tokenizer"
        elif name.startswith("digest"):
            difference = (
                "other documents than are there now (their names, sizes or revision differ)"
            )
        elif name == "reading":
            raise DataError(
                f"{path.parent}: was begun by an earlier version, which read such files differently; choose another"
                f" output_path, or delete {path.parent}"
            )
        raise DataError(
            f"{path.parent}: was begun with {difference}; set it back, choose another output_path, or delete {path.parent}"
        )


def _intact_record(job: _Job, rank: int, number: int) -> dict[str, Any] | None:
    """The record of a token file that is there and has the right size."""
    prefix = job.prefix(number, rank)
    path = prefix.with_name(prefix.name + ".json")
    if not path.exists():
        return None
    record = _load(path)
    sizes = {
        ".bin": record["tokens"] * job.dtype.itemsize,
        ".idx": 34 + 12 * record["documents"] + 8 * (record["documents"] + 1),
    }
    for suffix, size in sizes.items():
        file = prefix.with_name(prefix.name + suffix)
        if not file.exists() or file.stat().st_size != size:
            logger.warning(f"{file}: is missing or damaged; it is made again.")
            return None
    return record


def _missing_ranges(job: _Job, first: int, last: int) -> list[tuple[int, int, int]]:
    """What is left to do of rows [first, last): number of the first token file, its first row, behind its last row."""
    gaps: list[tuple[int, int, int]] = []
    names = job.output.glob(f"shard_{job.rank}_*.json")
    numbers = sorted(int(path.stem.rpartition("_")[2]) for path in names)
    number, row = 0, first
    for there in numbers:
        record = _intact_record(job, job.rank, there)
        if record is None:
            continue
        if there > number:
            gaps.append((number, row, record["first_row"]))
        number, row = there + 1, record["next_row"]
    if row < last:
        gaps.append((number, row, last))
    return gaps


@dataclass
class _SkipCounts:
    """Documents that were passed over."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)
    """Where and why, of the first few."""

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append([where, reason])


def _write_shards(job: _Job, source: Corpus) -> None:
    """Tokenize this rank's rows into shard_<rank>_0, shard_<rank>_1, …"""
    first, last = (part * len(source) // job.world for part in (job.rank, job.rank + 1))
    gaps = _missing_ranges(job, first, last)
    rows = sum(end - begin for _, begin, end in gaps)
    if rows < last - first:
        logger.info(f"{job.output}: goes on with {rows:,} of {last - first:,} rows left.")
    worker = _RangeTokenizer(source.reader, job.loaded, job.dtype, job.bos, job.eos)
    _check_space(job, source, worker.encoder)
    progress = _Progress(rows, job.config.dataset.max_document_bytes)
    rest = _SkipCounts()  # behind the last token file
    with _tokenize_pool(job, source, worker) as tokenized:
        for number, begin, end in gaps:
            rest = _write_range(job, source, tokenized(begin, end), number, (begin, end), progress)
    progress.finish()
    content = {
        "shards": _count_shards(job),
        "skipped": rest.counts,
        "examples": rest.examples,
        "settings": job.settings,
    }
    _write_json(job.done(job.rank), job.rank, content)


def _count_shards(job: _Job) -> int:
    return len(list(job.output.glob(f"shard_{job.rank}_*.json")))


def _write_range(
    job: _Job,
    source: Corpus,
    parts: "Iterator[_TokenizedRange]",
    number: int,
    rows: tuple[int, int],
    progress: "_Progress",
) -> _SkipCounts:
    """Write token files from `number` on; what was passed over behind the last of them."""
    writer: TokenFileWriter | None = None
    skipped, first_row, largest = _SkipCounts(), rows[0], -1
    try:
        for part in parts:
            tokens = np.frombuffer(part.tokens, job.dtype)
            ends = np.cumsum(part.lengths)
            skipped_rows = deque(part.skipped_rows)
            at, row = 0, part.first
            while row < part.last:
                begin = int(ends[at - 1]) if at else 0
                room = job.config.tokens_per_shard - (writer.tokens if writer is not None else 0)
                # Up to and including the document that fills the token file.
                until = min(int(np.searchsorted(ends, begin + room)) + 1, len(ends))
                if until > at:
                    writer = writer or TokenFileWriter(job.prefix(number), job.dtype)
                    some = tokens[begin : int(ends[until - 1])]
                    writer.append_many(some, part.lengths[at:until])
                    largest = max(largest, int(some.max()))
                full = writer is not None and writer.tokens >= job.config.tokens_per_shard
                row = int(part.rows[until - 1]) + 1 if full else part.last
                while skipped_rows and skipped_rows[0][0] < row:
                    place, reason = skipped_rows.popleft()
                    skipped.add(source.name(place), reason)
                    progress.skip(source.name(place), reason)
                if source.kind == "file":
                    for long in np.flatnonzero(part.lengths[at:until] >= _LARGE_DOCUMENT).tolist():
                        progress.large_document(
                            source.name(int(part.rows[at + long])), int(part.lengths[at + long])
                        )
                if full and writer is not None:
                    _finish_shard(job, writer, number, (first_row, row), largest, skipped)
                    writer, number = None, number + 1
                    skipped, first_row, largest = _SkipCounts(), row, -1
                at = until
            progress.advance(part.last - part.first, len(part.lengths), len(tokens))
        if writer is not None:
            _finish_shard(job, writer, number, (first_row, rows[1]), largest, skipped)
            writer, skipped = None, _SkipCounts()
        return skipped
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.abandon()


def _finish_shard(
    job: _Job,
    writer: TokenFileWriter,
    number: int,
    rows: tuple[int, int],
    largest: int,
    skipped: _SkipCounts,
) -> None:
    """Finish a token file, then write its record: from then on it is never made again."""
    info = writer.close()
    content = {
        "first_row": rows[0],
        "next_row": rows[1],
        "documents": info.documents,
        "tokens": info.tokens,
        "max_token_id": largest,
        "sha256": {"bin": info.sha256_bin, "idx": info.sha256_idx},
        "skipped": skipped.counts,
        "examples": skipped.examples,
        "settings": job.settings,
    }
    prefix = job.prefix(number)
    _write_json(prefix.with_name(prefix.name + ".json"), job.rank, content)


@dataclass(frozen=True)
class _TokenizedRange:
    """What a worker made of rows [first, last)."""

    first: int
    last: int
    tokens: bytes
    lengths: NDArray[np.int64]  # of each document, in tokens
    rows: NDArray[np.int64]  # and where it comes from
    skipped_rows: list[tuple[int, str]]  # rows that were passed over, and why


class _RangeTokenizer:
    """Reads and tokenizes; one per process."""

    def __init__(
        self,
        reader: Reader,
        loaded: tokenizer.Loaded,
        dtype: np.dtype[Any],
        bos: int | None,
        eos: int | None,
    ):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
        self.reader = reader
        self.encoder = Encoder(loaded.tokenizer, dtype)
        self.bos, self.eos = (
            np.array([] if token is None else [token], dtype).tobytes() for token in (bos, eos)
        )
        self.special_ids = np.array(
            [token for token in (loaded.bos, loaded.eos) if token is not None], dtype
        )

    def tokenize(self, task: Task) -> _TokenizedRange:
        texts: list[str] = []
        rows: list[int] = []
        skipped_rows: list[tuple[int, str]] = []
        for row, text in enumerate(self.reader.texts(task), task.first):
            if isinstance(text, SkippedDocument):
                skipped_rows.append((row, text.reason))
            elif text is not None:
                texts.append(text)
                rows.append(row)
        pieces: list[bytes] = []
        lengths: list[int] = []
        kept: list[int] = []
        for row, content in zip(rows, self.encoder.encode(texts), strict=True):
            if content is None:
                skipped_rows.append((row, "untokenizable"))
            elif not content:
                skipped_rows.append((row, "empty"))
            elif np.isin(np.frombuffer(content, self.special_ids.dtype), self.special_ids).any():
                skipped_rows.append((row, "ends_itself"))
            else:
                pieces += (self.bos, content, self.eos)
                lengths.append(
                    (len(self.bos) + len(content) + len(self.eos)) // self.special_ids.itemsize
                )
                kept.append(row)
        return _TokenizedRange(
            task.first,
            task.last,
            b"".join(pieces),
            np.array(lengths, np.int64),
            np.array(kept, np.int64),
            sorted(skipped_rows),
        )


class _WorkerDied(Exception):
    pass


def _exit_with_parent(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _worker_main(connection: Connection) -> None:
    """A worker process: it is told what it is made of, then one task after the other, until nobody is left who tells it."""
    # If the parent is killed, it does not finish what nobody waits for.
    threading.Thread(
        target=_exit_with_parent, args=(multiprocessing.parent_process(),), daemon=True
    ).start()
    worker: _RangeTokenizer | None = None
    with contextlib.suppress(EOFError, OSError):  # half of a task too
        parts = connection.recv_bytes()
        while True:
            task = connection.recv()
            try:
                worker = worker or _RangeTokenizer(*pickle.loads(parts))
                answer: _TokenizedRange | Exception = worker.tokenize(task)
            except MemoryError:
                return
            except Exception as error:
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Signals to stop wait until this is over. Processes that are started meanwhile never hear of them: their parent does."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # which those that are started inherit
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # Another thread may take a signal: the handler is called in this one all the same.
        handlers = {
            each: signal.signal(each, lambda number, frame: came.append(number)) for each in numbers
        }
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def _tokenize_pool(
    job: _Job, source: Corpus, worker: _RangeTokenizer
) -> Iterator[Callable[[int, int], Iterator[_TokenizedRange]]]:
    """Gives a function from rows [first, last) to what becomes of them, range by range and in order."""
    workers = job.config.tokenize_workers
    if workers == 1:
        yield lambda first, last: map(worker.tokenize, source.tasks(first, last, _RANGE))
        return
    # A process may be killed at any instant, for want of memory mostly. ProcessPoolExecutor then waits for ever if the process held the
    # lock of a queue that all share, or had sent half an answer through a pipe that the others keep open. So each has a pipe of its own,
    # which ends with it, and a thread of ours that waits for its answer.
    # Spawned, since forked processes would inherit our locks, and those of the threads that libraries keep.
    context = multiprocessing.get_context("spawn")
    parts = pickle.dumps((source.reader, job.loaded, job.dtype, job.bos, job.eos))
    processes: list[Any] = []
    free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(workers)

    def begin(connection: Connection) -> None:
        try:
            connection.send_bytes(parts)
        except OSError:
            pass  # the first task will tell
        finally:
            free.put(connection)

    def start() -> None:
        try:
            ours, theirs = context.Pipe()
            with _block_signals():
                process = context.Process(target=_worker_main, args=(theirs,), daemon=True)
                process.start()
                processes.append(process)
            theirs.close()  # or its end would not be one
            threads.submit(begin, ours)
        except BrokenPipeError:
            raise _WorkerDied from None
        except (OSError, RuntimeError) as error:  # files, processes, threads
            raise DataError(
                f"tokenize_workers: only {len(processes)} of {workers} worker processes could be started: {error};"
                " lower tokenize_workers"
            ) from None

    def ask(task: Task) -> _TokenizedRange:
        connection = free.get()
        try:
            connection.send(task)
            answer: _TokenizedRange | Exception = connection.recv()
        except (EOFError, OSError):  # half of an answer too
            raise _WorkerDied from None
        finally:
            free.put(connection)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tokenized(first: int, last: int) -> Iterator[_TokenizedRange]:
        waiting: deque[Future[_TokenizedRange]] = deque()
        for task in source.tasks(first, last, _RANGE):
            if len(processes) < workers:
                start()
            waiting.append(threads.submit(ask, task))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        resource_tracker.ensure_running()  # a process of Python's; where it is begun, it ends what _block_signals does
        yield tokenized
    except _WorkerDied:
        raise DataError(
            "tokenize_workers: a worker process died, most likely for want of memory; lower tokenize_workers"
            f" (now {workers}) and start the same command again, it goes on where it stopped"
        ) from None
    finally:
        with _block_signals():
            for process in processes:  # they have nothing to save
                process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def _estimate(source: Corpus, encoder: Encoder) -> float:
    """Bytes that the token files will take, from a sample of the documents."""
    texts: list[str] = []
    size = 0
    for text in source.sample(64):
        texts.append(text[:_SAMPLE])
        size += len(texts[-1].encode())
        if size >= _SAMPLE:
            break
    sample = sum(len(content or b"") for content in encoder.encode(texts))
    return sample / max(size, 1) * source.bytes + (20 + 2 * encoder.dtype.itemsize) * len(source)


def _check_space(job: _Job, source: Corpus, encoder: Encoder) -> None:
    """Raises DataError if a sample of the documents says that the token files will not fit on the disk."""
    if job.config.dataset.disable_disk_space_check or not len(source):
        return
    in_all = _estimate(source, encoder)
    there = sum(path.stat().st_size for path in job.output.glob("shard_*.*"))
    free = shutil.disk_usage(job.output).free
    if in_all - there > free:
        raise DataError(
            f"output_path: {job.output}: the token files will need about {(in_all - there) / 1e9:.3g} GB more, but"
            f" {free / 1e9:.3g} GB are free; make room, or set dataset.disable_disk_space_check: yes"
        )


def _write_metadata(job: _Job, source: Corpus) -> None:
    """Write the metadata, once all ranks are done."""
    missing = [rank for rank in range(job.world) if not _is_done(job, rank)]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        logger.info(f"Rank {job.rank} is done. {job.metadata} is written when rank {names} is.")
        return
    shards: list[tuple[str, dict[str, Any]]] = []
    records: list[dict[str, Any]] = []
    for rank in range(job.world):
        done = _load(job.done(rank))
        _check_settings(job.done(rank), job.settings)
        mine = [job.prefix(number, rank) for number in range(done["shards"])]
        found = [(prefix.name, _load(prefix.with_name(prefix.name + ".json"))) for prefix in mine]
        shards += found
        records += [*(record for _, record in found), done]
    skipped = {
        reason: count
        for reason in documents.REASONS
        if (count := sum(record["skipped"].get(reason, 0) for record in records))
    }
    config = job.config.dataset
    if not shards:
        for rank in range(job.world):  # nothing to go on from
            job.done(rank).unlink(missing_ok=True)
        why = (
            ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are none"
        )
        raise DataError(f"dataset.path: {config.path} has no document to write: {why}")
    _copy_tokenizer(job)
    tokens = sum(record["tokens"] for _, record in shards)
    count = sum(record["documents"] for _, record in shards)
    content = {
        "format": FORMAT,
        "split": HASH,
        "datasets": [
            {
                "prefix": f"{job.output.name}/{name}",
                "num_documents": record["documents"],
                "num_tokens": record["tokens"],
                "weight": record["tokens"] / tokens,
                "dtype": str(job.dtype),
                "sha256": record["sha256"],
            }
            for name, record in shards
        ],
        "tokenizer": {
            "fingerprint": job.loaded.fingerprint,
            "vocab_size": job.loaded.vocab_size,
            "bos": job.loaded.bos,
            "eos": job.loaded.eos,
            "writes_bos": job.bos is not None,
            "writes_eos": job.eos is not None,
            "path": f"{job.output.name}/tokenizer",
        },
        "max_token_id": max(record["max_token_id"] for _, record in shards),
        "num_documents": count,
        "num_tokens": tokens,
        "skipped_documents": sum(skipped.values()),
        "skipped": skipped,
        "skipped_examples": [example for record in records for example in record["examples"]][
            :_EXAMPLES
        ],
        "source": {
            "path": config.path,
            "config_name": config.config_name,
            "data_directory": config.data_directory,
            "data_files": config.data_files,
            "split": config.split,
            "field": config.field,
            "documents": len(source) - source.blank_rows,
            "digest": source.digest,
            "left_out_files": len(source.left_out),
            "left_out_examples": [list(each) for each in source.left_out[:_EXAMPLES]],
        },
    }
    _write_json(job.metadata, job.rank, {**content, "sha256": content_digest(content)})
    passed = (
        f"; passed over {', '.join(f'{number:,} {reason}' for reason, number in skipped.items())}"
        if skipped
        else ""
    )
    logger.info(
        f"{job.metadata}: {count:,} documents, {tokens:,} tokens as {job.dtype} in {len(shards):,}"
        f" token file{'s' if len(shards) > 1 else ''}{passed}"
    )


def _copy_tokenizer(job: _Job) -> None:
    folder = job.output / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, file in job.loaded.named_files():
        partial = folder / f"{name}.{job.rank}.partial"
        partial.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, partial)
        partial.replace(folder / name)


def _load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: damaged: {error}; delete it and start the same command again"
        ) from error


def _write_json(path: Path, rank: int, content: dict[str, Any]) -> None:
    """Whole or absent, also after a power cut."""
    partial = path.with_name(f"{path.name}.{rank}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class _Progress:
    """Rows, tokens, tokens per second and time left, on stderr every few seconds."""

    def __init__(self, rows: int, largest: int = 2**26):
        self.rows, self.largest = rows, largest
        self.done = self.documents = self.tokens = self.named = self.large = 0
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def skip(self, where: str, reason: str) -> None:
        """Name a document that was passed over, unless there were several already."""
        self.named += reason != "empty"
        if reason != "empty" and self.named <= _EXAMPLES:
            last = "; further ones are only counted" if self.named == _EXAMPLES else ""
            limit = (
                f", more than dataset.max_document_bytes {self.largest:,}"
                if reason == "too_large"
                else ""
            )
            logger.warning(f"Passed over ({reason}{limit}): {where}{last}")

    def large_document(self, where: str, tokens: int) -> None:
        """Name a file that is one document of millions of tokens, unless there were several already."""
        self.large += 1
        if self.large <= _EXAMPLES:
            logger.info(
                f"{where} is one document of {tokens:,} tokens, since a file is a document. If it holds several, write"
                " them to a file each, or as rows of jsonl."
            )

    def advance(self, rows: int, documents: int, tokens: int) -> None:
        """So many more are done."""
        self.done, self.documents, self.tokens = (
            self.done + rows,
            self.documents + documents,
            self.tokens + tokens,
        )
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 5):
            return
        self.shown, seconds = now, now - self.started
        left = seconds / self.done * (self.rows - self.done)
        line = (
            f"{100 * self.done / self.rows:.1f} %, {self.documents:,} documents, {self.tokens:,} tokens,"
            f" {self.tokens / seconds:,.0f} tokens/s, {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left"
        )
        self._write(f"\r\x1b[K{line}" if self.terminal else line + "\n")

    def finish(self) -> None:
        """The last word."""
        if self.terminal:
            self._write("\r\x1b[K")
        seconds = max(time.monotonic() - self.started, 1e-9)
        logger.info(
            f"Tokenized {self.documents:,} documents: {self.tokens:,} tokens in {seconds:,.1f} s,"
            f" {self.tokens / seconds:,.0f} tokens/s."
        )

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # whoever reads has enough; the work goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
