"""Load and save weights in Hugging Face's format (safetensors), full or sharded.

Loading: each process reads only its slices of each file, directly to their device. Files are
mapped, so host memory holds one slice at a time. Saving: weights are rounded to the dtype, and
gathered in batches of 256 MiB, or one weight if that is larger; the first process appends each
batch to its file. The bytes depend on the weights alone, not on the layout.

A safetensors file is the length of its header (8 bytes), the header (JSON, padded to 8 bytes) and
the tensors.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.huggingface import weight_files
from fast_llm.collectives import all_gather_object, is_main, or_default_group
from fast_llm.dtypes import DTYPES
from fast_llm.errors import CheckpointError
from fast_llm.models import Family
from fast_llm.tensors import local_part, local_region, torch_dtype

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
) -> None:
    """Fill tensors or DTensors, by name, from a folder of safetensors files.

    Every process calls it with the weights it has a part of. Dtypes are converted. Raises
    CheckpointError unless the folder holds all of them in the right shapes, and no others.
    """
    files = weight_files(folder)
    wanted = {
        name
        for names in all_gather_object(list(weights), or_default_group(group))
        for name in names
    }
    places = {name: family.stored_name(name, wanted, files) for name in wanted}
    missing = sorted(name for name in wanted if places[name] not in files)
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    extra = sorted(
        name for name in files.keys() - set(places.values()) if not family.is_optional_tensor(name)
    )
    if extra:
        raise CheckpointError(
            f"{folder}: holds {len(extra)} tensors that the model does not have, first {extra[0]}"
        )
    by_file: dict[Path, list[str]] = {}
    for name in weights:
        by_file.setdefault(files[places[name]], []).append(name)
    for path, names in sorted(by_file.items()):
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    source = file.get_slice(places[name])
                    if tuple(source.get_shape()) != tuple(weights[name].shape):
                        raise CheckpointError(
                            f"{path}: {name} has the shape {source.get_shape()}, must be"
                            f" {list(weights[name].shape)}"
                        )
                    local = local_part(weights[name])
                    if local.numel():
                        local.copy_(source[local_region(weights[name])])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error


@torch.no_grad()
def save_weights(
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: str | None,
    parameters_per_file: int,
    group: dist.ProcessGroup | None = None,
) -> list[str]:
    """Write weights as `model.safetensors`, or as several files and an index; returns their names.

    Every process calls it with the tensors or DTensors it has a part of, in the same order.
    `dtype`: None keeps that of each weight. `group`: on which processes wait while the first one
    writes, with a long timeout. Raises CheckpointError.
    """
    group = or_default_group(group)
    own = {
        name: (torch_dtype(dtype) if dtype else weight.dtype, tuple(weight.shape))
        for name, weight in weights.items()
    }
    parts = all_gather_object(own, group)
    # The first process that has a part of each weight.
    owners = {name: rank for rank, names in reversed([*enumerate(parts)]) for name in names}
    every = {name: parts[owners[name]][name] for name in sorted(owners, key=_natural_key)}
    plan = _split(every, parameters_per_file)
    total = 0
    for file_name, names in plan.items():
        tensors = in_file_order({name: every[name] for name in names})
        names[:] = tensors
        total += sum(_size(every[name]) for name in names)
        for number, batch in enumerate(_batches(every, names)):
            with raise_on_all(f"{folder / file_name}: could not be written", group):
                full_weights = {
                    name: _full_weight(weights.get(name), *every[name], owners[name], group)
                    for name in batch
                }
                if is_main(group):
                    with (folder / file_name).open("ab" if number else "wb") as file:
                        if not number:
                            file.write(safetensors_header(tensors, {}))
                        for name, full in full_weights.items():
                            assert full is not None
                            _check_finite(name, full)
                            file.write(tensor_bytes(full))
                del full_weights
    written = list(plan)
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: file for file in plan for n in plan[file]},
        }
        with raise_on_all(f"{folder / INDEX}: could not be written", group):
            if is_main(group):
                (folder / INDEX).write_text(
                    json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
                )
        written.append(INDEX)
    return written


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
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes in safetensors' order: wider dtypes first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


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


_Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


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
    weight: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    owner: int,
    group: dist.ProcessGroup | None,
) -> Tensor | None:
    """The full weight, on the first process and on those that have a part of it.

    `owner`: the first process with a part; another pipeline stage's weight is sent from there.
    """
    full: Tensor | None = None
    if weight is not None:
        full = weight.detach().to(dtype)
        full = full.full_tensor() if isinstance(full, DTensor) else full
    if owner > 0 and group is not None:  # another pipeline stage's
        rank = dist.get_rank(group)
        if rank == owner:
            assert full is not None
            dist.send(full.cpu().contiguous().flatten().view(torch.uint8), group=group, group_dst=0)
        elif rank == 0:
            full = torch.empty(shape, dtype=dtype)
            dist.recv(full.flatten().view(torch.uint8), group=group, group_src=owner)
    return full


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
) -> None:
    """Write a complete Hugging Face folder atomically. Every process calls it.

    `files`: small files by their path in the folder (tokenizer, generation_config.json). A
    config.json among them is copied unchanged if its content equals `config`. Raises
    CheckpointError on all processes if one fails; an existing folder at `path` is then unchanged.
    """
    group = or_default_group(group)
    what = f"{path}: could not be exported"
    partial: Path | None = None
    try:
        with raise_on_all(what, group):
            if is_main(group):
                partial = folders.begin(path)
        into = all_gather_object(partial, group)[0]
        assert into is not None
        names = save_weights(weights, into, dtype, parameters_per_file, group)
        with raise_on_all(what, group):
            if partial is not None:
                small = dict(files)
                if "config.json" not in files or json.loads(files["config.json"]) != config:
                    small["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
                for name, content in small.items():
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    (partial / name).write_bytes(content)
                folders.publish(
                    partial, path, "export", step, {}, folders.digests(partial, [*names, *small])
                )
    except BaseException:
        if partial is not None:
            rmtree(partial, ignore_errors=True)
        raise
