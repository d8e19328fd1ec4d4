"""Losses by source of the data, as perplexity, and in bits per byte of text.

A sequence belongs to one source, so the head adds up the losses of each sequence under the number
of its source (`SourceLosses` in model/loss.py). The sums go with the step's one reduction. A run
with one source has none of this.

Bits per byte compare models with different tokenizers:

    bits per byte = loss · (target tokens / bytes) / ln 2

`prepare` writes the bytes of each token file's text to dataset.json. The ratio is that of all token
files of a source, so it is an approximation: the sequences of a record, or the documents of a
split, may have another. Tokens that FIM adds, and BOS and EOS that are predicted, cost bits and
have no bytes.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fast_llm.data.dataset import SPLITS, Dataset
from fast_llm.data.metadata import TextSize, text_sizes
from fast_llm.data.source import RandomSource, Source
from fast_llm.model.decoder import Head
from fast_llm.model.loss import SourceLosses
from fast_llm.parallel.mesh import Mesh
from fast_llm.training.step import StepResult

logger = logging.getLogger("fast_llm")

SUMS = "sources"  # the name of the sums in `TrainStep.sums` and `StepResult.sums`


class SourceMonitor:
    """The sources of a run, with the names and text sizes that losses are reported with."""

    def __init__(self, dataset: Dataset, isolate: bool, mesh: Mesh):
        """`isolate`: documents are kept apart, so their first tokens are not predicted."""
        self.dataset = dataset
        self.names = dataset.source_names
        sizes = text_sizes(dataset.metadata | dataset.validation_metadata)
        self.bytes_per_target: list[float | None] = [None] * len(self.names)
        self.bytes_of_sets: dict[str, float | None] = {}
        for split, found in dataset.splits.items():
            for source in found.sources:
                ratio = bytes_per_target(source, sizes, isolate)
                if split in SPLITS:
                    self.bytes_per_target[source.number] = ratio
                else:
                    self.bytes_of_sets[split] = ratio
        self.losses = SourceLosses(
            torch.zeros(2, len(self.names), dtype=torch.float64, device=mesh.device)
        )

    @property
    def several(self) -> bool:
        """Whether losses are separated by source."""
        return len(self.names) > 1

    def attach(self, models: Iterable[nn.Module]) -> None:
        """Let the heads of this process's pipeline stages add up losses by source."""
        for model in models:
            for module in model.modules():
                if isinstance(module, Head):
                    module.source_losses = self.losses

    def warn_unknown(self) -> None:
        """Log once which data does not say how many bytes of text it has."""
        named = zip(self.names, self.bytes_per_target, strict=True)
        unknown = [name for name, ratio in [*named, *self.bytes_of_sets.items()] if ratio is None]
        splits = self.dataset.splits.values()
        masked = {
            self.names[source.number] if split in SPLITS else split
            for split, found in self.dataset.splits.items()
            for source in found.sources
            if source.masked  # their dataset.json may say it, but not of the targets alone
        }
        unknown = [name for name in unknown if name not in masked]
        if unknown and not any(isinstance(s, RandomSource) for f in splits for s in f.sources):
            logger.info(
                f"Bits per byte are not logged for {', '.join(unknown)}: no dataset.json has its"
                " bytes of text (num_bytes, which `fast-llm prepare` writes)."
            )

    def training(
        self, steps: Sequence[StepResult], consumed_samples: int, padding: Sequence[int]
    ) -> dict[str, Any]:
        """The fields of a training record: of each source, and of all together. `padding`: of each
        source, the inputs of the consumed sequences that hold no token.
        """
        used = [result for result in steps if result.updated or result.spike]
        loss = sum(result.loss for result in used) / len(used) if used else math.nan
        sums = [0.0] * 2 * len(self.names)
        for result in used if self.several else ():
            sums = [a + b for a, b in zip(sums, result.sums[SUMS], strict=True)]
        fields = self.fields("", loss, self._bits_per_nat(sums))
        if not self.several:
            return fields
        sources = self.by_source(sums)
        inputs = self.dataset.inputs_by_source("training", consumed_samples)
        tokens = [count - unused for count, unused in zip(inputs, padding, strict=True)]
        epochs = self.dataset.epochs("training", consumed_samples)
        for name, count, (_, epoch) in zip(self.names, tokens, epochs, strict=True):
            sources[name] |= {"consumed_tokens": count, "epochs": epoch}
        return fields | {"sources": sources}

    def evaluation(
        self, losses: Mapping[str, float | None], sums: Sequence[float]
    ) -> dict[str, Any]:
        """The fields of a validation or test record. `sums`: [2 · sources] of all processes."""
        fields: dict[str, Any] = {}
        for metric, loss in losses.items():
            name = metric.removesuffix("_loss")
            if metric == "language_model_loss":
                fields |= self.fields("", loss, self._bits_per_nat(sums))
            else:
                fields |= self.fields(f"{name}_", loss, _inverse(self.bytes_of_sets[name]))
        return fields | ({"sources": self.by_source(sums)} if self.several and sums else {})

    def fields(
        self, prefix: str, loss: float | None, bits_per_nat: float | None
    ) -> dict[str, float | None]:
        """A loss as perplexity and, if the bytes of its text are known, in bits per byte."""
        if loss is None or not math.isfinite(loss):
            perplexity = bits = None
        else:
            perplexity, bits = math.exp(min(loss, 700)), loss * (bits_per_nat or 0.0)
        found = {f"{prefix}perplexity": perplexity}
        return found if bits_per_nat is None else found | {f"{prefix}bits_per_byte": bits}

    def by_source(self, sums: Sequence[float]) -> dict[str, dict[str, Any]]:
        """Loss and target tokens of each source, from [2 · sources] sums."""
        count, found = len(self.names), {}
        for number, name in enumerate(self.names):
            total, targets = sums[number], sums[count + number]
            loss = total / targets if targets and math.isfinite(total) else None
            bits = _inverse(self.bytes_per_target[number])
            found[name] = {
                "loss": loss,
                **self.fields("", loss, bits),
                "target_tokens": int(targets),
            }
        return found

    def _bits_per_nat(self, sums: Sequence[float]) -> float | None:
        """Target tokens per byte, divided by ln 2, over all sources; None if one is unknown."""
        if not self.several:
            return _inverse(self.bytes_per_target[0]) if self.names else None
        targets = sums[len(self.names) :]
        bytes_of_text = 0.0
        for count, ratio in zip(targets, self.bytes_per_target, strict=True):
            if count and ratio is None:
                return None
            bytes_of_text += count * (ratio or 0.0)
        return sum(targets) / bytes_of_text / math.log(2) if bytes_of_text else None


def bytes_per_target(
    source: Source | RandomSource, sizes: Mapping[str, TextSize], isolate: bool
) -> float | None:
    """Bytes of text per target token, over the token files of a source; None if unknown.

    Where documents are kept apart, nothing predicts their first token. It is BOS, or else text,
    whose bytes are then not counted: as many as a token of text has on average.
    """
    if isinstance(source, RandomSource) or source.masked:
        return None
    targets = predicted = 0.0
    for file in source.files:
        size = sizes.get(str(file.prefix))
        if size is None:
            return None
        first = file.documents if isolate else 0
        text = file.tokens - file.documents * size.added
        targets += file.tokens - first
        lost = 0.0 if size.begins_with_bos else first / max(1, text)
        predicted += size.bytes * (1 - lost)
    return predicted / targets if predicted > 0 and targets > 0 else None


def _inverse(bytes_of_target: float | None) -> float | None:
    return None if bytes_of_target is None else 1 / bytes_of_target / math.log(2)
