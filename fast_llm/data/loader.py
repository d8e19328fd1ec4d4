"""This process's micro-batches, from any sequence of the run on.

With b sequences a micro-batch and P processes, micro-batch m of process r in a step that begins at
sequence s holds sequences s + (m·P + r)·b … + b, those of them that are still of this step. Threads
read ahead (NumPy copies without holding Python's lock); an error in one of them is raised where the
batch is taken. Resuming is a matter of another s. Letters: B sequences of a micro-batch, S tokens
of a sequence.
"""

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from fast_llm.config.batch import BatchSizes
from fast_llm.data.dataset import Dataset
from fast_llm.data.source import PackedSample
from fast_llm.errors import DataError
from fast_llm.model.attention import PackedSequences
from fast_llm.model.batch import Batch
from fast_llm.model.loss import IGNORE_INDEX

logger = logging.getLogger("fast_llm")


class Loader:
    """Iterates over steps; each gives this process's micro-batches."""

    def __init__(
        self,
        dataset: Dataset,
        phase: str,
        plan: BatchSizes,
        *,
        rank: int,
        processes: int,
        vocab_size: int,
        first_sample: int,
        steps: int,
        isolate: bool,
        workers: int,
        prefetch: int,
        cut: Callable[[Batch], Batch] | None = None,
        pin: bool = False,
        warn_ms: float = 1000,
    ):
        """`first_sample`: the sequence with which the first step begins; `workers`: threads;
        `prefetch`: steps ahead for each of them; `isolate`: keep documents apart; `cut`: what of a
        micro-batch this process has; `warn_ms`: warn when a step's batches take longer."""
        self.dataset, self.phase, self.plan = dataset, phase, plan
        self.rank, self.processes = rank, processes
        self.vocab_size = vocab_size
        self.first_sample, self.steps = first_sample, steps
        self.isolate, self.cut, self.pin, self.warn_ms = isolate, cut, pin, warn_ms
        self.ahead = workers * prefetch
        self.places = np.arange(dataset.length)
        dataset.splits[phase].open()
        # A new thread begins on the first GPU; it must pin for this process's own.
        begin = (
            functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if pin else None
        )
        self.pool = ThreadPoolExecutor(workers, "batches", begin) if workers else None
        self.wait_seconds = 0.0

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave no thread behind."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[list[Batch]]:
        waiting: deque[Future[list[Batch]]] = deque()
        submitted = 0
        for step in range(self.steps):
            started = time.perf_counter()
            if self.pool is None:
                batches = self.step(step)
            else:
                while submitted < min(self.steps, step + 1 + self.ahead):
                    waiting.append(self.pool.submit(self.step, submitted))
                    submitted += 1
                batches = waiting.popleft().result()
            self.wait_seconds += time.perf_counter() - started
            yield batches

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of the step-th step, counted from 0."""
        started = time.perf_counter()
        begin = self.first_sample + step * self.plan.batch_size
        end, size = begin + self.plan.batch_size, self.plan.micro_batch_size
        batches = []
        for number in range(self.plan.micro_batches):
            first = begin + (number * self.processes + self.rank) * size
            batches.append(self.micro_batch(first, min(size, max(0, end - first))))
        milliseconds = (time.perf_counter() - started) * 1e3
        if milliseconds > self.warn_ms:
            logger.warning(
                f"Making one step's {len(batches)} batches took {milliseconds:.0f} ms (sequences"
                f" from {begin} on); is the storage slow?"
            )
        return batches

    def micro_batch(self, first: int, count: int) -> Batch:
        """`count` sequences of the phase from `first` on, and rows without targets up to the
        micro-batch's size."""
        size, length = self.plan.micro_batch_size, self.dataset.length
        tokens, labels, positions = (np.empty((size, length), np.int64) for _ in range(3))
        tokens[count:], labels[count:] = 0, IGNORE_INDEX
        starts = [np.zeros(1, np.int64)] * size
        targets = count * length
        for row in range(count):
            packed = self.dataset.read(self.phase, first + row)
            # Not an assignment: the C library's copy of some tens of kB takes seven times as long
            # on some processors (Zen 3).
            np.positive(packed.tokens[:-1], out=tokens[row])
            np.positive(packed.targets, out=labels[row])
            starts[row] = packed.starts
            if self.isolate:
                labels[row, packed.ends] = IGNORE_INDEX
                targets -= len(packed.ends)
            self._check(packed, first + row)
        documents = None
        if self.isolate:
            parts = []
            for row, begins in enumerate(starts):
                inside = begins if begins[-1] < length else begins[:-1]
                row_lengths = np.empty_like(inside)
                row_lengths[:-1], row_lengths[-1] = inside[1:], length
                row_lengths -= inside
                np.subtract(self.places, inside.repeat(row_lengths), out=positions[row])
                parts.append(row_lengths)
            lengths = np.concatenate(parts)
            boundaries = np.zeros(len(lengths) + 1, np.int32)
            lengths.cumsum(out=boundaries[1:])
            documents = PackedSequences(
                tuple(lengths.tolist()), torch.from_numpy(boundaries), int(lengths.max())
            )
        else:
            positions[:] = self.places
        inputs, targeted, placed = (
            torch.from_numpy(array) for array in (tokens, labels, positions)
        )
        batch = Batch(inputs, targeted, placed, documents, targets)
        if self.cut is not None:
            batch = self.cut(batch)
        return batch.pin() if self.pin else batch

    def _check(self, packed: PackedSample, index: int) -> None:
        """A token that the model does not have would read foreign memory on a GPU."""
        # A negative number is a huge one without a sign, so one pass over them is enough.
        worst = int(packed.tokens.view(np.uint64).max())
        if (
            packed.targets.base is None
        ):  # no view of the tokens: made of parts, each with a target of its own
            worst = max(worst, int(packed.targets.view(np.uint64).max()))
        if worst < self.vocab_size:
            return
        largest, smallest = int(packed.tokens.max()), int(packed.tokens.min())
        place = int(
            packed.tokens.argmax() if largest >= self.vocab_size else packed.tokens.argmin()
        )
        for span in self.dataset.locate(self.phase, index):
            if place < span.tokens:
                raise DataError(
                    f"{span.prefix}: document {span.document} holds token"
                    f" {largest if largest >= self.vocab_size else smallest} at its place"
                    f" {span.begin + place}, but the model's vocab_size is {self.vocab_size}; the"
                    " data was made with another tokenizer or is damaged"
                )
            place -= span.tokens
        raise DataError(
            f"sequence {index:,} of {self.phase}: a target is token {worst}, but the model's"
            f" vocab_size is {self.vocab_size}; the data was made with another tokenizer or is"
            " damaged"
        )
