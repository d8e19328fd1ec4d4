"""The constraints across settings, one function each. Those on the shape of the model are in
model_checks.py, those on the learning rate in learning_rate.py, those on the data in
data_checks.py.

Each yields its violations: the dotted paths that it concerns, the one to point at first, and what
is wrong. `validate` leaves out violations that concern a setting that is wrong itself, so it can
report all mistakes of a file at once:

    validate(TrainConfig, document, REFUSED, RENAMED, constraints=partial(violations, processes=8))
"""

import math
from itertools import chain

from fast_llm.config.batch import BatchSizes, derive_batch_sizes, with_smallest_micro_batch
from fast_llm.config.data_checks import data_path, packing, sources, split, stage_length, stages
from fast_llm.config.document import Document
from fast_llm.config.learning_rate import schedule_problems
from fast_llm.config.model_checks import (
    Violations,
    activation,
    experts,
    export_format,
    fp8,
    heads,
    initialization,
    layer_kinds,
    rotary,
    tensor_parallel,
)
from fast_llm.config.stages import pipeline_problems
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import Violation
from fast_llm.errors import ConfigError
from fast_llm.terminal import nearest


def violations(config: TrainConfig, processes: int) -> Violations:
    """Every violated constraint of this configuration on `processes` processes."""
    yield from _batch(config, processes)
    yield from _processes(config, processes)
    yield from _shard_size(config, processes)
    yield from _expert_parallel(config, processes)
    yield from _profiled_ranks(config, processes)
    yield from _pipeline(config, processes)
    yield from _in_stages(config, processes)
    for constraint in (
        _micro_sequence,
        tensor_parallel,
        _sequence_data_parallel,
        data_path,
        sources,
        stages,
        split,
        packing,
        _learning_rate,
        _loss_scale,
        _sub_intervals,
        _keep_every,
        _spikes,
        _experiment_dir,
        _push,
        _samples,
        _validation,
        _evaluations,
        heads,
        experts,
        layer_kinds,
        activation,
        export_format,
        rotary,
        initialization,
        _pretrained,
        fp8,
        _steps,
    ):
        yield from constraint(config)


def _in_stages(config: TrainConfig, processes: int) -> Violations:
    """What the lengths and positions of stages must meet, as those of the whole run do."""

    def found(one: TrainConfig) -> list[Violation]:
        shaped = _batch(one, processes), _pipeline(one, processes), _sequence_data_parallel(one)
        return [*chain(*shaped, rotary(one), fp8(one))]

    always, positions = found(config), "model.base_model.transformer.rotary"
    for number, stage in enumerate(config.data.stages):
        if not stage.changes_model or any(stage_length(config, number)):
            continue
        inside, here = config.in_stage(number), f"data.stages.{number}"
        length, rows = inside.batch.sequence_length, inside.batch.batch_size
        for paths, text in found(inside):
            first = paths[0]
            if (paths, text) in always:
                continue
            if first.startswith(positions):
                yield (first.replace(positions, f"{here}.rotary"), "data.stages", positions), text
                continue
            if first != "batch.sequence_length":
                text = f"given {length}, which makes batch_size {rows}, but {first}: {text}"
            yield (f"{here}.sequence_length", "data.stages", *_BATCH, "batch.sequence_length"), text


def check(config: TrainConfig, document: Document, processes: int) -> list[str]:
    """Every violation as a message with its place in the file."""
    return [
        f"{document.where(paths[0])}: {paths[0]}: {text}"
        for paths, text in violations(config, processes)
    ]


_BATCH = tuple(
    f"batch.{name}"
    for name in (
        "batch_size",
        "micro_batch_size",
        "sequential_micro_batches",
        "depth_first_micro_batches",
        "breadth_first_micro_batches",
    )
)


def _batch_sizes(config: TrainConfig, processes: int) -> BatchSizes:
    distributed = config.model.distributed
    return derive_batch_sizes(
        with_smallest_micro_batch(config.batch),
        distributed.data_parallel(processes),
        distributed.pipeline_parallel > 1,
    )


