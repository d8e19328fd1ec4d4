"""Forecasts compared, as text: one run on several kinds of GPUs; layouts, with the fastest first.

The functions that end in `_rows` and `_cells` return labels and texts; the others lay them out,
as lists of labels or as tables under headings.
"""

from dataclasses import dataclass

from fast_llm.config.train import TrainConfig
from fast_llm.planning.advice import speed_advice
from fast_llm.planning.compiler import COMPILE
from fast_llm.planning.devices import DEVICES, DeviceSpec
from fast_llm.planning.disk import format_bytes
from fast_llm.planning.layout import MOMENT_BYTES, ParallelLayout
from fast_llm.planning.report import MOMENTS, Rows
from fast_llm.planning.search import (
    MICRO_BATCH_COUNTS,
    Settings,
    changed_settings,
    fastest_layouts,
    forecast_config,
    forecast_lengths,
    require_batch_size,
    resolve_auto,
    with_settings,
)
from fast_llm.planning.time import Forecast
from fast_llm.terminal import fields, short_duration, table

_MOMENTS_OF = {size: MOMENTS[dtype] for dtype, size in MOMENT_BYTES.items()}
_MEMORY_CLASSES = {"h100": "80", "h200": "141", "b200": "180"}  # GB, as GPUs are sold


# Kinds of GPUs.


def describe_gpus(config: TrainConfig, processes: int, columns: int | None = None) -> str:
    """Memory per process and time of the run on several kinds of GPUs, as text."""
    return fields([("Forecast", _gpus_table(config, processes))], 14, columns)


def _gpus_table(config: TrainConfig, processes: int) -> str:
    """A row for each kind of GPU: memory and time as configured, and the fastest micro-batch.

    With stages of several lengths: the most memory, and the mean time of a step.
    """
    lines = []
    for name, gigabytes in _MEMORY_CLASSES.items():
        device = DEVICES[name]
        own = forecast_lengths(config, processes, device)
        fits = all(one.fits for _, one in own)
        total = sum(steps * one.seconds for steps, one in own)
        steps = sum(steps for steps, _ in own)
        mean = total / steps if steps else own[-1][1].seconds
        lines.append(
            (
                f"{name.upper()} {gigabytes} GB",
                format_bytes(max(one.memory for _, one in own)),
                "yes" if fits else "no",
                f"{mean:.3g} s" if fits else "",
                short_duration(total) if fits else "",
                *_fastest_micro_batch(config, processes, device),
            )
        )
    headings = ("GPU", "memory", "fits", "step", "total", "fastest", "recompute")
    return table(headings, lines, (1, 3, 4, 5))


def _fastest_micro_batch(
    config: TrainConfig, processes: int, device: DeviceSpec
) -> tuple[str, str]:
    """The fastest micro-batch that fits, and the recomputation that it needs."""
    if config.batch.batch_size is None:
        return "", ""
    any_rows: Settings = {**dict.fromkeys(MICRO_BATCH_COUNTS), "batch.micro_batch_size": "auto"}
    fastest = forecast_config(with_settings(config, any_rows), processes, device)
    if not fastest.fits:
        return "none", ""
    return str(fastest.layout.micro_batch_size), fastest.layout.recompute


# Layouts.


@dataclass(frozen=True)
class LayoutReport:
    """A configuration's layout, the fastest ones, and the fastest for each number of GPUs."""

    configured: Forecast
    advice: tuple[str, str]  # label and sentence: what to change without another arrangement
    by_length: list[tuple[int, Forecast]]  # with several lengths: steps, and the forecast of each
    fastest: list[Forecast]
    changes: Rows  # dotted path and value: what to set for the first of the fastest
    by_gpus: list[Forecast]


def compare_layouts(config: TrainConfig, processes: int, device: DeviceSpec) -> LayoutReport:
    """Forecast the configured layout, and search for faster ones.

    Raises ConfigError if batch_size is not given.
    """
    require_batch_size(config)
    compile_all = config.model.multi_stage.compile_all
    resolved = resolve_auto(config, processes, device.memory, "cuda")
    config = with_settings(resolved, {COMPILE: compile_all})  # of each layout anew, if auto
    fastest = fastest_layouts(config, processes, device)
    by_gpus = [
        one
        for gpus in (2**power for power in range(11))
        for _, one in fastest_layouts(config, gpus, device, 1)
    ]
    own = forecast_lengths(config, processes, device)
    return LayoutReport(
        configured=own[-1][1],
        by_length=own if len(own) > 1 else [],
        fastest=[one for _, one in fastest],
        changes=changed_settings(config, fastest[0][0]) if fastest else [],
        advice=speed_advice(config, processes, device),
        by_gpus=by_gpus,
    )


