"""Text about a run before it starts: the run, its memory and time on GPUs, layouts compared.

The functions that end in `_rows` and `_cells` return labels and texts; the others lay them out,
as lists of labels or as tables under headings.
"""

from dataclasses import dataclass
from typing import Any

from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import TrainConfig
from fast_llm.planning.devices import DEVICES, DeviceSpec
from fast_llm.planning.disk import (
    checkpoint_bytes,
    disk_use,
    export_bytes,
    format_bytes,
    free_bytes,
)
from fast_llm.planning.layout import MOMENT_BYTES, ParallelLayout
from fast_llm.planning.preflight import RunSpec
from fast_llm.planning.search import (
    MICRO_BATCH_COUNTS,
    Settings,
    fastest_layouts,
    forecast_config,
    require_batch_size,
    resolve_auto,
    with_settings,
)
from fast_llm.planning.time import Forecast
from fast_llm.terminal import fields, short_duration, table

Rows = list[tuple[str, str]]  # label and text; an empty label continues the row above

_MOMENTS = {"auto": "fp32 or bf16", "fp32": "fp32", "bf16": "bf16", "int8": "8-bit"}
_MOMENTS_OF = {size: _MOMENTS[dtype] for dtype, size in MOMENT_BYTES.items()}
_MEMORY_CLASSES = {"h100": "80", "h200": "141", "b200": "180"}  # GB, as GPUs are sold


# A run.


def describe_run(spec: RunSpec, columns: int | None = None) -> str:
    """What a run will do, as text of at most `columns` columns."""
    return fields(run_rows(spec), 14, columns)


def describe_warnings(spec: RunSpec, columns: int | None = None) -> str:
    """Warnings about allowed settings that are probably mistakes, as text; empty without any."""
    rows = [("Warning", f"{warning}.") for warning in spec.warnings]
    return fields(rows, 14, columns) + "\n" if rows else ""


def run_rows(spec: RunSpec) -> Rows:
    """What a run will do."""
    config, training = spec.config, spec.config.training
    transformer = config.model.base_model.transformer
    fp8 = ", matmuls of the blocks in fp8" * config.model.distributed.fp8
    tokens = spec.batch_size * config.batch.sequence_length
    flops = spec.cost.model_flops_per_token * training.train_iters * tokens
    rows = [
        (
            "Model",
            f"{spec.cost.parameters:,} parameters: {transformer.num_layers} layers of"
            f" {transformer.hidden_size}, {transformer.num_attention_heads} heads in"
            f" {transformer.head_groups} groups, vocabulary {config.model.base_model.vocab_size:,}",
        ),
        ("Start", _start(spec)),
        (
            "Precision",
            f"computes in {config.model.distributed.training_dtype}{fp8}; fp32 weights and"
            f" gradients, {_MOMENTS[config.optimizer.moments_dtype]} moments",
        ),
        ("Processes", _processes(spec)),
        ("Batch", _batch(spec)),
        (
            "Training",
            f"{training.train_iters:,} steps of {tokens:,} tokens ="
            f" {training.train_iters * tokens:,} tokens, {flops:.3g} floating-point operations",
        ),
    ]
    rows += _data_rows(spec, tokens) + _saving_rows(spec)
    return rows + [("Changed", change) for change in spec.changes]


def _start(spec: RunSpec) -> str:
    folder = spec.pretrained_folder
    if spec.checkpoint is not None:
        return f"resumes from {spec.checkpoint}, after step {spec.completed_steps}"
    if folder is not None and spec.config.pretrained.model_weights:
        return f"the weights of {folder}"
    return "random weights" + (f" in the shape of {folder}" if folder is not None else "")


def _processes(spec: RunSpec) -> str:
    """The number of processes and the parallelism over them."""
    config, count = spec.config, spec.processes
    if count == 1:
        return "1 (nothing is sharded)"
    distributed, multi = config.model.distributed, config.model.multi_stage
    words = [f"{count}, zero_stage {multi.zero_stage or 1}"]
    replicas = distributed.replicas(count)
    group = multi.shard_size or replicas
    if group < replicas:
        words.append(f"sharded in groups of {group}")
    if distributed.tensor_parallel > 1:
        sequence = " with sequence parallelism" * distributed.sequence_tensor_parallel
        words.append(f"tensor parallel {distributed.tensor_parallel}{sequence}")
    if distributed.sequence_data_parallel > 1:
        words.append(f"context parallel {distributed.sequence_data_parallel}")
    if distributed.pipeline_parallel > 1:
        words.append(
            f"pipeline parallel {distributed.pipeline_parallel} with stages of"
            f" {stage_sizes(config)} layers" + _schedule(spec)
        )
    return ", ".join(words)


def _schedule(spec: RunSpec) -> str:
    if spec.config.batch.micro_batch_size == "auto":
        return ""
    in_flight = micro_batches_in_flight(spec.config, spec.batch)
    return f" ({schedule_name(spec.config, in_flight)}, {in_flight} micro-batches at a time)"


def _batch(spec: RunSpec) -> str:
    """The micro-batches of a step and the processes that share them."""
    data_parallel = spec.config.model.distributed.data_parallel(spec.processes)
    words = f"{spec.batch_size} sequences of {spec.config.batch.sequence_length:,} tokens ="
    if spec.config.batch.micro_batch_size == "auto":
        return f"{words} micro-batches as memory allows × {data_parallel} processes"
    batch = spec.batch
    return (
        f"{words} {batch.micro_batch_size} a micro-batch × {batch.micro_batches} micro-batches ×"
        f" {data_parallel} processes"
        + (f", with {batch.padding} empty rows" if batch.padding else "")
    )


