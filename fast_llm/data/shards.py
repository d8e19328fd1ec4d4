"""The output folder of a preparation: token files, their records, and how an interrupted job
resumes.

Rank r writes its rows into shard_<r>_0, shard_<r>_1, …, in order. A token file ends with the
document that brings it to `tokens_per_shard`. Its record (shard_<r>_<i>.json) is written after it:
which rows it holds, how many tokens, its digests, and the settings. A started job trusts every
record whose token file has the right size, and tokenizes only the rows between them. So an
interrupted preparation ends with the same bytes as an undisturbed one.

Memory is that of one token file's document lengths (4 bytes each) and of the results that workers
send.
"""

import contextlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.data.documents import Corpus
from fast_llm.data.job import Job
from fast_llm.data.progress import Progress
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.data.workers import RangeTokenizer, TokenizedRange, tokenize_pool
from fast_llm.errors import DataError
from fast_llm.storage import write_atomically

logger = logging.getLogger("fast_llm")

EXAMPLES = 10  # skipped documents that are named
_LARGE_DOCUMENT = 2**20  # tokens; such a file is likely a collection of documents
# What older records mean by a setting that their version did not have.
_OLD_DEFAULTS = {"dataset.max_document_bytes": 2**26, "reading": 1}


def remove_partial_files(job: Job) -> None:
    """Delete what this rank was writing when it was interrupted."""
    partial = [job.metadata.with_name(f"{job.metadata.name}.{job.rank}.partial")]
    for folder in (job.output, job.output / "tokenizer"):
        partial += [
            *folder.glob(f"shard_{job.rank}_*.partial"),
            *folder.glob(f"*.{job.rank}.partial"),
        ]
    for path in partial:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A record. Raises DataError if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: damaged: {error}; delete it and run the same command again"
        ) from error


def write_json(path: Path, rank: int, content: dict[str, Any]) -> None:
    """Write a file that is complete or absent, also after a power failure."""
    partial = path.with_name(f"{path.name}.{rank}.partial")
    write_atomically(path, json.dumps(content, indent=1) + "\n", partial)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises DataError if a record was made with other settings."""
    before = read_json(path)["settings"]
    for name, value in settings.items():
        old = before.get(name, _OLD_DEFAULTS.get(name, value))
        if old == value:
            continue
        difference = f"{name} {json.dumps(old)}, now it is {json.dumps(value)}"
        if name == "tokenizer":
            difference = "another tokenizer"
        elif name.startswith("digest"):
            difference = (
                "other documents than there are now (their names, sizes or revision differ)"
            )
        elif name == "reading":
            raise DataError(
                f"{path.parent}: was started by an earlier version, which read such files"
                f" differently; choose another output_path, or delete {path.parent}"
            )
        raise DataError(
            f"{path.parent}: was started with {difference}; restore it, choose another output_path,"
            f" or delete {path.parent}"
        )


def rank_is_done(job: Job, rank: int) -> bool:
    """Whether a rank has finished and its token files are still there."""
    path = job.rank_record(rank)
    return path.exists() and all(
        _intact_record(job, rank, number) for number in range(read_json(path)["shards"])
    )


def _intact_record(job: Job, rank: int, number: int) -> dict[str, Any] | None:
    """The record of a token file, if that exists and has the right size."""
    path = job.record(number, rank)
    if not path.exists():
        return None
    record = read_json(path)
    sizes = {
        ".bin": record["tokens"] * job.dtype.itemsize,
        ".idx": 34 + 12 * record["documents"] + 8 * (record["documents"] + 1),
    }
    prefix = job.shard(number, rank)
    for suffix, size in sizes.items():
        file = prefix.with_name(prefix.name + suffix)
        if not file.exists() or file.stat().st_size != size:
            logger.warning(f"{file}: missing or damaged; it is written again.")
            return None
    return record


def _missing_ranges(job: Job, first: int, last: int) -> list[tuple[int, int, int]]:
    """What is left to do of rows [first, last): number of the first token file, first row, end of
    the rows.
    """
    missing: list[tuple[int, int, int]] = []
    numbers = sorted(int(path.stem.rpartition("_")[2]) for path in job.records())
    number, row = 0, first
    for existing in numbers:
        record = _intact_record(job, job.rank, existing)
        if record is None:
            continue
        if existing > number:
            missing.append((number, row, record["first_row"]))
        number, row = existing + 1, record["next_row"]
    if row < last:
        missing.append((number, row, last))
    return missing


@dataclass
class SkipCounts:
    """How many documents were skipped for each reason, and where the first few are."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)  # [where, reason]

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append([where, reason])


