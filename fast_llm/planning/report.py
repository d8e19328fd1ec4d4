"""A run before it starts, as text: model, processes, batch, data, disk, warnings.

The functions that end in `_rows` return labels and texts; the others lay them out.
"""

import math
from itertools import pairwise

from fast_llm.config.parameter_rules import covered, frozen_names
from fast_llm.config.saving import CheckpointConfig, ExportConfig
from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import TrainConfig
from fast_llm.data.dataset import Dataset
from fast_llm.data.sampling import UNIT
from fast_llm.models import family_of
from fast_llm.optim.schedule import borders, learning_rate
from fast_llm.planning.branch import describe_ancestors
from fast_llm.planning.compiler import describe_compiler
from fast_llm.planning.disk import (
    checkpoint_bytes,
    copied_bytes,
    disk_use,
    export_bytes,
    format_bytes,
    free_bytes,
)
from fast_llm.planning.evaluations import measured_sets
from fast_llm.planning.run_spec import RunSpec
from fast_llm.planning.stages import (
    StageSpan,
    describe_stage,
    last_sequence,
    remaining_stages,
    total_flops,
)
from fast_llm.terminal import counted, fields, table

Rows = list[tuple[str, str]]  # label and text; an empty label continues the row above
MOMENTS = {"auto": "fp32 or bf16", "fp32": "fp32", "bf16": "bf16", "int8": "8-bit"}


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
    flops = total_flops(config, spec.batch_size)
    rows = [
        (
            "Model",
            f"{spec.cost.parameters:,} parameters: {transformer.num_layers} layers of"
            f" {transformer.hidden_size}, {transformer.num_attention_heads} heads in"
            f" {transformer.head_groups} groups, vocabulary {config.model.base_model.vocab_size:,}"
            + _experts(spec),
        ),
        *_parameter_rows(spec),
        ("Start", _start(spec)),
        *([("Ancestors", describe_ancestors(spec.ancestors))] if spec.ancestors else []),
        (
            "Precision",
            f"computes in {config.model.distributed.training_dtype}{fp8}; fp32 weights and"
            f" gradients, {MOMENTS[config.optimizer.moments_dtype]} moments",
        ),
        ("Compiler", describe_compiler(config, spec.settings_before)),
        ("Processes", _processes(spec)),
        ("Batch", _batch(spec)),
        (
            "Training",
            f"{counted(training.train_iters, 'step')} of {tokens:,} tokens ="
            f" {training.train_iters * tokens:,} tokens, {flops:.3g} floating-point operations"
            + _remaining(spec, tokens)
            + _padding(spec, training.train_iters * tokens),
        ),
        *_learning_rate(config),
    ]
    rows += _data_rows(spec, tokens) + _saving_rows(spec)
    return rows + [("Changed", change) for change in spec.changes]


def _remaining(spec: RunSpec, step_tokens: int) -> str:
    """The steps that a resumed run or a branch has left."""
    if not spec.completed_steps:
        return ""
    left = spec.config.training.train_iters - spec.completed_steps
    tokens = f", {left * step_tokens:,} tokens" * bool(left)
    return f"; {counted(left, 'step')} left{tokens}"


def _last_sequence(spec: RunSpec) -> int:
    """How many sequences the run has consumed by its end."""
    return last_sequence(spec.config, _spans(spec))


def _spans(spec: RunSpec) -> list[StageSpan]:
    """The stages from where the run is."""
    samples = spec.consumed_samples
    tokens = spec.history.inputs(samples) if spec.history is not None else 0
    return remaining_stages(spec.config, spec.completed_steps, samples, tokens, spec.batch_size)


def _padding(spec: RunSpec, tokens: int) -> str:
    """Of these tokens, how many are padding, in all orders and stages of the run."""
    if spec.history is None:
        return ""
    end = _last_sequence(spec)
    share = sum(spec.history.expected_padding(end).values()) / max(1, spec.history.inputs(end))
    if not share or not tokens:
        return ""
    return f"; {100 * share:.3g} % of the tokens, {round(share * tokens):,}, are padding"


def _experts(spec: RunSpec) -> str:
    """Experts, and the parameters that compute one token."""
    t = spec.config.model.base_model.transformer
    if not (layers := t.expert_layers()):
        return ""
    return (
        f"; {t.num_experts_per_token} of {t.num_experts} experts in {len(layers)} layers,"
        f" {spec.cost.active_parameters:,} active parameters"
    )


def _parameter_rows(spec: RunSpec) -> Rows:
    """The parameters that each pattern of the optimizer covers, if there are patterns."""
    optimizer, base = spec.config.optimizer, spec.config.model.base_model
    shapes = family_of(base).shapes(base)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    lines = [
        (f"{sum(sizes[name] for name in names):,}", f"{len(names):,}", effect, pattern)
        for pattern, effect, names in covered(optimizer, shapes)
    ]
    if not lines:
        return []
    titles = ("parameters", "tensors", "effect", "pattern")
    rows = [("Parameters", table(titles, lines, (0, 1)))]
    if frozen := sum(sizes[name] for name in frozen_names(optimizer, shapes)):
        total = sum(sizes.values())
        rows.append(("", f"{total - frozen:,} of {total:,} parameters are trained"))
    return rows


