"""Memory of a process at each phase of a step, counted tensor by tensor.

Nothing is measured or fitted: each term is a tensor that `model/`, `parallel/`, `optim/` or FSDP2
holds in that phase. `activations.py` gives the bytes of one block; `ProcessMemory` adds up each
phase. docs/forecasts.md has the formulas and a comparison with measured peaks. Only arithmetic: a
forecast takes microseconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fast_llm.planning.activations import (
    backward_temporaries,
    loss_backward_tensors,
    loss_tensors,
    recomputed_activations,
    saved_activations,
    uses_torch_loss,
)
from fast_llm.planning.layout import UPCASTING_CPU, LocalSizes, ParallelLayout, Workload

# Bytes that are not tensors': CUDA, cuBLAS and NCCL on a GPU; Python and its libraries on a CPU.
RUNTIME_BYTES = {"cuda": 2 * 2**30, "cpu": 2**29, UPCASTING_CPU: 2**29}
FRAGMENTATION = 0.03  # gaps between tensors in PyTorch's memory, as a share of the tensors

Parts = dict[str, float]  # part → bytes


@dataclass(frozen=True)
class StepPhase:
    """The tensors that a process holds in one phase of a step, in bytes."""

    name: str
    parts: Parts

    @cached_property
    def bytes(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())


def peak_phase(workload: Workload, layout: ParallelLayout, device_kind: str) -> StepPhase:
    """The phase with the most bytes, of the process that needs most."""
    peaks = [
        ProcessMemory(LocalSizes(workload, layout, device_kind, rank)).peak()
        for rank in range(layout.pipeline)
    ]
    return max(peaks, key=lambda phase: phase.bytes)


def with_overhead(phase: StepPhase, device_kind: str) -> float:
    """Bytes of memory that a process needs for a phase: tensors, fragmentation and the runtime."""
    return phase.bytes * (1 + FRAGMENTATION) + RUNTIME_BYTES[device_kind]


def required_bytes(workload: Workload, layout: ParallelLayout, device_kind: str) -> float:
    """Bytes of memory that a process needs for a step."""
    return with_overhead(peak_phase(workload, layout, device_kind), device_kind)


class ProcessMemory:
    """Memory of one process in each phase of a step."""

    def __init__(self, sizes: LocalSizes):
        self.s = sizes
        layout = sizes.layout
        pipeline = layout.pipeline > 1
        self.accumulates = layout.micro_batches > 1
        # Gradients accumulate unsharded if they are reduced at the last micro-batch only.
        self.unsharded_gradients = (
            sizes.sharded and self.accumulates and (layout.zero_stage == 1 or pipeline)
        )
        self.reduces_each_micro_batch = sizes.sharded and not self.unsharded_gradients
        self.keeps_gathered = layout.zero_stage < 3 or pipeline  # weights, between blocks
        # They stay from one micro-batch to the next.
        self.stays_gathered = self.keeps_gathered and self.accumulates
        self.state_shards = layout.shards if sizes.sharded else 1
        self.saved = saved_activations(sizes, layout.recompute)

    def peak(self) -> StepPhase:
        """The phase with the most bytes."""
        return max(self.phases(), key=lambda phase: phase.bytes)

    def phases(self) -> Iterator[StepPhase]:
        """The phases of a step that can be its peak."""
        s = self.s
        if s.has_head:
            yield self._cross_entropy()
            yield self._cross_entropy_backward()
        if s.head_parameters and self.reduces_each_micro_batch:
            yield self._head_reduction()
        if s.has_head and s.on_cpu:
            yield self._final_norm_backward()
        last = s.layers_with_backward - 1
        for done in sorted({0, min(1, last), last}):
            yield self._block_backward(done)
            if s.sharded:
                yield self._block_reduction(done)
        if s.sharded:
            yield self._embedding_reduction()
        yield self._optimizer()

    # Tensors of several phases.

    @cached_property
    def state(self) -> Parts:
        """Weights, masters and moments: there all the time."""
        s = self.s
        count, moment_bytes = s.parameters, s.workload.moment_bytes * s.trained_parameters
        if s.sharded:
            shards = s.layout.shards
            return {
                "weights": 0.0,
                "masters": 4 * count / shards,
                "moments": moment_bytes / shards,
            }
        master_bytes = 2 if s.workload.split_masters and not s.on_cpu else 4
        return {
            "weights": s.dtype_bytes * count,
            "masters": master_bytes * count if s.mixed_precision else 0,
            "moments": moment_bytes,
        }

    @cached_property
    def constant(self) -> Parts:
        """State, tokens of micro-batches, and buffers between pipeline stages."""
        s, layout = self.s, self.s.layout
        pipeline = layout.pipeline > 1
        loaded = layout.micro_batches if s.on_cpu else layout.in_flight if pipeline else 1
        exchanged = 2 * s.stages_per_rank * layout.in_flight * s.stream if pipeline else 0.0
        return self.state | {"buffers": 24 * s.tokens * loaded + exchanged}

    @cached_property
    def accumulated(self) -> float:
        """Gradients that a micro-batch adds to: there from the start of its backward pass."""
        s = self.s
        if s.sharded and not self.accumulates:
            return 0.0
        if not s.sharded and not s.mixed_precision and not self.accumulates:
            return 0.0
        if s.sharded and not self.unsharded_gradients:
            return 4 * s.trained_parameters / s.layout.shards
        return 4 * (s.trained_in_blocks * s.own_share + s.trained_outside_parameters)

    @cached_property
    def final_gradients(self) -> float:
        """Gradients at the end of a step."""
        return 4 * self.s.trained_parameters / self.state_shards

    @cached_property
    def activations(self) -> float:
        """Saved activations of all blocks, and rotary cosines and sines of passes in flight."""
        s, layout = self.s, self.s.layout
        blocks: float = s.layers_with_backward
        passes = 1
        if layout.pipeline > 1:
            passes = layout.forward_passes_in_flight(s.pipeline_rank)
            blocks = s.layers / s.stages_per_rank * passes
        rotary = 8 * s.workload.head_size * s.tokens
        return blocks * self.saved + rotary * passes

    @cached_property
    def head_activations(self) -> float:
        """Input and output of the final norm."""
        s = self.s
        return s.stream * 2 + 4 * s.stream_tokens if s.has_head else 0.0

    def gathered(self, blocks: int) -> float:
        """Gathered weights of this many blocks and outside of blocks, in the compute dtype."""
        s = self.s
        count = s.own_block_parameters * blocks + s.outside_parameters
        return count * s.dtype_bytes if s.sharded else 0.0

    @cached_property
    def gathered_for_head(self) -> float:
        """Gathered weights when the forward pass of the blocks is over."""
        return self.gathered(self.s.layers if self.keeps_gathered else 1)

    @cached_property
    def gathered_after_head(self) -> float:
        """The same without the head, if its backward pass frees it."""
        freed = 0 if self.stays_gathered else self.s.head_parameters * self.s.dtype_bytes
        return self.gathered_for_head - freed

    @cached_property
    def carried_reduction(self) -> Parts:
        """The input of the last reduction, which FSDP2 keeps until the next.

        The embedding's is kept into the next micro-batch; if the embedding is frozen, that of the
        lowest trained block, which FSDP2 reduces when the backward pass is over.
        """
        if self.reduces_each_micro_batch and self.accumulates:
            last: float = self._trained_embedding_parameters
            if not self.s.workload.trains_embedding:
                last = max(last, self.s.trained_block_parameters * self.s.own_share)
            return {"communication": 4.0 * last}
        return {}

    @cached_property
    def carried_after_head(self) -> Parts:
        """The input of the last reduction, after the head's."""
        if self.s.head_parameters and self.reduces_each_micro_batch:
            return {"communication": 4.0 * self.s.trained_head_parameters}
        return self.carried_reduction

    @property
    def _trained_embedding_parameters(self) -> int:
        return self.s.trained_outside_parameters - self.s.trained_head_parameters

    @cached_property
    def reduced_head_gradient(self) -> float:
        """The head's gradient after its reduction, where none was accumulated before."""
        s = self.s
        if not (s.head_parameters and self.reduces_each_micro_batch) or self.accumulated:
            return 0.0
        return 4 * s.trained_head_parameters / s.layout.shards

    @cached_property
    def own_head_gradient(self) -> float:
        """The head's gradient until the embedding's is reduced, if both are one FSDP2 unit."""
        s = self.s
        one_unit = s.has_head and s.sharded and not s.head_parameters and s.workload.trains_head
        return s.vocabulary * s.hidden * s.dtype_bytes if one_unit else 0.0

    # The phases.

    @cached_property
    def _loss_gradients(self) -> float:
        """Gradients of hidden states and head that are made with the loss."""
        s = self.s
        of_head = 4 * s.vocabulary * s.hidden * s.workload.trains_head
        return 0.0 if uses_torch_loss(s) else s.normed + of_head

    def _cross_entropy(self) -> StepPhase:
        s = self.s
        arriving = 0
        if s.sharded and s.layout.shards > 1 and not self.stays_gathered:
            # The buffer in which the last unit was gathered; with zero_stage 3 no block is there.
            unit = s.head_parameters or s.own_block_parameters
            freed = 0 if self.keeps_gathered else s.own_block_parameters
            arriving = (unit - freed) * s.dtype_bytes
        return StepPhase(
            "in the cross entropy",
            self.constant
            | self.carried_reduction
            | {
                "gradients": self.accumulated,
                "gathered weights": self.gathered_for_head + arriving,
                "activations": self.activations + self.head_activations,
                "logits": loss_tensors(s) + self._loss_gradients,
            },
        )

    def _cross_entropy_backward(self) -> StepPhase:
        return StepPhase(
            "in the cross entropy's backward pass",
            self.constant
            | self.carried_reduction
            | {
                "gradients": self.accumulated,
                "gathered weights": self.gathered_for_head,
                "activations": self.activations + self.head_activations,
                "logits": self._loss_gradients + self.s.normed + loss_backward_tensors(self.s),
            },
        )

    def _head_reduction(self) -> StepPhase:
        s = self.s
        sent = s.trained_head_parameters * (s.dtype_bytes + 4)
        return StepPhase(
            "reducing the head",
            self.constant
            | {
                "communication": sent + self.reduced_head_gradient,
                "gradients": self.accumulated,
                "gathered weights": self.gathered_for_head,
                "activations": self.activations + self.head_activations,
                "temporaries": s.normed,
            },
        )

    def _final_norm_backward(self) -> StepPhase:
        return StepPhase(
            "in the last norm's backward pass",
            self.constant
            | self.carried_after_head
            | {
                "gradients": self.accumulated + self.reduced_head_gradient,
                "gathered weights": self.gathered_after_head,
                "activations": self.activations + self.head_activations,
                "logits": self.own_head_gradient,
                "temporaries": 2 * self.s.stream,
            },
        )

    def _around_block(self, done: int) -> Parts:
        """Tensors outside the block that is in its backward pass, after `done` other blocks."""
        s = self.s
        block = s.own_block_parameters
        trained = min(s.trained_block_parameters * done, s.trained_in_blocks)
        fresh = 0.0  # gradients made in this backward pass, where none were accumulated before
        if not self.accumulated and s.sharded:
            fresh = 4 * trained / s.layout.shards
        elif not self.accumulated:
            head = s.vocabulary * s.hidden * s.has_head * s.workload.trains_head
            fresh = 4 * (trained + head)
        gathered = self.gathered_after_head
        if not self.keeps_gathered:
            prefetches = s.layout.shards > 1 and done < s.layers - 1
            gathered += block * s.dtype_bytes if s.sharded and prefetches else 0
        elif s.sharded and not self.stays_gathered:
            gathered -= block * s.dtype_bytes * done
        return self.constant | {
            "gradients": self.accumulated + fresh + self.reduced_head_gradient,
            "gathered weights": gathered,
            "logits": self.own_head_gradient,
        }

    def _block_backward(self, done: int) -> StepPhase:
        s = self.s
        # The reduction of the previous block overlaps.
        carried = self.carried_after_head
        if done:
            block = s.trained_block_parameters * s.own_share
            carried = {"communication": 4 * block if s.sharded else 0.0}
        return StepPhase(
            f"in the backward pass of block {s.layers - done} of {s.layers}",
            self._around_block(done)
            | {
                "activations": self.activations - done * self.saved,
                "recomputed": recomputed_activations(s),
                "temporaries": backward_temporaries(s) + s.stream,
            }
            | carried,
        )

    def _block_reduction(self, done: int) -> StepPhase:
        s = self.s
        reduced = 0 if self.accumulated else 1 / s.layout.shards
        block = s.trained_block_parameters * s.own_share
        return StepPhase(
            f"reducing block {s.layers - done} of {s.layers}",
            self._around_block(done)
            | {
                "activations": self.activations - done * self.saved - self.saved,
                "temporaries": s.stream + block * s.dtype_bytes,
                "communication": 4 * (block + s.trained_block_parameters * reduced),
            },
        )

    def _embedding_reduction(self) -> StepPhase:
        s = self.s
        blocks = 0.0
        if not self.accumulated:
            blocks = 4 * s.trained_in_blocks / s.layout.shards
        freed = 0
        if not self.stays_gathered:
            freed = (
                s.own_block_parameters * s.dtype_bytes * (s.layers if self.keeps_gathered else 1)
            )
        reduced = 0 if self.accumulated else 4 / s.layout.shards
        return StepPhase(
            "reducing the embedding",
            self.constant
            | {
                "communication": self._trained_embedding_parameters * (s.dtype_bytes + 4 + reduced),
                "gradients": self.accumulated + self.reduced_head_gradient + blocks,
                "gathered weights": self.gathered_after_head - freed,
            },
        )

    def _optimizer(self) -> StepPhase:
        s = self.s
        fp32_moments = 0.0
        if s.workload.moment_bytes < 8 and (s.on_cpu or not s.workload.split_masters):
            # fp32 copies of the largest weight's moments.
            outside = s.vocabulary * s.hidden if s.has_embedding or s.has_head else 0
            fp32_moments = 8 * max(outside, s.hidden * s.ffn) / self.state_shards
        return StepPhase(
            "in the optimizer",
            self.constant
            | {
                "gradients": self.final_gradients,
                "gathered weights": self.gathered_after_head if self.stays_gathered else 0.0,
                "temporaries": fp32_moments,
            },
        )