def remaining_rows(job: Job, corpus: Corpus) -> list[tuple[int, int, int]]:
    """The ranges of this rank's rows that have no token file yet."""
    first, last = (part * len(corpus) // job.world for part in (job.rank, job.rank + 1))
    missing = _missing_ranges(job, first, last)
    rows = sum(end - begin for _, begin, end in missing)
    if rows < last - first:
        logger.info(f"{job.output}: resuming, {rows:,} of {last - first:,} rows left.")
    return missing


def write_shards(
    job: Job,
    corpus: Corpus,
    missing: list[tuple[int, int, int]],
    range_tokenizer: RangeTokenizer,
) -> None:
    """Tokenize the missing ranges into token files, then record that this rank has finished."""
    rows = sum(end - begin for _, begin, end in missing)
    progress = Progress(rows, job.config.dataset.max_document_bytes)
    skipped = SkipCounts()  # after the last token file
    with tokenize_pool(corpus, range_tokenizer, job.config.tokenize_workers) as tokenize:
        for number, begin, end in missing:
            ranges = tokenize(begin, end)
            skipped = _write_range(job, corpus, ranges, number, (begin, end), progress)
    progress.finish()
    content = {
        "shards": len(job.records()),
        "skipped": skipped.counts,
        "examples": skipped.examples,
        "settings": job.settings,
    }
    write_json(job.rank_record(job.rank), job.rank, content)


def _write_range(
    job: Job,
    corpus: Corpus,
    ranges: Iterator[TokenizedRange],
    number: int,
    rows: tuple[int, int],
    progress: Progress,
) -> SkipCounts:
    """Write token files from `number` on; what was skipped after the last of them."""
    writer: TokenFileWriter | None = None
    skipped, first_row, max_token = SkipCounts(), rows[0], -1
    try:
        for part in ranges:
            tokens = np.frombuffer(part.tokens, job.dtype)
            ends = np.cumsum(part.lengths)
            waiting = deque(part.skipped_rows)
            at, row = 0, part.first
            while row < part.last:
                begin = int(ends[at - 1]) if at else 0
                room = job.config.tokens_per_shard - (writer.tokens if writer is not None else 0)
                # Up to and including the document that fills the token file.
                until = min(int(np.searchsorted(ends, begin + room)) + 1, len(ends))
                if until > at:
                    writer = writer or TokenFileWriter(job.shard(number), job.dtype)
                    some = tokens[begin : int(ends[until - 1])]
                    writer.append_many(some, part.lengths[at:until])
                    max_token = max(max_token, int(some.max()))
                full = writer is not None and writer.tokens >= job.config.tokens_per_shard
                row = int(part.rows[until - 1]) + 1 if full else part.last
                while waiting and waiting[0][0] < row:
                    place, reason = waiting.popleft()
                    skipped.add(corpus.name(place), reason)
                    progress.skip(corpus.name(place), reason)
                _report_large(corpus, part, at, until, progress)
                if full and writer is not None:
                    _finish_shard(job, writer, number, (first_row, row), max_token, skipped)
                    writer, number = None, number + 1
                    skipped, first_row, max_token = SkipCounts(), row, -1
                at = until
            progress.advance(part.last - part.first, len(part.lengths), len(tokens))
        if writer is not None:
            _finish_shard(job, writer, number, (first_row, rows[1]), max_token, skipped)
            writer, skipped = None, SkipCounts()
        return skipped
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.abandon()


def _report_large(
    corpus: Corpus, part: TokenizedRange, at: int, until: int, progress: Progress
) -> None:
    if corpus.kind != "file":
        return
    for large in np.flatnonzero(part.lengths[at:until] >= _LARGE_DOCUMENT).tolist():
        name = corpus.name(int(part.rows[at + large]))
        progress.large_document(name, int(part.lengths[at + large]))


def _finish_shard(
    job: Job,
    writer: TokenFileWriter,
    number: int,
    rows: tuple[int, int],
    max_token: int,
    skipped: SkipCounts,
) -> None:
    """Complete a token file, then write its record. A recorded file is never written again."""
    info = writer.close()
    content = {
        "first_row": rows[0],
        "next_row": rows[1],
        "documents": info.documents,
        "tokens": info.tokens,
        "max_token_id": max_token,
        "sha256": {"bin": info.sha256_bin, "idx": info.sha256_idx},
        "skipped": skipped.counts,
        "examples": skipped.examples,
        "settings": job.settings,
    }
    write_json(job.record(number), job.rank, content)
