"""Worker processes that read and tokenize ranges of rows, or complete units of work.

The parent process sends each worker a task (some rows, about a megabyte of text) and receives their
tokens. Results come back in the order of the rows, whatever the number of workers. A unit of work
(units.py) is written to disk by its worker, in any order. Each worker has its own pipe and ends
when its pipe or its parent is gone. So a killed process never leaves another one waiting.

Where that is safe, workers are forked: they share the memory of the tokenizer with the parent, and
do not load it. Else they are spawned, and each loads it again.

A task costs what tokenizing costs (encode.py). Up to three results per worker are held in memory,
some MB each.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fast_llm.data import tokenizer
from fast_llm.data.documents import CONTAINS_EOS, FILTERED, Corpus
from fast_llm.data.duplicates import digest
from fast_llm.data.encode import Encoder
from fast_llm.data.engine import REFERENCE, DifferentTokens, FastEncoder, installed
from fast_llm.data.filtering import HASH_SEED, Filter, apply_filter, load_filter
from fast_llm.data.masks import NONE, DocumentMasks, MaskedText, Spans
from fast_llm.data.reading import Reader, SkippedDocument, Task
from fast_llm.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
RANGE_BYTES = 2**20  # text of one task
_IN_FLIGHT = 3  # tasks per worker
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends


@dataclass(frozen=True)
class TokenizedRange:
    """The documents of rows [first, last) as tokens."""

    first: int
    last: int
    tokens: bytes  # of all documents, one after the other
    lengths: NDArray[np.int64]  # [documents]: tokens of each
    rows: NDArray[np.int64]  # [documents]: the row of each
    skipped_rows: list[tuple[int, str]]  # row and reason, in ascending order
    text_bytes: NDArray[np.int64]  # [documents]: bytes of UTF-8 of each
    digests: bytes = b""  # of the texts, 16 bytes each, if duplicates are looked for
    masks: DocumentMasks = field(default_factory=DocumentMasks.of)

    def without_tokens(self) -> "TokenizedRange":
        """The same documents, by their lengths only."""
        return replace(self, tokens=b"")


class RangeTokenizer:
    """Reads and tokenizes tasks. One per process."""

    def __init__(
        self,
        reader: Reader,
        loaded: tokenizer.Loaded,
        dtype: np.dtype[Any],
        bos: int | None,
        eos: int | None,
        fast: bool | FastEncoder = False,
    ):
        """`bos` and `eos`: the tokens written before and after each document; None writes
        nothing. `fast`: use the fast engine, which has been admitted.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
        self.arguments = (reader, loaded, dtype, bos, eos, bool(fast))
        self.reader = reader
        self.filter = None if reader.filter is None else load_filter(reader.filter)
        self.encoder = Encoder(loaded.tokenizer, dtype)
        self.fast = FastEncoder(self.encoder, text=loaded.text) if fast is True else fast or None
        self.bos, self.eos = (
            np.array([] if token is None else [token], dtype).tobytes() for token in (bos, eos)
        )
        self.special_ids = np.array(
            [token for token in (loaded.bos, loaded.eos) if token is not None], dtype
        )

    def __reduce__(self) -> Any:
        return type(self), self.arguments

    def __call__(self, task: Task) -> TokenizedRange:
        return self.tokenize(task)

    def tokenize(self, task: Task) -> TokenizedRange:
        """Read the rows of a task and tokenize their documents.

        Raises DataError for a file that cannot be read or a line that is not JSON, DifferentTokens
        if the fast engine is wrong.
        """
        texts: list[str] = []
        rows: list[int] = []
        skipped: list[tuple[int, str]] = []
        for row, text in enumerate(self.reader.texts(task), task.first):
            if isinstance(text, SkippedDocument):
                skipped.append((row, text.reason))
            elif text is not None:
                if self.filter is not None:
                    text = self._filtered(self.filter, text, row)
                if isinstance(text, SkippedDocument):
                    skipped.append((row, text.reason))
                else:
                    texts.append(text)
                    rows.append(row)
        pieces: list[bytes] = []
        lengths: list[int] = []
        kept: list[int] = []
        text_bytes: list[int] = []
        digests: list[bytes] = []
        masks: list[Spans] = []
        encoded = self.encode(texts, rows)
        has_special = self._has_special(b"".join(filter(None, encoded)))
        for row, text, content in zip(rows, texts, encoded, strict=True):
            if content is None:
                skipped.append((row, "untokenizable"))
            elif not content:
                skipped.append((row, "empty"))
            elif has_special and self._has_special(content):
                skipped.append((row, CONTAINS_EOS))
            else:
                pieces += (self.bos, content, self.eos)
                size = len(self.bos) + len(content) + len(self.eos)
                lengths.append(size // self.special_ids.itemsize)
                kept.append(row)
                text_bytes.append(len(text) if text.isascii() else len(text.encode()))
                if self.reader.deduplicate:
                    digests.append(digest(text))
                if isinstance(text, MaskedText):
                    masks.append(self._masked(text, content, row))
        return TokenizedRange(
            task.first,
            task.last,
            b"".join(pieces),
            np.array(lengths, np.int64),
            np.array(kept, np.int64),
            sorted(skipped),
            np.array(text_bytes, np.int64),
            b"".join(digests),
            DocumentMasks.of(masks),
        )

    def _masked(self, text: MaskedText, content: bytes, row: int) -> Spans:
        """The masked tokens of a document, counted from its first token."""
        found = self.encoder.masked_tokens(text, content) if text.spans.size else NONE
        if found is None:
            raise DifferentTokens(row)
        return found + len(self.bos) // self.special_ids.itemsize

    def _filtered(self, keep: Filter, text: str, row: int) -> str | SkippedDocument:
        wanted = apply_filter(keep, text, row)
        if wanted is None:
            return SkippedDocument(FILTERED)
        if wanted is text:
            return text
        if isinstance(text, MaskedText):
            raise DataError(
                f"dataset.filter: {self.reader.filter} returned another text for row {row:,}, whose"
                " spans (dataset.loss_masking_spans) would no longer fit; return True or False"
            )
        return self.reader.document(wanted)

    @property
    def may_fork(self) -> bool:
        """Whether a forked process can do this work. pyarrow and the user's filter may have
        threads, whose locks a forked process would wait for without end.
        """
        return self.reader.table is None and self.filter is None

    @property
    def engine(self) -> str:
        """Name and version of the library that encodes."""
        return f"{installed()}" if self.fast else REFERENCE

    def encode(self, texts: Sequence[str], rows: Sequence[int]) -> list[bytes | None]:
        """The tokens of each text, without BOS and EOS; None if the tokenizer fails on it."""
        return self.fast.encode(texts, rows) if self.fast else self.encoder.encode(texts)

    def _has_special(self, content: bytes) -> bool:
        tokens = np.frombuffer(content, self.special_ids.dtype)
        return any(bool((tokens == special).any()) for special in self.special_ids)


@contextlib.contextmanager
def tokenize_pool(
    corpus: Corpus, range_tokenizer: RangeTokenizer, workers: int
) -> Iterator[Callable[[int, int], Iterator[TokenizedRange]]]:
    """A function that tokenizes rows [first, last) range by range, in order.

    With one worker it runs in this process. Raises DataError if a worker cannot be started or is
    killed.
    """
    with worker_pool(range_tokenizer, workers, range_tokenizer.may_fork, corpus.filters) as pool:
        yield lambda first, last: pool.in_order(corpus.tasks(first, last, RANGE_BYTES))


def can_fork() -> bool:
    """Whether this process can be forked: only this thread of Python is left in the copy, and locks
    that others hold stay locked. NumPy's own threads are prepared for it.
    """
    return sys.platform == "linux" and threading.active_count() == 1


@contextlib.contextmanager
def worker_pool(
    work: Callable[[T], R], workers: int, may_fork: bool, filters: bool
) -> Iterator["Workers[T, R]"]:
    """Processes that do `work`. With one worker, this process does it.

    `may_fork`: whether a forked process can do it; for spawned ones it is pickled. `filters`:
    whether `work` calls a filter, which needs a spawned process (filtering.py). Raises DataError if
    a worker cannot be started or is killed.
    """
    if workers == 1 and not filters:
        yield Workers(work)
        return
    pool = _Pool(work, workers, may_fork and can_fork())
    try:
        pool.prepare()
        yield pool
    except _WorkerDied:
        raise DataError(
            "tokenize_workers: a worker process died, most likely because memory ran out; lower"
            f" tokenize_workers (now {workers}) and run the same command again to resume"
        ) from None
    finally:
        pool.close()


class Workers(Generic[T, R]):
    """Does the work in this process."""

    def __init__(self, work: Callable[[T], R]):
        self.work = work

    def in_order(self, tasks: Iterator[T]) -> Iterator[R]:
        """The results of tasks, in their order."""
        return map(self.work, tasks)

    def as_completed(self, tasks: Iterator[T]) -> Iterator[R]:
        """The results of tasks, in any order. A task is taken when a worker is free for it."""
        return map(self.work, tasks)


def as_completed(submit: Callable[[T], "Future[R]"], tasks: Iterator[T], most: int) -> Iterator[R]:
    """The results of tasks, in any order, of which at most `most` are submitted and not done."""
    waiting: set[Future[R]] = set()
    for task in tasks:
        waiting.add(submit(task))
        if len(waiting) >= most:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


class _WorkerDied(Exception):
    pass


class _Pool(Workers[T, R]):
    """Worker processes, each with its own pipe, and a thread per task in flight that waits for the
    answer.

    The out-of-memory killer does kill workers. ProcessPoolExecutor then hangs if the process held
    the lock of the shared queue, or had sent half an answer through a pipe that others keep open.
    """

    def __init__(self, work: Callable[[T], R], workers: int, forks: bool):
        self.workers = workers
        self.work = work
        self.forks = forks
        self.work_bytes = b"" if forks else pickle.dumps(work)
        self.context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self.processes: list[Any] = []
        self.idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)

    def prepare(self) -> None:
        """Fork all workers, while this process has no other thread. Others start with the work."""
        if not self.forks:
            # Python's own helper process. Starting it unblocks signals, so it starts before the
            # workers do.
            resource_tracker.ensure_running()
            return
        gc.freeze()  # so that collecting garbage does not copy what the workers share
        with warnings.catch_warnings():
            # Python 3.12 warns of the threads of NumPy.
            warnings.simplefilter("ignore", DeprecationWarning)
            while len(self.processes) < self.workers:
                self._start_worker()
        gc.unfreeze()

    def in_order(self, tasks: Iterator[T]) -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        for task in tasks:
            waiting.append(self._submit(task))
            if len(waiting) >= _IN_FLIGHT * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def as_completed(self, tasks: Iterator[T]) -> Iterator[R]:
        return as_completed(self._submit, tasks, self.workers)

    def _submit(self, task: T) -> "Future[R]":
        if len(self.processes) < self.workers:
            self._start_worker()
        return self.threads.submit(self._run, task)

    def _start_worker(self) -> None:
        try:
            ours, theirs = self.context.Pipe()
            with block_signals(), _environment(HASH_SEED):
                given = (theirs, self.work if self.forks else None)
                process = self.context.Process(target=_worker_main, args=given, daemon=True)
                process.start()
                self.processes.append(process)
            theirs.close()  # only the worker holds its end, so that the pipe breaks with the worker
            if self.forks:
                self.idle.put(ours)
            else:
                self.threads.submit(self._send_work, ours)
        except BrokenPipeError:
            raise _WorkerDied from None
        except (OSError, RuntimeError) as error:  # no more files, processes or threads
            raise DataError(
                f"tokenize_workers: only {len(self.processes)} of {self.workers} worker processes"
                f" could be started: {error}; lower tokenize_workers"
            ) from None

    def _send_work(self, connection: Connection) -> None:
        try:
            connection.send_bytes(self.work_bytes)
        except OSError:
            pass  # the first task raises
        finally:
            self.idle.put(connection)

    def _run(self, task: T) -> R:
        """Have an idle worker run a task, and wait for its answer."""
        connection = self.idle.get()
        try:
            connection.send(task)
            answer: R | Exception = connection.recv()
        except (EOFError, OSError):  # also in the middle of an answer
            raise _WorkerDied from None
        finally:
            self.idle.put(connection)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the workers, which have nothing to save."""
        with block_signals():
            for process in self.processes:
                process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.join()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of processes that are started in the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _worker_main(connection: Connection, work: Callable[[Any], Any] | None) -> None:
    """A worker process: receives its work if it was spawned, then tasks until the pipe closes."""
    if work is not None:
        # Forked workers also hold ends of each other's pipes, and the lock of the output folder:
        # all must end at once with the parent.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(
        target=_exit_with_parent, args=(multiprocessing.parent_process(),), daemon=True
    ).start()
    with contextlib.suppress(EOFError, OSError):  # also in the middle of a task
        pickled = b"" if work is not None else connection.recv_bytes()
        while True:
            task = connection.recv()
            try:
                work = work or pickle.loads(pickled)
                answer: Any = work(task)
            except MemoryError:
                return
            except Exception as error:
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)


def _exit_with_parent(parent: Any) -> None:
    """A range may take minutes: a worker whose parent was killed does not finish it."""
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the end of the block; processes started in it ignore them for
    good.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    received: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # which child processes inherit
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # Another thread may receive the signal; Python then calls the handler in this one all the
        # same.
        handlers = {
            each: signal.signal(each, lambda number, frame: received.append(number))
            for each in numbers
        }
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if received:
            signal.raise_signal(received[0])
