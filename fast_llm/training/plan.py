"""Everything that can be known before torch is loaded: what a run will do, and what stands in its way.

The configuration is completed by the pretrained model's config.json, checked, and compared with the data,
the tokenizer, the headers of the weights, the optional packages, the disk, and the checkpoint the run
would go on from. `--validate` prints the result and ends here; training goes on with it.
"""

import importlib.util
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_llm import __version__
from fast_llm.checkpoint import folder as checkpoints
from fast_llm.checkpoint import llama
from fast_llm.config.batch import BatchPlan, plan_batch
from fast_llm.config.checks import check
from fast_llm.config.section import Document, validate
from fast_llm.config.train import TrainConfig
from fast_llm.data import tokenizer
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.errors import ConfigError, DataError, UserError
from fast_llm.model.cost import Cost, cost

logger = logging.getLogger("fast_llm")


@dataclass(frozen=True)
class Plan:
    """A run that can be started."""

    config: TrainConfig
    processes: int
    batch: BatchPlan
    dataset: Dataset
    cost: Cost
    source: Path | None  # the pretrained model's folder, weights included
    source_config: dict[str, Any] | None  # its config.json
    files_from: Path | None  # where its small files are
    tokenizer_ids: dict[str, int | None]
    checkpoint: Path | None  # the newest good one, to go on from
    pretrained_checkpoint: Path | None  # `pretrained.format: distributed`
    identity: dict[str, Any]  # what may not change on resume
    changes: list[str]  # what did change since the checkpoint

    def evaluation_steps(self, phase: str, iterations: int) -> int:
        """How many batches of a phase are measured: as many as asked for, or as a further set has."""
        if phase in ("validation", "test"):
            return iterations
        return max(1, min(iterations, self.dataset.sequences(phase) // self.batch.batch_size))
