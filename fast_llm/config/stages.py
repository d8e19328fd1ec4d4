"""How a pipeline is divided: layers into stages, a step's micro-batches into fillings. Arithmetic, without torch."""

from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import TrainConfig

_INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")


def stage_sizes(config: TrainConfig) -> list[int]:
    """The layers of each pipeline stage, from the first stage to the last."""
    layers, wanted = (
        config.model.base_model.transformer.num_layers,
        config.model.multi_stage.layers_per_stage,
    )
    if isinstance(wanted, list):
        return wanted
    if wanted is not None and wanted > 0:
        whole, rest = divmod(layers, wanted)
        return [wanted] * whole + [rest] * (rest > 0)
    stages = config.model.distributed.pipeline_parallel
    whole, rest = divmod(layers, stages)
    # The embedding and the head are work, too: what is left over goes to stages between them.
    order = [*range(1, stages - 1), 0, stages - 1]
    return [whole + (stage in order[:rest]) for stage in range(stages)]


def schedule_name(config: TrainConfig, in_flight: int) -> str:
    """The pipeline schedule, with the default filled in."""
    given, processes = (
        config.model.multi_stage.pipeline_schedule,
        config.model.distributed.pipeline_parallel,
    )
    if given is not None:
        return given
    if len(stage_sizes(config)) > processes:
        return (
            "interleaved_1f1b" if in_flight % max(1, in_flight // processes) == 0 else "looped_bfs"
        )
    return "1f1b" if in_flight >= processes else "gpipe"


def micro_batches_in_flight(config: TrainConfig, batch: BatchSizes) -> int:
    """How many micro-batches are in the pipeline together; it is filled `micro_batches` / this times a step."""
    breadth, depth = (
        config.batch.breadth_first_micro_batches,
        config.batch.depth_first_micro_batches,
    )
    if breadth is not None:
        return breadth
    return max(1, batch.micro_batches // depth) if depth is not None else batch.micro_batches


def problems(config: TrainConfig, batch: BatchSizes) -> list[tuple[str, str]]:
    """What does not fit together: the setting at fault, and why."""
    settings, processes = config.model.multi_stage, config.model.distributed.pipeline_parallel
    layers = config.model.base_model.transformer.num_layers
    above, breadth = "model.multi_stage", config.batch.breadth_first_micro_batches
    per_stage, schedule = f"{above}.layers_per_stage", f"{above}.pipeline_schedule"
    if processes == 1:
        found = [
            (path, f"given {given}, but model.distributed.pipeline_parallel is 1; {instead}")
            for path, given, instead in (
                (per_stage, settings.layers_per_stage, "leave it out"),
                (schedule, settings.pipeline_schedule, "leave it out"),
                (
                    "batch.breadth_first_micro_batches",
                    breadth if breadth != 1 else None,
                    "use depth_first_micro_batches",
                ),
            )
            if given is not None
        ]
        return found
    if settings.layers_per_stage == 0:
        return [(per_stage, "given 0, must be 1 or more")]
    sizes = stage_sizes(config)
    if sum(sizes) != layers or (settings.layers_per_stage is None and 0 in sizes):
        return [
            (per_stage, f"given {sizes}, must add up to num_layers {layers}")
            if isinstance(settings.layers_per_stage, list)
            else (
                "model.distributed.pipeline_parallel",
                f"given {processes}, must be at most num_layers {layers}",
            )
        ]
    if len(sizes) % processes:
        words = (
            f"given {settings.layers_per_stage}, which makes {len(sizes)} stages of {layers} layers"
        )
        return [
            (
                per_stage,
                f"{words}; their number must be a multiple of pipeline_parallel {processes}",
            )
        ]
    each, in_flight = len(sizes) // processes, micro_batches_in_flight(config, batch)
    depth = config.batch.depth_first_micro_batches or 1
    if batch.micro_batches % in_flight or batch.micro_batches % depth:
        which = "breadth" if breadth is not None else "depth"
        given = breadth if breadth is not None else config.batch.depth_first_micro_batches
        words = f"given {given}, must divide the {batch.micro_batches} micro-batches of a step"
        return [(f"batch.{which}_first_micro_batches", words)]
    name = schedule_name(config, in_flight)
    single, needed = ("1f1b", "gpipe"), {"zbv_zero_bubble": 2}.get(name)
    if (name in single and each > 1) or (needed and each != needed):
        wanted = f"{needed} stages" if needed else "one stage"
        return [
            (
                schedule,
                f"given {name}, which needs {wanted} a process, but there {'are' if each > 1 else 'is'} {each}; set"
                f" layers_per_stage to {max(1, layers // (processes * (needed or 1)))}",
            )
        ]
    if name == "1f1b" and in_flight < processes:
        return [
            (
                schedule,
                f"given 1f1b, which needs at least {processes} micro-batches, not {in_flight}; use gpipe",
            )
        ]
    if name in _INTERLEAVED and in_flight % max(1, in_flight // processes):
        near = in_flight // processes * processes
        return [
            (
                schedule,
                f"{name} takes a multiple of pipeline_parallel {processes} micro-batches, not {in_flight}; choose a"
                f" batch_size with {near} or {near + processes}, or looped_bfs",
            )
        ]
    if name.endswith("zero_bubble") and settings.zero_stage == 3:
        return [
            (
                schedule,
                f"given {name}, but with zero_stage: 3 it loses gradients: weights are freed before theirs are made; use"
                " zero_stage: 2 or another schedule",
            )
        ]
    if name == "zbv_zero_bubble" and config.model.base_model.tie_word_embeddings:
        return [
            (
                schedule,
                "given zbv_zero_bubble, which puts embedding and head on one process as two weights, but"
                " tie_word_embeddings makes them one; use interleaved_zero_bubble",
            )
        ]
    return []
