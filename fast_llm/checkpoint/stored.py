"""Parameters and the tensors that files hold of them: the same, parts of one, or several together.

A family says which (`StoredPart`). Experts are often one tensor each. Phi-3 has queries, keys and
values in one matrix.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_llm.errors import CheckpointError
from fast_llm.models import Family, StoredPart
from fast_llm.tensors import local_part, local_region

# Tensor of a file → the parameters that it is made of, each with its place; or a constant.
Sources = dict[str, list[tuple[str, "StoredPart | float"]]]


@dataclass(frozen=True)
class Part:
    """What this process has of a parameter, or of one expert of it."""

    place: StoredPart
    region: tuple[slice, ...]  # of the parameter, or of the expert
    local: Tensor


def local_parts(weight: Tensor, places: list[StoredPart]) -> list[Part]:
    """What this process has of a parameter, or of each expert of it."""
    region, local = local_region(weight), local_part(weight)
    if places[0].expert is None:
        return [Part(places[0], region, local)]
    numbers = range(region[0].start, region[0].stop)
    return [
        Part(places[number], region[1:], one) for number, one in zip(numbers, local, strict=True)
    ]


def read_part(file: Any, path: Path, part: Part) -> None:
    """Copy from an open file what this process has."""
    place, source = part.place, file.get_slice(part.place.name)
    if tuple(source.get_shape()) != place.shape:
        raise CheckpointError(
            f"{path}: {place.name} has the shape {source.get_shape()}, must be {list(place.shape)}"
        )
    if not part.local.numel():
        return
    wanted = list(part.region)
    if place.transposed:
        wanted[-2:] = wanted[:-3:-1]
    steps = [1] * len(wanted)
    for dimension, within in enumerate(place.region):
        begin, steps[dimension] = within.start or 0, within.step or 1
        last = begin + (wanted[dimension].stop - 1) * steps[dimension]
        wanted[dimension] = slice(begin + wanted[dimension].start * steps[dimension], last + 1)
    # safetensors reads contiguous ranges.
    read = source[tuple(wanted)][tuple(slice(None, None, step) for step in steps)]
    part.local.copy_(read.transpose(-1, -2) if place.transposed else read)


def check_constant(path: Path, name: str, found: Tensor, value: float) -> None:
    """Raise CheckpointError unless a file's number is the one that is computed with."""
    if found.numel() != 1 or not math.isclose(float(found), value, rel_tol=2**-8):  # bf16's
        raise CheckpointError(f"{path}: {name} is {found.tolist()}, must be {value}")


def in_files(
    weights: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], family: Family | None
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], Sources]:
    """Dtype and shape of each tensor in the files, and what it is made of."""
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    sources: Sources = {}
    shapes = {name: shape for name, (_, shape) in weights.items()}
    for name, (dtype, shape) in weights.items():
        parts = family.stored_parts(name, shapes) if family is not None else None
        for place in parts or [StoredPart(name, shape)]:
            sources.setdefault(place.name, []).append((name, place))
            stored[place.name] = dtype, place.shape
        for constant, value in (family.constants(name) if family is not None else {}).items():
            sources[constant], stored[constant] = [(name, value)], (dtype, ())
    return stored, sources


def assemble(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    parts: list[tuple[str, "StoredPart | float"]],
    full_weights: Mapping[str, Tensor | None],
) -> Tensor:
    """A tensor of a file, from the parameters that it is made of."""
    made: Tensor | None = None
    for name, place in parts:
        if not isinstance(place, StoredPart):
            return torch.tensor(place, dtype=dtype)
        full = full_weights[name]
        assert full is not None
        full = full if place.expert is None else full[place.expert]
        full = full.transpose(-1, -2) if place.transposed else full
        if not place.region:
            return full
        made = torch.empty(shape, dtype=dtype) if made is None else made
        made[place.region] = full
    assert made is not None
    return made
