"""Small helpers for tensors, some of which may be DTensors: tensors split over several processes.

Code that works on training state (parallelism, checkpoints, digests) handles plain tensors and
DTensors alike with these. None of them communicates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def on_host(like: Tensor, local: Tensor) -> Tensor:
    """`local`, in host memory, as the local part of a tensor like `like`.

    DTensor.from_local would move it to the device of the mesh.
    """
    if not isinstance(like, DTensor):
        return local
    made: Tensor = DTensor(local, like._spec, requires_grad=False)
    return made


def _same(source: Tensor) -> Tensor:
    return source


@dataclass(frozen=True)
class Stored:
    """A tensor as checkpoints hold it, and the tensors that this process's part is computed from.

    An fp32 weight may be two halves of a split master; a bf16 moment 8-bit numbers and the largest
    level of each block.
    """

    like: Tensor  # without data: dtype, shape, and of a DTensor mesh and placements
    sources: tuple[Tensor, ...]
    join: Callable[..., Tensor] = _same  # from the sources, on any device, to the part

    @staticmethod
    def of(
        weight: Tensor,
        sources: tuple[Tensor, ...],
        join: Callable[..., Tensor] = _same,
        dtype: torch.dtype = torch.float32,
    ) -> "Stored":
        """A tensor with the shape, mesh and placements of `weight`, in `dtype`."""
        local = torch.empty(local_part(weight).shape, dtype=dtype, device="meta")
        return Stored(distributed_like(weight, local), sources, join)

    def part(self) -> Tensor:
        """This process's part, in host memory, with its present values."""
        return self.join(*(source.cpu() for source in self.sources))
