"""Time of a step on a kind of GPU, computed before there is a cluster.

A step's seconds are a sum: floating-point operations of matmuls and of attention at the rates that
a GPU sustains, bytes that everything else moves in its memory, bytes sent between GPUs that nothing
overlaps, and the pipeline bubble. docs/forecasts.md has the formulas with their sources, and a
comparison with measured and published speeds. Nothing is fitted to them. Only arithmetic: a
forecast takes microseconds.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fast_llm.planning.activations import mean_over_blocks
from fast_llm.planning.devices import (
    GPUS_PER_NODE,
    HOP_SECONDS,
    NODE_HOP_SECONDS,
    DeviceSpec,
)
from fast_llm.planning.layout import LocalSizes, ParallelLayout, Workload
from fast_llm.planning.memory import StepPhase, peak_phase, with_overhead

Seconds = dict[str, float]  # part of a step → seconds


@dataclass(frozen=True)
class Forecast:
    """Memory and time of one layout on one kind of GPU."""

    workload: Workload
    layout: ParallelLayout
    device: DeviceSpec
    model_flops: float  # of a token, forward and backward
    peak: StepPhase  # of the process with the most memory
    parts: Mapping[str, float]  # part of a step → seconds, of the process with the most work

    @property
    def memory(self) -> float:
        """Bytes of a GPU that are needed."""
        return with_overhead(self.peak, "cuda")

    @property
    def fits(self) -> bool:
        """Whether the GPU has that many."""
        return self.memory <= self.device.memory

    @cached_property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def gpu_tokens_per_second(self) -> float:
        """Tokens a second of each GPU."""
        tokens = self.workload.batch_size * self.workload.sequence_length
        return tokens / self.seconds / self.layout.processes

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the share of the data sheet's FLOP/s, counted as in training."""
        return self.gpu_tokens_per_second * self.model_flops / self.device.peak_flops

    @property
    def limit(self) -> str:
        """The largest part of a step, and the largest other part that a layout could avoid."""
        first, *others = sorted(self.parts, key=lambda part: -self.parts[part])
        avoidable = (part for part in others if part not in ("attention", "matmuls"))
        shown = [first, *[part for part in (next(avoidable, None),) if part is not None]]
        return ", ".join(f"{part} {self.parts[part] / self.seconds:.0%}" for part in shown)


def forecast(
    workload: Workload, layout: ParallelLayout, device: DeviceSpec, model_flops: float
) -> Forecast:
    """Forecast a step.

    The pipeline rank with the most work gives the time, the one with the most memory the peak.
    """
    ranks = range(layout.pipeline)
    steps = [StepTime(LocalSizes(workload, layout, "cuda", rank), device).parts() for rank in ranks]
    slowest = max(steps, key=lambda parts: sum(parts.values()))
    peak = peak_phase(workload, layout, "cuda")
    return Forecast(workload, layout, device, model_flops, peak, slowest)


