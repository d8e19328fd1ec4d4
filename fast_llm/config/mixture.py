"""The sections `data.sources` and `data.stages`, of `data.format: mixture`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, field_serializer

from fast_llm.config.mistakes import Allowed
from fast_llm.config.rotary import RotaryConfig
from fast_llm.config.section import Section
from fast_llm.config.types import NonNegativeFloat, PathText, Positive, PositiveFloat


class DataSourceConfig(Section):
    """With `format: mixture`, the sources of the training data, each under a name of letters,
    digits and `_`. A path alone stands for a section with this path (`code: code/dataset.json`).
    """

    path: PathText
    """A dataset.json written by `fast-llm prepare`, the prefix of a token file, or a `.ds` file of
    datatrove."""
    weight: PositiveFloat | None = None
    """Share of the sequences in stages without `weights`, relative to the other sources. Give it
    for all sources or for none. null means the number of tokens of the source."""
    max_epochs: PositiveFloat | None = None
    """Maximum number of epochs that the run may take of this source. A run that would take more is
    refused before it starts. null has no limit."""


class StageRotaryConfig(RotaryConfig):
    """The settings of `model.base_model.transformer.rotary` that differ in this stage, for example
    `{theta: 8e6}`. Those that are not given are the model's, not the defaults that are named here.
    null changes nothing.
    """


class DataStageConfig(Section):
    """With `format: mixture`, the stages of training, in order. Each has its own shares of the
    sources, and each source continues where it was. A stage may have longer sequences and other
    rotary positions, too. Without stages all of training is one.
    """

    until: Positive | None = None
    """Last step of the stage. The last stage may leave it out: it lasts until the end of
    training."""
    until_tokens: Positive | None = None
    """Instead of `until`: the stage ends with the step at which the run has consumed this many
    tokens, counted from the start of training: batch size × sequence length of every step, and of
    data that was skipped after spikes."""
    weights: dict[str, NonNegativeFloat] = {}
    """Share of the sequences of each source, relative to the others. A source that is not named
    gets none. Without `weights`, those of `data.sources` apply."""
    sequence_length: Positive | None = None
    """Tokens in a sequence of this stage; null means batch.sequence_length. The tokens of a step
    stay the same: twice the length means half of batch.batch_size, which is required, and half of
    micro_batch_size, but at least 1. Validation and test keep batch.sequence_length."""
    rotary: StageRotaryConfig | None = None

    @field_serializer("rotary")
    def _given(self, rotary: StageRotaryConfig | None) -> dict[str, Any] | None:
        """What is given alone: the rest is the model's, not the default."""
        return None if rotary is None else rotary.model_dump(mode="json", exclude_unset=True)

    @property
    def changes_model(self) -> bool:
        """Whether the length or the positions of the stage are its own."""
        return self.sequence_length is not None or self.rotary is not None


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


DataSource = Annotated[
    DataSourceConfig,
    BeforeValidator(_path_alone),
    Allowed("a path, or a section of settings"),
]
