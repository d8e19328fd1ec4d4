"""How a batch is dealt to processes and micro-batches: arithmetic that explains itself where it does not come out."""

from dataclasses import dataclass

from fast_llm.config.train import BatchConfig
from fast_llm.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """One step: `batch_size` = `micro_batch_size` × `micro_batches` × processes."""

    batch_size: int  # sequences a step, over all processes
    micro_batch_size: int  # sequences a forward pass
    micro_batches: int  # forward passes a step, on each process


def plan_batch(batch: BatchConfig, processes: int) -> BatchPlan:
    """One step of `batch` on so many processes. What is not given follows from the rest; with neither size given a
    micro-batch is one sequence.

    Raises ConfigError where the numbers do not fit together.
    """
    sequential = batch.sequential_micro_batches
    depth, breadth = batch.depth_first_micro_batches, batch.breadth_first_micro_batches or 1
    if sequential is not None and depth is not None and sequential != depth * breadth:
        raise ConfigError(
            [
                f"batch.sequential_micro_batches: given {sequential}, must be depth_first_micro_batches"
                f" {depth} × breadth_first_micro_batches {breadth} = {depth * breadth}; leave it out"
            ]
        )
    given = sequential if sequential is not None else depth
    size, micro = batch.batch_size, batch.micro_batch_size
    if size is None:
        micro, given = micro or 1, given or 1
        return BatchPlan(micro * given * processes, micro, given)
    if micro is None:
        given = given or 1
        unit, words = given * processes, f"{given} micro-batches × {_processes(processes)}"
        _divides(size, unit, words)
        return BatchPlan(size, size // unit, given)
    unit, words = micro * processes, f"micro_batch_size {micro} × {_processes(processes)}"
    _divides(size, unit, words)
    if given is not None and given != size // unit:
        raise ConfigError(
            [
                f"batch.{'depth_first' if sequential is None else 'sequential'}_micro_batches: given {given}, but"
                f" batch_size {size} / ({words}) = {size // unit}; leave it out"
            ]
        )
    return BatchPlan(size, micro, size // unit)


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _divides(size: int, unit: int, words: str) -> None:
    if size % unit:
        below, above = size // unit * unit, (size // unit + 1) * unit
        near = f"the nearest are {below} and {above}" if below else f"the smallest is {above}"
        raise ConfigError([f"batch.batch_size: batch_size {size} must be a multiple of {words} = {unit}; {near}"])