class StepTime:
    """The seconds of one process's step."""

    def __init__(self, sizes: LocalSizes, device: DeviceSpec):
        self.s, self.device = sizes, device
        self.workload, self.layout = sizes.workload, sizes.layout

    def parts(self) -> Seconds:
        """The seconds of each part of a step."""
        s, layout = self.s, self.layout
        forward, backward = self.block
        micro_batch = self._micro_batch()
        step = {name: layout.micro_batches * seconds for name, seconds in micro_batch.items()}
        step["optimizer"] = self.optimizer
        step["sharding communication"] = self.sharding_communication(
            sum(forward.values()), sum(backward.values())
        )
        if s.sharded:  # FSDP2 copies gathered weights
            every_pass = layout.zero_stage == 3 and layout.pipeline == 1
            gathers = layout.micro_batches * 2 if every_pass else 1
            copies = self.memory_traffic(6 * s.own_parameters * gathers)
            step["gradient accumulation"] = step.get("gradient accumulation", 0.0) + copies
        step["pipeline bubble"] = self.bubble_micro_batches() * sum(micro_batch.values())
        return {name: seconds for name, seconds in step.items() if seconds}

    def _micro_batch(self) -> Seconds:
        """One micro-batch, forward and backward."""
        s, layout = self.s, self.layout
        seconds: Seconds = defaultdict(float)
        forward, backward = self.block
        for name, spent in forward.items():
            seconds[name] += s.layers * spent
        # Gradients that nothing trained needs are not computed.
        times = {
            "matmuls": sum(one.weights + one.inputs for one in s.backward) / 2,
            "attention": sum(one.attention for one in s.backward),
        }
        for name, spent in backward.items():
            seconds[name] += times.get(name, sum(one.is_any for one in s.backward)) * spent
        if s.has_head:
            for name, spent in self.head.items():
                seconds[name] += spent
        if s.has_embedding:
            seconds["head and embedding"] += self.memory_traffic(
                10 * s.vocabulary * s.hidden * self.workload.trains_embedding + 4 * s.stream
            )
        if s.mixed_precision or s.sharded:
            # Low-precision gradients into fp32 sums, or towards their reduction. One GPU's matmuls
            # and cross entropy accumulate in fp32 themselves: they read and write the sums.
            fused = 0.0
            if not s.sharded and self.workload.split_masters:
                fused = s.trained_in_blocks
            separate = s.trained_in_blocks * s.own_share + s.trained_outside_parameters - fused
            if s.fuses_head_gradient:
                separate = s.vocabulary * s.hidden * self.workload.trains_embedding
            seconds["gradient accumulation"] += self.memory_traffic(10 * separate + 6 * fused)
        seconds["communication within blocks"] += s.layers * self.block_communication
        if layout.pipeline > 1:
            within_node = self.strides["pipeline"] < GPUS_PER_NODE
            device = self.device
            bandwidth = device.link_bandwidth if within_node else device.network_bandwidth
            seconds["communication within blocks"] += 2 * s.stages_per_rank * (s.stream / bandwidth)
        return seconds

    # On the GPU itself.

    def matmul(self, rows: int, columns: int, inner: int, fp8: bool = False) -> float:
        """Seconds of a matmul [rows, inner] · [inner, columns], including its memory traffic."""
        s, device = self.s, self.device
        rate = device.fp32_flops if s.dtype_bytes == 4 else device.matmul_flops * (1 + fp8)
        factors = (1 if fp8 else s.dtype_bytes) * (rows * inner + inner * columns)
        moved = factors + s.dtype_bytes * rows * columns
        return 2 * rows * columns * inner / rate + moved / device.memory_bandwidth

    def memory_traffic(self, size: float) -> float:
        """Seconds to read and write `size` bytes in total."""
        return size / self.device.memory_bandwidth

    @cached_property
    def attention_projections(self) -> float:
        """The matmuls of q, k, v and o of a block, forward."""
        s, fp8 = self.s, self.workload.fp8
        queries = self.matmul(s.tokens, s.query_size, s.hidden, fp8)
        keys = self.matmul(s.tokens, s.key_size, s.hidden, fp8)
        return 2 * queries + 2 * keys

    @cached_property
    def mlp_matmuls(self) -> float:
        """The matmuls of a block's MLP, forward."""
        s, fp8 = self.s, self.workload.fp8
        gate_or_up = self.matmul(s.tokens, s.ffn, s.hidden, fp8)
        return self.workload.mlp_inputs * gate_or_up + self.matmul(s.tokens, s.hidden, s.ffn, fp8)

    @cached_property
    def fp8_quantization(self) -> tuple[float, float]:
        """Quantization for a block's fp8 matmuls, forward and backward.

        Bytes a number: 2 for the absolute maximum; 2 read and 2 written in both orders, of weights
        2 and 1 in one order. Gradients of weights pass through bf16.
        """
        s = self.s
        if not self.workload.fp8:
            return 0.0, 0.0
        inputs = (2 if self.layout.compiled else 5) * s.hidden + s.query_size + s.ffn
        gradients = s.query_size + 2 * s.key_size + 2 * s.hidden + 2 * s.ffn
        return (
            self.memory_traffic(6 * (s.tokens * inputs) + 5 * s.block_parameters),
            self.memory_traffic(6 * (s.tokens * gradients) + (3 + 4) * s.block_parameters),
        )

    @cached_property
    def attention(self) -> tuple[float, float]:
        """Attention of a block, forward and backward, as if each sequence were one document.

        Backward computes the scores again: 2.5 times the forward work.
        """
        s, device = self.s, self.device
        work = 2 * s.tokens * self.workload.attended_length * s.query_size
        if s.dtype_bytes == 4:
            return work / device.fp32_flops, 2.5 * work / device.fp32_flops
        varlen = self.workload.packed or self.layout.context > 1
        forward, backward = device.varlen_attention_flops if varlen else device.attention_flops
        return work / forward, 2.5 * work / backward

    @cached_property
    def elementwise(self) -> dict[str, tuple[float, float]]:
        """Norms with residuals, rotary embedding and gate of a block, forward and backward."""
        s, w = self.s, self.s.dtype_bytes
        rotated = s.tokens * (s.query_size + s.key_size)
        if self.layout.compiled:
            moved: dict[str, tuple[float, float]] = {
                "norms": (8 * s.stream, 8 * s.stream),
                "rotary": (2 * w * rotated, 2 * w * rotated),
                "gate": (3 * s.mlp, 5 * s.mlp),
            }
        else:
            moved = {
                "norms": (10 * s.stream, 12 * s.stream),
                "rotary": (40 * rotated, 40 * rotated),
                "gate": (5 * s.mlp, 9 * s.mlp),
            }
        norms = self.workload.norms / 2  # as many times as in Llama
        if self.workload.normed_heads:
            norms += (s.queries + s.keys) / (2 * s.stream)
        moved["norms"] = moved["norms"][0] * norms, moved["norms"][1] * norms
        return {
            name: (self.memory_traffic(forward), self.memory_traffic(backward))
            for name, (forward, backward) in moved.items()
        }

    @cached_property
    def block(self) -> tuple[Seconds, Seconds]:
        """One block without communication, forward and backward."""
        matmuls = self.attention_projections + self.mlp_matmuls
        elementwise = [sum(part[way] for part in self.elementwise.values()) for way in (0, 1)]
        forward = {
            "matmuls": matmuls,
            "attention": self.attention[0],
            "norms, rotary, gate": elementwise[0],
        }
        backward = {
            "matmuls": 2 * matmuls,
            "attention": self.attention[1],
            "norms, rotary, gate": elementwise[1],
        }
        if self.workload.fp8:
            quantization = self.fp8_quantization
            forward["fp8 quantization"], backward["fp8 quantization"] = quantization
        gate, norms, rotary = (self.elementwise[name][0] for name in ("gate", "norms", "rotary"))
        everything = matmuls + self.attention[0] + elementwise[0] + self.fp8_quantization[0]
        backward["recomputation"] = {
            "none": 0.0,
            "activation": gate,
            "activation_and_input": gate + norms / 2,
            "selective": gate + norms + rotary,
            "full": self.mlp_matmuls + gate + norms / 2,
            "block": everything,
        }[self.layout.recompute]
        return forward, backward

    @cached_property
    def head(self) -> Seconds:
        """Head and cross entropy of a micro-batch: matmuls, and traffic of logits and gradient."""
        s = self.s
        logits, weights = s.tokens * s.vocabulary, s.vocabulary * s.hidden
        logit_bytes = {"torch": 26, "fused": 34}.get(self.workload.loss, 3 * s.dtype_bytes)
        chunks = 2 if self.workload.loss != "torch" else 1
        # The gradient goes to its fp32 sum at once, or to the compute dtype.
        written = 12 if s.fuses_head_gradient else 6
        computed = self.workload.backward_of_head
        passes = 1 + computed.weights + computed.inputs
        return {
            "matmuls": passes * self.matmul(s.tokens, s.vocabulary, s.hidden),
            "head and embedding": self.memory_traffic(
                logit_bytes * logits + (8 * chunks + written) * weights
            ),
        }

    @cached_property
    def optimizer(self) -> float:
        """Norm and update: gradients are read twice, masters and moments read and written."""
        s = self.s
        weight_bytes = 16.0 + 2 * self.workload.moment_bytes
        if not s.sharded and s.mixed_precision and not self.workload.split_masters:
            weight_bytes += 6  # masters into weights
        shards = self.layout.shards if s.sharded else 1
        return self.memory_traffic(weight_bytes * s.trained_parameters / shards)

    # Communication.

    def ring(self, size: float, members: int, stride: int, times: float = 1) -> float:
        """Seconds of an all-gather, or a reduce-scatter, of `size` bytes in total in a ring.

        `stride`: ranks from one member to the next. `times`: how many of these collectives.
        """
        if members == 1 or not size:
            return 0.0
        node_members = min(members, max(1, GPUS_PER_NODE // stride))
        nodes = members / node_members
        within = size * (1 - 1 / members) / self.device.link_bandwidth
        between = size * (1 - 1 / nodes) / (self.device.network_bandwidth * node_members)
        latency = (members - 1) * HOP_SECONDS
        if nodes > 1:
            latency = (members - nodes) * HOP_SECONDS + nodes * NODE_HOP_SECONDS
        return times * (max(within, between) + latency)

    @cached_property
    def strides(self) -> dict[str, int]:
        """Ranks from one process to the next along each axis."""
        tensor, context = self.layout.tensor, self.layout.context
        return {
            "context": tensor,
            "shards": tensor,
            "copies": tensor * self.layout.shards,
            "pipeline": tensor * context * self.layout.data,
        }

    @cached_property
    def block_communication(self) -> float:
        """Collectives of tensor and context parallelism, of a block and micro-batch.

        Nothing is computed meanwhile.
        """
        s, layout = self.s, self.layout
        tensor = self.ring(s.normed, layout.tensor, 1, 8)
        all_keys: float = 2 * s.keys * layout.context
        if layout.context > 1:  # with a window, the end of each chunk alone
            all_keys = all_keys / s.tokens * mean_over_blocks(s, s.tokens, 0)
        context = self.ring(all_keys, layout.context, self.strides["context"])
        recomputed = 1.5 if layout.recompute == "block" else 1.0
        return recomputed * (tensor + 2 * context + 4 * self.expert_exchange)

    @cached_property
    def expert_exchange(self) -> float:
        """Rows that one all-to-all of expert parallelism sends to other processes' experts.

        A process sends and receives as many: each of its tokens' rows, but for its own experts'.
        """
        s, experts = self.s, self.layout.expert
        if experts == 1:
            return 0.0
        rows = self.workload.expert_rows * s.normed
        within_node = self.strides["shards"] * experts <= GPUS_PER_NODE
        device = self.device
        bandwidth = device.link_bandwidth if within_node else device.network_bandwidth
        hop = HOP_SECONDS if within_node else NODE_HOP_SECONDS
        return rows * (1 - 1 / experts) / bandwidth + hop

    def _gather(self, parameters: float) -> float:
        """Gather weights of a sharding group."""
        size = parameters * self.s.dtype_bytes
        return self.ring(size, self.layout.shards, self.strides["shards"])

    def _reduce(self, parameters: float) -> float:
        """Reduce fp32 gradients over a sharding group."""
        return self.ring(parameters * 4, self.layout.shards, self.strides["shards"])

    def _sum_over_copies(self, parameters: float) -> float:
        """All-reduce sharded gradients over the sharding groups."""
        copies = self.layout.replicas // self.layout.shards
        size = parameters * 4 / self.layout.shards
        return self.ring(size, copies, self.strides["copies"], 2)

    def sharding_communication(self, forward: float, backward: float) -> float:
        """Seconds of a step that gathers of weights and reductions of gradients are exposed.

        `forward`, `backward`: seconds of a block's computation.
        """
        s, layout = self.s, self.layout
        if not s.sharded:
            return 0.0
        gather, reduce = self._gather, self._reduce
        block, outside, others = s.own_block_parameters, s.outside_parameters, s.layers - 1
        # Frozen weights are gathered, and have no gradient to reduce.
        trained = s.trained_in_blocks / max(1, s.layers) * s.own_share  # of a mean block
        trained_outside = s.trained_outside_parameters
        if layout.pipeline > 1:  # all of it before and after the pipeline is filled
            fillings = layout.micro_batches // layout.in_flight
            once = s.layers * gather(block) + gather(outside)
            return (
                once
                + fillings * (s.layers * reduce(trained) + reduce(trained_outside))
                + s.layers * self._sum_over_copies(trained)
                + self._sum_over_copies(trained_outside)
            )
        # The embedding is gathered before anything is computed, and reduced when nothing is left to
        # compute.
        embedding = outside - s.head_parameters
        head_gather = max(0.0, gather(s.head_parameters) - forward)
        head_reduce = max(0.0, reduce(s.trained_head_parameters) - backward)
        first_gathers = gather(embedding) + gather(block) + head_gather
        of_embedding = reduce(trained_outside - s.trained_head_parameters)
        last_reductions = of_embedding + reduce(trained) + head_reduce
        gathers = first_gathers + others * max(0.0, gather(block) - forward)
        reductions = last_reductions + others * max(0.0, reduce(trained) - backward)
        copies = self._exposed_sum_over_copies(backward)
        if layout.zero_stage == 1:
            return gathers + reductions + copies
        if layout.zero_stage == 2:
            return gathers + layout.micro_batches * reductions + copies
        both = reduce(trained) + gather(block)  # the backward pass gathers again
        again = last_reductions + gather(block) + others * max(0.0, both - backward)
        return layout.micro_batches * (gathers + again) + copies

    def _exposed_sum_over_copies(self, backward: float) -> float:
        """Seconds that summing gradients over sharding groups adds to the last backward pass."""
        s, layout = self.s, self.layout
        if layout.replicas == layout.shards:
            return 0.0
        trained = s.trained_in_blocks / max(1, s.layers)
        reduced, summed = self._reduce(trained), self._sum_over_copies(trained)
        exposed = max(0.0, reduced + summed - max(backward, reduced))
        outside = self._sum_over_copies(s.trained_outside_parameters)
        return outside + summed + (s.layers - 1) * exposed

    def bubble_micro_batches(self) -> float:
        """Micro-batches for whose time a process of a pipeline waits in a step.

        (p - 1) / v for p processes with v stages each (Narayanan et al. 2021), a third of it with
        zero-bubble schedules (Qi et al. 2023), each time that the pipeline is filled.
        """
        layout = self.layout
        if layout.pipeline == 1:
            return 0.0
        waits = layout.pipeline - 1.0
        if layout.schedule.endswith("zero_bubble"):
            waits = waits / 3
        stages = self.s.stages_per_rank if layout.schedule != "zbv_zero_bubble" else 1
        return waits / stages * (layout.micro_batches / layout.in_flight)
