"""A preparation on a Ray cluster: `distributed.engine: ray`.

This process divides the corpus and hands out units of work (units.py), the largest first, as Ray
tasks of one CPU; then token files (assemble.py). A task whose worker or node dies is given to
another. Results are files in the output folder, which all nodes share with the documents. So a
preparation whose driver died resumes, and the bytes are those of one process.

Tokenizer and table of documents travel with the work: once to each node, through Ray's object
store, and are kept by each worker process.
"""

import contextlib
import logging
import os
import pickle
import secrets
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fast_llm.data.assemble import FilePlan, plan_files, skipped_behind, write_file
from fast_llm.data.documents import Corpus
from fast_llm.data.duplicates import find_duplicates
from fast_llm.data.filtering import HASH_SEED
from fast_llm.data.job import Job
from fast_llm.data.progress import Progress
from fast_llm.data.ranks import begin_units, report
from fast_llm.data.shards import check_bad_lines, read_record, write_rank_record
from fast_llm.data.units import Unit, UnitSummary, UnitTokenizer, is_done
from fast_llm.data.workers import RangeTokenizer
from fast_llm.errors import DataError, MissingPackage

logger = logging.getLogger("fast_llm")

_DEATHS = 5  # of workers with one task, after which it is likely the task's fault
_WAIT = 60.0  # seconds without a finished task, after which a line says so
_held: dict[str, Any] = {}  # in a worker process: its work, unpickled once


def prepare_on_ray(job: Job, corpus: Corpus, range_tokenizer: RangeTokenizer) -> None:
    """Write all token files. Raises DataError and DifferentTokens as RangeTokenizer does, and
    MissingPackage without Ray.
    """
    units, missing, needed = begin_units(job, corpus)
    refused = job.refused_engine.exists()
    left = [unit for unit in needed if not is_done(job.units, unit, refused)]
    left.sort(key=lambda unit: -unit.bytes)
    with _cluster() as ray:
        ranges = [(unit.first, unit.last) for unit in left]
        progress = Progress(corpus, ranges, corpus.reader.max_bytes)
        bad_lines: list[int] = []
        work = UnitTokenizer(corpus, range_tokenizer, job.units, "")
        for summary in _results(ray, corpus, work, left):
            report(corpus, summary, progress)
            bad_lines += summary.bad_lines
            check_bad_lines(job, map(corpus.name, sorted(bad_lines)))
        progress.finish()
        if job.config.dataset.deduplicate and needed:
            find_duplicates(job.units, range(len(units)), str(job.rank))
        plans, tail = plan_files(job, units, missing)
        unwritten = [plan for plan in plans if read_record(job, plan.number) is None]
        for _ in _results(ray, corpus, _FileWriter(job, corpus), unwritten):
            pass
    write_rank_record(job, skipped_behind(job, corpus, units, tail))


class _FileWriter:
    def __init__(self, job: Job, corpus: Corpus):
        self.job, self.corpus = job, corpus

    def __call__(self, plan: FilePlan) -> None:
        # A process that was given up may still write: no two share a partial file.
        write_file(replace(self.job, rank=secrets.randbits(62)), self.corpus, plan)


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """The module `ray`, connected to the cluster of RAY_ADDRESS, or to one of this machine that
    ends with the block.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("ray", "distributed.engine: ray") from error
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            **local,
        )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"RAY_ADDRESS {address}" if address else "no cluster could be started"
        raise DataError(f"distributed.engine: ray: {where}: {error}") from error
    try:
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        cpus = int(ray.cluster_resources().get("CPU", 0))
        logger.info(f"Ray: {nodes} node{'s' if nodes != 1 else ''}, {cpus} CPUs.")
        yield ray
    finally:
        ray.shutdown()


def _results(
    ray: Any, corpus: Corpus, work: Any, tasks: list[Unit] | list[FilePlan]
) -> Iterator[Any]:
    """The results of tasks, in any order. Raises what a task raises."""
    if not tasks:
        return
    key, pickled = uuid.uuid4().hex, ray.put(pickle.dumps(work))
    environment = {"runtime_env": {"env_vars": HASH_SEED}} if corpus.filters else {}
    remote = ray.remote(num_cpus=1, max_retries=0, **environment)(_do)
    waiting, running = deque[Unit | FilePlan](tasks), dict[Any, Unit | FilePlan]()
    deaths: Counter[int] = Counter()
    while waiting or running:
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < most:
            task = waiting.popleft()
            running[remote.remote(key, pickled, task)] = task
        done, _ = ray.wait(list(running), timeout=_WAIT)
        if not done:
            logger.info(f"Ray: waiting for {len(running):,} tasks; none has finished in a minute.")
        for future in done:
            task = running.pop(future)
            try:
                answer = ray.get(future)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:  # of the worker or its node
                _count_death(ray, corpus, task, error, deaths)
                waiting.appendleft(task)
                continue
            if isinstance(answer, Exception):
                raise answer
            yield answer


def _count_death(
    ray: Any, corpus: Corpus, task: Unit | FilePlan, error: Exception, deaths: "Counter[int]"
) -> None:
    where = f"rows from {corpus.name(task.first)} to {corpus.name(task.last - 1)}"
    kind = type(error).__name__
    logger.warning(f"Ray: a worker or its node died ({kind}); trying again: {where}.")
    deaths[task.number] += isinstance(
        error, ray.exceptions.WorkerCrashedError | ray.exceptions.OutOfMemoryError
    )
    if deaths[task.number] >= _DEATHS:
        raise DataError(
            f"distributed.engine: ray: {_DEATHS} workers died with the {where}, most likely because"
            " memory ran out; start Ray with fewer CPUs for each node (--num-cpus) and run the same"
            " command again to resume"
        )


def _do(key: str, pickled: bytes, task: Unit | FilePlan) -> "UnitSummary | Exception | None":
    """Runs in a worker process of Ray. An exception is returned, so that Ray does not wrap it."""
    try:
        if key not in _held:
            _held.clear()
            _held[key] = pickle.loads(pickled)
        work = _held[key]
        if isinstance(work, UnitTokenizer):
            work.tag = f"ray-{uuid.uuid4().hex}"
        result: UnitSummary | None = work(task)
        return result
    except Exception as error:
        return error
