"""The output folder of a preparation: token files, their records, and how an interrupted job
resumes.

Rows are written into shard_0_0, shard_0_1, …, in order. A token file ends with the document that
brings it to `tokens_per_shard`. Its record (shard_0_<i>.json) is written after it:
which rows it holds, how many tokens, its digests, and the settings. A started job trusts every
record whose token file has the right size, and tokenizes only the rows between them. So an
interrupted preparation ends with the same bytes as an undisturbed one.

Memory is that of one token file's document lengths (4 bytes each) and of the results that workers
send.
"""

import contextlib
import glob
import itertools
import json
import logging
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.data.documents import DUPLICATE, FILTERED, Corpus
from fast_llm.data.engine import NAME
from fast_llm.data.job import Job
from fast_llm.data.masks import MaskWriter, masks_path
from fast_llm.data.origins import RowRuns
from fast_llm.data.progress import Progress
from fast_llm.data.reading import NOT_JSON, too_many_bad_lines
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.data.workers import RangeTokenizer, TokenizedRange, tokenize_pool
from fast_llm.errors import DataError
from fast_llm.storage import write_atomically

logger = logging.getLogger("fast_llm")

EXAMPLES = 10  # skipped documents that are named
BAD_LINES = 100  # that a record lists
LARGE_DOCUMENT = 2**20  # tokens; such a file is likely a collection of documents
# What older records mean by a setting that their version did not have.
_OLD_DEFAULTS: dict[str, Any] = {
    "dataset.deduplicate": False,
    "dataset.filter": None,
    "dataset.loss_masking_spans": None,
    "dataset.max_document_bytes": 2**26,
    "reading": 1,
    "tokenizer.special_tokens": [],
}


def remove_partial_files(job: Job, of_all_ranks: bool = False) -> None:
    """Delete what this rank, or any process, was writing when it was interrupted."""
    rank = "*" if of_all_ranks or job.on_ray else str(job.rank)
    partial = [*job.output.parent.glob(f"{glob.escape(job.metadata.name)}.{rank}.partial")]
    for folder in (job.output, job.output / "tokenizer", job.units):
        partial += folder.glob(f"*.{rank}.partial")
    partial += job.output.glob("shard_*.bin.partial")  # of earlier versions
    partial += job.output.glob("shard_*.idx.partial")
    for path in partial:
        path.unlink(missing_ok=True)


def remove_shared_work(job: Job) -> None:
    """Delete what ranks shared, once it is of no use."""
    for folder in (job.units, job.counts):
        shutil.rmtree(folder, ignore_errors=True)


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
    # Recorded only if it is used.
    spans = "dataset.loss_masking_spans"
    differences: list[str] = []
    for name, value in ({spans: None} | settings).items():
        old = before.get(name, _OLD_DEFAULTS.get(name, value))
        if old == value:
            continue
        difference = f"{name} {json.dumps(old)}, now it is {json.dumps(value)}"
        if name == "tokenizer" and any(one.startswith("tokenizer.") for one in differences):
            continue  # the fingerprint covers them
        if name == "tokenizer":
            difference = "another tokenizer"
        elif name == "dataset.filter_sha256":
            if before.get("dataset.filter") != settings.get("dataset.filter"):
                continue  # another filter, which is named already
            difference = "another version of the module of dataset.filter"
        elif name.startswith("digest"):
            difference = (
                "other documents than there are now (their names, sizes or revision differ)"
            )
        elif name == "reading":
            raise DataError(
                f"{path.parent}: was started by an earlier version, which read such files"
                f" differently; choose another output_path, or delete {path.parent}"
            )
        if name == "distributed.world_size":
            raise DataError(
                f"{path.parent}: was started by an earlier version on {old} nodes, whose parts this"
                f" version cannot complete; choose another output_path, or delete {path.parent}"
            )
        differences.append(difference)
    if differences:
        them = "it" if len(differences) == 1 else "them"
        raise DataError(
            f"{path.parent}: was started with {', and with '.join(differences)}; restore {them},"
            f" choose another output_path, or delete {path.parent}"
        )


def is_complete(job: Job) -> bool:
    """Whether all rows are written and the token files are still there."""
    if not job.rank_record().exists():
        return False
    ranks = range(read_json(job.rank_record())["settings"]["distributed.world_size"])
    return all(
        job.rank_record(rank).exists()
        and all(
            read_record(job, number, rank)
            for number in range(read_json(job.rank_record(rank))["shards"])
        )
        for rank in ranks
    )


