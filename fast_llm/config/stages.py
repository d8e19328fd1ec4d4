"""Division of a pipeline: layers into stages, micro-batches into fillings of the pipeline.

A filling is a group of micro-batches that are in the pipeline together. Only arithmetic, without
torch.
"""

from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import TrainConfig

_INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")
_PER_STAGE = "model.multi_stage.layers_per_stage"
# Recomputation levels that save some results for one backward pass.
_SINGLE_PASS_LEVELS = ("activation", "activation_and_input", "selective")
_SCHEDULE = "model.multi_stage.pipeline_schedule"


def stage_sizes(config: TrainConfig) -> list[int]:
    """The layers of each pipeline stage, from the first stage to the last."""
    layers = config.model.base_model.transformer.num_layers
    wanted = config.model.multi_stage.layers_per_stage
    if isinstance(wanted, list):
        return wanted
    if wanted is not None and wanted > 0:
        full, rest = divmod(layers, wanted)
        return [wanted] * full + [rest] * (rest > 0)
    stages = config.model.distributed.pipeline_parallel
    each, rest = divmod(layers, stages)
    # Embedding and head are work, too: stages without them get the remaining layers first.
    order = [*range(1, stages - 1), 0, stages - 1]
    return [each + (stage in order[:rest]) for stage in range(stages)]


def schedule_name(config: TrainConfig, in_flight: int) -> str:
    """The pipeline schedule, or the default for this number of stages and micro-batches."""
    given = config.model.multi_stage.pipeline_schedule
    processes = config.model.distributed.pipeline_parallel
    if given is not None:
        return given
    if len(stage_sizes(config)) > processes:
        divides = in_flight % max(1, in_flight // processes) == 0
        return "interleaved_1f1b" if divides else "looped_bfs"
    return "1f1b" if in_flight >= processes else "gpipe"


def micro_batches_in_flight(config: TrainConfig, batch: BatchSizes) -> int:
    """Micro-batches of one filling; a step has `batch.micro_batches` / this fillings."""
    breadth = config.batch.breadth_first_micro_batches
    depth = config.batch.depth_first_micro_batches
    if breadth is not None:
        return breadth
    return max(1, batch.micro_batches // depth) if depth is not None else batch.micro_batches


def pipeline_problems(config: TrainConfig, batch: BatchSizes) -> list[tuple[str, str]]:
    """Settings of the pipeline that contradict each other: the setting at fault, and why.

    Without a pipeline all of its settings are at fault; with one, the first contradiction is
    reported.
    """
    if config.model.distributed.pipeline_parallel == 1:
        return _without_pipeline(config)
    for find in (_stage_problem, _micro_batch_problem, _schedule_problem):
        if (problem := find(config, batch)) is not None:
            return [problem]
    return []


def _without_pipeline(config: TrainConfig) -> list[tuple[str, str]]:
    settings, breadth = config.model.multi_stage, config.batch.breadth_first_micro_batches
    given = (
        (_PER_STAGE, settings.layers_per_stage, "leave it out"),
        (_SCHEDULE, settings.pipeline_schedule, "leave it out"),
        (
            "batch.breadth_first_micro_batches",
            breadth if breadth != 1 else None,
            "use depth_first_micro_batches",
        ),
    )
    return [
        (path, f"given {value}, but model.distributed.pipeline_parallel is 1; {advice}")
        for path, value, advice in given
        if value is not None
    ]


def _stage_problem(config: TrainConfig, batch: BatchSizes) -> tuple[str, str] | None:
    """The stages must hold all layers, and each process the same number of stages."""
    wanted = config.model.multi_stage.layers_per_stage
    processes = config.model.distributed.pipeline_parallel
    layers = config.model.base_model.transformer.num_layers
    if wanted == 0:
        return _PER_STAGE, "given 0, must be 1 or more"
    sizes = stage_sizes(config)
    if sum(sizes) != layers or (wanted is None and 0 in sizes):
        if isinstance(wanted, list):
            return _PER_STAGE, f"given {sizes}, must add up to num_layers {layers}"
        return (
            "model.distributed.pipeline_parallel",
            f"given {processes}, must be at most num_layers {layers}",
        )
    if len(sizes) % processes:
        return (
            _PER_STAGE,
            f"given {wanted}, which makes {len(sizes)} stages of {layers} layers; their number"
            f" must be a multiple of pipeline_parallel {processes}",
        )
    return None


def _micro_batch_problem(config: TrainConfig, batch: BatchSizes) -> tuple[str, str] | None:
    """All fillings must have the same number of micro-batches."""
    breadth = config.batch.breadth_first_micro_batches
    depth = config.batch.depth_first_micro_batches
    in_flight = micro_batches_in_flight(config, batch)
    if batch.micro_batches % in_flight == 0 and batch.micro_batches % (depth or 1) == 0:
        return None
    name, given = ("depth", depth) if breadth is None else ("breadth", breadth)
    return (
        f"batch.{name}_first_micro_batches",
        f"given {given}, must divide the {batch.micro_batches} micro-batches of a step",
    )


def _schedule_problem(config: TrainConfig, batch: BatchSizes) -> tuple[str, str] | None:
    """A schedule restricts the numbers of stages and micro-batches."""
    processes = config.model.distributed.pipeline_parallel
    layers = config.model.base_model.transformer.num_layers
    in_flight = micro_batches_in_flight(config, batch)
    name, each = schedule_name(config, in_flight), len(stage_sizes(config)) // processes
    needed = {"1f1b": 1, "gpipe": 1, "zbv_zero_bubble": 2}.get(name)
    if needed is not None and each != needed:
        wanted = f"{needed} stages" if needed > 1 else "one stage"
        return (
            _SCHEDULE,
            f"given {name}, which needs {wanted} a process, but there"
            f" {'are' if each > 1 else 'is'} {each}; set layers_per_stage to"
            f" {max(1, layers // (processes * needed))}",
        )
    if name == "1f1b" and in_flight < processes:
        return (
            _SCHEDULE,
            f"given 1f1b, which needs at least {processes} micro-batches, not {in_flight}; use"
            " gpipe",
        )
    if name in _INTERLEAVED and in_flight % max(1, in_flight // processes):
        near = in_flight // processes * processes
        return (
            _SCHEDULE,
            f"{name} takes a multiple of pipeline_parallel {processes} micro-batches, not"
            f" {in_flight}; choose a batch_size with {near} or {near + processes}, or looped_bfs",
        )
    if name.endswith("zero_bubble") and config.model.multi_stage.zero_stage == 3:
        return (
            _SCHEDULE,
            f"given {name}, but with zero_stage: 3 it loses gradients: weights are freed before"
            " theirs are made; use zero_stage: 2 or another schedule",
        )
    level = config.model.base_model.transformer.mlp_recompute_level
    if name.endswith("zero_bubble") and level in _SINGLE_PASS_LEVELS:
        return (
            _SCHEDULE,
            f"given {name}, which computes gradients in two passes, but mlp_recompute_level:"
            f" {level} saves results for one; use full, block or none, or another schedule",
        )
    if name == "zbv_zero_bubble" and config.model.base_model.tie_word_embeddings:
        return (
            _SCHEDULE,
            "given zbv_zero_bubble, which puts embedding and head on one process as two weights,"
            " but tie_word_embeddings makes them one; use interleaved_zero_bubble",
        )
    return None
