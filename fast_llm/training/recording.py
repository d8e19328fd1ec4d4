"""A micro-batch as one CUDA graph (`model.multi_stage.cuda_graphs`).

A small model's kernels take less time than it takes the CPU to start them one by one, some two thousand in a micro-batch. They are
recorded once, with the addresses that they read and write, and then started together.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fast_llm.model.batch import Batch
from fast_llm.parallel.single import SingleWeights

_WARM = 3  # micro-batches that run as ever: kernels are built, libraries choose, buffers come to be


class Recording:
    """Runs a micro-batch, from the fourth on from the recording. All are of one shape, and each sequence is one document."""

    def __init__(self, run: Callable[[Batch, float | Tensor], Tensor], weights: SingleWeights):
        """`run`: forward and backward pass of a micro-batch for a factor of the loss; returns the loss."""
        self.run = run
        self.weights = weights
        self.seen = 0

    def __call__(self, batch: Batch, seed: float) -> Tensor:
        """The loss of this micro-batch."""
        assert batch.documents is None
        self.seen += 1
        if self.seen <= _WARM:
            return self.run(batch, seed)
        if self.seen == _WARM + 1:
            self._record(batch, seed)
        for mine, given in zip(self._tensors(self.batch), self._tensors(batch), strict=True):
            mine.copy_(given)
        self.seed.fill_(seed)
        self.graph.replay()
        return self.loss

    def _record(self, batch: Batch, seed: float) -> None:
        self.batch = replace(
            batch, tokens=batch.tokens.clone(), labels=batch.labels.clone(), positions=batch.positions.clone()
        )
        self.seed = torch.full((), seed, dtype=torch.float32, device=batch.tokens.device)
        self.weights.always_add()
        torch.cuda.empty_cache()  # the recording has memory of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.run(self.batch, self.seed)

    @staticmethod
    def _tensors(batch: Batch) -> tuple[Tensor, ...]:
        return batch.tokens, batch.labels, batch.positions
