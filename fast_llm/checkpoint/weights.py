"""Load and save weights in Hugging Face's format (safetensors), full or sharded.

Loading: each process reads only its slices of each file, directly to their device. Files are
mapped, so host memory holds one slice at a time. Saving: each process rounds its parts to the dtype
and sends them, through host memory, to the first one, which appends them to its file in batches of
256 MiB, or of one weight if that is larger. The bytes depend on the weights alone, not on the
layout.

A safetensors file is the length of its header (8 bytes), the header (JSON, padded to 8 bytes) and
the tensors.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.huggingface import weight_files
from fast_llm.checkpoint.stored import (
    Part,
    Sources,
    assemble,
    check_constant,
    in_files,
    local_parts,
    read_part,
)
from fast_llm.collectives import all_gather_object, is_main, or_default_group
from fast_llm.dtypes import DTYPES
from fast_llm.errors import CheckpointError
from fast_llm.models import Family, StoredPart
from fast_llm.tensors import local_part, local_region, torch_dtype

_Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
INDEX = "model.safetensors.index.json"
BATCH_BYTES = 2**28  # bytes
_SAFETENSORS_DTYPES = {getattr(torch, dtype.torch): dtype.safetensors for dtype in DTYPES} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@contextmanager
def raise_on_all(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """A context that every process enters: if one fails in it, all raise when all have left it.

    File errors become CheckpointErrors of `what` with the reason; other exceptions stay as they are
    on their own process. Inside, no process may wait for another after anything that can fail on
    one only.
    """
    error: BaseException | None = None
    try:
        yield
    # Any error must reach the others. DCP's is not an Exception.
    except (Exception, CheckpointException) as problem:
        error = problem
    reasons = [
        reason
        for reason in all_gather_object(None if error is None else _reason(error), group)
        if reason
    ]
    if not reasons:
        return
    if error is not None and not _is_file_error(error):
        raise error
    raise CheckpointError(f"{what}: {reasons[0]}" if what else reasons[0]) from error


def _causes(error: BaseException) -> list[BaseException]:
    """The errors of all processes in a CheckpointException of DCP; other errors alone."""
    return (
        [cause for cause, _ in error.failures.values()]
        if isinstance(error, CheckpointException)
        else [error]
    )


def _is_file_error(error: BaseException) -> bool:
    return all(
        isinstance(cause, OSError | SafetensorError | CheckpointError) for cause in _causes(error)
    )


def _reason(error: BaseException) -> str:
    cause = _causes(error)[0]
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}" + (f" ({cause.filename})" if cause.filename else "")
    text = str(cause).strip()
    return (
        text
        if isinstance(cause, CheckpointError)
        else (text.splitlines() or [type(cause).__name__])[0]
    )


@torch.no_grad()
def load_weights(
    weights: Mapping[str, Tensor],
    folder: Path,
    family: Family,
    group: dist.ProcessGroup | None = None,
    model: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fill tensors or DTensors, by name, from a folder of safetensors files.

    Every process calls it with the weights it has a part of. Dtypes are converted. Raises
    CheckpointError unless the folder holds all of them in the right shapes, and no others. `model`:
    the shapes of all parameters, where `weights` are some of them.
    """
    files = weight_files(folder)
    own = {name: tuple(weight.shape) for name, weight in weights.items()}
    wanted: dict[str, tuple[int, ...]] = {}
    for shapes in all_gather_object(own, or_default_group(group)):
        wanted |= shapes
    every = wanted if model is None else model
    # Of each parameter: where the files have it, or each of its experts.
    places = {
        name: family.stored_parts(name, every)
        or [StoredPart(family.stored_name(name, every, files), shape)]
        for name, shape in wanted.items()
    }
    stored = {place.name for several in places.values() for place in several}
    constants = {place: value for name in wanted for place, value in family.constants(name).items()}
    missing = sorted(place for place in stored if place not in files)
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    extra = sorted(
        name
        for name in files.keys() - stored - constants.keys()
        if not family.is_optional_tensor(name)
    )
    if model is None and extra:
        raise CheckpointError(
            f"{folder}: holds {len(extra)} tensors that the model does not have, first {extra[0]}"
        )
    by_file: dict[Path, list[Part]] = {}
    for name, weight in weights.items():
        for part in local_parts(weight, places[name]):
            by_file.setdefault(files[part.place.name], []).append(part)
    for path, parts in sorted(by_file.items()):
        try:
            with safe_open(path, framework="pt") as file:
                for part in parts:
                    read_part(file, path, part)
                for place in [place for place in constants if files.get(place) == path]:
                    check_constant(path, place, file.get_tensor(place), constants[place])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error


