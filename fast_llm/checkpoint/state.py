"""Training state in and out, through torch's distributed checkpoint (DCP).

DCP's planner knows which process holds which part of a tensor, so that a checkpoint of one layout is read by
any other. Its Hugging Face storage keeps tensors in safetensors with their offsets in the header; nothing
is pickled. Everything that is not a tensor is JSON in the folder's manifest.

Each process writes and hashes its own files; the first publishes the folder when all are done.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.weights import _agree, _readable
from fast_llm.errors import CheckpointError

LARGEST_FILE = 2**32  # bytes that one process writes to one file: DCP holds a file in memory


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `<root>/<step>`, whole or not at all; every process calls it.

    `group`: a gloo group with patience, or None with one process. Raises CheckpointError on all processes if one fails.
    """
    final = root / str(step)
    main = group is None or dist.get_rank() == 0
    error: str | None = None
    box: list[Any] = [None]
    if main:
        box[0] = folders.partial_name(final)
        try:
            box[0].mkdir(parents=True)
        except OSError as problem:
            error = f"{box[0]}: {problem.strerror}"
    _agree(error, group)
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group)
    partial: Path = box[0]
    files: dict[str, dict[str, Any]] = {}
    try:
        writer = dcp.HuggingFaceStorageWriter(
            str(partial), fqn_to_index_mapping=_files(tensors, group), save_distributed=True
        )
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=DefaultSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
        rank = 0 if group is None else dist.get_rank(group)
        mine = sorted(path.name for path in partial.glob(f"shard-{rank + 1:05d}-*.safetensors"))
        for name in mine:
            _readable(partial / name)
        files = folders.digests(partial, mine)
    except Exception as problem:  # the others must hear of it, whatever it is
        error = f"{final}: could not be saved: {_first_line(problem)}"
    _agree(error, group)
    listed = [files]
    if group is not None:
        listed = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(listed, files, group=group)
    if main:
        try:
            everything = {name: entry for part in listed for name, entry in part.items()}
            folders.publish(partial, final, "checkpoint", step, info, everything)
        except OSError as problem:
            error = f"{final}: could not be published: {problem.strerror}"
    _agree(error, group)
    return final


def load(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors or DTensors of any layout from a checkpoint; every process calls it.

    Raises CheckpointError if one is missing or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    there = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in there:
            raise CheckpointError(f"{path}: {name} is missing; it is a checkpoint of another model")
        size = getattr(there[name], "size", ())
        if tuple(size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: {name} has the shape {list(size)}, must be {list(tensor.shape)};"
                " it is a checkpoint of another model"
            )
    with torch.no_grad():
        dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=DefaultLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


def _files(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Which of a process's files each tensor goes to, counted from 1."""
    processes = 1 if group is None else dist.get_world_size(group)
    mapping, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // processes
        if filled and filled + size > LARGEST_FILE:
            number, filled = number + 1, 0
        mapping[name] = number
        filled += size
    return mapping


def _first_line(error: BaseException) -> str:
    """The cause of DCP's errors, which come wrapped with a traceback for each process."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