def _batch(config: TrainConfig, processes: int) -> Violations:
    try:
        _batch_sizes(config, processes)
    except ConfigError as error:
        for problem in error.problems:
            path, _, text = problem.partition(": ")
            yield (path, *_BATCH), text


_AXES = ("tensor_parallel", "sequence_data_parallel", "pipeline_parallel")


def _processes(config: TrainConfig, processes: int) -> Violations:
    sizes = {name: getattr(config.model.distributed, name) for name in _AXES}
    product = math.prod(sizes.values())
    if processes % product:
        names = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        given = " × ".join(names) + (f" = {product}" if len(names) > 1 else "")
        yield (
            tuple(
                f"model.distributed.{name}" for name in sorted(_AXES, key=lambda name: -sizes[name])
            ),
            f"{given} must divide the number of processes, which is {processes}; start that many"
            f" with torchrun (to --validate alone, set WORLD_SIZE={product} in the environment)",
        )


def _shard_size(config: TrainConfig, processes: int) -> Violations:
    size, distributed = config.model.multi_stage.shard_size, config.model.distributed
    replicas = distributed.replicas(processes)
    if size is not None and size < replicas and replicas % size:
        divisors = [str(divisor) for divisor in range(1, replicas + 1) if replicas % divisor == 0]
        words = f"the {replicas} processes" + (
            " that share training state" if replicas < processes else ""
        )
        yield (
            ("model.multi_stage.shard_size",),
            f"given {size}, must divide {words}: {', '.join(divisors)}",
        )


def _expert_parallel(config: TrainConfig, processes: int) -> Violations:
    distributed, t = config.model.distributed, config.model.base_model.transformer
    size, name = distributed.expert_parallel, "model.distributed.expert_parallel"
    number = "model.base_model.transformer.num_experts"
    if size > 1 and not t.expert_layers():
        yield (name, number), f"given {size}, but the model has no experts; leave it out"
        return
    if t.num_experts % size:
        yield (
            (name, number),
            f"given {size}, must divide the model's num_experts {t.num_experts}, e.g."
            f" {math.gcd(size, t.num_experts)}",
        )
    replicas = distributed.replicas(processes)
    shard = config.model.multi_stage.shard_size
    sharing = replicas if shard is None else min(shard, replicas)
    if sharing % size:
        yield (
            (name, "model.multi_stage.shard_size"),
            f"given {size}, must divide the {sharing} processes that share training state",
        )


def _profiled_ranks(config: TrainConfig, processes: int) -> Violations:
    profiling = config.training.profiling
    if profiling.interval is not None and max(profiling.ranks) >= processes:
        yield (
            ("training.profiling.ranks", "training.profiling.interval"),
            f"given {profiling.ranks}, each must be below the number of processes, which is"
            f" {processes}",
        )


def _sequence_data_parallel(config: TrainConfig) -> Violations:
    distributed, length = config.model.distributed, config.batch.sequence_length
    size = distributed.sequence_data_parallel
    if size > 1 and length % (2 * size):
        yield (
            ("batch.sequence_length", "model.distributed.sequence_data_parallel"),
            f"given {length}, must be a multiple of 2 × sequence_data_parallel {size} = {2 * size}:"
            " each process holds a chunk from the front and one from the back",
        )
    elif distributed.sequence_tensor_parallel and length // size % distributed.tensor_parallel:
        factor = size * distributed.tensor_parallel
        yield (
            (
                "batch.sequence_length",
                "model.distributed.sequence_tensor_parallel",
                "model.distributed.tensor_parallel",
            ),
            f"given {length}, must be a multiple of tensor_parallel {distributed.tensor_parallel}"
            + (f" × sequence_data_parallel {size} = {factor}" if size > 1 else "")
            + " with sequence_tensor_parallel",
        )


