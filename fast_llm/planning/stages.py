"""The stages of `data.stages` from a step on: where each begins and ends.

A stage ends after a step, so its border is computed from where the run is: a rewind takes later
sequences for the same steps, and the borders to come move with it. With `until_tokens` the border
is the first step that ends at or after this number of consumed tokens, padding included.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from fast_llm.config.train import TrainConfig
from fast_llm.data.dataset import Split


@dataclass(frozen=True)
class StageSpan:
    """The steps of a stage that are still to come: those after step `after`, up to `last`."""

    number: int  # in `data.stages`
    after: int
    index: int  # the first sequence of these steps
    last: int | None = None  # None: until the end of training
    weights: Mapping[str, float] = field(default_factory=dict)  # empty: those of `data.sources`


def remaining_stages(
    config: TrainConfig, step: int, samples: int, tokens: int, batch_size: int
) -> list[StageSpan]:
    """The stage in force after `step`, and those to come. Without `data.stages` there is one.

    `samples`, `tokens`: consumed by that step, padding included. A stage without a step to come is
    left out.
    """
    length, spans, after = config.batch.sequence_length, list[StageSpan](), step
    for number, stage in enumerate(config.data.stages):
        last = stage.until
        if stage.until_tokens is not None:
            missing = max(0, stage.until_tokens - tokens)
            last = step + -(-missing // (batch_size * length))
        if last is None or last > after:
            index = samples + (after - step) * batch_size
            spans.append(StageSpan(number, after, index, last, stage.weights))
        if last is None:
            return spans
        after = max(after, last)
    if config.data.stages:  # steps after the end of the last stage continue as it does
        return spans or [StageSpan(number, step, samples, None, stage.weights)]
    return [StageSpan(0, step, samples)]


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
    config: TrainConfig, split: Split, step: int, samples: int, batch_size: int
) -> list[str]:
    """Sources of which the run takes more than `max_epochs`, from `step` and `samples` on."""
    end = samples + (config.training.train_iters - step) * batch_size
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
        exceeded = step + max(1, -(-(first - samples) // batch_size))
        source = split.sources[place]
        problems.append(
            f"data.sources.{label}.max_epochs: given {limit:g}, but the run takes"
            f" {epochs(place, end):.3g} epochs of {source.name} ({source.tokens:,} tokens for"
            f" training), more than {limit:g} from step {exceeded:,} on; lower its weight, prepare"
            " more of it, train fewer steps, or raise max_epochs"
        )
    return problems
