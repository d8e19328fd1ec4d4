"""Documents in, token files out.

Documents are rows of a table that `datasets` maps into memory. Worker processes read and tokenize ranges of
rows; this process writes what they return in the rows' order, so the result does not depend on how many they
are. A token file is whole or absent and leaves a small record beside it; a preparation that was broken off goes
on behind the last record and ends with the same bytes.

What becomes of odd documents: an empty one, or a row without text, is passed over and counted; a source file
that is not UTF-8 is passed over, counted and named; NULs and special tokens' spellings are ordinary text. All of
these counts are in the metadata.
"""

import errno
import fcntl
import glob
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import tokenizer as tokenizers
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import DataError, MissingPackage

logger = logging.getLogger("fast_llm")

_ROWS = 256  # read by a worker at a time
_CHARACTERS = 2**22  # tokenized at a time
_KINDS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".json.gz": "json",
    ".json.zst": "json",
    ".arrow": "arrow",
}


def prepare(config: PrepareConfig) -> Path:
    """Write token files and their metadata; the metadata's path.

    Raises DataError for documents, tokenizers and folders that do not fit, MissingPackage without `datasets`.
    """
    rank, world = _world(config)
    output = Path(config.output_path).expanduser()
    loaded = tokenizers.load(config.tokenizer.path)
    dtype = _dtype(config, loaded)
    front, back = _ends(config, loaded)
    metadata = output.with_name(output.name + ".json")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / f".lock_{rank}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"{output}: is being prepared by another process; wait for it") from error
            table = _Table.open(config)
            settings = _settings(config, loaded, dtype, front, back, world, len(table))
            first, last = rank * len(table) // world, (rank + 1) * len(table) // world
            _write_shards(config, output, rank, table, (first, last), loaded, dtype, front, back, settings)
            _finish(config, output, metadata, world, loaded, front, back, settings, table.skipped_files)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{output}: the disk is full; make room and start the same command again, it goes on where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"{output}: can not be written to: {error.strerror}") from error
        raise
    return metadata


def _world(config: PrepareConfig) -> tuple[int, int]:
    wanted = config.distributed
    world = wanted.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    rank = wanted.rank if wanted.rank is not None else int(os.environ.get("RANK", "0"))
    if rank >= world:
        raise DataError(f"distributed.rank: given {rank}, must be below distributed.world_size {world}")
    return rank, world


def _dtype(config: PrepareConfig, loaded: tokenizers.Loaded) -> np.dtype[Any]:
    """The smallest integer type for the vocabulary, or the one asked for."""
    for name in ("uint8", "uint16", "int32"):
        if loaded.vocab_size - 1 <= np.iinfo(name).max:
            break
    wanted = config.dataset.data_type
    if wanted is None:
        return np.dtype(name)
    if loaded.vocab_size - 1 > np.iinfo(wanted).max:
        raise DataError(
            f"dataset.data_type: given {wanted}, which ends at {np.iinfo(wanted).max}, but the tokenizer's largest token is"
            f" {loaded.vocab_size - 1}; {name} holds it"
        )
    return np.dtype(wanted)


def _ends(config: PrepareConfig, loaded: tokenizers.Loaded) -> tuple[int | None, int | None]:
    """The tokens before and behind each document."""
    wanted = config.tokenizer
    if wanted.bos == "yes" and loaded.bos is None:
        raise DataError(f"tokenizer.bos: given yes, but {loaded.path.parent} names no BOS token")
    if wanted.eos != "no" and loaded.eos is None:
        raise DataError(
            f"tokenizer.eos: {loaded.path.parent} names no EOS token, without which documents run together; add eos_token"
            " to its tokenizer_config.json, or set tokenizer.eos: no"
        )
    front = loaded.bos if wanted.bos == "yes" or (wanted.bos == "auto" and loaded.adds_bos) else None
    return front, None if wanted.eos == "no" else loaded.eos