def read_record(job: Job, number: int, rank: int = 0) -> dict[str, Any] | None:
    """The record of a token file, if that exists and has the right size."""
    path = job.record(number, rank)
    if not path.exists():
        return None
    record = read_json(path)
    if job.refused_engine.exists() and record.get("engine", "").startswith(NAME):
        return None
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
    if "masks" in record["sha256"] and not masks_path(prefix).exists():
        logger.warning(f"{masks_path(prefix)}: missing; the token file is written again.")
        return None
    return record


def remaining_rows(job: Job, corpus: Corpus) -> list[tuple[int, int, int]]:
    """The ranges of rows that have no token file yet: number of the first token file, first row,
    end of the rows.
    """
    missing: list[tuple[int, int, int]] = []
    numbers = sorted(int(path.stem.rpartition("_")[2]) for path in job.records())
    number, row = 0, 0
    for existing in numbers:
        record = read_record(job, existing)
        if record is None:
            continue
        if existing > number:
            missing.append((number, row, record["first_row"]))
        number, row = existing + 1, record["next_row"]
    if row < len(corpus):
        missing.append((number, row, len(corpus)))
    rows = sum(end - begin for _, begin, end in missing)
    if rows < len(corpus):
        logger.info(f"{job.output}: resuming, {rows:,} of {len(corpus):,} rows left.")
    return missing


@dataclass
class SkipCounts:
    """How many documents were skipped for each reason, and where the first few are."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)  # [where, reason]
    bad_lines: list[str] = field(default_factory=list)  # where the first ones are

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if reason == NOT_JSON and len(self.bad_lines) < BAD_LINES:
            self.bad_lines.append(where)
        if len(self.examples) < EXAMPLES and reason not in (DUPLICATE, FILTERED):
            self.examples.append([where, reason])

    def as_record(self) -> dict[str, Any]:
        """Its part of a record."""
        bad_lines = {"bad_lines": self.bad_lines} if self.bad_lines else {}
        return {"skipped": self.counts, "examples": self.examples, **bad_lines}


def write_shards(
    job: Job,
    corpus: Corpus,
    missing: list[tuple[int, int, int]],
    range_tokenizer: RangeTokenizer,
) -> None:
    """Tokenize the missing ranges into token files, then record that all are written."""
    ranges_of_rows = [(begin, end) for _, begin, end in missing]
    progress = Progress(corpus, ranges_of_rows, job.config.dataset.max_document_bytes)
    skipped = SkipCounts()  # after the last token file
    with tokenize_pool(corpus, range_tokenizer, job.config.tokenize_workers) as tokenize:
        for number, begin, end in missing:
            ranges = tokenize(begin, end)
            skipped = write_range(
                job, corpus, ranges, number, (begin, end), progress, range_tokenizer.engine
            )
    progress.finish()
    write_rank_record(job, skipped)


def write_rank_record(job: Job, skipped: SkipCounts) -> None:
    """Record that all token files are written. `skipped`: what no token file's record has."""
    content = {
        "shards": len(job.records()),
        **skipped.as_record(),
        "settings": job.settings,
    }
    write_json(job.rank_record(), job.rank, content)