def _start(spec: RunSpec) -> str:
    folder = spec.pretrained_folder
    if spec.checkpoint is not None:
        begins = "branches" if spec.branches else "resumes"
        return f"{begins} from {spec.checkpoint}, after step {spec.completed_steps}"
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
    if distributed.expert_parallel > 1:
        words.append(f"expert parallel {distributed.expert_parallel}")
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
    processes = counted(data_parallel, "process", "processes")
    words = (
        f"{counted(spec.batch_size, 'sequence')} of {spec.config.batch.sequence_length:,} tokens ="
    )
    if spec.config.batch.micro_batch_size == "auto":
        return f"{words} micro-batches as memory allows × {processes}"
    batch = spec.batch
    return (
        f"{words} {batch.micro_batch_size} a micro-batch ×"
        f" {counted(batch.micro_batches, 'micro-batch', 'micro-batches')} × {processes}"
        + (f", with {counted(batch.padding, 'empty row')}" if batch.padding else "")
    )


def _learning_rate(config: TrainConfig) -> Rows:
    """The rate at the start, at each border between pieces of the schedule, and at the end."""
    rate, last = config.optimizer.learning_rate, config.training.train_iters
    if not last:
        return []
    scale = config.optimizer.default_learning_rate_scale
    pieces = [(step, name) for step, name in borders(rate) if step < last]
    lines = [
        (f"{step:,}", f"{learning_rate(step, rate) * scale:.4g}", name)
        for step, name in [*pieces, (last, "end of training")]
    ]
    return [("Schedule", table(("step", "learning rate", "then"), lines, (1,)))]


def _data_rows(spec: RunSpec, step_tokens: int) -> Rows:
    """The data that the run reads. `step_tokens`: tokens of a step."""
    rows: Rows = []
    training, dataset = spec.config.training, spec.dataset
    history, sequences = spec.history, _last_sequence(spec)
    steady = training.train_iters * step_tokens
    if history is not None and history.inputs(sequences) != steady:
        padding = sum(history.expected_padding(sequences).values())
        consumed = history.inputs(sequences) - round(padding)
        rows.append(
            (
                "",
                f"with other batch sizes before, or skipped data: {consumed:,} tokens by the end",
            )
        )
    rows += _source_rows(dataset, sequences)
    if stages := _stage_lines(spec):
        headings = ("steps", "tokens", "share", "epochs", "source")
        rows.append(("Stages", table(headings, stages, (0, 1, 2, 3))))
        rows += [
            ("", f"stage {number + 1}: {describe_stage(spec.config, number)}")
            for number, stage in enumerate(spec.config.data.stages)
            if stage.changes_model
        ]
    rows += _masked_rows(dataset, spec.consumed_samples, sequences)
    if dataset.documents("training"):
        shares = [
            (split, f"{dataset.documents(split):,}", f"{dataset.tokens(split):,}")
            for split in ("training", "validation", "test")
        ]
        rows.append(("Split", table(("for", "documents", "tokens"), shares, (1, 2))))
    if training.validation.interval is not None and training.validation.iterations is not None:
        measured = training.validation.iterations * step_tokens
        measured = round(measured * (1 - dataset.padding("validation")))
        own = measured_sets(spec.config)
        named = [name for name in dataset.validation_sets if name not in own]
        rows.append(
            (
                "Validation",
                f"at the start, {_every(training.validation.interval)} and at the end, on the"
                f" same {measured:,} of {dataset.tokens('validation'):,} tokens"
                + (f", and on {', '.join(named)}" if named else ""),
            )
        )
    return rows + _evaluation_rows(spec.config)


def _source_rows(dataset: Dataset, sequences: int) -> Rows:
    """Each source's tokens, and its epochs after this many sequences."""
    found = dataset.epochs("training", sequences)
    padded = int(any(source.padding for source, _ in found))
    sources = [
        (
            f"{source.tokens:,}",
            f"{epochs:.3g}",
            *[f"{100 * source.padding:.3g} %"] * padded,
            source.name,
        )
        if source.tokens
        else ("unlimited", "-", source.name)  # format: random
        for source, epochs in found
    ]
    heads = ("training tokens", "epochs", *["padding"] * padded, "source")
    return [("Data", table(heads, sources, range(2 + padded)))] if sources else []


def _masked_rows(dataset: Dataset, first: int, last: int) -> Rows:
    """What label masks leave out of the sequences from `first` to before `last`."""
    masked = sum(source.masked_tokens for source in dataset.masked_sources)
    if not masked:
        return []
    tokens, share = dataset.tokens("training"), dataset.masked(first, last)
    words = (
        f"{masked:,} of {tokens:,} training tokens are no targets, {share:.1%} of what the run"
        " reads"
    )
    if dataset.fim is not None:
        names = ", ".join(source.name for source in dataset.masked_sources)
        words += f"; data.fim leaves {names} as it is"
    return [("Masked", words)]


