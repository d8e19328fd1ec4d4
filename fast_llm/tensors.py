"""Small helpers for tensors, some of which may be DTensors: tensors split over several processes.

Code that works on training state (parallelism, checkpoints, digests) handles plain tensors and
DTensors alike with these. None of them communicates.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fast_llm.dtypes import BY_NAME


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype for a name of the settings: fp32, bf16, fp16."""
    dtype: torch.dtype = getattr(torch, BY_NAME[name].torch)
    return dtype


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this process, which may be empty; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """The slices of the full tensor that `local_part` is."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, extent) for extent in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(begin, begin + extent) for begin, extent in zip(offset, shape, strict=True))


def replication_factor(tensor: Tensor) -> int:
    """On how many processes the same part of `tensor` lies."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def distributed_like(weight: Tensor, local: Tensor) -> Tensor:
    """`local` as the local part of a tensor with the shape, mesh and placements of `weight`."""
    if not isinstance(weight, DTensor):
        return local
    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
