"""What to change in a configuration for more speed, by forecast, as one line of `fast-llm plan`.

It keeps the batch, and context and pipeline parallelism. It tries every combination of micro-batch,
recomputation, ZeRO stage, moments and compiler, also without tensor parallelism, and keeps only the
changes that pay. The tables of layouts (search.py) vary the rest.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from fast_llm.config.train import TrainConfig
from fast_llm.planning.compiler import COMPILE, why_not_compiled
from fast_llm.planning.devices import DeviceSpec
from fast_llm.planning.search import (
    MICRO_BATCH_COUNTS,
    RECOMPUTE,
    RECOMPUTE_LEVELS,
    Settings,
    changed_settings,
    forecast_config,
    is_allowed,
    with_settings,
)
from fast_llm.planning.time import Forecast

_ZERO, _TENSOR = "model.multi_stage.zero_stage", "model.distributed.tensor_parallel"
_ROWS, _MOMENTS = "batch.micro_batch_size", "optimizer.moments_dtype"
_SEQUENCE = "model.distributed.sequence_tensor_parallel"
# A forecast is not more exact: smaller gains are not worth a change.
_WORTHWHILE = 0.01


def speed_advice(config: TrainConfig, processes: int, device: DeviceSpec) -> tuple[str, str]:
    """A label and a sentence. `config` has no `auto` but for the compiler."""
    before = forecast_config(config, processes, device)
    found = [
        (one, settings)
        for settings in _changes(config)
        if (one := _fitting(config, settings, processes, device)) is not None
        and one.layout.padding <= before.layout.padding
    ]
    if not found:
        return "To fit", "no micro-batch, recomputation or ZeRO stage is enough, by forecast"
    rate = max(one.gpu_tokens_per_second for one, _ in found)
    # Of those nearly as fast, the one with the fewest changes.
    one, settings = min(
        (pair for pair in found if pair[0].gpu_tokens_per_second >= rate * (1 - _WORTHWHILE)),
        key=lambda pair: (len(_needed(config, *pair)), -pair[0].gpu_tokens_per_second),
    )
    gain = one.gpu_tokens_per_second / before.gpu_tokens_per_second - 1
    if before.fits and gain < _WORTHWHILE:
        return "Faster", "nothing to change in this layout, by forecast"
    words = " ".join(f"{path}={value}" for path, value in _needed(config, one, settings))
    speed = f"{one.gpu_tokens_per_second:,.0f} tokens/s a GPU"
    if not before.fits:
        return "To fit", f"{words}: {speed}, by forecast"
    return "Faster", f"{words}: {speed} ({gain:+.0%}), by forecast"


def _needed(config: TrainConfig, one: Forecast, settings: Settings) -> list[tuple[str, str]]:
    return changed_settings(config, settings | {RECOMPUTE: one.layout.recompute})


def _changes(config: TrainConfig) -> Iterator[Settings]:
    """Combinations of settings; recomputation is chosen for each."""
    distributed, given = config.model.distributed, config.model.multi_stage
    others: list[tuple[Any, list[Any]]] = [
        (distributed.tensor_parallel, [1]),
        (given.zero_stage, [1, 2, 3] if distributed.pipeline_parallel == 1 else []),
        (config.batch.micro_batch_size, [1, 2, 3, 4, 8, 16]),
        (config.optimizer.moments_dtype, ["bf16", "int8"]),
        (given.compile_all, [True] if given.compile_all is False else []),
    ]
    choices = (dict.fromkeys((now, *further)) for now, further in others)
    for tensor, stage, size, dtype, compiled in product(*choices):
        if compiled is True and given.compile_all is False and why_not_compiled(config, "cuda"):
            continue
        settings: dict[str, Any] = {
            _TENSOR: tensor,
            _SEQUENCE: distributed.sequence_tensor_parallel and tensor > 1,
            _ZERO: stage,
            _ROWS: size,
            _MOMENTS: dtype,
            COMPILE: compiled,
        }
        if size != config.batch.micro_batch_size or tensor != distributed.tensor_parallel:
            settings |= dict.fromkeys(MICRO_BATCH_COUNTS)
        yield settings


def _fitting(
    config: TrainConfig, settings: Settings, processes: int, device: DeviceSpec
) -> Forecast | None:
    """The forecast with the least recomputation that fits, if any does."""
    for level in RECOMPUTE_LEVELS:
        changed = with_settings(config, settings | {RECOMPUTE: level})
        if not is_allowed(changed, processes):
            return None
        one = forecast_config(changed, processes, device)
        if one.fits:
            return one
    return None
