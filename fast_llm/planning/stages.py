"""The stages of `data.stages` from a step on: where each begins and ends.

A stage ends after a step, so its border is computed from where the run is: a rewind takes later
sequences for the same steps, and the borders to come move with it. With `until_tokens` the border
is the first step that ends at or after this number of consumed tokens, padding included. A stage
may have other sequence lengths; a step has the same tokens in all stages.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from fast_llm.config.parameter_rules import frozen_names
from fast_llm.config.text import format_value
from fast_llm.config.train import TrainConfig
from fast_llm.data.dataset import Split
from fast_llm.models import family_of
from fast_llm.models.flops import Cost


@dataclass(frozen=True)
class StageSpan:
    """The steps of a stage that are still to come: those after step `after`, up to `last`."""

    number: int  # in `data.stages`
    after: int
    index: int  # the first sequence of these steps
    length: int  # tokens in a sequence
    batch_size: int  # sequences in a step
    last: int | None = None  # None: until the end of training
    weights: Mapping[str, float] = field(default_factory=dict)  # empty: those of `data.sources`

    def sequences(self, step: int) -> int:
        """How many sequences the run has consumed after `step`, which is in this stage."""
        return self.index + (step - self.after) * self.batch_size


def remaining_stages(
    config: TrainConfig, step: int, samples: int, tokens: int, batch_size: int
) -> list[StageSpan]:
    """The stage in force after `step`, and those to come. Without `data.stages` there is one.

    `samples`, `tokens`: consumed by that step, padding included. `batch_size`: of sequences of
    `batch.sequence_length`. A stage without a step to come is left out.
    """
    base, after, index = config.batch.sequence_length, step, samples
    if not config.data.stages:
        return [StageSpan(0, step, samples, base, batch_size)]
    spans = list[StageSpan]()
    for number, stage in enumerate(config.data.stages):
        last, length = stage.until, stage.sequence_length or base
        size = batch_size * base // length
        if stage.until_tokens is not None:
            missing = max(0, stage.until_tokens - tokens)
            last = step + -(-missing // (batch_size * base))
        if last is None or last > after:
            spans.append(StageSpan(number, after, index, length, size, last, stage.weights))
        if last is None:
            return spans
        index, after = index + max(0, last - after) * size, max(after, last)
    # Steps after the end of the last stage continue as it does.
    return spans or [StageSpan(number, step, samples, length, size, None, stage.weights)]


def describe_stage(config: TrainConfig, number: int) -> str:
    """The lengths and positions of a stage, as text."""
    stage, batch = config.data.stages[number], config.in_stage(number).batch
    words = f"sequences of {batch.sequence_length:,} tokens"
    if batch.batch_size is not None:
        words += f", {batch.batch_size:,} a step"
    if stage.rotary is None:
        return words
    given = stage.rotary.model_dump(mode="json", exclude_unset=True)
    return f"{words}, rotary {', '.join(f'{name} {format_value(given[name])}' for name in given)}"


def last_sequence(config: TrainConfig, spans: Sequence[StageSpan]) -> int:
    """How many sequences the run has consumed by its end. `spans`: the remaining stages."""
    end = config.training.train_iters
    span = next((one for one in spans if one.last is None or one.last >= end), spans[-1])
    return span.sequences(max(end, span.after))


def steps_by_stage(config: TrainConfig, batch_size: int) -> dict[int | None, int]:
    """How many steps of the run each stage of `data.stages` has; None: the run, without stages."""
    steps, end = dict[int | None, int](), config.training.train_iters
    spans = remaining_stages(config, 0, 0, 0, batch_size)
    for span in spans:
        number = span.number if config.data.stages else None
        last = end if span is spans[-1] or span.last is None else span.last
        steps[number] = max(0, min(last, end) - span.after)
    return steps


def by_length(config: TrainConfig) -> list[tuple[int, TrainConfig]]:
    """The settings of each sequence length that training has, and how many steps have it; the
    shortest first. One without stages that change it.
    """
    size = config.batch.batch_size
    if size is None or not any(stage.sequence_length for stage in config.data.stages):
        return [(config.training.train_iters, config)]
    counts, inside = dict[int, int](), dict[int, TrainConfig]()
    for number, steps in steps_by_stage(config, size).items():
        one = config.in_stage(number)
        length = one.batch.sequence_length
        counts[length] = counts.get(length, 0) + steps
        inside[length] = one
    return [(counts[length], inside[length]) for length in sorted(inside)]


def total_flops(config: TrainConfig, batch_size: int) -> float:
    """Floating-point operations of the run's steps, forward and backward."""
    total = 0.0
    for number, steps in steps_by_stage(config, batch_size).items():
        tokens = steps * batch_size * config.batch.sequence_length
        total += tokens * training_cost(config.in_stage(number)).model_flops_per_token
    return total


