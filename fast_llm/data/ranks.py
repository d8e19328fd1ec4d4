"""A preparation divided among ranks: processes of torchrun, of a Slurm array, or started by hand.

Ranks share the output folder and nothing else. Each claims units of work (units.py), those dealt to
it before others, the largest first. When all units are done, the ranks that are still there claim
token files (assemble.py). The last one to finish writes dataset.json.

A rank may start late, end early or never start: the others do its work. The bytes are those of one
process.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from fast_llm.data.assemble import FilePlan, overlapping, plan_files, skipped_behind, write_file
from fast_llm.data.claims import Claims, local_locks
from fast_llm.data.documents import Corpus
from fast_llm.data.duplicates import DONE, find_duplicates
from fast_llm.data.job import Job
from fast_llm.data.progress import Progress
from fast_llm.data.shards import (
    check_bad_lines,
    check_settings,
    read_record,
    remaining_rows,
    write_json,
    write_rank_record,
)
from fast_llm.data.units import Unit, UnitSummary, UnitTokenizer, divide, is_done
from fast_llm.data.workers import RangeTokenizer, as_completed, worker_pool
from fast_llm.errors import DataError
from fast_llm.storage import content_digest

logger = logging.getLogger("fast_llm")

_FILES = 2**40  # claims of token files are numbered from here, those of units from 0
_DUPLICATES = 2**41  # the claim of finding duplicates
_PROGRESS = 2**42  # the claim of showing the progress of all ranks
_POLL = 0.2  # seconds between two looks at work that other ranks have claimed
_WRITERS = 8  # token files that one process writes at a time
Item = TypeVar("Item")


class EngineRefused(Exception):
    """Another rank has found the fast engine to be wrong."""


def prepare_units(job: Job, corpus: Corpus, range_tokenizer: RangeTokenizer) -> bool:
    """Do work until none is left. Returns whether all token files are written; if not, other ranks
    that cannot be waited for have the rest.

    Raises DataError as RangeTokenizer does, DifferentTokens or EngineRefused if the fast engine is
    wrong.
    """
    try:
        units, missing, needed = begin_units(job, corpus)
        if job.world > 1 and (option := local_locks(job.units)):
            logger.warning(
                f"{job.output}: mounted with {option}, so locks hold within a node alone: ranks on"
                " other nodes may do the same work twice. The result is the same."
            )
        with contextlib.closing(Claims(job.units / "claims")) as claims:
            if not _tokenize(job, corpus, range_tokenizer, needed, claims):
                return job.metadata.exists()
            if job.metadata.exists():
                return True
            if job.config.dataset.deduplicate and needed:
                _find_duplicates(job, units, claims)
            plans, tail = plan_files(job, units, missing)
            written = _write_files(job, corpus, claims, plans)
            if written and not job.metadata.exists():
                write_rank_record(job, skipped_behind(job, corpus, units, tail))
            return written
    except FileNotFoundError:
        # Another rank has ended the preparation, and deleted the units.
        if job.metadata.exists():
            return True
        if job.units.exists():
            raise
        raise DataError(
            f"dataset.path: {job.config.dataset.path} has no document to write; the message of"
            " another rank says why"
        ) from None


def _write_files(job: Job, corpus: Corpus, claims: Claims, plans: list[FilePlan]) -> bool:
    """Write token files until all are done; False if other ranks have the rest."""

    def write(plan: FilePlan) -> FilePlan:
        write_file(job, corpus, plan)
        return plan

    with ThreadPoolExecutor(writers := min(_WRITERS, job.config.tokenize_workers)) as threads:
        return work_through(
            job,
            claims,
            plans,
            lambda plan: _FILES + plan.number,
            lambda plan: read_record(job, plan.number) is not None,
            # A file is claimed when a thread is free for it, so that other ranks write some too.
            lambda some: as_completed(lambda plan: threads.submit(write, plan), some, writers),
        )


def begin_units(
    job: Job, corpus: Corpus
) -> tuple[list[Unit], list[tuple[int, int, int]], list[Unit]]:
    """All units, the ranges of rows that have no token file, and the units with such rows."""
    units = divide(corpus)
    job.units.mkdir(exist_ok=True)
    _agree_on_settings(job, units)
    missing = remaining_rows(job, corpus)
    needed = {unit for _, first, last in missing for unit in overlapping(units, first, last)}
    if needed and job.config.dataset.deduplicate:
        needed = set(units)  # a document may be a copy of any earlier one
    return units, missing, sorted(needed, key=lambda unit: unit.number)


def _agree_on_settings(job: Job, units: list[Unit]) -> None:
    """Write the settings that units are made with, or compare them with those that are there.

    Ranks that start together see no records of each other yet: of all, one writes the file. The
    rows of each unit are part of it.

    Raises DataError if they differ.
    """
    path = job.units / "settings.json"
    edges = content_digest({"rows": [(unit.first, unit.last) for unit in units]})
    settings = {**job.settings, "rows of the units of work": edges}
    if not path.exists():
        mine = path.with_name(f"{path.name}.{job.rank}.new")
        write_json(mine, job.rank, {"settings": settings})
        with contextlib.suppress(FileExistsError):  # another rank's is first
            os.link(mine, path)
        mine.unlink()
    check_settings(path, settings)


def _find_duplicates(job: Job, units: list[Unit], claims: Claims) -> None:
    """Have one rank find the duplicates, and wait for it."""
    while not (job.units / DONE).exists() and not job.metadata.exists():
        if claims.take(_DUPLICATES) or not claims.available:
            find_duplicates(job.units, range(len(units)), str(job.rank))
            claims.release(_DUPLICATES)
        else:
            time.sleep(_POLL)


def _tokenize(
    job: Job, corpus: Corpus, range_tokenizer: RangeTokenizer, units: list[Unit], claims: Claims
) -> bool:
    """Tokenize units until all are done; False if other ranks have the rest."""
    work = UnitTokenizer(corpus, range_tokenizer, job.units, str(job.rank))
    refused = job.refused_engine.exists()
    left = [unit for unit in units if not is_done(job.units, unit, refused)]
    ranges = [(unit.first, unit.last) for unit in left]
    progress = Progress(corpus, ranges, corpus.reader.max_bytes)
    others = _OtherRanks(job, claims, progress, left)
    workers = job.config.tokenize_workers
    with worker_pool(work, workers, work.may_fork, corpus.filters) as pool:

        def finished(some: Iterator[Unit]) -> Iterator[Unit]:
            bad_lines: list[int] = []
            for summary in pool.as_completed(some):
                others.look(summary.unit)
                report(corpus, summary, progress)
                bad_lines += summary.bad_lines
                check_bad_lines(job, map(corpus.name, sorted(bad_lines)))
                if range_tokenizer.fast and job.refused_engine.exists():
                    raise EngineRefused
                yield summary.unit

        done = work_through(
            job,
            claims,
            sorted(units, key=lambda unit: -unit.bytes),
            lambda unit: unit.number,
            lambda unit: is_done(job.units, unit, job.refused_engine.exists()),
            finished,
            others.look,
        )
    progress.finish()
    return done


class _OtherRanks:
    """Lets one rank show the progress of all: the one that has claimed to. If it ends, the claim
    falls to another.
    """

    def __init__(self, job: Job, claims: Claims, progress: Progress, units: list[Unit]):
        self.job, self.claims, self.progress = job, claims, progress
        self.left = {unit.number: unit for unit in units}
        progress.hidden = job.world > 1

    def look(self, done: Unit | None = None) -> None:
        """Count the units that other ranks have done, if the line is due and this rank shows it.

        `done`: a unit that this rank has done.
        """
        if done is not None:
            self.left.pop(done.number, None)
        if self.job.world == 1 or not self.progress.due:
            return
        self.progress.hidden = not self.claims.take(_PROGRESS) and self.claims.available
        if self.progress.hidden:
            self.progress.shown = time.monotonic()  # look again after the same time
            return
        for name in os.listdir(self.job.units):
            number, _, suffix = name.partition(".")
            if suffix == "npz" and (unit := self.left.pop(int(number), None)) is not None:
                with np.load(self.job.units / name) as arrays:
                    documents, tokens = arrays["counts"].tolist()
                self.progress.advance_others(unit.first, unit.last, documents, tokens)


def report(corpus: Corpus, summary: UnitSummary, progress: Progress) -> None:
    """Show what a unit did."""
    for row, reason in summary.skipped:
        progress.skip(corpus.name(row), reason)
    for row, tokens in summary.large:
        progress.large_document(corpus.name(row), tokens)
    progress.advance(summary.unit.first, summary.unit.last, summary.documents, summary.tokens)


def work_through(
    job: Job,
    claims: Claims,
    items: list[Item],
    number: Callable[[Item], int],
    is_finished: Callable[[Item], bool],
    work: Callable[[Iterator[Item]], Iterator[Item]],
    waiting: Callable[[], None] = lambda: None,
) -> bool:
    """Claim items and do them until all are done, by this rank or another.

    `work` takes items when a worker is free and gives those that are done. `waiting` is called
    again and again while other ranks have the rest. Returns False if items are left that cannot be
    claimed or waited for.
    """
    mine = items[job.rank :: job.world]
    left = mine + [
        item
        for step in range(1, job.world)
        for item in items[(job.rank + step) % job.world :: job.world]
    ]
    # Without locks, the last rank may be the only one left to write token files.
    fixed = set(map(number, mine if items and isinstance(items[0], Unit) else items))
    waited = time.monotonic()
    while True:
        done = 0
        for item in work(_claimed(job, claims, left, number, is_finished, fixed)):
            claims.release(number(item))
            done += 1
        left = [item for item in left if not is_finished(item)]
        if not left or job.metadata.exists():
            return True
        if not claims.available:
            return False
        if not done:
            if time.monotonic() - waited > 60:
                waited = time.monotonic()
                logger.info(f"Waiting for other ranks, which work on {len(left):,} parts.")
            waiting()
            time.sleep(_POLL)


def _claimed(
    job: Job,
    claims: Claims,
    items: list[Item],
    number: Callable[[Item], int],
    is_finished: Callable[[Item], bool],
    fixed: set[int],
) -> Iterator[Item]:
    """Items that are not done, each claimed by this rank; without locks, those in `fixed`."""
    for item in items:
        if is_finished(item):
            continue
        if not claims.take(number(item)) and (claims.available or number(item) not in fixed):
            continue
        # It may have been finished, and even cleaned up, since it was looked at.
        if is_finished(item) or job.metadata.exists():
            claims.release(number(item))
        else:
            yield item