def _pipeline(config: TrainConfig, processes: int) -> Violations:
    try:
        batch = _batch_sizes(config, processes)
    except ConfigError:
        return  # reported by _batch
    for path, text in pipeline_problems(config, batch):
        concerned = (
            "model.multi_stage.layers_per_stage",
            "model.multi_stage.pipeline_schedule",
            "model.distributed.pipeline_parallel",
            "batch.breadth_first_micro_batches",
        )
        yield (path, *(name for name in concerned if name != path)), text


def _micro_sequence(config: TrainConfig) -> Violations:
    batch = config.batch
    if batch.micro_sequence_length not in (None, batch.sequence_length):
        yield (
            ("batch.micro_sequence_length", "batch.sequence_length"),
            f"given {batch.micro_sequence_length}, must be sequence_length {batch.sequence_length}:"
            " sequences are not split into parts; leave it out, and use micro_batch_size: 1 and"
            " mlp_recompute_level: full to save memory",
        )


def _learning_rate(config: TrainConfig) -> Violations:
    yield from schedule_problems(config.optimizer.learning_rate, config.training.train_iters)


def _loss_scale(config: TrainConfig) -> Violations:
    scaler, above = config.optimizer.gradient_scaler, "optimizer.gradient_scaler"
    if scaler.minimum > scaler.initial:
        yield (
            (f"{above}.minimum", f"{above}.initial"),
            f"given {scaler.minimum}, must be at most initial {scaler.initial}",
        )


def _sub_intervals(config: TrainConfig) -> Violations:
    training = config.training
    if not training.shutdown.within(training.checkpoint):
        yield (
            ("training.shutdown.interval", "training.shutdown.offset", "training.checkpoint"),
            f"given {training.shutdown.interval}, must be a multiple of"
            f" training.checkpoint.interval ({_number(training.checkpoint.interval)}) with the same"
            " offset: a run can only stop where it saves",
        )
    if training.wandb is not None and not training.wandb.alert.within(training.logs):
        yield (
            ("training.wandb.alert.interval", "training.wandb.alert.offset", "training.logs"),
            f"given {training.wandb.alert.interval}, must be a multiple of training.logs.interval"
            f" ({_number(training.logs.interval)}) with the same offset: an alert posts what is"
            " logged",
        )


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def _keep_every(config: TrainConfig) -> Violations:
    for name, saved in (
        ("checkpoint", config.training.checkpoint),
        ("export", config.training.export),
    ):
        if saved.keep_every is not None and saved.interval is None:
            yield (
                (f"training.{name}.keep_every", f"training.{name}.interval"),
                f"given {saved.keep_every}, but nothing is saved: set training.{name}.interval, or"
                " leave it out",
            )


def _spikes(config: TrainConfig) -> Violations:
    if config.training.spikes.policy == "rewind" and config.training.checkpoint.interval is None:
        yield (
            ("training.spikes.policy", "training.checkpoint.interval"),
            "given rewind, but no checkpoint is saved to go back to: set"
            " training.checkpoint.interval,"
            " or use skip or stop",
        )


def _experiment_dir(config: TrainConfig) -> Violations:
    training = config.training
    if config.run.experiment_dir is not None:
        return
    for name, wanted in (
        ("training.checkpoint.interval", training.checkpoint.interval is not None),
        ("training.export.interval", training.export.interval is not None),
        ("training.shutdown.interval", training.shutdown.interval is not None),
        ("training.profiling.interval", training.profiling.interval is not None),
        ("training.samples.interval", training.samples.interval is not None),
        ("training.tensorboard", training.tensorboard),
    ):
        if wanted:
            yield (name, "run.experiment_dir"), "needs a folder to write to: set run.experiment_dir"


