"""Rows of JSON files counted by several ranks together.

Counting reads the files completely, so ranks share it as they share units of work (ranks.py): each
claims groups of files of about 64 MiB or more. Results are `<output_path>/counts/<digest>/<n>.npz`,
which all ranks read, also those that start later. The digest is of all that decides them: names and
sizes of the files and the settings of the reader. They are deleted with the units.

A corpus of less than 64 MiB is counted by each rank. So is any, where locks do not work.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.data.claims import Claims
from fast_llm.data.documents import OpenTable, Table
from fast_llm.data.files import DatasetFiles
from fast_llm.data.job import Job
from fast_llm.data.ranks import work_through
from fast_llm.data.tables import JsonLines, JsonValue, ranges_by_size
from fast_llm.data.units import write_arrays
from fast_llm.data.workers import as_completed
from fast_llm.storage import content_digest

_GROUP = 2**26  # bytes


@dataclass(frozen=True)
class FileGroup:
    """Files [first, last) of a corpus."""

    number: int
    first: int
    last: int


def open_shared(
    job: Job,
    found: DatasetFiles,
    paths: list[str],
    opened: OpenTable,
    workers: int,
    stop: threading.Event,
) -> list[Table] | None:
    """The tables of JSON files, whose rows all ranks count together; None if each is to count them.

    `stop` ends `opened` early, with CancelledError. Raises DataError as `opened` does.
    """
    sizes = np.array([found.sizes[path] for path in paths], np.int64)
    if job.world == 1 or found.kind != "json" or sizes.sum() < _GROUP:
        return None
    ranges = enumerate(ranges_by_size(sizes, _GROUP))
    groups = [FileGroup(number, first, last) for number, (first, last) in ranges]
    settings = (found.config.field, found.config.max_document_bytes, found.config.max_bad_lines)
    identity = {"documents": found.digest, "paths": paths, "settings": settings}
    folder = job.counts / content_digest(identity)
    count = _Counter(paths, opened, job, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Claims(folder / "claims")) as claims:
            if not _count(job, folder, groups, claims, count, workers, stop):
                return None
        tables = (_read(folder, group, paths[group.first : group.last]) for group in groups)
        return [table for some in tables for table in some]
    except FileNotFoundError:  # another rank has finished, and deleted them
        return None


def _count(
    job: Job,
    folder: Path,
    groups: list[FileGroup],
    claims: Claims,
    count: Callable[[FileGroup], FileGroup],
    workers: int,
    stop: threading.Event,
) -> bool:
    """Count until all groups are done; False if that cannot be waited for."""
    with ThreadPoolExecutor(workers) as threads:
        try:
            return work_through(
                job,
                claims,
                groups,
                lambda group: group.number,
                lambda group: _path(folder, group).exists(),
                lambda some: as_completed(
                    lambda group: threads.submit(count, group), some, workers
                ),
            )
        finally:
            stop.set()  # after an error or a signal, so that the threads end


class _Counter:
    def __init__(self, paths: list[str], opened: OpenTable, job: Job, folder: Path):
        self.paths, self.opened, self.job, self.folder = paths, opened, job, folder

    def __call__(self, group: FileGroup) -> FileGroup:
        """Count the rows of a group's files, and store the result."""
        arrays: dict[str, Any] = {}
        described: list[dict[str, Any]] = []
        for path in self.paths[group.first : group.last]:
            table = self.opened(path)
            assert isinstance(table, JsonLines | JsonValue)
            values = {name: value for name, value in asdict(table).items() if name != "path"}
            if isinstance(table, JsonLines):
                for name in ("offsets", "lines"):
                    arrays[f"{len(described)}.{name}"] = values.pop(name)
            described.append(values)
        arrays["tables"] = np.array(json.dumps(described))
        write_arrays(_path(self.folder, group), str(self.job.rank), arrays)
        return group


def _path(folder: Path, group: FileGroup) -> Path:
    return folder / f"{group.number}.npz"


def _read(folder: Path, group: FileGroup, paths: list[str]) -> list[Table]:
    """The tables of a group that was counted."""
    found: list[Table] = []
    with np.load(_path(folder, group)) as arrays:
        described = json.loads(str(arrays["tables"]))
        for number, (path, values) in enumerate(zip(paths, described, strict=True)):
            if f"{number}.lines" not in arrays:
                found.append(JsonValue(path, **values))
                continue
            values["bad_rows"] = tuple(values["bad_rows"])
            offsets, lines = arrays[f"{number}.offsets"], arrays[f"{number}.lines"]
            found.append(JsonLines(path, offsets=offsets, lines=lines, **values))
    return found
