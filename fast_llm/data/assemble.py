"""Token files from the results of units (units.py).

`plan_files` finds where token files begin and end from the numbers of tokens alone, before any is
written. Each can then be written by another process, from the units that overlap its rows. The
bytes and the records are those of one process that writes all rows in order (shards.py).

Planning opens each unit's arrays once. Writing reads the tokens once and hashes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fast_llm.data.documents import Corpus
from fast_llm.data.engine import NAME, REFERENCE
from fast_llm.data.job import Job
from fast_llm.data.shards import SkipCounts, write_range
from fast_llm.data.units import Unit, UnitResult
from fast_llm.data.workers import TokenizedRange


@dataclass(frozen=True)
class FilePlan:
    """A token file that is to be written: its number, and its rows [first, last)."""

    number: int
    first: int
    last: int
    units: list[Unit]
    """Those with its rows."""


def overlapping(units: list[Unit], first: int, last: int) -> list[Unit]:
    """The units that have some of the rows [first, last)."""
    return [unit for unit in units if unit.first < last and unit.last > first]


def plan_files(
    job: Job, units: list[Unit], missing: list[tuple[int, int, int]]
) -> tuple[list[FilePlan], int]:
    """The token files of the missing ranges (`shards.remaining_rows`), and the first row behind all
    token files: rows from there on have no document.
    """
    plans: list[FilePlan] = []
    rows = units[-1].last if units else 0
    row = rows
    for number, first, last in missing:
        some = overlapping(units, first, last)
        ends, tail = _ends(job, some, first, last)
        for end in [*ends, *([last] if tail else [])]:
            plans.append(FilePlan(number, first, end, overlapping(some, first, end)))
            number, first = number + 1, end
        row = first if last == rows else rows
    return plans, row


def _ends(job: Job, units: list[Unit], first: int, last: int) -> tuple[list[int], bool]:
    """Where full token files end among rows [first, last), and whether documents are left."""
    ends: list[int] = []
    filled = 0  # tokens of the unfinished file
    for unit in units:
        result = UnitResult(job.units, unit, job.dtype)
        inside = first <= unit.first and unit.last <= last
        if inside and filled + result.tokens < job.config.tokens_per_shard:
            filled += result.tokens
            continue
        rows = result.rows
        at, end = np.searchsorted(rows, (first, last)).tolist()
        total = np.cumsum(result.lengths[at:end])
        before = 0
        while len(total) and int(total[-1]) - before >= job.config.tokens_per_shard - filled:
            full = int(np.searchsorted(total, before + job.config.tokens_per_shard - filled))
            ends.append(int(rows[at + full]) + 1)
            filled, before = 0, int(total[full])
        filled += int(total[-1]) - before if len(total) else 0
    return ends, filled > 0


def write_file(job: Job, corpus: Corpus, plan: FilePlan) -> None:
    """Write a token file and its record."""
    parts = _parts(job, plan.units, plan.first, plan.last)
    engines = {UnitResult(job.units, unit, job.dtype).engine for unit in plan.units}
    engine = next((name for name in sorted(engines) if name.startswith(NAME)), REFERENCE)
    write_range(job, corpus, parts, plan.number, (plan.first, plan.last), None, engine)


def skipped_behind(job: Job, corpus: Corpus, units: list[Unit], row: int) -> SkipCounts:
    """What was skipped from a row on that no document follows."""
    skipped = SkipCounts()
    for part in _parts(job, overlapping(units, row, len(corpus)), row, len(corpus)):
        for place, reason in part.skipped_rows:
            skipped.add(corpus.name(place), reason)
    return skipped


def _parts(job: Job, units: list[Unit], first: int, last: int) -> Iterator[TokenizedRange]:
    for unit in units:
        yield from UnitResult(job.units, unit, job.dtype).ranges(first, last)
