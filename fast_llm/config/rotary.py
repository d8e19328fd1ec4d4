"""The section `rotary` of the YAML file: rotary position embedding, with every scaling of it that
transformers computes for published models.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field

from fast_llm.config.mistakes import Allowed
from fast_llm.config.section import Section
from fast_llm.config.types import Positive, PositiveFloat

Factors = (
    Annotated[
        tuple[PositiveFloat, ...],  # hashable, and given as a list
        Field(strict=False),
        Allowed("a list of numbers above 0 (one for each pair of rotated dimensions)"),
    ]
    | None
)


class RotaryConfig(Section):
    """Rotary position embedding. With `pretrained.path` it comes from the model's config.json."""

    type: Literal["none", "default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    """`default`: no scaling. `none`: no position embedding at all. The others are for contexts
    longer than those that a model was first trained with. `linear`: divides all frequencies by
    scale_factor. `dynamic`: raises theta if the context is longer than original_context_length.
    `yarn`: divides low frequencies only, and scales queries and keys (YaRN). `llama3`: divides low
    frequencies only, as Llama 3.1 does. `longrope`: divides each frequency by a number of its
    own."""
    theta: PositiveFloat = 10000
    """Base of the frequencies."""
    partial_rotary_factor: Annotated[
        float, Field(gt=0, le=1), Allowed("a number above 0, up to 1")
    ] = 1.0
    """Share of a head's dimensions, from the first one on, that are rotated."""
    scale_factor: PositiveFloat = 8.0
    """By how much the context is longer: linear divides all frequencies by it, yarn and llama3 low
    ones. dynamic raises theta with it, and longrope derives attention_factor from it."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_context_length / low_frequency_factor are scaled fully."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_context_length / high_frequency_factor are not scaled."""
    original_context_length: Positive = 8192
    """dynamic, yarn, llama3, longrope: context length of the model before scaling, in tokens."""
    attention_factor: PositiveFloat | None = None
    """yarn, longrope: factor of rotated queries and rotated keys. null means 1 if scale_factor is
    at most 1. Else it means 0.1 ln(scale_factor) + 1 for yarn, and √(1 + ln(scale_factor) /
    ln(original_context_length)) for longrope."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with at least this many rotations in the original context are not
    scaled."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with at most this many rotations in the original context are scaled
    fully."""
    truncate: bool = True
    """yarn: round the limits of beta_fast and beta_slow outwards to pairs of dimensions. `no` for
    gpt-oss."""
    short_factor: Factors = None
    """longrope: divisors of the frequencies, if the context is not longer than
    original_context_length."""
    long_factor: Factors = None
    """longrope: divisors of the frequencies, if the context is longer."""
    context_length: Positive | None = None
    """dynamic, longrope: context length that the angles are computed for, in tokens. null means
    batch.sequence_length."""

    @property
    def magnitude(self) -> float:
        """The factor of all cosines and sines."""
        if self.type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.type == "yarn":
            return yarn_magnitude(self.scale_factor)
        if self.scale_factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.scale_factor) / math.log(self.original_context_length))

    def for_context(self, length: int) -> Self:
        """These positions with `length`, in tokens, where `context_length` is null."""
        if self.context_length is not None or self.type not in ("dynamic", "longrope"):
            return self
        return self.model_copy(update={"context_length": length})

    def rotated_dims(self, head_dim: int) -> int:
        """How many of a head's dimensions are rotated."""
        return 0 if self.type == "none" else int(head_dim * self.partial_rotary_factor)


def yarn_magnitude(scale_factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of queries and keys (Peng et al. 2023), the logarithm times `weight`."""
    return 1.0 if scale_factor <= 1 else 0.1 * weight * math.log(scale_factor) + 1.0