@torch.no_grad()
def save_weights(
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: str | None,
    parameters_per_file: int,
    group: dist.ProcessGroup | None = None,
    part_of: Callable[[str], Tensor] | None = None,
    family: Family | None = None,
) -> list[str]:
    """Write weights as `model.safetensors`, or as several files and an index; returns their names.

    Every process calls it with the tensors or DTensors it has a part of, in the same order.
    `dtype`: None keeps that of each weight. `group`: through which the first process receives the
    others' parts in host memory (gloo), with a long timeout. `part_of`: this process's part of a
    weight in host memory, if `weights` hold no data. `family`: has the names in files of experts,
    which are written one by one. Raises CheckpointError.
    """
    group = or_default_group(group)
    part_of = part_of or (lambda name: local_part(weights[name]).detach().cpu())
    own = {
        name: (torch_dtype(dtype) if dtype else weight.dtype, tuple(weight.shape))
        for name, weight in weights.items()
    }
    every = {name: one for part in all_gather_object(own, group) for name, one in part.items()}
    every = {name: every[name] for name in sorted(every, key=_natural_key)}
    regions = all_gather_object(
        {name: local_region(weight) for name, weight in weights.items()}, group
    )
    stored, sources = in_files(every, family)
    plan = _split(stored, parameters_per_file)
    for file_name, names in plan.items():
        tensors = in_file_order({name: stored[name] for name in names}, sources)
        names[:] = tensors
        full_weights: dict[str, Tensor | None] = {}
        for number, batch in enumerate(_batches(stored, names)):
            with raise_on_all(f"{folder / file_name}: could not be written", group):
                needed = dict.fromkeys(name for place in batch for name, _ in sources[place])
                # The experts of a parameter may continue from the batch before.
                full_weights = {n: full for n, full in full_weights.items() if n in needed}
                for name in needed:
                    if name not in full_weights:
                        full_weights[name] = _full_weight(
                            name, *every[name], regions, part_of, group
                        )
                if is_main(group):
                    with (folder / file_name).open("ab" if number else "wb") as file:
                        if not number:
                            file.write(safetensors_header(tensors, {}))
                        for place in batch:
                            full = assemble(*stored[place], sources[place], full_weights)
                            _check_finite(place, full)
                            file.write(tensor_bytes(full))
    if len(plan) == 1:
        return list(plan)
    _write_index(folder, plan, sum(map(_size, stored.values())), group)
    return [*plan, INDEX]


def _write_index(
    folder: Path, plan: dict[str, list[str]], total: int, group: dist.ProcessGroup | None
) -> None:
    """Write the index of several files; `total`: the bytes of all tensors."""
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: file for file in plan for n in plan[file]},
    }
    with raise_on_all(f"{folder / INDEX}: could not be written", group):
        if is_main(group):
            (folder / INDEX).write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )


def _check_finite(name: str, weight: Tensor) -> None:
    """Raise CheckpointError for NaN and infinities, which may come from rounding to fp16."""
    if (
        weight.is_floating_point()
        and weight.numel()
        and not torch.stack(torch.aminmax(weight)).isfinite().all()
    ):
        fp16 = weight.dtype == torch.float16
        what = (
            "has values beyond fp16's range; choose bf16 or fp32"
            if fp16
            else "holds NaN or infinities"
        )
        raise CheckpointError(f"{name} {what}")


