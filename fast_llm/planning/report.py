"""What a person reads before a run: the run, its memory on several GPUs, and layouts compared.

The functions that end in `_rows` return labels and texts, for any presentation; the others lay them
out as text.
"""

from collections.abc import Iterable
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

Rows = list[tuple[str, str]]  # label and text; an empty label continues the row above

_MOMENTS = {"auto": "fp32 or bf16", "fp32": "fp32", "bf16": "bf16", "int8": "8-bit"}
_MOMENTS_OF = {size: _MOMENTS[dtype] for dtype, size in MOMENT_BYTES.items()}
_MEMORY_CLASSES = {"h100": "80", "h200": "141", "b200": "180"}  # GB, as GPUs are sold


def _lay_out(rows: Iterable[tuple[str, str]], width: int) -> list[str]:
    return [f"{label:<{width}}{text}" for label, text in rows]


# A run.


def describe_run(spec: RunSpec) -> str:
    """What a run will do, as text."""
    return "\n".join(_lay_out(run_rows(spec), 14))


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
    """How processes are arranged."""
    config, count = spec.config, spec.processes
    if count == 1:
        return "1 (nothing is sharded)"
    distributed, multi = config.model.distributed, config.model.multi_stage
    words = [f"{count}, zero_stage {multi.zero_stage or 1}"]
    replicas = distributed.data_parallel(count) * distributed.sequence_data_parallel
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
    """How a batch is divided."""
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
    """What the run reads. `step_tokens`: tokens of a step."""
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
    for source, epochs in dataset.epochs("training", sequences):
        text = f"{source.name}: {source.tokens:,} tokens to train on, {epochs:.3g} epochs"
        rows.append(("Data", text))
    if dataset.documents("training"):
        shares = [
            f"{dataset.documents(split):,} for {split} ({dataset.tokens(split):,} tokens)"
            for split in ("training", "validation", "test")
        ]
        rows.append(("Documents", ", ".join(shares)))
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
    """What the run writes."""
    rows: Rows = []
    config, parameters = spec.config, spec.cost.parameters
    saved, export = config.training.checkpoint, config.training.export
    if saved.interval is not None:
        size = checkpoint_bytes(config, parameters)
        rows.append(
            (
                "Checkpoints",
                f"every {saved.interval:,} steps, {format_bytes(size)} each"
                + (f", {saved.keep} kept" if saved.keep else ", all kept")
                + (", and the permanent ones" if saved.keep_every else "")
                + _background(spec, size),
            )
        )
    if export.interval is not None:
        size = export_bytes(config, parameters)
        count = -(-config.training.train_iters // export.interval)
        count = min(count, export.keep or count)
        rows.append(
            (
                "Exports",
                f"every {export.interval:,} steps, {format_bytes(size)} each,"
                f" {format_bytes(size * count)} in all",
            )
        )
    if spec.folder is not None:
        use = disk_use(config, spec.folder, parameters, spec.completed_steps)
        total = format_bytes(sum(count * size for count, size in use.values()))
        rows.append(
            (
                "Disk",
                f"{format_bytes(free_bytes(spec.folder))} free at {spec.folder}, this run takes"
                f" {total} at most",
            )
        )
    return rows


def _background(spec: RunSpec, checkpoint_size: int) -> str:
    """Whether training waits for checkpoints, or the host memory that background saving takes."""
    if not spec.config.training.checkpoint.background:
        return "; training waits for them"
    distributed = spec.config.model.distributed
    replicas = distributed.data_parallel(spec.processes) * distributed.sequence_data_parallel
    copies = replicas // min(spec.config.model.multi_stage.shard_size or replicas, replicas)
    return (
        f"; written in the background from {format_bytes(checkpoint_size * copies)} of host memory"
    )


# Memory on several GPUs.


def describe_memory(config: TrainConfig, processes: int) -> str:
    """The memory that a process needs on several GPUs, as text."""
    return "\n".join(_lay_out(memory_rows(config, processes), 14))


def memory_rows(config: TrainConfig, processes: int) -> Rows:
    """The memory that a process needs on several GPUs, and the fastest micro-batch on each."""
    rows: Rows = []
    for name, gigabytes in _MEMORY_CLASSES.items():
        device = DEVICES[name]
        own = forecast_config(config, processes, device)
        words = f"{format_bytes(own.memory)} as configured" + ("" if own.fits else ", too much")
        if config.batch.batch_size is not None:
            words += f"; {_fastest_micro_batch(config, processes, device)}"
        rows.append(("" if rows else "Memory", f"a GPU of {gigabytes} GB: {words}"))
    return rows


def _fastest_micro_batch(config: TrainConfig, processes: int, device: DeviceSpec) -> str:
    any_rows: Settings = {**dict.fromkeys(MICRO_BATCH_COUNTS), "batch.micro_batch_size": "auto"}
    fastest = forecast_config(with_settings(config, any_rows), processes, device)
    if not fastest.fits:
        return "no micro-batch fits, see `fast-llm plan`"
    return (
        f"fastest with micro_batch_size {fastest.layout.micro_batch_size}, mlp_recompute_level"
        f" {fastest.layout.recompute}"
    )


# Layouts compared.

LAYOUT_COLUMNS = (
    "GPUs",
    "layout",
    "rows",
    "recompute",
    "tokens/s/GPU",
    "tokens/s",
    "step s",
    "MFU",
    "memory",
    "limited by",
)
_ALIGNED = (">5", "<48", ">4", "<21", ">12", ">12", ">7", ">4", ">9", "")


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


def describe_layouts(config: TrainConfig, processes: int, device: DeviceSpec) -> str:
    """The configured layout and the fastest ones, as text."""
    report = compare_layouts(config, processes, device)
    lines = ["As configured", "", *_lay_out(forecast_rows(report.configured), 11), ""]
    lines += [f"The fastest that fit {processes} × {device.name.upper()}", ""]
    if report.fastest:
        lines += _table(report.fastest)
        lines += ["", "For the first of them, set", ""]
        lines += [f"  {path}={value}" for path, value in report.changes]
        if not report.changes:
            lines.append("  nothing to change")
    else:
        lines.append(
            "None: the batch has too few sequences for so many, or the model is too large for so"
            " few."
        )
    lines += ["", "By number of GPUs", "", *_table(report.by_gpus)]
    return "\n".join(lines)


def _table(forecasts: list[Forecast]) -> list[str]:
    # The last two columns are separated by two spaces, as the first two.
    rows = [LAYOUT_COLUMNS, *(layout_row(one) for one in forecasts)]
    lines = []
    for row in rows:
        cells = [f"{cell:{aligned}}" for cell, aligned in zip(row, _ALIGNED, strict=True)]
        lines.append(f"{cells[0]}  {' '.join(cells[1:-1])}  {cells[-1]}")
    return lines


def layout_row(one: Forecast) -> tuple[str, ...]:
    """A forecast in the columns LAYOUT_COLUMNS."""
    rate = one.gpu_tokens_per_second
    return (
        str(one.layout.processes),
        _arrangement(one.layout),
        str(one.layout.micro_batch_size),
        one.layout.recompute,
        f"{rate:,.0f}",
        f"{rate * one.layout.processes:,.0f}",
        f"{one.seconds:.2f}",
        f"{one.mfu:.0%}",
        format_bytes(one.memory),
        one.limit,
    )


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
    """Settings that differ from the configuration's, as they are written."""

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
