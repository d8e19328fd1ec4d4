"""The counters of a run, which checkpoints hold: steps, sequences, padding, skipped data."""

from dataclasses import dataclass, field

from fast_llm.planning.history import History
from fast_llm.planning.run_spec import StageSettings
from fast_llm.training.step import PADDING, StepResult


@dataclass
class TrainState:
    """The counters of a run, equal on all processes."""

    history: History | None  # of batch sizes and data orders; None without training data
    stage: StageSettings  # in force: of the last step; before the first, those of the run
    step: int = 0
    consumed_samples: int = 0  # sequences, those of skipped ranges included
    skipped_ranges: list[dict[str, int]] = field(default_factory=list)  # one for each rewind
    nonfinite_steps: int = 0  # in a row
    # Inputs without a token in the consumed sequences, by the key number of their source.
    padding: dict[int, int] = field(default_factory=dict)

    def advance(self, result: StepResult) -> None:
        """Count one step of the stage in force."""
        if self.history is not None and (counts := result.sums.get(PADDING)):
            sources = self.history.order_at(self.consumed_samples).sources
            for source, count in zip(sources, counts, strict=True):
                self.padding[source.key] = self.padding.get(source.key, 0) + int(count)
        self.step += 1
        self.consumed_samples += self.stage.batch.batch_size
        if result.targets:  # a step without target tokens says nothing about training's health
            healthy = result.updated or bool(result.spike)
            self.nonfinite_steps = 0 if healthy else self.nonfinite_steps + 1

    @property
    def consumed_tokens(self) -> int:
        """Tokens of the consumed sequences, whose length may have changed during the run."""
        if self.history is None:
            return 0
        return self.history.inputs(self.consumed_samples) - sum(self.padding.values())

    @property
    def padding_by_source(self) -> list[int]:
        """`padding` of the current sources, in their order."""
        if self.history is None:
            return []
        sources = self.history.order_at(max(0, self.consumed_samples - 1)).sources
        return [self.padding.get(source.key, 0) for source in sources]