@dataclass
class _Table:
    """Rows of documents. Opened anew in every worker, since a memory map is not sent between processes."""

    rows: Any  # a datasets.Dataset, or a list of files
    field: str
    skipped_files: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, first: int, last: int) -> list[str | None]:
        """The documents of rows [first, last); None for what is no text."""
        if isinstance(self.rows, list):
            return [_read_file(path) for path in self.rows[first:last]]
        return [text if isinstance(text, str) else None for text in self.rows[first:last][self.field]]

    @staticmethod
    def open(config: PrepareConfig) -> "_Table":
        source = config.dataset
        files = _local_files(config)
        if files is not None and not files:
            raise DataError(f"dataset.path: {source.path} holds no files to read")
        if files is not None and _kind(files[0]) is None:
            return _Table(files, source.field, [])
        try:
            import datasets
        except ImportError as error:
            raise MissingPackage("datasets", "data", "prepare") from error
        datasets.disable_progress_bars()
        workers = config.loading_workers if config.loading_workers > 1 else None
        try:
            if files is None and (Path(source.path) / "state.json").is_file():
                rows = datasets.load_from_disk(source.path)
            elif files is not None:
                kind = _kind(files[0])
                rows = datasets.load_dataset(kind, data_files=files, split="train", num_proc=workers)
            else:
                rows = datasets.load_dataset(
                    source.path,
                    name=source.config_name,
                    data_dir=source.data_directory,
                    data_files=source.data_files,
                    split=source.split,
                    num_proc=workers,
                )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(f"dataset.path: {source.path} can not be read: {_reason(error)}") from error
        except Exception as error:
            raise DataError(f"dataset.path: {source.path} can not be read: {_reason(error)}") from error
        if source.field not in rows.column_names:
            raise DataError(
                f"dataset.field: {source.path} has no column {source.field}; it has {', '.join(rows.column_names)}"
            )
        return _Table(rows, source.field, [])


