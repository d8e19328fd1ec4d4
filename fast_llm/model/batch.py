"""The model's input: a micro-batch of packed sequences. config/batch.py computes batch sizes.

Letters: B sequences of a micro-batch, S tokens of a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fast_llm.model.attention import DocumentBoundaries


@dataclass(frozen=True)
class Batch:
    """One micro-batch, or the shard of it that a process has."""

    tokens: Tensor  # int64 B S
    labels: Tensor  # int64 B S, -100 where no token is predicted
    positions: Tensor  # int64 B S
    documents: DocumentBoundaries | None  # None: each sequence is one document
    targets: int  # labels that are not -100
    # int64 B, the source of each sequence, if there are several; B S for `Head.token_scores`
    sources: Tensor | None = None
    fim: tuple[int, ...] = ()  # counts of fill-in-the-middle, over all of the micro-batch
    padding: tuple[int, ...] = ()  # inputs without a token, of each source, as `fim`

    def to(self, device: torch.device) -> "Batch":
        """A copy on a device; from page-locked memory the copy is asynchronous."""
        if device.type == "cpu":
            return self
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            None if self.documents is None else self.documents.to(device),
            self.targets,
            None if self.sources is None else self.sources.to(device, non_blocking=True),
            self.fim,
            self.padding,
        )

    def pin(self) -> "Batch":
        """A copy in page-locked memory."""
        return Batch(
            self.tokens.pin_memory(),
            self.labels.pin_memory(),
            self.positions.pin_memory(),
            None if self.documents is None else self.documents.pin(),
            self.targets,
            None if self.sources is None else self.sources.pin_memory(),
            self.fim,
            self.padding,
        )