def _evaluation_rows(config: TrainConfig) -> Rows:
    """The evaluations on intervals of their own."""
    rows: Rows = []
    for name, one in config.training.evaluations.items():
        if one.interval is not None:
            what = f"tasks {', '.join(one.tasks)}" if one.tasks else ", ".join(one.validation_sets)
            limit = f", {one.limit:,} examples of each" if one.limit is not None else ""
            when = f"at the start, {_every(one.interval)} and at the end"
            rows.append(("Evaluations" if not rows else "", f"{name}: {what}{limit}, {when}"))
    return rows


def _stage_lines(spec: RunSpec) -> list[tuple[str, ...]]:
    """For each stage from where the run is, and each source: share, and epochs by its end."""
    config, history = spec.config, spec.history
    if not config.data.stages or history is None:
        return []
    split, end = spec.dataset.splits["training"], config.training.train_iters
    lines: list[tuple[str, ...]] = []
    for span in _spans(spec):
        steps = min(span.last or end, end) - span.after
        if steps <= 0:
            lines.append(("", "", "", "", f"stage {span.number + 1} is after the last step"))
            continue
        count = steps * span.batch_size
        order, edges = split.order_at(span.index), split.edges(span.weights)
        first = (
            f"{span.after + 1:,} to {span.after + steps:,}",
            f"{count * span.length:,}",
        )
        for source, epochs, (low, high) in zip(
            split.sources, order.epochs(span.index + count), pairwise(edges), strict=True
        ):
            share = f"{100 * (high - low) / UNIT:.3g} %"
            lines.append((*first, share, f"{epochs:.3g}", source.name))
            first = ("", "")
    return lines


def _saving_rows(spec: RunSpec) -> Rows:
    """The checkpoints and exports that the run writes, and their size."""
    rows: Rows = []
    config, parameters = spec.config, spec.cost.parameters
    saved, export = config.training.checkpoint, config.training.export
    lines = []
    if saved.interval is not None:
        size = checkpoint_bytes(config, parameters)
        every = counted(saved.interval, "step")
        lines.append(("checkpoints", every, format_bytes(size), _kept(saved)))
    if export.interval is not None:
        size = export_bytes(config, parameters)
        every = counted(export.interval, "step")
        lines.append(("exports", every, format_bytes(size), _kept(export)))
    if lines:
        rows.append(("Saving", table(("", "every", "size", "kept"), lines, (1, 2))))
    if (repo := export.push_to_hub.repo) is not None:
        average, private = export.push_to_hub.average, export.push_to_hub.private
        what = f"exports of the average {average}" if average else "exports"
        rows.append(("", f"{what} are pushed to {'the private ' * private}{repo} on the Hub"))
    if saved.interval is not None:
        rows.append(("", _background(spec, copied_bytes(config, parameters))))
    rows += _averages(spec, parameters)
    if spec.folder is not None:
        use = disk_use(config, spec.folder, parameters, spec.completed_steps)
        total = format_bytes(sum(count * size for count, size in use.values()))
        free = format_bytes(free_bytes(spec.folder))
        rows.append(("Disk", f"{free} free at {spec.folder}, this run takes {total} at most"))
    return rows


def _kept(saved: CheckpointConfig | ExportConfig) -> str:
    """How many saved folders are kept."""
    if saved.keep is None:
        return "all"
    if saved.keep_every is None or saved.interval is None:
        return f"{saved.keep}"
    return f"{_every(saved.keep_every * saved.interval)}, and the {saved.keep} newest of the others"


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {counted(steps, 'step')}"


def _averages(spec: RunSpec, parameters: int) -> list[tuple[str, str]]:
    """How each average is made, and the host memory that it takes over all processes."""
    size = 4 * parameters * _copies(spec)
    rows = []
    for name, average in spec.config.training.averages.items():
        kind = "uniform mean" if average.decay is None else f"EMA with decay {average.decay:g}"
        since = f" after step {average.start:,}" if average.start else ""
        stretch = f", anew every {average.length:,} steps" if average.length else ""
        rows.append(
            f"{name}: {kind} of the weights {_every(average.interval)}{since}{stretch};"
            f" {format_bytes(size)} of host memory"
        )
    if rows:
        rows.append(
            f"up to {format_bytes(size)} more on GPUs, for copies of the weights, and"
            f" {format_bytes(size * len(rows))} while a checkpoint or export is written"
        )
    return [("" if number else "Averages", row) for number, row in enumerate(rows)]


def _copies(spec: RunSpec) -> int:
    """How many groups of processes hold all weights together: several with hybrid sharding."""
    replicas = spec.config.model.distributed.replicas(spec.processes)
    return replicas // min(spec.config.model.multi_stage.shard_size or replicas, replicas)


def _background(spec: RunSpec, copied: int) -> str:
    """Whether training waits for checkpoints, or the host memory that background saving takes."""
    if not spec.config.training.checkpoint.background:
        return "training waits for checkpoints"
    return (
        "checkpoints are written in the background, from"
        f" {format_bytes(copied * _copies(spec))} of host memory"
    )
