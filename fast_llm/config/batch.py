"""Division of a batch into micro-batches and processes.

The batch size stays as given on any number of processes, so that a run can resume on other nodes.
Where it does not divide evenly, micro-batches are padded with rows without targets: all processes
do the same work. Only arithmetic.
"""

from dataclasses import dataclass

from fast_llm.config.train import BatchConfig
from fast_llm.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of a step.

    `batch_size` + `padding` = `micro_batch_size` × `micro_batches` × data-parallel processes
    """

    batch_size: int  # sequences a step, over all processes
    micro_batch_size: int  # rows a forward pass
    micro_batches: int  # forward passes a step, on each process
    padding: int = 0  # empty rows a step


def derive_batch_sizes(batch: BatchConfig, processes: int, pipeline: bool = False) -> BatchSizes:
    """Derive the sizes of a step on this many data-parallel processes.

    Settings that are not given follow from the others. With neither size given, a micro-batch is
    one sequence. `pipeline`: micro-batches pass through several processes, in
    depth_first_micro_batches fillings of the pipeline. `auto` must be resolved before. Raises
    ConfigError if the numbers contradict each other.
    """
    assert batch.micro_batch_size != "auto", "auto is resolved first"
    sequential = batch.sequential_micro_batches
    depth, breadth = batch.depth_first_micro_batches, batch.breadth_first_micro_batches
    if sequential is not None and depth is not None and (breadth or not pipeline):
        product = depth * (breadth or 1)
        if sequential != product:
            raise ConfigError(
                [
                    f"batch.sequential_micro_batches: given {sequential}, must be"
                    f" depth_first_micro_batches {depth} × breadth_first_micro_batches"
                    f" {breadth or 1} = {product}; leave it out"
                ]
            )
    size, micro = batch.batch_size, batch.micro_batch_size
    given, name = sequential, "sequential"
    if given is None and size is not None and micro is not None and pipeline:
        given = depth * breadth if depth and breadth else None  # one of them follows from the other
    elif given is None and (depth or breadth):
        given, name = (depth or 1) * (breadth or 1), "depth_first" if depth else "breadth_first"
    if size is None:
        micro, given = micro or 1, given or 1
        return BatchSizes(micro * given * processes, micro, given)
    many = given or 1
    if micro is None:
        micro = -(-size // (many * processes))
    else:
        many = -(-size // (micro * processes))
    rows = -(-size // micro)
    if rows < processes and (micro == batch.micro_batch_size or size < processes):
        raise ConfigError(
            [
                f"batch.batch_size: batch_size {size} / micro_batch_size {micro} = {rows}"
                f" micro-batch{'es' * (rows > 1)} for {_processes(processes)}: {processes - rows}"
                " would have nothing to do; raise it, lower micro_batch_size or start fewer"
            ]
        )
    if given is not None and given != many:
        raise ConfigError(
            [
                f"batch.{name}_micro_batches: given {given}, but batch_size {size} /"
                f" (micro_batch_size {micro} × {_processes(processes)}) = {many}; leave it out"
            ]
        )
    return BatchSizes(size, micro, many, micro * many * processes - size)


def with_smallest_micro_batch(batch: BatchConfig) -> BatchConfig:
    """The batch with 1 in place of `micro_batch_size: auto`, the least that it may become.

    Raises ConfigError if other settings do not go with `auto`.
    """
    if batch.micro_batch_size != "auto":
        return batch
    if batch.batch_size is None:
        raise ConfigError(["batch.micro_batch_size: given auto, which needs batch_size; give it"])
    for name in (
        "sequential_micro_batches",
        "depth_first_micro_batches",
        "breadth_first_micro_batches",
    ):
        if getattr(batch, name) is not None:
            raise ConfigError([f"batch.{name}: follows from micro_batch_size: auto; leave it out"])
    return batch.model_copy(update={"micro_batch_size": 1})


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")
