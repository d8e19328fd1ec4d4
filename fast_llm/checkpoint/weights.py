"""Weights in and out as safetensors, whatever they are spread over.

Reading, each process takes from each file only the slices it holds, straight to where they live. Writing,
weights are gathered one at a time and the first process writes a file whenever it is full, so that host
memory holds one file's weights at most. The bytes depend on the weights alone, not on the processes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.llama import weight_files
from fast_llm.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def load_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors or DTensors, by name, from a folder of safetensors files, converting dtypes.

    Raises CheckpointError unless every one of them is there with its shape.
    """
    files = weight_files(folder)
    missing = [name for name in weights if name not in files]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    for path in sorted({files[name] for name in weights}):
        with safe_open(path, framework="pt") as file:
            for name, weight in weights.items():
                if files[name] != path:
                    continue
                source = file.get_slice(name)
                if tuple(source.get_shape()) != tuple(weight.shape):
                    raise CheckpointError(
                        f"{path}: {name} has the shape {source.get_shape()}, must be {list(weight.shape)}"
                    )
                local, region = _region(weight)
                if local.numel():
                    local.copy_(source[region])


def _region(weight: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This process's part of a weight, and where it lies in the whole."""
    if not isinstance(weight, DTensor):
        return weight, tuple(slice(0, extent) for extent in weight.shape)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    region = tuple(slice(begin, begin + extent) for begin, extent in zip(offset, shape, strict=True))
    return weight.to_local(), region


def save_weights(
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: str | None,
    parameters_per_file: int,
    group: dist.ProcessGroup | None = None,
) -> list[str]:
    """Write weights as safetensors files with their index; every process calls it. The files' names.

    `dtype` None keeps each weight's own. `group`: on which processes wait while one writes.
    """
    plan: list[list[str]] = [[]]
    filled = 0
    for name, weight in weights.items():
        if plan[-1] and filled + weight.numel() > parameters_per_file:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += weight.numel()
    main = not dist.is_initialized() or dist.get_rank() == 0
    names = [
        f"model-{i:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else "model.safetensors"
        for i in range(1, len(plan) + 1)
    ]
    total = 0
    for file_name, inside in zip(names, plan, strict=True):
        gathered = {}
        for name in inside:
            whole = _whole(weights[name].detach())
            if main:
                gathered[name] = whole.to("cpu", DTYPES[dtype] if dtype else whole.dtype, copy=True).contiguous()
                total += gathered[name].nbytes
        if main:
            save_file(gathered, folder / file_name, metadata={"format": "pt"})
            _readable(folder / file_name)
        if group is not None:
            dist.barrier(group)
    if main and len(plan) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, inside in zip(names, plan, strict=True) for name in sorted(inside)},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        names.append("model.safetensors.index.json")
    return names


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _readable(path: Path) -> None:
    """safetensors writes files that only their owner may read; give them what the umask says."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def export_llama(
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
    """Write a complete Hugging Face folder, which is there whole or not at all; every process calls it.

    `files`: small files that go along, by name (tokenizer, generation_config.json).
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    partial = folders.partial_name(path)
    error: str | None = None
    if main:
        try:
            partial.mkdir(parents=True)
        except OSError as problem:
            error = f"{partial}: {problem.strerror}"
    _agree(error, group)
    try:
        names = save_weights(weights, partial, dtype, parameters_per_file, group)
        if main:
            for name, content in files.items():
                (partial / name).write_bytes(content)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            names += [*files, "config.json"]
            folders.publish(partial, path, "export", step, {}, folders.digests(partial, sorted(set(names))))
    except Exception as problem:  # the others must hear of it, whatever it is
        error = f"{path}: could not be exported: {problem}"
    _agree(error, group)


def _agree(error: str | None, group: dist.ProcessGroup | None) -> None:
    """Raise CheckpointError on every process if one of them has an error."""
    errors = [error]
    if group is not None:
        errors = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
    found = [text for text in errors if text]
    if found:
        raise CheckpointError(found[0])