def _data_rows(spec: RunSpec, step_tokens: int) -> Rows:
    """The data that the run reads. `step_tokens`: tokens of a step."""
    rows: Rows = []
    training, dataset = spec.config.training, spec.dataset
    sequences = (
        spec.consumed_samples + (training.train_iters - spec.completed_steps) * spec.batch_size
    )
    consumed = spec.history.tokens(sequences) if spec.history is not None else 0
    if spec.history is not None and consumed != training.train_iters * step_tokens:
        rows.append(
            (
                "",
                f"with other batch sizes before, or skipped data: {consumed:,} tokens by the end",
            )
        )
    sources = [
        (f"{source.tokens:,}", f"{epochs:.3g}", source.name)
        if source.tokens
        else ("unlimited", "-", source.name)  # format: random
        for source, epochs in dataset.epochs("training", sequences)
    ]
    if sources:
        rows.append(("Data", table(("training tokens", "epochs", "source"), sources, (0, 1))))
    if dataset.documents("training"):
        shares = [
            (split, f"{dataset.documents(split):,}", f"{dataset.tokens(split):,}")
            for split in ("training", "validation", "test")
        ]
        rows.append(("Split", table(("for", "documents", "tokens"), shares, (1, 2))))
    if training.validation.interval is not None and training.validation.iterations is not None:
        measured = training.validation.iterations * step_tokens
        rows.append(
            (
                "Validation",
                f"at the start, every {training.validation.interval:,} steps and at the end, on the"
                f" same {measured:,} of {dataset.tokens('validation'):,} tokens"
                + "".join(f"; {name}" for name in dataset.validation_sets),
            )
        )
    return rows


def _saving_rows(spec: RunSpec) -> Rows:
    """The checkpoints and exports that the run writes, and their size."""
    rows: Rows = []
    config, parameters = spec.config, spec.cost.parameters
    saved, export = config.training.checkpoint, config.training.export
    lines = []
    if saved.interval is not None:
        size = checkpoint_bytes(config, parameters)
        kept = str(saved.keep or "all") + ", and the permanent ones" * bool(saved.keep_every)
        lines.append(("checkpoints", f"{saved.interval:,} steps", format_bytes(size), kept))
    if export.interval is not None:
        size = export_bytes(config, parameters)
        lines.append(
            ("exports", f"{export.interval:,} steps", format_bytes(size), str(export.keep or "all"))
        )
    if lines:
        rows.append(("Saving", table(("", "every", "size", "kept"), lines, (1, 2))))
    if saved.interval is not None:
        rows.append(("", _background(spec, checkpoint_bytes(config, parameters))))
    if spec.folder is not None:
        use = disk_use(config, spec.folder, parameters, spec.completed_steps)
        total = format_bytes(sum(count * size for count, size in use.values()))
        free = format_bytes(free_bytes(spec.folder))
        rows.append(("Disk", f"{free} free at {spec.folder}, this run takes {total} at most"))
    return rows


def _background(spec: RunSpec, checkpoint_size: int) -> str:
    """Whether training waits for checkpoints, or the host memory that background saving takes."""
    if not spec.config.training.checkpoint.background:
        return "training waits for checkpoints"
    replicas = spec.config.model.distributed.replicas(spec.processes)
    copies = replicas // min(spec.config.model.multi_stage.shard_size or replicas, replicas)
    return (
        f"checkpoints are written in the background, from {format_bytes(checkpoint_size * copies)}"
        " of host memory"
    )


# Memory and time on several GPUs.


def describe_gpus(config: TrainConfig, processes: int, columns: int | None = None) -> str:
    """Memory per process and time of the run on several kinds of GPUs, as text."""
    return fields([("Forecast", _gpus_table(config, processes))], 14, columns)


def _gpus_table(config: TrainConfig, processes: int) -> str:
    """A row for each kind of GPU: memory and time as configured, and the fastest micro-batch."""
    lines = []
    for name, gigabytes in _MEMORY_CLASSES.items():
        device = DEVICES[name]
        own = forecast_config(config, processes, device)
        lines.append(
            (
                f"{name.upper()} {gigabytes} GB",
                format_bytes(own.memory),
                "yes" if own.fits else "no",
                f"{own.seconds:.3g} s" if own.fits else "",
                short_duration(own.seconds * config.training.train_iters) if own.fits else "",
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


# Layouts compared.


@dataclass(frozen=True)
class LayoutReport:
    """A configuration's layout, the fastest ones, and the fastest for each number of GPUs."""

    configured: Forecast
    fastest: list[Forecast]
    changes: Rows  # dotted path and value: what to set for the first of the fastest
    by_gpus: list[Forecast]


def compare_layouts(config: TrainConfig, processes: int, device: DeviceSpec) -> LayoutReport:
    """Forecast the configured layout, and search for faster ones.

    Raises ConfigError if batch_size is not given.
    """
    require_batch_size(config)
    config = resolve_auto(config, processes, device.memory, "cuda")
    fastest = fastest_layouts(config, processes, device)
    by_gpus = [
        one
        for gpus in (2**power for power in range(11))
        for _, one in fastest_layouts(config, gpus, device, 1)
    ]
    return LayoutReport(
        configured=forecast_config(config, processes, device),
        fastest=[one for _, one in fastest],
        changes=_changes(config, fastest[0][0]) if fastest else [],
        by_gpus=by_gpus,
    )


def describe_layouts(
    config: TrainConfig, processes: int, device: DeviceSpec, columns: int | None = None
) -> str:
    """The configured layout and the fastest ones, as text of at most `columns` columns."""
    report = compare_layouts(config, processes, device)
    lines = ["As configured", "", fields(forecast_rows(report.configured), 11, columns), ""]
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


def _changes(config: TrainConfig, settings: Settings) -> Rows:
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
