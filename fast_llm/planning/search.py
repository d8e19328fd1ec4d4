"""Search for the fastest layout that fits, and for the values of `auto` settings.

`resolve_auto` is the only place where `auto` turns into a value; `ParallelLayout`, `Workload` and
the trainer see only configurations without it. A search tries a few thousand layouts, in a second
or two.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from fast_llm.config.checks import violations
from fast_llm.config.train import TrainConfig
from fast_llm.errors import ConfigError
from fast_llm.planning.compiler import COMPILE, resolve_compiler
from fast_llm.planning.devices import DEVICES, GPUS_PER_NODE, DeviceSpec
from fast_llm.planning.layout import MOMENT_BYTES, ParallelLayout, Workload
from fast_llm.planning.memory import required_bytes
from fast_llm.planning.run_spec import RunSpec
from fast_llm.planning.stages import by_length, training_cost
from fast_llm.planning.time import Forecast, forecast

Settings = dict[str, Any]  # dotted path → value

RECOMPUTE = "model.base_model.transformer.mlp_recompute_level"
# From the fastest with the most memory to the slowest with the least.
RECOMPUTE_LEVELS = ("none", "activation", "activation_and_input", "selective", "full", "block")
MICRO_BATCH_COUNTS = tuple(
    f"batch.{name}_micro_batches" for name in ("sequential", "depth_first", "breadth_first")
)
_MOMENTS, _MICRO_BATCH_SIZE = "optimizer.moments_dtype", "batch.micro_batch_size"


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Copy a configuration with other values at some dotted paths; nothing is validated."""

    def put(section: Any, path: list[str], value: Any) -> Any:
        first, *rest = path
        changed = put(getattr(section, first), rest, value) if rest else value
        return section.model_copy(update={first: changed})

    for path, value in settings.items():
        config = put(config, path.split("."), value)
    return config


def changed_settings(config: TrainConfig, settings: Settings) -> list[tuple[str, str]]:
    """Settings that differ from the configuration's, in YAML."""

    def current(path: str) -> Any:
        value: Any = config
        for key in path.split("."):
            value = getattr(value, key)
        return value

    return [
        (path, _written(wanted)) for path, wanted in settings.items() if wanted != current(path)
    ]


def _written(value: Any) -> str:
    if value is None:
        return "null"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def is_allowed(config: TrainConfig, processes: int) -> bool:
    """Whether a configuration keeps all constraints on this many processes."""
    return next(iter(violations(config, processes)), None) is None


def require_batch_size(config: TrainConfig) -> int:
    """The sequences of a step, which do not change with the layout.

    Raises ConfigError if batch_size is not given.
    """
    if config.batch.batch_size is not None:
        return config.batch.batch_size
    raise ConfigError(
        [
            "batch.batch_size: missing: without it the batch grows with the number of processes;"
            " give it to compare layouts"
        ]
    )


def model_flops(config: TrainConfig) -> float:
    """Floating-point operations of a token, forward and backward."""
    return training_cost(config).model_flops_per_token


# Settings that are `auto`.