def training_cost(config: TrainConfig) -> Cost:
    """Parameters, and FLOPs of a token of training."""
    base = config.model.base_model
    family = family_of(base)
    frozen = frozen_names(config.optimizer, family.shapes(base))
    return family.cost(base, config.batch.sequence_length, frozen)


def stage_problems(
    config: TrainConfig, step: int, samples: int, tokens: int, batch_size: int
) -> list[str]:
    """Stages to come that end with the same step as the stage before, because a step takes more
    tokens. `step`, `samples`, `tokens`: as of `remaining_stages`.
    """
    found = {span.number for span in remaining_stages(config, step, samples, tokens, batch_size)}
    step_tokens = batch_size * config.batch.sequence_length
    return [
        f"data.stages.{number}.until_tokens: given {stage.until_tokens}, so the stage has no step:"
        f" the stage before ends with the same one, as a step takes {step_tokens:,} tokens; give it"
        " more tokens, or leave the stage out"
        for number, stage in enumerate(config.data.stages)
        if number not in found and (stage.until_tokens or 0) > tokens
    ]


def epoch_problems(
    config: TrainConfig, split: Split, step: int, samples: int, tokens: int, batch_size: int
) -> list[str]:
    """Sources of which the run takes more than `max_epochs`, from `step` on.

    `samples`, `tokens`, `batch_size`: as of `remaining_stages`.
    """
    spans = remaining_stages(config, step, samples, tokens, batch_size)
    end = last_sequence(config, spans)
    if end <= samples:
        return []  # nothing is trained any more

    def epochs(place: int, index: int) -> float:
        return split.order_at(max(samples, index - 1)).epochs(index)[place]

    problems = []
    for place, label in enumerate(split.labels):
        limit = config.data.sources[label].max_epochs if label else None
        if limit is None or epochs(place, end) <= max(limit, epochs(place, samples)):
            continue  # what a rewind took beyond the limit is taken, and nothing more
        first = bisect.bisect_right(range(end), limit, samples, key=partial(epochs, place))
        span = [one for one in spans if one.index < max(first, samples + 1)][-1]
        exceeded = span.after + max(1, -(-(first - span.index) // span.batch_size))
        source = split.sources[place]
        problems.append(
            f"data.sources.{label}.max_epochs: given {limit:g}, but the run takes"
            f" {epochs(place, end):.3g} epochs of {source.name} ({source.tokens:,} tokens for"
            f" training), more than {limit:g} from step {exceeded:,} on; lower its weight, prepare"
            " more of it, train fewer steps, or raise max_epochs"
        )
    return problems


def length_problems(config: TrainConfig, split: Split) -> list[str]:
    """Stages that use a source with less than one of their sequences."""
    problems = []
    for number, stage in enumerate(config.data.stages):
        length = stage.sequence_length
        if length is None:
            continue  # opening the data has reported it
        parts = zip(split.sources, split.labels, pairwise(split.edges(stage.weights)), strict=True)
        problems += [
            f"data.stages.{number}.sequence_length: given {length}, but data.sources.{label} has"
            f" {source.tokens:,} tokens for training, fewer than one sequence of {length} + 1; give"
            " it no weight in this stage, prepare more of it, or lower sequence_length"
            for source, label, (low, high) in parts
            if high > low and not source.with_length(length).sequences
        ]
    return problems
