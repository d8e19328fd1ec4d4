"""Worker processes that read and tokenize ranges of rows.

The parent process sends each worker a task (some rows, about a megabyte of text) and receives their
tokens. Results come back in the order of the rows, whatever the number of workers. Each worker has
its own pipe and ends when its pipe or its parent is gone. So a killed process never leaves another
one waiting.

A task costs what tokenizing costs (encode.py). Up to three results per worker are held in memory,
some MB each.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data import tokenizer
from fast_llm.data.documents import CONTAINS_EOS, Corpus
from fast_llm.data.encode import Encoder
from fast_llm.data.reading import Reader, SkippedDocument, Task
from fast_llm.errors import DataError

_RANGE_BYTES = 2**20  # text of one task
_IN_FLIGHT = 3  # tasks per worker


@dataclass(frozen=True)
class TokenizedRange:
    """The documents of rows [first, last) as tokens."""

    first: int
    last: int
    tokens: bytes  # of all documents, one after the other
    lengths: NDArray[np.int64]  # [documents]: tokens of each
    rows: NDArray[np.int64]  # [documents]: the row of each
    skipped_rows: list[tuple[int, str]]  # row and reason, in ascending order


class RangeTokenizer:
    """Reads and tokenizes tasks. One per process."""

    def __init__(
        self,
        reader: Reader,
        loaded: tokenizer.Loaded,
        dtype: np.dtype[Any],
        bos: int | None,
        eos: int | None,
    ):
        """`bos` and `eos`: the tokens written before and after each document; None writes
        nothing.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
        self.arguments = (reader, loaded, dtype, bos, eos)
        self.reader = reader
        self.encoder = Encoder(loaded.tokenizer, dtype)
        self.bos, self.eos = (
            np.array([] if token is None else [token], dtype).tobytes() for token in (bos, eos)
        )
        self.special_ids = np.array(
            [token for token in (loaded.bos, loaded.eos) if token is not None], dtype
        )

    def tokenize(self, task: Task) -> TokenizedRange:
        """Read the rows of a task and tokenize their documents.

        Raises DataError for a file that cannot be read or a line that is not JSON.
        """
        texts: list[str] = []
        rows: list[int] = []
        skipped: list[tuple[int, str]] = []
        for row, text in enumerate(self.reader.texts(task), task.first):
            if isinstance(text, SkippedDocument):
                skipped.append((row, text.reason))
            elif text is not None:
                texts.append(text)
                rows.append(row)
        pieces: list[bytes] = []
        lengths: list[int] = []
        kept: list[int] = []
        for row, content in zip(rows, self.encoder.encode(texts), strict=True):
            if content is None:
                skipped.append((row, "untokenizable"))
            elif not content:
                skipped.append((row, "empty"))
            elif self._contains_eos(content):
                skipped.append((row, CONTAINS_EOS))
            else:
                pieces += (self.bos, content, self.eos)
                size = len(self.bos) + len(content) + len(self.eos)
                lengths.append(size // self.special_ids.itemsize)
                kept.append(row)
        return TokenizedRange(
            task.first,
            task.last,
            b"".join(pieces),
            np.array(lengths, np.int64),
            np.array(kept, np.int64),
            sorted(skipped),
        )

    def _contains_eos(self, content: bytes) -> bool:
        tokens = np.frombuffer(content, self.special_ids.dtype)
        return bool(np.isin(tokens, self.special_ids).any())


@contextlib.contextmanager
def tokenize_pool(
    corpus: Corpus, range_tokenizer: RangeTokenizer, workers: int
) -> Iterator[Callable[[int, int], Iterator[TokenizedRange]]]:
    """A function that tokenizes rows [first, last) range by range, in order.

    With one worker it runs in this process. Raises DataError if a worker cannot be started or is
    killed.
    """
    if workers == 1:
        yield lambda first, last: map(
            range_tokenizer.tokenize, corpus.tasks(first, last, _RANGE_BYTES)
        )
        return
    pool = _Pool(corpus, range_tokenizer, workers)
    try:
        # Python's own helper process. Starting it unblocks signals, so it starts before the workers
        # do.
        resource_tracker.ensure_running()
        yield pool.tokenize
    except _WorkerDied:
        raise DataError(
            "tokenize_workers: a worker process died, most likely because memory ran out; lower"
            f" tokenize_workers (now {workers}) and run the same command again to resume"
        ) from None
    finally:
        pool.close()


class _WorkerDied(Exception):
    pass


class _Pool:
    """Worker processes, each with its own pipe, and a thread per task in flight that waits for the
    answer.

    The out-of-memory killer does kill workers. ProcessPoolExecutor then hangs if the process held
    the lock of the shared queue, or had sent half an answer through a pipe that others keep open.
    Processes are spawned, since forked ones inherit the locks of other threads.
    """

    def __init__(self, corpus: Corpus, range_tokenizer: RangeTokenizer, workers: int):
        self.corpus, self.workers = corpus, workers
        self.arguments = pickle.dumps(range_tokenizer.arguments)
        self.context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self.idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)

    def tokenize(self, first: int, last: int) -> Iterator[TokenizedRange]:
        """Rows [first, last), range by range, in order."""
        waiting: deque[Future[TokenizedRange]] = deque()
        for task in self.corpus.tasks(first, last, _RANGE_BYTES):
            if len(self.processes) < self.workers:
                self._start_worker()
            waiting.append(self.threads.submit(self._run, task))
            if len(waiting) >= _IN_FLIGHT * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _start_worker(self) -> None:
        try:
            ours, theirs = self.context.Pipe()
            with block_signals():
                process = self.context.Process(target=_worker_main, args=(theirs,), daemon=True)
                process.start()
                self.processes.append(process)
            theirs.close()  # only the worker holds its end, so that the pipe breaks with the worker
            self.threads.submit(self._send_arguments, ours)
        except BrokenPipeError:
            raise _WorkerDied from None
        except (OSError, RuntimeError) as error:  # no more files, processes or threads
            raise DataError(
                f"tokenize_workers: only {len(self.processes)} of {self.workers} worker processes"
                f" could be started: {error}; lower tokenize_workers"
            ) from None

    def _send_arguments(self, connection: Connection) -> None:
        try:
            connection.send_bytes(self.arguments)
        except OSError:
            pass  # the first task raises
        finally:
            self.idle.put(connection)

    def _run(self, task: Task) -> TokenizedRange:
        """Have an idle worker run a task, and wait for its answer."""
        connection = self.idle.get()
        try:
            connection.send(task)
            answer: TokenizedRange | Exception = connection.recv()
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


def _worker_main(connection: Connection) -> None:
    """A worker process: receives the arguments of its RangeTokenizer, then tasks until the pipe
    closes.
    """
    threading.Thread(
        target=_exit_with_parent, args=(multiprocessing.parent_process(),), daemon=True
    ).start()
    range_tokenizer: RangeTokenizer | None = None
    with contextlib.suppress(EOFError, OSError):  # also in the middle of a task
        arguments = connection.recv_bytes()
        while True:
            task = connection.recv()
            try:
                range_tokenizer = range_tokenizer or RangeTokenizer(*pickle.loads(arguments))
                answer: TokenizedRange | Exception = range_tokenizer.tokenize(task)
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