def _reason(error: BaseException) -> str:
    """The first cause: `datasets` wraps what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _local_files(config: PrepareConfig) -> list[str] | None:
    """The files that the configuration names on this machine, sorted; None if it names a Hub dataset."""
    source = config.dataset
    place = Path(source.path).expanduser()
    if (place / "state.json").is_file():
        return None
    if place.is_file():
        return [str(place)]
    if place.is_dir():
        root = place / source.data_directory if source.data_directory else place
        patterns = source.data_files or "**/*"
        found = {
            path
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            for path in glob.glob(str(root / pattern), recursive=True)
        }
        files = sorted(path for path in found if Path(path).is_file() and not Path(path).name.startswith("."))
        if source.data_files is None:
            tables = [path for path in files if _kind(path) is not None]
            files = tables or files
        kinds = {_kind(path) for path in files}
        if len(kinds) > 1:
            names = ", ".join(sorted(str(kind or "text") for kind in kinds))
            raise DataError(
                f"dataset.path: {source.path} mixes kinds of files ({names}); choose with dataset.data_files"
            )
        return files
    if any(sign in source.path for sign in "*?["):
        return sorted(path for path in glob.glob(str(place), recursive=True) if Path(path).is_file())
    if source.path.startswith((".", "/", "~")) or source.path.count("/") > 1:
        raise DataError(f"dataset.path: {source.path}: no such file or folder")
    return None


def _kind(path: str) -> str | None:
    """Which builder of `datasets` reads a file; None: a document of plain text."""
    suffixes = Path(path).suffixes
    return _KINDS.get("".join(suffixes[-2:])) or _KINDS.get("".join(suffixes[-1:]))


def _read_file(path: str) -> str | None:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _settings(
    config: PrepareConfig,
    loaded: tokenizers.Loaded,
    dtype: np.dtype[Any],
    front: int | None,
    back: int | None,
    world: int,
    rows: int,
) -> dict[str, Any]:
    """What decides the bytes of the token files."""
    source = config.dataset
    return {
        "dataset": [
            source.path,
            source.config_name,
            source.data_directory,
            source.data_files,
            source.split,
            source.field,
        ],
        "rows": rows,
        "tokenizer": loaded.fingerprint,
        "bos": front,
        "eos": back,
        "data_type": str(dtype),
        "tokens_per_shard": config.tokens_per_shard,
        "world_size": world,
    }


def _write_shards(
    config: PrepareConfig,
    output: Path,
    rank: int,
    table: _Table,
    rows: tuple[int, int],
    loaded: tokenizers.Loaded,
    dtype: np.dtype[Any],
    front: int | None,
    back: int | None,
    settings: dict[str, Any],
) -> None:
    """Tokenize rows [first, last) into shard_<rank>_0, shard_<rank>_1, …"""
    done = _records(output, rank)
    if (output / f"rank_{rank}.json").exists():
        _same_settings(output / f"rank_{rank}.json", settings)
        return
    for path in done:
        _same_settings(path, settings)
    at = _load(done[-1])["next_row"] if done else rows[0]
    number = len(done)
    if not config.dataset.disable_disk_space_check:
        _check_space(output, table, (at, rows[1]), dtype)
    for stray in output.glob(f"shard_{rank}_*.partial"):
        stray.unlink()
    writer: TokenFileWriter | None = None
    counts = _Counts()
    progress = _Progress(rows[1] - at)
    _State.table, _State.loaded, _State.front, _State.back, _State.dtype = table, loaded, front, back, dtype
    total_tokens = 0
    for first, part in _tokenized(config, (at, rows[1])):
        data = np.frombuffer(part.tokens, dtype)
        begin = 0
        for row, length in zip(part.rows, part.lengths, strict=True):
            if writer is None:
                writer = TokenFileWriter(output / f"shard_{rank}_{number}", dtype)
                counts = _Counts()
            writer.append(data[begin : begin + length])
            begin += length
            counts.largest = max(counts.largest, part.largest)
            if writer.tokens >= config.tokens_per_shard:
                _close(writer, output, rank, number, first + row + 1, counts, settings)
                writer, number = None, number + 1
        counts.skipped += part.skipped
        counts.named += part.named
        total_tokens += len(data)
        progress.show(first + part.read - at, total_tokens)
    if writer is not None:
        _close(writer, output, rank, number, rows[1], counts, settings)
    progress.finish(total_tokens)
    for name in counts.named[:10]:
        logger.warning(f"Passed over, since it is not UTF-8: {name}")
    _write_json(output / f"rank_{rank}.json", {"settings": settings, "shards": len(_records(output, rank))})


@dataclass
class _Counts:
    """What is counted on the way."""

    largest: int = -1
    skipped: int = 0
    named: list[str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.named = []


@dataclass
class _Part:
    """What a worker made of a range of rows."""

    tokens: bytes
    lengths: list[int]
    rows: list[int]  # of each document, within the range
    read: int
    largest: int
    skipped: int
    named: list[str]


class _State:
    """What workers inherit when they are forked."""

    table: _Table
    loaded: tokenizers.Loaded
    front: int | None
    back: int | None
    dtype: np.dtype[Any]


def _tokenized(config: PrepareConfig, rows: tuple[int, int]) -> Iterator[tuple[int, _Part]]:
    """Ranges of rows and what became of them, in order."""
    ranges = [(begin, min(begin + _ROWS, rows[1])) for begin in range(rows[0], rows[1], _ROWS)]
    if config.tokenize_workers == 1:
        for part in ranges:
            yield part[0], _tokenize(part)
        return
    # Forked, so that workers share the memory map; no thread runs in this process by now.
    with multiprocessing.get_context("fork").Pool(config.tokenize_workers) as pool:
        for part, result in zip(ranges, pool.imap(_tokenize, ranges), strict=True):
            yield part[0], result


def _tokenize(rows: tuple[int, int]) -> _Part:
    """Tokens of rows [first, last)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded, front, back = _State.loaded, _State.front, _State.back
    # The spelling of a special token inside a document is text, not a token: no document can end itself.
    loaded.tokenizer.encode_special_tokens = True
    part = _Part(b"", [], [], rows[1] - rows[0], -1, 0, [])
    ids: list[np.ndarray[Any, Any]] = []
    pending: list[tuple[int, str]] = []
    size = 0

    def encode() -> None:
        for (row, _), encoding in zip(
            pending,
            loaded.tokenizer.encode_batch_fast([text for _, text in pending], add_special_tokens=False),
            strict=True,
        ):
            tokens = encoding.ids
            document = [
                *([front] if front is not None else []),
                *tokens,
                *([back] if back is not None else []),
            ]
            ids.append(np.array(document, dtype=np.int64))
            part.lengths.append(len(document))
            part.rows.append(row)
        pending.clear()

    for row, text in enumerate(_State.table.texts(*rows)):
        if not text:
            part.skipped += 1
            if text is None and isinstance(_State.table.rows, list):
                part.named.append(_State.table.rows[rows[0] + row])
            continue
        pending.append((row, text))
        size += len(text)
        if size >= _CHARACTERS:
            encode()
            size = 0
    encode()
    if ids:
        flat = np.concatenate(ids)
        part.largest = int(flat.max(initial=-1))
        part.tokens = flat.astype(_State.dtype).tobytes()
    return part


def _close(
    writer: TokenFileWriter,
    output: Path,
    rank: int,
    number: int,
    next_row: int,
    counts: _Counts,
    settings: dict[str, Any],
) -> None:
    """Publish a token file, then its record."""
    info = writer.close()
    _write_json(
        output / f"shard_{rank}_{number}.json",
        {
            "documents": info.documents,
            "tokens": info.tokens,
            "sha256": {"bin": info.sha256_bin, "idx": info.sha256_idx},
            "next_row": next_row,
            "max_token_id": counts.largest,
            "settings": settings,
        },
    )


