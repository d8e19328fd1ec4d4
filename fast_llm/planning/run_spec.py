"""What the preflight hands to training: a run that can be started."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fast_llm.checkpoint.folder import Manifest
from fast_llm.config.batch import BatchSizes, derive_batch_sizes
from fast_llm.config.train import TrainConfig
from fast_llm.data.dataset import Dataset
from fast_llm.models.flops import Cost
from fast_llm.planning.branch import Ancestor
from fast_llm.planning.history import History
from fast_llm.planning.stages import training_cost

SpecialTokens = dict[str, int | None]  # bos and eos → id


@dataclass(frozen=True)
class StageSettings:
    """What is in force in a stage of `data.stages`."""

    number: int | None  # None: outside of all stages
    config: TrainConfig
    batch: BatchSizes
    cost: Cost

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.config.batch.sequence_length


@dataclass(frozen=True)
class RunSpec:
    """A run that can be started."""

    config: TrainConfig
    processes: int
    dataset: Dataset
    cost: Cost
    pretrained_folder: Path | None
    pretrained_config: dict[str, Any] | None  # its config.json
    extra_files: dict[str, bytes]  # copied into exports: tokenizer, generation_config.json
    special_tokens: SpecialTokens
    checkpoint: Path | None  # to continue from: the newest good one, or that of the branch
    manifest: Manifest | None  # of that checkpoint
    ancestors: list[Ancestor]  # runs that this one branched from, the oldest first
    completed_steps: int  # of that checkpoint
    consumed_samples: int  # sequences that the completed steps consumed
    identity: dict[str, Any]  # settings and data that may not change on resume
    history: History | None  # of batch sizes and data orders; None without training data
    changes: list[str]  # settings that changed since the checkpoint
    warnings: list[str]  # about settings that are allowed and probably not intended

    @property
    def folder(self) -> Path | None:
        """The experiment folder."""
        name = self.config.run.experiment_dir
        return None if name is None else Path(name).expanduser()

    @property
    def branches(self) -> bool:
        """Whether `checkpoint` is another run's, with which this run begins."""
        return self.checkpoint is not None and (
            self.folder is None or self.checkpoint.parent != self.folder / "checkpoint"
        )

    @property
    def settings_before(self) -> dict[str, Any] | None:
        """The resolved settings of the run that wrote `checkpoint`; None without one."""
        if self.manifest is None:
            return None
        settings: dict[str, Any] = self.manifest.info["settings"]
        return settings

    @property
    def batch_size(self) -> int:
        """Sequences a step, over all processes."""
        return global_batch_size(self.config, self.processes)

    @cached_property
    def batch(self) -> BatchSizes:
        """The sizes of a batch; `resolve_auto` comes first."""
        return _batch_sizes(self.config, self.processes)

    def in_stage(self, number: int | None) -> StageSettings:
        """What is in force in a stage; None: outside of all stages, as validation is."""
        config = self.config.in_stage(number)
        if config is self.config:
            return StageSettings(number, config, self.batch, self.cost)
        sizes = _batch_sizes(config, self.processes)
        return StageSettings(number, config, sizes, training_cost(config))

    def evaluation_steps(self, split: str, iterations: int) -> int:
        """The batches of a split to evaluate: at most all that an additional set has."""
        if split in ("validation", "test"):
            return iterations
        return min(iterations, self.dataset.sequences(split) // self.batch_size)


def _batch_sizes(config: TrainConfig, processes: int) -> BatchSizes:
    distributed = config.model.distributed
    data_parallel = distributed.data_parallel(processes)
    return derive_batch_sizes(config.batch, data_parallel, distributed.pipeline_parallel > 1)


def global_batch_size(config: TrainConfig, processes: int) -> int:
    """Sequences a step over all processes: as given, or derived from the other sizes."""
    return config.batch.batch_size or _batch_sizes(config, processes).batch_size
