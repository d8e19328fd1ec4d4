"""The section `optimizer`; its learning rate is in learning_rate.py."""

import math
from typing import Annotated, Any, Literal

from pydantic import field_validator

from fast_llm.config.learning_rate import LearningRateConfig
from fast_llm.config.mistakes import Allowed
from fast_llm.config.section import Section
from fast_llm.config.text import format_value
from fast_llm.config.types import (
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Text,
    no_fp64,
    short_dtype,
)


class GradientScalerConfig(Section):
    """Loss scaling against underflow of fp16 gradients."""

    constant: PositiveFloat | None = None
    """A fixed loss scale, with any dtype. null means a dynamic scale for fp16 and none
    otherwise."""
    initial: PositiveFloat = 65536
    """Dynamic loss scale at the start."""
    minimum: PositiveFloat = 1.0
    """Lower limit of the dynamic loss scale."""
    window: Positive = 1000
    """Steps without overflow after which the dynamic loss scale doubles."""
    hysteresis: Positive = 2
    """Overflows after which the dynamic loss scale is halved."""


class OptimizerConfig(Section):
    """AdamW. Weight decay applies to all matrices, including embedding and head, but not to norms
    and biases. `no_weight_decay` and `learning_rate_scales` have patterns of parameter names, such
    as `model.layers.*.mlp.*` or `model.layers.[0-7].*`: `*` is any text, also with dots, `?` is one
    character, and `[0-7]` is one of these. A pattern must match the whole name. Names are those of
    Hugging Face; the experts of a layer are one parameter (`*.mlp.experts.up_proj.weight`), and so
    are embedding and head if they are tied (`model.embed_tokens.weight`). In YAML, quote a pattern
    that begins with `*`.
    """

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay: each update subtracts learning rate × weight_decay × weight."""
    beta_1: Fraction = 0.9
    """Decay rate of the average of gradients (first moment)."""
    beta_2: Fraction = 0.999
    """Decay rate of the average of squared gradients (second moment)."""
    epsilon: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    gradient_norm_clipping: PositiveFloat | None = 1.0
    """Maximum L2 norm of all gradients together. null turns clipping off."""
    default_learning_rate_scale: NonNegativeFloat = 1.0
    """Factor on the learning rate."""
    no_weight_decay: Annotated[list[Text], Allowed("a list of patterns of parameter names")] = []
    """Patterns of matrices without weight decay, for example `["model.embed_tokens.*"]`."""
    learning_rate_scales: Annotated[
        list[Any], Allowed("a list of factors of 0 or more and patterns in turn")
    ] = []
    """Factors on the learning rate, and patterns of the parameters that have them instead of
    `default_learning_rate_scale`, in turn: `[0.1, "model.embed_tokens.*", 0.5, "*norm*"]`. If
    several patterns match a name, the last decides. A factor of 0 freezes parameters: they have no
    gradient, no moments and no weight decay, and the gradient norm leaves them out. `[0, "*", 1,
    "model.embed_tokens.*"]` trains the embedding alone. A resumed run must freeze the same
    parameters."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    gradient_scaler: GradientScalerConfig = GradientScalerConfig()
    moments_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "int8"],
        no_fp64,
        short_dtype,
        Allowed("auto, fp32, bf16 or int8 (float32, bfloat16)"),
    ] = "auto"
    """Dtype of both moments. `bf16` saves 4 bytes a parameter. `int8` saves 6, with one exponent
    per 128 adjacent values; meant for long sequences. `auto` is fp32, or bf16 on a GPU whose memory
    is too small, never int8; a resumed run with auto keeps its dtype. A run may resume with any
    other."""
    max_nonfinite_steps: Positive = 5
    """Consecutive steps with infinite or NaN loss or gradients after which training stops. With a
    dynamic loss scale, it stops only once the scale is at its minimum. Such steps never change the
    weights."""

    @property
    def scaled_patterns(self) -> list[tuple[float, str]]:
        """The factors and patterns of `learning_rate_scales`, in pairs."""
        return list(
            zip(self.learning_rate_scales[::2], self.learning_rate_scales[1::2], strict=True)
        )

    @field_validator("learning_rate_scales")
    @classmethod
    def _pairs(cls, value: list[Any]) -> list[Any]:
        scales, patterns = value[::2], value[1::2]
        if (
            len(scales) != len(patterns)
            or not all(isinstance(pattern, str) and pattern for pattern in patterns)
            or not all(type(scale) in (int, float) and 0 <= scale < math.inf for scale in scales)
        ):
            raise ValueError(
                f"given {format_value(value)}, must be factors of 0 or more and patterns in turn:"
                ' [0.1, "model.embed_tokens.*", 0.5, "*norm*"]'
            )
        return value