def write_range(
    job: Job,
    corpus: Corpus,
    ranges: Iterator[TokenizedRange],
    number: int,
    rows: tuple[int, int],
    progress: Progress | None,
    engine: str,
) -> SkipCounts:
    """Write token files from `number` on; what was skipped after the last of them.

    `progress`: None if what was tokenized and skipped has been shown already.
    """
    writer: TokenFileWriter | None = None
    skipped, first_row, max_token, runs = SkipCounts(), rows[0], -1, RowRuns()
    masks = MaskWriter()
    bad_lines = _bad_lines_before(job, number)
    try:
        for part in ranges:
            tokens, ends = np.frombuffer(part.tokens, job.dtype), np.cumsum(part.lengths)
            waiting = deque(part.skipped_rows)
            at, row = 0, part.first
            while row < part.last:
                begin = int(ends[at - 1]) if at else 0
                room = job.config.tokens_per_shard - (writer.tokens if writer is not None else 0)
                # Up to and including the document that fills the token file.
                until = min(int(np.searchsorted(ends, begin + room)) + 1, len(ends))
                if until > at:
                    writer = writer or TokenFileWriter(job.shard(number), job.dtype, str(job.rank))
                    some = tokens[begin : int(ends[until - 1])]
                    masks.add(part.masks.some(at, until), part.lengths[at:until], writer.tokens)
                    writer.append_many(some, part.lengths[at:until])
                    runs.add(part.rows[at:until], part.text_bytes[at:until])
                    max_token = max(max_token, int(some.max()))
                full = writer is not None and writer.tokens >= job.config.tokens_per_shard
                row = int(part.rows[until - 1]) + 1 if full else part.last
                while waiting and waiting[0][0] < row:
                    place, reason = waiting.popleft()
                    bad_lines += reason == NOT_JSON
                    _skip(job, skipped, corpus.name(place), reason, bad_lines, progress)
                if progress is not None:
                    _report_large(corpus, part, at, until, progress)
                if full and writer is not None:
                    done = first_row, row
                    _finish_shard(
                        job, writer, number, done, max_token, skipped, runs, masks, engine
                    )
                    writer, number = None, number + 1
                    skipped, first_row, max_token, runs = SkipCounts(), row, -1, RowRuns()
                    masks = MaskWriter()
                at = until
            if progress is not None:
                progress.advance(part.first, part.last, len(part.lengths), len(tokens))
        if writer is not None:
            done = first_row, rows[1]
            _finish_shard(job, writer, number, done, max_token, skipped, runs, masks, engine)
            writer, skipped = None, SkipCounts()
        return skipped
    finally:
        _abandon(writer)


def _abandon(writer: TokenFileWriter | None) -> None:
    """Remove what is unfinished after a failure."""
    if writer is not None:
        with contextlib.suppress(OSError):
            writer.abandon()


def _skip(
    job: Job,
    skipped: SkipCounts,
    place: str,
    reason: str,
    bad_lines: int,
    progress: Progress | None,
) -> None:
    """Count a document that is skipped. Raises DataError if `bad_lines` are too many."""
    skipped.add(place, reason)
    if bad_lines > job.config.dataset.max_bad_lines:
        raise too_many_bad_lines(place, job.config.dataset.max_bad_lines)
    if progress is not None:
        progress.skip(place, reason)


def _bad_lines_before(job: Job, number: int) -> int:
    """The bad lines of this rank's token files before file `number`."""
    if not job.config.dataset.max_bad_lines:
        return 0
    before = (job.record(earlier) for earlier in range(number))
    return sum(read_json(path)["skipped"].get(NOT_JSON, 0) for path in before if path.exists())


def check_bad_lines(job: Job, places: Iterable[str]) -> None:
    """Raises DataError for the first of these bad lines that dataset.max_bad_lines does not
    allow.
    """
    allowed = job.config.dataset.max_bad_lines
    if (where := next(itertools.islice(places, allowed, None), None)) is not None:
        raise too_many_bad_lines(where, allowed)


def _report_large(
    corpus: Corpus, part: TokenizedRange, at: int, until: int, progress: Progress
) -> None:
    if corpus.kind != "file":
        return
    for large in np.flatnonzero(part.lengths[at:until] >= LARGE_DOCUMENT).tolist():
        name = corpus.name(int(part.rows[at + large]))
        progress.large_document(name, int(part.lengths[at + large]))


def _finish_shard(
    job: Job,
    writer: TokenFileWriter,
    number: int,
    rows: tuple[int, int],
    max_token: int,
    skipped: SkipCounts,
    runs: RowRuns,
    masks: MaskWriter,
    engine: str,
) -> None:
    """Complete a token file, then write its record. A recorded file is never written again."""
    info = writer.close()
    rows_digest = runs.write(job.shard(number), job.rank)
    sha256 = {"bin": info.sha256_bin, "idx": info.sha256_idx, "rows": rows_digest}
    masked = {}
    if job.config.dataset.loss_masking_spans is not None:
        sha256["masks"] = masks.write(job.shard(number), job.rank)
        masked["masked_tokens"] = masks.tokens
    content = {
        "first_row": rows[0],
        "next_row": rows[1],
        "documents": info.documents,
        "tokens": info.tokens,
        "text_bytes": runs.text_bytes,
        "max_token_id": max_token,
        **masked,
        "sha256": sha256,
        **skipped.as_record(),
        "engine": engine,
        "settings": job.settings,
    }
    write_json(job.record(number), job.rank, content)
