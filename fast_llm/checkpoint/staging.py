"""Copy training state to host memory while training continues.

A tensor of a checkpoint is computed from tensors of the device, its sources (`tensors.Stored`).
They are what is copied; whoever writes the checkpoint joins them in host memory.

On a GPU the copy runs on a stream of its own, at the speed of the bus, during the next forward and
backward pass. Only the next update waits for it, on the GPU (`HostCopy.before_update`). That speed
needs page-locked memory, which takes seconds to allocate. A thread does so in advance.

Host memory: the bytes of the sources, reused by every save.
"""

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fast_llm.tensors import Stored

logger = logging.getLogger("fast_llm")

_SLAB_BYTES = 2**30  # page-locked at a time: some parts together
_ALIGNMENT = 64  # bytes


class HostCopy:
    """Copies of the sources of a checkpoint's tensors, by name."""

    def __init__(self) -> None:
        self.copies: dict[str, tuple[Tensor, ...]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None  # None: there was no copy, or it was complete

    def allocate(self, stored: Mapping[str, Stored]) -> None:
        """Allocate what `copy` needs. Raises RuntimeError if memory is short."""
        new = {name: one.sources for name, one in stored.items() if name not in self.copies}
        pinned = {name: sources for name, sources in new.items() if any(s.is_cuda for s in sources)}
        for name in new.keys() - pinned.keys():
            self.copies[name] = tuple(torch.empty_like(source) for source in new[name])
        sources = [source for each in pinned.values() for source in each]
        places = iter([place for slab in _slabs(sources) for place in self._locked(slab)])
        for name, each in pinned.items():
            self.copies[name] = tuple(next(places) for _ in each)

    def _locked(self, sources: Sequence[Tensor]) -> Iterator[Tensor]:
        """Tensors like `sources` in one page-locked piece of host memory."""
        slab = torch.empty(sum(map(_aligned_bytes, sources)), dtype=torch.uint8)
        cuda = torch.cuda.cudart()
        # PyTorch's own page-locked memory would be rounded up to a power of two.
        failed = cuda.cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
        if int(failed):
            logger.warning(
                f"{slab.nbytes} bytes of host memory could not be page-locked (CUDA error"
                f" {int(failed)}): training waits longer for each checkpoint."
            )
        else:
            weakref.finalize(self, cuda.cudaHostUnregister, slab.data_ptr())
        begin = 0
        for source in sources:
            place = slab[begin : begin + source.nbytes].view(source.dtype).view(source.shape)
            begin += _aligned_bytes(source)
            yield place

    @torch.no_grad()
    def copy(self, stored: Mapping[str, Stored]) -> None:
        """Start to copy the sources. They must not change before `before_update` or `wait`."""
        self.allocate(stored)
        pairs = [
            (copy, source)
            for name, one in stored.items()
            for copy, source in zip(self.copies[name], one.sources, strict=True)
        ]
        if not any(source.is_cuda for _, source in pairs):
            for copy, source in pairs:
                copy.copy_(source)
            return
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for copy, source in pairs:
                copy.copy_(source, non_blocking=True)
            self._copied = self._stream.record_event()

    def before_update(self) -> None:
        """Make the device wait for the copy before what is queued next. Costs the host nothing."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def part(self, name: str, one: Stored) -> Tensor:
        """The part of a tensor when it was copied, in host memory."""
        return one.join(*self.copies[name])


def copied_bytes(stored: Mapping[str, Stored]) -> int:
    """The bytes of host memory that a `HostCopy` takes."""
    return sum(source.nbytes for one in stored.values() for source in one.sources)


def _aligned_bytes(source: Tensor) -> int:
    return -(-source.nbytes // _ALIGNMENT) * _ALIGNMENT


def _slabs(sources: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive sources that share a piece of memory."""
    slab: list[Tensor] = []
    for source in sources:
        slab.append(source)
        if sum(map(_aligned_bytes, slab)) >= _SLAB_BYTES:
            yield slab
            slab = []
    if slab:
        yield slab
