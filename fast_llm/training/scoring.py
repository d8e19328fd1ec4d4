"""Log-probabilities of continuations, from the weights in memory, on all processes.

The first process has the requests, packs them into sequences of training's length, and sends these
to the others. Data-parallel processes take sequences in turn; the shapes are those of training, so
every layout, pipelines included, computes them as a validation. Each target's log-probability
travels in a place of its own of one sum over the processes, so the result has the same bits
whatever the order of additions.

Letters: P data-parallel processes, M micro-batches, B sequences of a micro-batch, S tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fast_llm.model.attention import PackedSequences
from fast_llm.model.batch import Batch
from fast_llm.model.decoder import CausalLM, Head
from fast_llm.model.loss import IGNORE_INDEX, TokenScores
from fast_llm.parallel.context import shard_batch
from fast_llm.parallel.mesh import Mesh
from fast_llm.training.step import TrainStep

_ROUNDS = 8  # that are sent at once


class Interrupted(Exception):
    """A signal to stop has arrived at some process."""


@dataclass(frozen=True)
class Request:
    """A text of which the last tokens are scored, after those before them."""

    tokens: Sequence[int]  # at most S + 1
    targets: int  # how many, above 0 and below the number of tokens

    @property
    def inputs(self) -> int:
        """Tokens that the model reads."""
        return len(self.tokens) - 1


# A sequence: its requests, by number, each with its tokens and number of targets.
Row = list[tuple[int, list[int], int]]


def pack(requests: Sequence[Request], length: int) -> list[Row]:
    """Sequences of `length` tokens that hold all requests: the longest first, each in the fullest
    sequence that has room (best fit, decreasing).
    """
    order = sorted(range(len(requests)), key=lambda n: -requests[n].inputs)
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # of each sequence that is not full, ascending
    for number in order:
        request = requests[number]
        place = bisect_left(room, (request.inputs, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append((number, list(request.tokens), request.targets))
        if left > request.inputs:
            insort(room, (left - request.inputs, row))
    return rows


class Scorer:
    """Scores requests. `score` is called on the first process, while the others are in `serve`."""

    def __init__(
        self,
        train_step: TrainStep,
        mesh: Mesh,
        models: Sequence[CausalLM],
        sizes: tuple[int, int],
        window: int | None,
        counts: tuple[tuple[int, ...], tuple[int, ...]],
        stop: Callable[[], bool],
        heartbeat: Callable[..., None],
    ):
        """`models`: of this process's stages. `sizes`: B and S. `window`: of attention. `counts`:
        `fim` and `padding` of an empty batch. `stop`: whether a signal has arrived here.
        """
        self.train_step, self.mesh = train_step, mesh
        self.heads = [model.head for model in models if isinstance(model.head, Head)]
        self.rows, self.length = sizes
        self.counts, self.stop, self.heartbeat = counts, stop, heartbeat
        pipeline = train_step.pipeline
        own = torch.Size((self.rows, self.length // mesh.context.size))  # tokens of this process
        self.micro_batches = 1 if pipeline is None else pipeline.runs[own][0]
        self.of_round = mesh.data.size * self.micro_batches * self.rows  # sequences
        self.shard = partial(
            shard_batch, rank=mesh.context.rank, size=mesh.context.size, window=window
        )
        self.error: BaseException | None = None  # that broke the work off

    def score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Of each request, the log-probability of its targets, and whether each is the most likely
        token. Raises Interrupted.
        """
        found: dict[int, tuple[float, bool]] = {}
        rows = pack(requests, self.length)
        try:
            for first in range(0, len(rows), self.of_round * _ROUNDS):
                for part in self._send(rows[first : first + self.of_round * _ROUNDS]):
                    found |= part
        except BaseException as error:
            self.error = error
            raise
        return [found[number] for number in range(len(requests))]

    def _send(self, rows: list[Row]) -> list[dict[int, tuple[float, bool]]]:
        self.heartbeat("evaluation", slow=True)
        self.mesh.broadcast(rows)
        return [
            self._read(part, self._compute(part))
            for first in range(0, len(rows), self.of_round)
            for part in [rows[first : first + self.of_round]]
        ]

    def finish(self) -> None:
        """Let the other processes return from `serve`."""
        self.mesh.broadcast(None)

    def serve(self) -> None:
        """Take part in the work of the first process. Raises Interrupted."""
        while True:
            self.heartbeat("evaluation", slow=True)
            rows: list[Row] | None = self.mesh.broadcast(None)
            if rows is None:
                return
            for first in range(0, len(rows), self.of_round):
                self._compute(rows[first : first + self.of_round])

    def _compute(self, rows: list[Row]) -> Tensor:
        """[2, P·M·B·S] of `TokenScores`, of a round."""
        self.heartbeat("evaluation")
        size = self.of_round * self.length
        scores = TokenScores(torch.zeros(2, size, device=self.mesh.device))
        each = self.micro_batches * self.rows
        first = self.mesh.data.rank * each
        batches = [
            self._batch(rows, first + number * self.rows) for number in range(self.micro_batches)
        ]
        for head in self.heads:
            head.token_scores = scores
        try:
            self.train_step.loss(batches)
        finally:
            for head in self.heads:
                head.token_scores = None
        values = torch.cat((scores.values.flatten(), scores.values.new_tensor([self.stop()])))
        values[:-1] *= self.train_step.contributes
        if self.mesh.size > 1:
            dist.all_reduce(values)
        if values[-1].item():
            raise Interrupted
        return values[:-1].view(2, size).cpu()

    def _batch(self, rows: list[Row], first: int) -> Batch:
        """The micro-batch of the sequences from `first` on."""
        shape = self.rows, self.length
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        lengths: list[int] = []
        for row in range(self.rows):
            begin = 0
            for _, text, targets in rows[first + row] if first + row < len(rows) else ():
                end = begin + len(text) - 1
                tokens[row, begin:end] = text[:-1]
                labels[row, end - targets : end] = text[-targets:]
                positions[row, begin:end] = np.arange(end - begin)
                lengths.append(end - begin)
                begin = end
            if begin < self.length:
                positions[row, begin:] = np.arange(self.length - begin)
                lengths.append(self.length - begin)
        slots = np.arange(first * self.length, (first + self.rows) * self.length).reshape(shape)
        ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        documents = PackedSequences(tuple(lengths), torch.from_numpy(ends), max(lengths))
        targets = int((labels != IGNORE_INDEX).sum())
        return self.shard(
            Batch(
                torch.from_numpy(tokens),
                torch.from_numpy(labels),
                torch.from_numpy(positions),
                documents,
                targets,
                torch.from_numpy(slots),
                *self.counts,
            )
        )

    def _read(self, rows: list[Row], values: Tensor) -> dict[int, tuple[float, bool]]:
        """Of each request of a round its result."""
        found: dict[int, tuple[float, bool]] = {}
        numbers: Any = values.double().numpy()
        for row, requests in enumerate(rows):
            end = row * self.length
            for number, text, targets in requests:
                end += len(text) - 1
                log_probabilities, others = numbers[:, end - targets : end]
                found[number] = float(log_probabilities.sum()), not others.any()
        return found