def resolve_auto(
    config: TrainConfig, processes: int, memory: float, device_kind: str
) -> TrainConfig:
    """Replace `auto` by values, for processes with `memory` bytes each.

    `device_kind`: cuda, cpu or UPCASTING_CPU.

    `moments_dtype` becomes fp32 where that fits without recomputing matmuls, else bf16.
    `micro_batch_size` becomes the fastest that fits, with more recomputation than
    `mlp_recompute_level` if needed; 1 where none fits. `compile_all`: see compiler.py.
    """
    config = with_settings(config, {COMPILE: resolve_compiler(config, device_kind)})
    any_rows = config.batch.micro_batch_size == "auto"
    moments = config.optimizer.moments_dtype
    if not any_rows and moments != "auto":
        return config
    longest, length = by_length(config)[-1][1], config.batch.sequence_length
    if longest.batch.sequence_length > length:  # it needs the most memory
        chosen = resolve_auto(longest, processes, memory, device_kind)
        found: Settings = {_MOMENTS: chosen.optimizer.moments_dtype}
        if any_rows:
            tokens = int(chosen.batch.micro_batch_size or 1) * longest.batch.sequence_length
            found[_MICRO_BATCH_SIZE] = max(1, tokens // length)
            found[RECOMPUTE] = chosen.model.base_model.transformer.mlp_recompute_level
        return with_settings(config, found)
    dtypes = ("fp32", "bf16") if moments == "auto" else (moments,)
    for dtype in dtypes:
        fitting = list(_fitting(config, processes, memory, device_kind, dtype))
        if fitting:
            return max(fitting, key=lambda pair: pair[0])[1]
    smallest: Settings = {_MOMENTS: dtypes[-1]}
    if any_rows:
        smallest |= {_MICRO_BATCH_SIZE: 1, RECOMPUTE: RECOMPUTE_LEVELS[-1]}
    return with_settings(config, smallest)


def _fitting(
    config: TrainConfig, processes: int, memory: float, device_kind: str, moments: str
) -> Iterator[tuple[float, TrainConfig]]:
    """For each micro-batch size, the configuration with the least recomputation that fits.

    Yields its speed and the configuration.

    The speed is that of an H100: it ranks them on any device.
    """
    any_rows, flops = config.batch.micro_batch_size == "auto", model_flops(config)
    given = RECOMPUTE_LEVELS.index(config.model.base_model.transformer.mlp_recompute_level)
    levels = RECOMPUTE_LEVELS[given:] if any_rows else RECOMPUTE_LEVELS[given : given + 1]
    if any_rows and moments == "fp32" and config.optimizer.moments_dtype == "auto":
        levels = tuple(level for level in levels if level not in ("full", "block"))
    for rows in (1, 2, 4, 8, 16, 32, 64) if any_rows else (config.batch.micro_batch_size,):
        for level in levels:
            settings = {_MICRO_BATCH_SIZE: rows, RECOMPUTE: level, _MOMENTS: moments}
            changed = with_settings(config, settings)
            if not is_allowed(changed, processes):
                continue
            layout = ParallelLayout.of(changed, processes)
            workload = Workload.of(changed, config.batch.batch_size or 0)
            padded = any_rows and layout.padding > 0 and layout.micro_batch_size > 1
            if not padded and required_bytes(workload, layout, device_kind) <= memory:
                one = forecast(workload, layout, DEVICES["h100"], flops)
                yield one.gpu_tokens_per_second, changed
                break  # the levels that follow are slower


def resolve_run(spec: RunSpec, memory: float, device_kind: str, triton: bool = True) -> RunSpec:
    """Resolve `auto` on the device of a run. A resumed run keeps the dtype of its moments, and
    whether its blocks are compiled. `triton`: whether Triton is installed.
    """
    config, before = spec.config, spec.settings_before
    if before is not None and config.optimizer.moments_dtype == "auto":
        moments = before["optimizer"].get("moments_dtype", "fp32")
        config = with_settings(config, {_MOMENTS: moments})
    compiled = resolve_compiler(config, device_kind, triton, before)
    config = with_settings(config, {COMPILE: compiled})
    return replace(spec, config=resolve_auto(config, spec.processes, memory, device_kind))


def forecast_config(config: TrainConfig, processes: int, device: DeviceSpec) -> Forecast:
    """Forecast a valid configuration; `auto` is resolved for this GPU."""
    config = resolve_auto(config, processes, device.memory, "cuda")
    layout = ParallelLayout.of(config, processes)
    rows = layout.micro_batch_size * layout.micro_batches * layout.data - layout.padding
    return forecast(Workload.of(config, rows), layout, device, model_flops(config))


def forecast_lengths(
    config: TrainConfig, processes: int, device: DeviceSpec
) -> list[tuple[int, Forecast]]:
    """Forecasts of a valid configuration: of each sequence length of its stages, with the number of
    steps that have it; the shortest first.
    """
    config = resolve_auto(config, processes, device.memory, "cuda")
    return [(steps, forecast_config(one, processes, device)) for steps, one in by_length(config)]


# Layouts.


def candidates(config: TrainConfig, processes: int) -> Iterator[Settings]:
    """Layouts that are worth a try. Each keeps the batch and divides it differently."""
    sequence, size = config.batch.sequence_length, require_batch_size(config)
    for tensor, context, pipeline in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        data, rest = divmod(processes, tensor * context * pipeline)
        if data < 1 or rest or (context > 1 and sequence < 4096 * context):
            continue
        replicas = data * context
        stages = (1, 2, 3) if pipeline == 1 and replicas > 1 else (1,)
        groups: tuple[int | None, ...] = (None,)
        if replicas > GPUS_PER_NODE // tensor > 1:
            groups = (None, GPUS_PER_NODE // min(tensor, GPUS_PER_NODE))
        for zero_stage, group, rows in product(stages, groups, (1, 2, 4, 8, 16)):
            if rows > 1 and rows * data > size:
                continue
            yield {
                "model.distributed.tensor_parallel": tensor,
                "model.distributed.sequence_tensor_parallel": tensor > 1,
                "model.distributed.sequence_data_parallel": context,
                "model.distributed.pipeline_parallel": pipeline,
                "model.multi_stage.zero_stage": zero_stage,
                "model.multi_stage.shard_size": group,
                "model.multi_stage.layers_per_stage": None,
                "model.multi_stage.pipeline_schedule": None,
                _MICRO_BATCH_SIZE: rows,
                "batch.batch_size": size,
                **dict.fromkeys(MICRO_BATCH_COUNTS),
            }


def fastest_layouts(
    config: TrainConfig, processes: int, device: DeviceSpec, count: int = 3
) -> list[tuple[Settings, Forecast]]:
    """The fastest layouts that fit, one for each arrangement of processes, the fastest first.

    With stages of several sequence lengths, all must fit, the run as a whole is the fastest, and
    the forecast is that of the longest sequences.
    """
    auto_moments = config.optimizer.moments_dtype == "auto"
    if auto_moments:
        config = with_settings(config, {_MOMENTS: "fp32"})
    flops = [model_flops(one) for _, one in by_length(config)]
    found: list[tuple[float, Settings, Forecast]] = []
    for settings in candidates(config, processes):
        changed = with_settings(config, settings)
        if not is_allowed(changed, processes):
            continue
        changed = with_settings(changed, {COMPILE: resolve_compiler(changed, "cuda")})
        parts = by_length(changed)
        shapes = [
            (Workload.of(one, one.batch.batch_size or 0), ParallelLayout.of(one, processes))
            for _, one in parts
        ]
        moments = (None, MOMENT_BYTES["bf16"]) if auto_moments else (None,)
        if fitting := _least_recomputation(shapes, moments, device, flops):
            level = fitting[-1].layout.recompute
            steps = [count for count, _ in parts]
            total = sum(n * one.seconds for n, one in zip(steps, fitting, strict=True))
            mean = total / sum(steps) if sum(steps) else fitting[-1].seconds
            found.append((mean, settings | {RECOMPUTE: level}, fitting[-1]))
    found.sort(key=lambda one: (one[0], one[2].memory))
    arrangements: dict[tuple[int, ...], tuple[Settings, Forecast]] = {}
    for _, settings, one in found:
        layout = one.layout
        axes = (layout.tensor, layout.context, layout.pipeline)
        arrangements.setdefault((*axes, layout.zero_stage, layout.shards), (settings, one))
    return list(arrangements.values())[:count]


def _least_recomputation(
    shapes: Sequence[tuple[Workload, ParallelLayout]],
    moments: Sequence[float | None],
    device: DeviceSpec,
    flops: Sequence[float],
) -> list[Forecast]:
    """The forecasts of all shapes with the least recomputation, and then the first size of moments,
    with which all fit; empty without any. `flops`: of a token of each shape.
    """
    for level in RECOMPUTE_LEVELS:
        for size in moments:
            found = list[Forecast]()
            for (workload, layout), of_token in zip(shapes, flops, strict=True):
                if size is not None:
                    workload = replace(workload, moment_bytes=size)
                one = forecast(workload, replace(layout, recompute=level), device, of_token)
                if not one.fits:
                    break
                found.append(one)
            else:
                return found
    return []