def _samples(config: TrainConfig) -> Violations:
    samples, distributed = config.training.samples, config.model.distributed
    every, prompts = "training.samples.interval", "training.samples.prompts"
    if samples.prompts and samples.interval is None:
        yield (
            (every, prompts),
            f"missing: {prompts} requires it (number of steps, e.g. 1000)",
        )
    if samples.interval is None:
        return
    if not samples.prompts:
        yield (prompts, every), f"missing: {every} requires it (a list of texts)"
    for name in ("pipeline_parallel", "sequence_data_parallel"):
        if getattr(distributed, name) > 1:
            yield (
                (every, f"model.distributed.{name}"),
                f"is not possible with model.distributed.{name}: a process needs all layers and all"
                " tokens of a text; leave one of them out. `fast-llm convert` and transformers"
                " generate text from any checkpoint",
            )


def _push(config: TrainConfig) -> Violations:
    training, where = config.training, "training.export.push_to_hub"
    push = training.export.push_to_hub
    if push.repo is not None and training.export.interval is None:
        yield (
            ("training.export.interval", f"{where}.repo"),
            f"missing: {where}.repo requires it (number of steps, e.g. 1000)",
        )
    if push.average is not None and push.average not in training.averages:
        known = ", ".join(training.averages) or "none"
        yield (
            (f"{where}.average", "training.averages"),
            f"given {push.average}, must be an average of training.averages: {known}",
        )


def _validation(config: TrainConfig) -> Violations:
    validation = config.training.validation
    every, many = "training.validation.interval", "training.validation.iterations"
    if validation.interval is not None and validation.iterations is None:
        yield (
            (many, every),
            "missing: training.validation.interval requires it (number of batches, e.g. 25)",
        )
    if validation.iterations is not None and validation.interval is None:
        yield (
            (every, many),
            "missing: training.validation.iterations requires it (number of steps, e.g. 1000, or"
            " null)",
        )
    never = validation.interval is None and "interval" in validation.model_fields_set
    left = set(config.data.validation_sets) - {
        name for one in config.training.evaluations.values() for name in one.validation_sets
    }
    if left and validation.interval is None and not never:
        yield (
            (every, "data.validation_sets"),
            "missing: data.validation_sets requires it (number of steps, e.g. 1000, or null for"
            " never)",
        )


def _evaluations(config: TrainConfig) -> Violations:
    """Each evaluation is complete; its sets exist, and each is measured once."""
    measured: dict[str, str] = {}
    for name, evaluation in config.training.evaluations.items():
        if evaluation.problem:
            yield (f"training.evaluations.{name}",), evaluation.problem
        here = f"training.evaluations.{name}.validation_sets"
        for number, one in enumerate(evaluation.validation_sets):
            concerned = (f"{here}.{number}", "data.validation_sets", here)
            if one not in config.data.validation_sets:
                known = ", ".join(config.data.validation_sets) or "no sets"
                hint = nearest(one, config.data.validation_sets)
                yield (
                    concerned,
                    f"given {one}, not a name of data.validation_sets{hint} (it has {known})",
                )
            elif one in measured:
                yield (
                    concerned,
                    f"given {one}, which training.evaluations.{measured[one]} measures already;"
                    " name it once",
                )
            measured.setdefault(one, name)


def _pretrained(config: TrainConfig) -> Violations:
    pretrained = config.pretrained
    state, style, path = "pretrained.optimizer_state", "pretrained.format", "pretrained.path"
    if pretrained.optimizer_state and pretrained.format != "distributed":
        yield (
            (state, style),
            "given yes, but a Hugging Face folder has no optimizer state; only format: distributed"
            " has",
        )
    if pretrained.format == "distributed" and pretrained.path is None:
        yield (path, style), "missing: format: distributed needs the folder of a checkpoint"


def _steps(config: TrainConfig) -> Violations:
    """0 steps are allowed if something is measured or saved."""
    training = config.training
    if not (
        training.train_iters
        or training.test_iters
        or training.validation.interval is not None
        or any(one.interval is not None for one in training.evaluations.values())
        or training.export.interval is not None
        or training.checkpoint.interval is not None
    ):
        yield (
            (
                "training.train_iters",
                "training.test_iters",
                "training.validation",
                "training.export",
                "training.checkpoint",
            ),
            "is 0, and nothing is measured or saved either: set the number of steps, e.g. 100_000",
        )