def _records(output: Path, rank: int) -> list[Path]:
    """The records of this rank's finished token files, in order, without a gap."""
    found: list[Path] = []
    while (path := output / f"shard_{rank}_{len(found)}.json").exists():
        found.append(path)
    return found


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    before = _load(path)["settings"]
    for name, value in settings.items():
        if before.get(name) != value:
            raise DataError(
                f"{path.parent}: was begun with {name} {json.dumps(before.get(name))}, now it is {json.dumps(value)};"
                " set it back, or choose another output_path or an empty one"
            )


def _finish(
    config: PrepareConfig,
    output: Path,
    metadata: Path,
    world: int,
    loaded: tokenizers.Loaded,
    front: int | None,
    back: int | None,
    settings: dict[str, Any],
    skipped_files: list[str],
) -> None:
    """Write the metadata, once all ranks are done: whoever is last does it."""
    if not all((output / f"rank_{rank}.json").exists() for rank in range(world)):
        logger.info(f"This part is done; the last of the {world} writes {metadata}.")
        return
    folder = output / "tokenizer"
    folder.mkdir(exist_ok=True)
    for file in loaded.files:
        shutil.copyfile(file, folder / file.name)
    records = [
        (path.name.removesuffix(".json"), _load(path)) for rank in range(world) for path in _records(output, rank)
    ]
    if not records:
        raise DataError(f"dataset.path: {config.dataset.path} holds no text in its column {config.dataset.field}")
    total = sum(record["tokens"] for _, record in records)
    content = {
        "format": "fast_llm dataset 1",
        "datasets": [
            {
                "prefix": f"{output.name}/{prefix}",
                "num_documents": record["documents"],
                "num_tokens": record["tokens"],
                "weight": record["tokens"] / total,
                "dtype": settings["data_type"],
                "sha256": record["sha256"],
            }
            for prefix, record in records
        ],
        "tokenizer": {
            "fingerprint": loaded.fingerprint,
            "vocab_size": loaded.vocab_size,
            "bos": loaded.bos,
            "eos": loaded.eos,
            "writes_bos": front is not None,
            "writes_eos": back is not None,
            "path": f"{output.name}/tokenizer",
        },
        "max_token_id": max(record["max_token_id"] for _, record in records),
        "num_documents": sum(record["documents"] for _, record in records),
        "num_tokens": total,
        "skipped_documents": settings["rows"] - sum(record["documents"] for _, record in records),
        "source": settings["dataset"],
    }
    _write_json(metadata, content)
    logger.info(
        f"{metadata}: {content['num_documents']:,} documents, {total:,} tokens as {settings['data_type']} in"
        f" {len(records)} token file{'s' if len(records) > 1 else ''}, {content['skipped_documents']:,} rows passed over"
    )


def _check_space(output: Path, table: _Table, rows: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Estimate from a sample of rows whether the token files will fit: four characters are about a token."""
    if rows[1] <= rows[0]:
        return
    sample = table.texts(rows[0], min(rows[0] + 100, rows[1]))
    characters = sum(len(text or "") for text in sample) / len(sample) * (rows[1] - rows[0])
    needed, free = int(characters / 4 * dtype.itemsize), shutil.disk_usage(output).free
    if needed > free:
        raise DataError(
            f"{output}: the tokens will need about {needed / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free; make room, or set"
            " dataset.disable_disk_space_check: yes"
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged; delete it and start again: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class _Progress:
    """Documents, tokens, tokens per second and time left, on stderr every few seconds."""

    def __init__(self, rows: int):
        self.rows = rows
        self.started = time.monotonic()
        self.shown = self.started
        self.terminal = sys.stderr.isatty()

    def show(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 10) or not done:
            return
        self.shown = now
        left = (now - self.started) / done * (self.rows - done)
        rate = tokens / (now - self.started)
        share = 100 * done / self.rows
        line = (
            f"{done:,}/{self.rows:,} rows ({share:.0f} %), {tokens:,} tokens, {rate:,.0f} tokens/s, {left:,.0f} s left"
        )
        sys.stderr.write(f"\r\x1b[K{line}" if self.terminal else line + "\n")
        sys.stderr.flush()

    def finish(self, tokens: int) -> None:
        if self.terminal:
            sys.stderr.write("\r\x1b[K")
        seconds = max(time.monotonic() - self.started, 1e-9)
        logger.info(
            f"Tokenized {self.rows:,} rows: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s."
        )