def in_file_order(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    sources: Sources | None = None,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes in safetensors' order: wider dtypes first, so that all are aligned.

    Then by name; the experts of one parameter (`sources`) follow each other, so that it is gathered
    once.
    """

    def key(name: str) -> tuple[int, str, int]:
        parameter, place = sources[name][0] if sources else (name, None)
        expert = place.expert if isinstance(place, StoredPart) else None
        return -tensors[name][0].itemsize, parameter, expert or 0

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The start of a safetensors file, up to its tensors, which must follow in this order.

    safetensors' own writer varies the order of metadata, and needs all tensors in memory.
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        content[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in a safetensors file, little endian."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    """A sort key of names that orders layers by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _size(tensor: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """The size in bytes of a tensor with this dtype and shape."""
    return tensor[0].itemsize * math.prod(tensor[1])


def _split(tensors: _Tensors, parameters_per_file: int) -> dict[str, list[str]]:
    """The weights of each file, in the given order."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, (_, shape) in tensors.items():
        if parts[-1] and filled + math.prod(shape) > parameters_per_file:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += math.prod(shape)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {
        f"model-{i:05d}-of-{len(parts):05d}.safetensors": names
        for i, names in enumerate(parts, start=1)
    }


def _batches(tensors: _Tensors, names: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    filled = 0
    for name in names:
        if batch and filled + _size(tensors[name]) > BATCH_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(name)
        filled += _size(tensors[name])
    yield batch


def _full_weight(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    regions: list[dict[str, tuple[slice, ...]]],
    part_of: Callable[[str], Tensor],
    group: dist.ProcessGroup | None,
) -> Tensor | None:
    """The full weight, on the first process, in host memory; the others send their parts there.

    `regions`: of each process's parts in the full weights.
    """
    # Of several processes with the same part, the first sends it.
    owners: dict[tuple[tuple[int, int], ...], int] = {}
    for rank, own in enumerate(regions):
        if name in own and all(part.stop > part.start for part in own[name]):
            owners.setdefault(tuple((part.start, part.stop) for part in own[name]), rank)
    this = 0 if group is None else dist.get_rank(group)
    full = torch.empty(shape, dtype=dtype) if this == 0 else None
    for region, rank in owners.items():
        if this == rank:
            part = part_of(name).to(dtype).contiguous()
            if full is None:
                dist.send(part.flatten().view(torch.uint8), group=group, group_dst=0)
            elif part.shape == full.shape:
                full = part
            else:
                full[tuple(slice(*limits) for limits in region)] = part
        elif full is not None:
            part = torch.empty([end - begin for begin, end in region], dtype=dtype)
            dist.recv(part.flatten().view(torch.uint8), group=group, group_src=rank)
            full[tuple(slice(*limits) for limits in region)] = part
    return full


@contextmanager
def new_folder(final: Path, what: str, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """A folder that all processes write to, before one publishes it as `final`.

    It is removed if a process fails. `what`: the start of the message.
    """
    partial: Path | None = None
    try:
        with raise_on_all(what, group):
            if is_main(group):
                partial = folders.begin(final)
        into = all_gather_object(partial, group)[0]
        assert into is not None
        yield into
    except BaseException:
        if partial is not None:
            rmtree(partial, ignore_errors=True)
        raise


def export_hugging_face(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    dtype: str,
    files: Mapping[str, bytes],
    parameters_per_file: int,
    step: int,
    group: dist.ProcessGroup | None = None,
    part_of: Callable[[str], Tensor] | None = None,
    family: Family | None = None,
) -> None:
    """Write a complete Hugging Face folder atomically. Every process calls it.

    `weights`, `dtype`, `parameters_per_file`, `group` and `part_of` are as in `save_weights`.
    `files`: small files by their path in the folder (tokenizer, generation_config.json). A
    config.json among them is copied unchanged if its content equals `config`. Raises
    CheckpointError on all processes if one fails; an existing folder at `path` is then unchanged.
    """
    group = or_default_group(group)
    what = f"{path}: could not be exported"
    with new_folder(path, what, group) as into:
        names = save_weights(weights, into, dtype, parameters_per_file, group, part_of, family)
        with raise_on_all(what, group):
            if is_main(group):
                small = dict(files)
                if "config.json" not in files or json.loads(files["config.json"]) != config:
                    small["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
                for name, content in small.items():
                    (into / name).parent.mkdir(parents=True, exist_ok=True)
                    (into / name).write_bytes(content)
                folders.publish(
                    into, path, "export", step, {}, folders.digests(into, [*names, *small])
                )
