"""The section `optimizer.learning_rate`, and its constraints.

optim/schedule.py has the formulas.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from fast_llm.config.mistakes import Allowed
from fast_llm.config.section import Section
from fast_llm.config.text import format_value
from fast_llm.config.types import Count, NonNegativeFloat, Positive, PositiveFloat

_PATH = "optimizer.learning_rate"
WITH_COOLDOWN = ("wsd", "inverse_sqrt")  # styles whose decay ends with `cooldown`


class RateStage(Section):
    """A list of the pieces of a schedule, instead of the settings above, such as `[{until: 2_000,
    shape: linear, end_rate: 1e-4}, {until: 9_000, shape: constant}, {until: 10_000, shape: 1-sqrt,
    end_rate: 0}]`. Each piece begins after the step at which the previous one ends. After the last
    piece the rate stays what it is. Infinite schedules can be written like this: warmup, decay,
    constant, final decay (Singh et al. 2025, arXiv 2503.02844).
    """

    until: Positive
    """Last step of the piece, counted from the start of training."""
    shape: Literal["constant", "linear", "cosine", "1-sqrt"]
    """How the rate goes from start_rate to end_rate, with c the fraction of the piece that is done.
    `constant`: it stays start_rate. `linear`: by c of the difference. `cosine`: by
    ½ (1 - cos(π c)). `1-sqrt`: by √c."""
    start_rate: Annotated[
        NonNegativeFloat | None, Field(validation_alias=AliasChoices("start_rate", "from"))
    ] = None
    """Learning rate at which the piece begins. `from` means the same. null means that at which the
    previous piece ended; 0 for the first piece."""
    end_rate: Annotated[
        NonNegativeFloat | None, Field(validation_alias=AliasChoices("end_rate", "to"))
    ] = None
    """Learning rate at `until`. `to` means the same. Required unless shape is constant."""


class LearningRateConfig(Section):
    """The learning rate: a linear warmup from 0, then a decay; or any pieces (`stages`)."""

    base: NonNegativeFloat = 1e-4
    """Peak learning rate."""
    minimum: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay and after it."""
    decay_style: Literal["constant", "linear", "power", "cosine", "wsd", "inverse_sqrt"] = (
        "constant"
    )
    """How the rate falls from base to minimum, with c the fraction of the decay that is done.
    `constant`: not at all. `power`: by c^decay_power of the difference. `linear`: an alias of
    `power`. `cosine`: by ½ (1 - cos(π c^decay_power)) of it (Loshchilov & Hutter 2017, arXiv
    1608.03983). `wsd`: warmup, stable, decay: base until the cooldown (Hu et al. 2024, arXiv
    2404.06395). `inverse_sqrt`: base × √(warmup_iterations / step), not below minimum (Vaswani et
    al. 2017, arXiv 1706.03762), until a cooldown, if there is one."""
    decay_iterations: Positive | None = None
    """Step at which the decay ends, counted from the start of training, so it includes the warmup.
    Required unless decay_style is constant, or inverse_sqrt without a cooldown."""
    decay_power: PositiveFloat = 1.0
    """Exponent of the fraction of the decay that is done, for linear, power and cosine."""
    warmup_iterations: Count = 0
    """Steps of the warmup."""
    cooldown: Annotated[
        Positive | Annotated[float, Field(gt=0, lt=1)] | None,
        Allowed("a number of steps above 0, a fraction below 1 such as 0.1, or null"),
    ] = None
    """Length of the final decay of wsd and inverse_sqrt, which ends at decay_iterations: an integer
    is a number of steps, a number below 1 a fraction of decay_iterations. Required for wsd."""
    cooldown_style: Literal["linear", "cosine", "1-sqrt"] | None = None
    """How the rate falls in the cooldown: `linear`, `cosine`, or `1-sqrt` (by √c of the difference;
    Hägele et al. 2024, arXiv 2405.18392). null means linear."""
    stages: (
        Annotated[
            list[RateStage],
            Field(min_length=1, max_length=1000),
            Allowed("a list of one or more stages"),
        ]
        | None
    ) = None

    @property
    def cooldown_iterations(self) -> int:
        """Steps of the cooldown; 0 without one."""
        if isinstance(self.cooldown, float):
            return max(1, round(self.cooldown * (self.decay_iterations or 0)))
        return self.cooldown or 0

    def pieces(self) -> list[tuple[int, str, float, float]]:
        """`stages` with what they leave out: until, shape, start and end of each."""
        found: list[tuple[int, str, float, float]] = []
        end = 0.0
        for stage in self.stages or []:
            start = end if stage.start_rate is None else stage.start_rate
            end = start if stage.end_rate is None else stage.end_rate
            found.append((stage.until, stage.shape, start, end))
        return found


# The settings that a violated constraint concerns, the one to point at first, and what is wrong.
_Problems = Iterator[tuple[tuple[str, ...], str]]


