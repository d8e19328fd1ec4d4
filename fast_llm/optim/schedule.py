"""The learning rate as a function of the update's number, without state.

Let t be the number of the update, from 1, w = `warmup_iterations`, d = `decay_iterations` (which
include the warmup), k the steps of the cooldown, and c the fraction of a decay that is done:

    t < w         base · t / w
    w <= t < d    constant: base
                  linear, power: base + c^p · (minimum - base)           p = `decay_power`
                  cosine: base + ½ (1 - cos(π c^p)) · (minimum - base)   (Loshchilov & Hutter 2017)
                      with c = (t - w) / (d - w)
    w <= t < d-k  wsd: base                                              (Hu et al. 2024)
                  inverse_sqrt: max(minimum, base · √(w / t))            (Vaswani et al. 2017)
    d-k <= t < d  r + f(c) · (minimum - r) with r the rate at d - k, c = (t - (d - k)) / k
                      f(c) = c, ½ (1 - cos(π c)), or √c for 1-sqrt       (Hägele et al. 2024)
    t >= d        minimum (base if constant)

A stage goes from rate a after update s to rate b at update u: a + f(c) · (b - a), with
c = (t - s) / (u - s).
"""

import math
from collections.abc import Callable
from itertools import pairwise

from fast_llm.config.learning_rate import WITH_COOLDOWN, LearningRateConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 0.0,
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
    "1-sqrt": math.sqrt,
}


def learning_rate(update: int, config: LearningRateConfig) -> float:
    """The learning rate of update number `update`, counted from 1."""
    if config.stages is not None:
        return _of_stages(update, config)
    if update < config.warmup_iterations:
        return config.base * update / config.warmup_iterations
    if config.decay_style in WITH_COOLDOWN:
        return _with_cooldown(update, config)
    if config.decay_style == "constant" or config.decay_iterations is None:
        return config.base
    if update >= config.decay_iterations:
        return config.minimum
    progress = (update - config.warmup_iterations) / (
        config.decay_iterations - config.warmup_iterations
    )
    progress **= config.decay_power
    if config.decay_style == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return config.base + progress * (config.minimum - config.base)


def _with_cooldown(update: int, config: LearningRateConfig) -> float:
    """The rate of wsd and inverse_sqrt after the warmup."""
    length, end = config.cooldown_iterations, config.decay_iterations
    begin = end - length if end is not None and length else update
    now, rate = min(update, begin), config.base
    if config.decay_style == "inverse_sqrt":
        rate = max(config.minimum, config.base * math.sqrt(config.warmup_iterations / now))
    if update <= begin:
        return rate
    done = (update - begin) / length
    return _between(rate, config.minimum, config.cooldown_style or "linear", done)


def _of_stages(update: int, config: LearningRateConfig) -> float:
    begin, rate = 0, 0.0
    for until, shape, start, end in config.pieces():
        if update <= until:
            return _between(start, end, shape, (update - begin) / (until - begin))
        begin, rate = until, end
    return rate


def _between(start: float, end: float, shape: str, done: float) -> float:
    """The rate after the fraction `done` of a decay from `start` to `end`."""
    return end if done >= 1 else start + _SHAPES[shape](done) * (end - start)


def borders(config: LearningRateConfig) -> list[tuple[int, str]]:
    """The updates between the pieces of the schedule, and in words the piece after each.

    The first is 1. At a border the rate is that with which the piece before it ends.
    """
    if config.stages is not None:
        ends = [1, *(stage.until for stage in config.stages)]
        shapes = [*(stage.shape for stage in config.stages), "constant"]
        return list(dict(zip(ends, shapes, strict=True)).items())
    warmup, style, power = config.warmup_iterations, config.decay_style, config.decay_power
    by_power = "linear" if power == 1 else f"power {power:.4g}"
    words = {"linear": by_power, "power": by_power, "wsd": "constant"}
    found = {1: "linear warmup"} if warmup > 1 else {}
    found[max(1, warmup)] = words.get(style, style.replace("inverse_sqrt", "inverse square root"))
    end = _end_of_decay(config)
    if end is None:
        return list(found.items())
    if style in WITH_COOLDOWN:
        shape = config.cooldown_style or "linear"
        found[max(1, end - config.cooldown_iterations)] = f"{shape} cooldown"
    found[end] = "constant"
    return list(found.items())


def likely_mistakes(config: LearningRateConfig, train_iters: int) -> list[str]:
    """Warnings about a schedule that is allowed and probably not intended, each with its setting.

    `train_iters`: the steps of the run; 0 trains nothing.
    """
    above = "optimizer.learning_rate"
    if not train_iters:
        return []
    end = _end_of_decay(config)
    if config.stages is not None:
        pieces, where = config.pieces(), f"{above}.stages"
        found = [
            f"{where}: the rate jumps from {before[3]:.4g} to {after[2]:.4g} after step {before[0]}"
            for before, after in pairwise(pieces)
            if before[3] != after[2]
        ]
    else:
        where, found = f"{above}.decay_iterations", []
        if config.warmup_iterations > train_iters:
            found.append(
                f"{above}.warmup_iterations: given {config.warmup_iterations}, above"
                f" training.train_iters {train_iters}: the rate never reaches base"
            )
        unset = config.decay_style == "constant" and "decay_style" not in config.model_fields_set
        if unset and config.decay_iterations is not None:
            found.append(f"{where}: has no effect with decay_style: constant, the default")
    last = learning_rate(train_iters, config)
    if end is not None and end > train_iters:
        found.append(
            f"{where}: the schedule ends at step {end}, but training.train_iters is {train_iters}:"
            f" training ends with the rate {last:.4g}"
        )
    elif end is not None and end < train_iters and last == 0:
        found.append(
            f"{where}: the schedule ends at step {end} with the rate 0: the later steps to"
            f" training.train_iters {train_iters} change nothing"
        )
    elif end is not None and end < train_iters:
        found.append(
            f"{where}: the schedule ends at step {end}: the later steps to training.train_iters"
            f" {train_iters} have the rate {last:.4g}"
        )
    return found


def rise(before: LearningRateConfig, now: LearningRateConfig, updates: int) -> str:
    """A warning about a schedule that changed after `updates` updates so that the rate more than
    doubles at once, as after a cooldown; empty if it does not.
    """
    old, new = learning_rate(max(1, updates), before), learning_rate(updates + 1, now)
    if before == now or new <= 2 * old:
        return ""
    return (
        f"optimizer.learning_rate: the rate rises from {old:.4g} to {new:.4g} after update"
        f" {updates}, because the schedule changed: continue from a checkpoint before the"
        " cooldown, or give the schedule another warmup with stages"
    )


def _end_of_decay(config: LearningRateConfig) -> int | None:
    """The step at which the schedule ends, if it does."""
    if config.stages is not None:
        return config.stages[-1].until
    if config.decay_style == "constant":
        return None
    if config.decay_style == "inverse_sqrt" and config.cooldown is None:
        return None
    return config.decay_iterations