def describe_layouts(
    config: TrainConfig, processes: int, device: DeviceSpec, columns: int | None = None
) -> str:
    """The configured layout and the fastest ones, as text of at most `columns` columns."""
    report = compare_layouts(config, processes, device)
    configured = [*forecast_rows(report.configured), report.advice]
    lines = ["As configured", "", fields(configured, 11, columns), ""]
    if report.by_length:
        lines[0] += f", sequences of {report.configured.workload.sequence_length:,} tokens"
        lines += ["By sequence length of the stages", "", _lengths_table(report.by_length), ""]
    lines += [f"The fastest that fit {processes} × {device.name.upper()}", ""]
    if report.fastest:
        lines.append(_layout_table(report.fastest, columns))
        lines += ["", "For the first of them, set", ""]
        lines += [f"  {path}={value}" for path, value in report.changes]
        if not report.changes:
            lines.append("  nothing to change")
    else:
        lines.append(
            "None: the batch has too few sequences for this many GPUs, or the model needs more"
            " GPUs."
        )
    lines += ["", "By number of GPUs", "", _layout_table(report.by_gpus, columns)]
    return "\n".join(lines)


def _lengths_table(forecasts: list[tuple[int, Forecast]]) -> str:
    """A row for each sequence length."""
    rows = [
        (
            f"{one.workload.sequence_length:,}",
            f"{steps:,}",
            f"{one.seconds:.3g} s",
            short_duration(steps * one.seconds),
            f"{one.mfu:.0%}",
            format_bytes(one.memory),
            "yes" if one.fits else "no",
        )
        for steps, one in forecasts
    ]
    headings = ("length", "steps", "step", "total", "MFU", "memory", "fits")
    return table(headings, rows, range(6))


_AXES = ("ZeRO", "shard", "TP", "CP", "PP", "DP")
_TEXTS = ("recompute", "limited by")


def _layout_table(forecasts: list[Forecast], columns: int | None) -> str:
    """A row for each forecast.

    Axes that no row uses are left out, and the limit if the table is wider than `columns`.
    """
    cells = [forecast_cells(one) for one in forecasts]
    headings = [
        name
        for name in (cells[0] if cells else ())
        if name not in _AXES or any(row[name] not in ("1", "-") for row in cells)
    ]
    while True:
        rows = [[row[name] for name in headings] for row in cells]
        numbers = [index for index, name in enumerate(headings) if name not in _TEXTS]
        found = table(headings, rows, numbers)
        longest = max(map(len, found.splitlines()), default=0)
        if columns is None or longest <= columns or headings[-1] != "limited by":
            return found
        headings.pop()


def forecast_cells(one: Forecast) -> dict[str, str]:
    """Heading → cell of a forecast."""
    layout, rate = one.layout, one.gpu_tokens_per_second
    most = max(one.parts, key=lambda name: one.parts[name])
    return {
        "GPUs": str(layout.processes),
        "ZeRO": str(layout.zero_stage) if layout.replicas > 1 else "-",
        "shard": str(layout.shards) if layout.shards < layout.replicas else "-",
        "TP": str(layout.tensor),
        "CP": str(layout.context),
        "PP": str(layout.pipeline),
        "DP": str(layout.data),
        "rows": str(layout.micro_batch_size),
        "recompute": layout.recompute,
        "tok/s/GPU": f"{rate:,.0f}",
        "step": f"{one.seconds:.2f} s",
        "MFU": f"{one.mfu:.0%}",
        "memory": format_bytes(one.memory),
        "limited by": f"{most} {one.parts[most] / one.seconds:.0%}",
    }


def forecast_rows(one: Forecast) -> Rows:
    """A forecast in detail."""
    layout, parts = one.layout, one.parts
    held = ", ".join(
        f"{name} {format_bytes(size)}"
        for name, size in sorted(one.peak.parts.items(), key=lambda part: -part[1])
        if size > one.peak.bytes / 100
    )
    spent = ", ".join(
        f"{name} {parts[name] / one.seconds:.1%}"
        for name in sorted(parts, key=lambda name: -parts[name])
    )
    verdict = "fits" if one.fits else "DOES NOT FIT"
    return [
        (
            "Layout",
            f"{layout.processes} × {one.device.name.upper()}: {_arrangement(layout)};"
            f" {layout.micro_batch_size} × {layout.micro_batches} sequences each, recompute"
            f" {layout.recompute}, {_MOMENTS_OF[one.workload.moment_bytes]} moments",
        ),
        (
            "Memory",
            f"{format_bytes(one.memory)} of {format_bytes(one.device.memory)}: {verdict}",
        ),
        ("", f"most {one.peak.name}: {held}"),
        (
            "Step",
            f"{one.seconds:.3g} s for {one.workload.batch_size * one.workload.sequence_length:,}"
            f" tokens: {one.gpu_tokens_per_second:,.0f} tokens/s a GPU, MFU {one.mfu:.1%}",
        ),
        ("", spent),
        ("Limit", one.limit),
    ]


def _arrangement(layout: ParallelLayout) -> str:
    """The sizes of the axes that have more than one process."""
    words = [f"zero_stage {layout.zero_stage}"] if layout.replicas > 1 else []
    words += [f"shard_size {layout.shards}"] if layout.shards < layout.replicas else []
    for axis in ("tensor", "context", "pipeline"):
        size = getattr(layout, axis)
        words += [f"{axis} {size}"] if size > 1 else []
    return ", ".join([*words, f"data {layout.data}"])