def schedule_problems(rate: LearningRateConfig, train_iters: int) -> _Problems:
    """Contradictions within the schedule. `train_iters`: for examples."""
    if rate.stages is not None:
        yield from _stages(rate)
        return
    yield from _cooldown(rate, train_iters)
    endless = rate.decay_style == "inverse_sqrt" and rate.cooldown is None
    if rate.decay_style == "constant" or endless:
        return  # the rest is not used
    warmup, end = f"{_PATH}.warmup_iterations", f"{_PATH}.decay_iterations"
    if rate.decay_iterations is None:
        yield (
            (end, f"{_PATH}.decay_style"),
            f"missing: decay_style {rate.decay_style} needs the step at which it ends, e.g."
            f" {train_iters or 100_000}",
        )
        return
    if rate.warmup_iterations >= rate.decay_iterations:
        yield (
            (warmup, end),
            f"given {rate.warmup_iterations}, must be below decay_iterations"
            f" {rate.decay_iterations}, which counts from the start and includes the warmup",
        )
    elif rate.warmup_iterations + rate.cooldown_iterations > rate.decay_iterations:
        yield (
            (f"{_PATH}.cooldown", warmup, end),
            f"given {format_value(rate.cooldown)}; its {rate.cooldown_iterations} steps and"
            f" warmup_iterations {rate.warmup_iterations} must together be at most"
            f" decay_iterations {rate.decay_iterations}, which counts from the start",
        )


def _cooldown(rate: LearningRateConfig, train_iters: int) -> _Problems:
    """A cooldown needs a style that has one; wsd needs a cooldown."""
    length, shape, style = f"{_PATH}.cooldown", f"{_PATH}.cooldown_style", f"{_PATH}.decay_style"
    off = rate.decay_style == "constant" and "decay_style" in rate.model_fields_set
    if rate.decay_style != "constant" and rate.minimum > rate.base:
        yield (
            (f"{_PATH}.minimum", f"{_PATH}.base"),
            f"given {rate.minimum}, must be at most base {rate.base}",
        )
    if rate.decay_style == "wsd" and rate.cooldown is None:
        yield (
            (length, style),
            "missing: decay_style wsd needs the length of its decay, in steps or as a fraction of"
            f" decay_iterations, e.g. {max(1, (train_iters or 100_000) // 10)} or 0.1",
        )
    for path, given in ((length, rate.cooldown), (shape, rate.cooldown_style)):
        if given is not None and rate.decay_style not in WITH_COOLDOWN and not off:
            yield (
                (path, style),
                f"given {format_value(given)}, but decay_style {rate.decay_style} has no cooldown;"
                " set decay_style to wsd or inverse_sqrt, or leave it out",
            )
    if rate.decay_style == "inverse_sqrt":
        if rate.warmup_iterations == 0:
            yield (
                (f"{_PATH}.warmup_iterations", style),
                "given 0, but decay_style inverse_sqrt counts its decay in lengths of the warmup;"
                " set it, e.g. 1000",
            )
        for path, given in (
            (f"{_PATH}.decay_iterations", rate.decay_iterations),
            (shape, rate.cooldown_style),
        ):
            if given is not None and rate.cooldown is None:
                yield (
                    (path, length, style),
                    f"given {format_value(given)}, but decay_style inverse_sqrt ends only with a"
                    " cooldown; set cooldown, or leave it out",
                )
    if rate.decay_style in WITH_COOLDOWN and rate.decay_power != 1:
        yield (
            (f"{_PATH}.decay_power", style),
            f"given {rate.decay_power}, but decay_style {rate.decay_style} has none; leave it out,"
            " and choose cooldown_style",
        )


def _stages(rate: LearningRateConfig) -> _Problems:
    """The stages stand alone, ascend, and each has the rates that its shape needs."""
    above = f"{_PATH}.stages"
    stages = rate.stages or []
    defaults = LearningRateConfig()
    others = [
        name
        for name in LearningRateConfig.model_fields
        if name != "stages" and getattr(rate, name) != getattr(defaults, name)
    ]
    if others:
        yield (
            (above, *(f"{_PATH}.{name}" for name in others)),
            f"given with {', '.join(others)}, which the stages replace: leave out one or the other",
        )
    for place, (one, other) in enumerate(pairwise(stages), start=1):
        if other.until <= one.until:
            yield (
                (f"{above}.{place}.until", above),
                f"given {other.until}, must be above {one.until}, the last step of the stage"
                " before it",
            )
    for place, stage in enumerate(stages):
        if stage.shape != "constant" and stage.end_rate is None:
            yield (
                (f"{above}.{place}.end_rate", above),
                f"missing: shape {stage.shape} needs the rate at which it ends",
            )
        if stage.shape == "constant" and stage.end_rate is not None:
            yield (
                (f"{above}.{place}.end_rate", above),
                f"given {stage.end_rate}, but shape constant has none; leave it out, or set"
                " start_rate",
            )
        if place == 0 and stage.shape == "constant" and stage.start_rate is None:
            yield (
                (f"{above}.0.start_rate", above),
                "missing: the first stage is constant and needs its rate, e.g. 1e-4",
            )
