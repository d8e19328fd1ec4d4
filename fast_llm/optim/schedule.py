"""The learning rate as a function of the update's number, without state.

Let t be the number of the update, from 1, w = `warmup_iterations`, d = `decay_iterations` (which
include the warmup) and c = (t - w) / (d - w):

    t < w         base · t / w
    w <= t < d    constant: base
                  linear, power: base + c^p · (minimum - base)           p = `decay_power`
                  cosine: base + ½ (1 - cos(π c^p)) · (minimum - base)   (Loshchilov & Hutter 2017)
    t >= d        minimum (base if constant)
"""

import math

from fast_llm.config.train import LearningRateConfig


def learning_rate(update: int, config: LearningRateConfig) -> float:
    """The learning rate of update number `update`, counted from 1."""
    if update < config.warmup_iterations:
        return config.base * update / config.warmup_iterations
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
