"""This process's micro-batches, starting at any sequence of the run.

A step begins at sequence s. With b sequences per micro-batch and P data-parallel processes,
micro-batch m of process r holds the sequences s + (m·P + r)·b … + b of that step, as far as it has
them. Threads read ahead; NumPy copies without holding Python's lock. An error in a thread is raised
where the batch is taken. To resume, start at another s.

Letters: B sequences of a micro-batch, S tokens of a sequence.
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
from numpy.typing import NDArray

from fast_llm.config.batch import BatchSizes
from fast_llm.data.dataset import SPLITS, Dataset
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
        split: str,
        sizes: BatchSizes,
        *,
        rank: int,
        processes: int,
        vocab_size: int,
        first_sample: int,
        steps: int,
        isolate: bool,
        workers: int,
        prefetch: int,
        shard: Callable[[Batch], Batch] | None = None,
        pin: bool = False,
        warn_ms: float = 1000,
        length: int | None = None,
    ):
        """`split`: of the dataset; `sizes`: of a step's batches.

        `first_sample`: the sequence at which the first step begins. `steps`: number of steps.
        `isolate`: keep documents apart. `workers`: number of threads (0 uses none). `prefetch`:
        steps that each thread prepares ahead. `shard`: reduces a micro-batch to the part that this
        process computes. `pin`: copy to pinned memory. `warn_ms`: warn if preparing the batches of
        a step takes longer. `length`: tokens in a sequence, if not the dataset's.
        """
        self.dataset, self.split, self.sizes = dataset, split, sizes
        self.rank, self.processes = rank, processes
        self.vocab_size = vocab_size
        self.first_sample, self.steps = first_sample, steps
        self.isolate, self.shard, self.pin, self.warn_ms = isolate, shard, pin, warn_ms
        self.ahead = workers * prefetch
        self.length = length or dataset.length
        self.position_ids = np.arange(self.length)
        self.by_source = split in SPLITS and len(dataset.source_names) > 1
        dataset.splits[split].open()
        # New threads use the first GPU; they must pin for the GPU of this process.
        initializer = (
            functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if pin else None
        )
        self.pool = ThreadPoolExecutor(workers, "batches", initializer) if workers else None
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
        """End the threads."""
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
        """This process's micro-batches of step `step`, counted from 0."""
        started = time.perf_counter()
        begin = self.first_sample + step * self.sizes.batch_size
        end, size = begin + self.sizes.batch_size, self.sizes.micro_batch_size
        batches = []
        for number in range(self.sizes.micro_batches):
            first = begin + (number * self.processes + self.rank) * size
            batches.append(self.micro_batch(first, min(size, max(0, end - first))))
        milliseconds = (time.perf_counter() - started) * 1e3
        if milliseconds > self.warn_ms:
            logger.warning(
                f"Preparing the {len(batches)} micro-batches of a step took {milliseconds:.0f} ms"
                f" (sequences from {begin} on); is the storage slow?"
            )
        return batches

    def micro_batch(self, first: int, count: int) -> Batch:
        """`count` sequences from `first` on, padded with rows without targets to the size of a
        micro-batch. Raises DataError for a token that the model does not have.
        """
        size, length = self.sizes.micro_batch_size, self.length
        tokens, labels, positions = (np.empty((size, length), np.int64) for _ in range(3))
        tokens[count:], labels[count:] = 0, IGNORE_INDEX
        starts = [np.zeros(1, np.int64)] * size
        sources, fim = np.zeros(size, np.int64), np.zeros(4, np.int64)
        padding = [0] * len(self.dataset.source_names)
        targets = count * length
        for row in range(count):
            packed = self.dataset.read(self.split, first + row)
            # np.positive copies seven times as fast as an assignment on some processors (Zen 3).
            np.positive(packed.tokens[:-1], out=tokens[row])
            np.positive(packed.targets, out=labels[row])
            starts[row], sources[row] = packed.starts, packed.source
            fim += packed.fim
            if self.isolate:
                labels[row, packed.ends] = IGNORE_INDEX
                targets -= len(packed.ends)
            elif len(packed.breaks):
                labels[row, packed.breaks] = IGNORE_INDEX
                targets -= len(packed.breaks)
            if packed.padding:  # the ends of documents lie before it
                labels[row, -packed.padding :] = IGNORE_INDEX
                targets -= packed.padding
                padding[packed.source] += packed.padding - 1  # the last target is no input
            if len(packed.masked):
                targets -= int((labels[row, packed.masked] != IGNORE_INDEX).sum())
                labels[row, packed.masked] = IGNORE_INDEX
            self._check(packed, first + row)
        documents = self._pack(starts, positions) if self.isolate else None
        if documents is None:
            positions[:] = self.position_ids
        inputs, targeted, placed = (
            torch.from_numpy(array) for array in (tokens, labels, positions)
        )
        numbers = torch.from_numpy(sources) if self.by_source else None
        counts = tuple(fim.tolist()), tuple(padding)
        batch = Batch(inputs, targeted, placed, documents, targets, numbers, *counts)
        if self.shard is not None:
            batch = self.shard(batch)
        return batch.pin() if self.pin else batch

    def _pack(
        self, starts: list[NDArray[np.int64]], positions: NDArray[np.int64]
    ) -> PackedSequences:
        """The documents of all rows. Fills `positions` [B, S], which begin at 0 in each document.

        `starts`: for each row, the indices at which documents begin.
        """
        length = self.length
        parts = []
        for row, begins in enumerate(starts):
            inside = begins if begins[-1] < length else begins[:-1]
            row_lengths = np.empty_like(inside)
            row_lengths[:-1], row_lengths[-1] = inside[1:], length
            row_lengths -= inside
            np.subtract(self.position_ids, inside.repeat(row_lengths), out=positions[row])
            parts.append(row_lengths)
        lengths = np.concatenate(parts)
        cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
        lengths.cumsum(out=cu_seqlens[1:])
        return PackedSequences(
            tuple(lengths.tolist()), torch.from_numpy(cu_seqlens), int(lengths.max())
        )

    def _check(self, packed: PackedSample, index: int) -> None:
        """Raise DataError for a token beyond the vocabulary: it would read out of bounds."""
        # As an unsigned number a negative one is huge, so the maximum finds both.
        worst = int(packed.tokens.view(np.uint64).max())
        if packed.targets.base is None:  # not a view of the tokens: joined from several ranges
            worst = max(worst, int(packed.targets.view(np.uint64).max()))
        if worst < self.vocab_size:
            return
        largest, smallest = int(packed.tokens.max()), int(packed.tokens.min())
        place = int(
            packed.tokens.argmax() if largest >= self.vocab_size else packed.tokens.argmin()
        )
        for span in self.dataset.locate(self.split, index):
            if place < span.tokens:
                raise DataError(
                    f"{span.prefix}: document {span.document} holds token"
                    f" {largest if largest >= self.vocab_size else smallest} at position"
                    f" {span.begin + place}, but the model's vocab_size is {self.vocab_size}; the"
                    " data was made with another tokenizer or is damaged"
                )
            place -= span.tokens
        raise DataError(
            f"sequence {index:,} of {self.split}: a target is token {worst}, but the model's"
            f" vocab_size is {self.vocab_size}; the data was made with another tokenizer or is"
            " damaged"
        )
