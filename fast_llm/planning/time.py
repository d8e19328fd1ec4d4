"""What a layout will be like before there is a cluster: does it fit, what does a step take, what limits it, what is better.

A step's seconds are summed from what is done in it: the floating-point operations of its products and of attention at the rates
that a device sustains, the bytes that everything else moves in its memory, the bytes that are sent between devices, and what a
pipeline waits. docs/planning.md has the formulas with their sources, and what was forecast beside what was measured.
No torch, no data, no weights: it answers in seconds on a laptop.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from fast_llm.config.checks import check, violations
from fast_llm.config.section import Document, validate
from fast_llm.config.train import REFUSED, RENAMED, TrainConfig
from fast_llm.errors import ConfigError
from fast_llm.models.llama import cost
from fast_llm.planning.memory import (
    MOMENT_BYTES,
    Memory,
    ParallelLayout,
    StepPhase,
    Workload,
    peak,
    required_bytes,
    with_reserve,
)
from fast_llm.planning.preflight import format_bytes, with_pretrained_model

GPUS_PER_NODE = 8  # devices of a node
_MOMENTS = {8: "fp32", 4: "bf16", MOMENT_BYTES["int8"]: "8-bit"}


@dataclass(frozen=True)
class DeviceSpec:
    """What a device sustains."""

    name: str
    memory: float  # bytes
    products: float  # FLOP/s of large bf16 products, for hours
    whole: tuple[
        float, float
    ]  # FLOP/s of causal attention in whole sequences, forward and backward
    documents: tuple[float, float]  # the same within documents
    single: float  # FLOP/s of fp32 products
    bandwidth: float  # bytes/s of its memory, reading and writing
    link: float  # bytes/s to the others of a node, each way
    network: float  # bytes/s to other nodes, each way
    peak: float  # FLOP/s of the data sheet, which MFU is a share of


def _scaled(
    name: str,
    gibibytes: float,
    best: float,
    memory: float,
    link: float,
    network: float,
    **more: float,
) -> DeviceSpec:
    """From what is published: the best rate of bf16 products (ml-engineering's MAMF table), and data sheets.

    An H200's own share of these was measured (docs/performance.md): 660 of 794.5 TFLOP/s and 4.25 of 4.8 TB/s hold for long, attention
    has 591 and 475 TFLOP/s in whole sequences, 264 and 263 in documents. NCCL reaches 0.8 of NVLink's rate, and between nodes
    half of the adapters' (all-gather over 256 GPUs, NVIDIA/nccl issue 1218).
    """
    share = best / 794.5e12
    hopper = 1.0 if name.startswith("h") else more.get("attention", 1.0)
    return DeviceSpec(
        name,
        gibibytes * 2**30,
        660e12 * share,
        (591e12 * share * hopper, 475e12 * share * hopper),
        (264e12 * share, 263e12 * share),
        more["single"],
        memory * 4.25 / 4.8,
        0.8 * link,
        0.5 * network,
        more["peak"],
    )


DEVICES = {
    device.name: device
    for device in (
        # Memory as nvidia-smi has it. Before Hopper there is but the flash kernel, whose rate is that within documents.
        _scaled(
            "a100",
            79.3,
            271.2e12,
            2.039e12,
            300e9,
            25e9,
            attention=0.5,
            single=19.5e12,
            peak=312e12,
        ),
        _scaled("h100", 79.6, 794.5e12, 3.35e12, 450e9, 50e9, single=67e12, peak=989e12),
        _scaled("h200", 140.4, 794.5e12, 4.8e12, 450e9, 50e9, single=67e12, peak=989e12),
        _scaled("b200", 178.4, 1745e12, 8e12, 900e9, 50e9, single=75e12, peak=2250e12),
    )
}
_HOP, _NODE_HOP = (
    3.4e-6,
    14e-6,
)  # seconds from neighbour to neighbour in a ring (NCCL's own tables, tuning.cc)


@dataclass(frozen=True)
class Forecast:
    """Of one layout on one kind of device."""

    shape: Workload
    layout: ParallelLayout
    device: DeviceSpec
    model_flops: float  # a token's
    peak: StepPhase  # of the process with the most
    parts: Mapping[str, float]  # what a step's seconds go to

    @property
    def memory(self) -> float:
        """Bytes of a device that are needed."""
        return with_reserve(self.peak, "cuda")

    @property
    def fits(self) -> bool:
        """Whether the device has them."""
        return self.memory <= self.device.memory

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def rate(self) -> float:
        """Tokens a second, of each device."""
        return self.shape.batch_size * self.shape.sequence / self.seconds / self.layout.processes

    @property
    def mfu(self) -> float:
        """Share of the data sheet's FLOP/s, counted as in training."""
        return self.rate * self.model_flops / self.device.peak

    @property
    def limit(self) -> str:
        """What takes most of a step, and what of the rest could be avoided."""
        first, *others = sorted(self.parts, key=lambda part: -self.parts[part])
        second = next(
            (part for part in others if part not in ("attention", "matrix products")), None
        )
        words = [
            f"{part} {self.parts[part] / self.seconds:.0%}"
            for part in (first, second)
            if part is not None
        ]
        return ", ".join(words)


def forecast(config: TrainConfig, processes: int, device: DeviceSpec) -> Forecast:
    """Of a configuration that meets the constraints."""
    layout = ParallelLayout.of(config, processes)
    rows = layout.micro_batch_size * layout.micro_batches * layout.data - layout.padding
    shape = Workload.of(config, rows)
    return of_layout(
        shape,
        layout,
        device,
        cost(config.model.base_model, config.batch.sequence_length).model_flops_per_token,
    )


def of_layout(
    shape: Workload, layout: ParallelLayout, device: DeviceSpec, model_flops: float
) -> Forecast:
    """The process of a pipeline with the most work gives the time, the one with the most memory the peak."""
    worst = peak(shape, layout, "cuda")
    if shape.moments_auto and with_reserve(worst, "cuda") > device.memory:
        shape = replace(shape, moments=4)
        worst = peak(shape, layout, "cuda")
    steps = [
        Step(Memory(shape, layout, "cuda", place), device).parts()
        for place in range(layout.pipeline)
    ]
    return Forecast(
        shape, layout, device, model_flops, worst, max(steps, key=lambda parts: sum(parts.values()))
    )


class Step:
    """The seconds of one step, of one process."""

    def __init__(self, memory: Memory, device: DeviceSpec):
        self.m, self.device = memory, device
        self.shape, self.layout = memory.shape, memory.layout

    # What the device does by itself.

    def product(self, rows: int, columns: int, inner: int, fp8: bool = False) -> float:
        """One product, with reading its factors and writing its result."""
        rate = self.device.single if self.m.w == 4 else self.device.products * (1 + fp8)
        size = (1 if fp8 else self.m.w) * (
            rows * inner + inner * columns
        ) + self.m.w * rows * columns
        return 2 * rows * columns * inner / rate + size / self.device.bandwidth

    def moved(self, size: float) -> float:
        """Bytes read and written."""
        return size / self.device.bandwidth

    @cached_property
    def projections(self) -> float:
        """q, k, v and o of a block, forward."""
        m, fp8 = self.m, self.shape.fp8
        return 2 * self.product(m.T, m.A, m.E, fp8) + 2 * self.product(m.T, m.K, m.E, fp8)

    @cached_property
    def feed_forward(self) -> float:
        """The products of a block's MLP, forward."""
        m, fp8 = self.m, self.shape.fp8
        return 2 * self.product(m.T, m.F, m.E, fp8) + self.product(m.T, m.E, m.F, fp8)

    @cached_property
    def rounded(self) -> tuple[float, float]:
        """What a block's products in fp8 need besides, forward and backward: the greatest number (2 bytes), and numbers read once
        for both orders (2 and 2), of weights for one (2 and 1); gradients of weights go by way of bf16."""
        m, shape = self.m, self.shape
        if not shape.fp8:
            return 0.0, 0.0
        seen = m.T * (2 * m.E + m.A + m.F) if self.layout.compiled else m.T * (5 * m.E + m.A + m.F)
        made = m.T * (m.A + 2 * m.K + 2 * m.E + 2 * m.F)
        return self.moved(6 * seen + 5 * m.block), self.moved(6 * made + (3 + 4) * m.block)

    @cached_property
    def attention(self) -> tuple[float, float]:
        """Of a block, forward and backward; the latter computes the scores again. As if each sequence were one document."""
        m, device = self.m, self.device
        work = 2 * m.T * self.shape.sequence * m.A
        if m.w == 4:
            return work / device.single, 2.5 * work / device.single
        forward, backward = (
            device.documents if self.shape.packed or self.layout.context > 1 else device.whole
        )
        return work / forward, 2.5 * work / backward

    @cached_property
    def elementwise(self) -> dict[str, tuple[float, float]]:
        """Norms with residuals, rotary positions and the gate of a block: forward, backward; counted pass by pass."""
        m, w = self.m, self.m.w
        norms, turned, gated = m.R * m.E * w, m.T * (m.A + m.K), m.T * m.F * w
        if self.layout.compiled:
            sizes = {
                "norms": (8 * norms, 8 * norms),
                "rotary": (2 * w * turned, 2 * w * turned),
                "gate": (3 * gated, 5 * gated),
            }
        else:
            sizes = {
                "norms": (10 * norms, 12 * norms),
                "rotary": (40 * turned, 40 * turned),
                "gate": (5 * gated, 9 * gated),
            }
        return {
            name: (self.moved(forward), self.moved(backward))
            for name, (forward, backward) in sizes.items()
        }

    @cached_property
    def block(self) -> tuple[dict[str, float], dict[str, float]]:
        """One block, forward and backward, on the device itself."""
        forward, backward = self.attention
        products = self.projections + self.feed_forward
        passes = [sum(part[way] for part in self.elementwise.values()) for way in (0, 1)]
        there = {
            "matrix products": products,
            "attention": forward,
            "norms, rotary, gate": passes[0],
        }
        back = {
            "matrix products": 2 * products,
            "attention": backward,
            "norms, rotary, gate": passes[1],
        }
        if self.shape.fp8:
            there["rounding to fp8"], back["rounding to fp8"] = self.rounded
        gate, norms, rotary = (self.elementwise[name][0] for name in ("gate", "norms", "rotary"))
        again = {
            "none": 0.0,
            "activation": gate,
            "activation_and_input": gate + norms / 2,
            "selective": gate + norms + rotary,
            "full": self.feed_forward + gate + norms / 2,
            "block": products + forward + passes[0] + self.rounded[0],
        }[self.layout.recompute]
        back["recomputed"] = again
        return there, back

    @cached_property
    def head(self) -> dict[str, float]:
        """Head and cross entropy of a micro-batch: three products, passes over the logits, sums of the head's gradient."""
        m = self.m
        logits, weights = m.T * m.V, m.V * m.E
        passes = {"torch": 26, "fused": 34}.get(self.shape.loss, 3 * m.w)
        stretches = 2 if self.shape.loss != "torch" else 1
        into = 12 if m.adds else 6  # to the fp32 sum at once, or into what is computed in
        return {
            "matrix products": 3 * self.product(m.T, m.V, m.E),
            "head and embedding": self.moved(passes * logits + (8 * stretches + into) * weights),
        }

    @cached_property
    def optimizer(self) -> float:
        """Norm and update."""
        m = self.m
        each = (
            16.0 + 2 * self.shape.moments
        )  # gradients read twice, masters and moments read and written
        if not m.sharded and m.mixed and not self.shape.halves:
            each += 6  # masters into weights
        return self.moved(each * m.parameters / (self.layout.shard if m.sharded else 1))

    # What is sent.

    def sent(self, size: float, members: int, stride: int, times: float = 1) -> float:
        """A gather of `size` bytes in all, or a reduction of them, in a ring of processes that are `stride` apart."""
        if members == 1 or not size:
            return 0.0
        together = min(members, max(1, GPUS_PER_NODE // stride))  # of a node
        nodes = members / together
        inside = size * (1 - 1 / members) / self.device.link
        between = size * (1 - 1 / nodes) / (self.device.network * together)
        hops = (members - nodes) * _HOP + nodes * _NODE_HOP if nodes > 1 else (members - 1) * _HOP
        return times * (max(inside, between) + hops)

    @cached_property
    def strides(self) -> dict[str, int]:
        """How far apart the neighbours along each axis are."""
        tensor, context = self.layout.tensor, self.layout.context
        return {
            "context": tensor,
            "weights": tensor,
            "copies": tensor * self.layout.shard,
            "pipeline": tensor * context * self.layout.data,
        }

    @cached_property
    def within(self) -> float:
        """Of one block and micro-batch, forward and backward: what tensor and context parallelism send, while nothing is computed."""
        m, layout = self.m, self.layout
        row = m.w * m.T * m.E
        tensor = self.sent(row, layout.tensor, 1, 8)
        keys = 2 * m.K * m.T * layout.context * m.w
        again = 1.5 if layout.recompute == "block" else 1.0
        return again * (tensor + 2 * self.sent(keys, layout.context, self.strides["context"]))

    def exposed(self, forward: float, backward: float) -> float:
        """Of a step: what gathering weights and reducing gradients take beyond what is computed meanwhile.

        `forward`, `backward`: seconds that a block is computed for.
        """
        m, layout = self.m, self.layout
        if not m.sharded:
            return 0.0
        stride, shard, copies = (
            self.strides["weights"],
            layout.shard,
            layout.sharing // layout.shard,
        )
        layers, many = m.layers, layout.micro_batches

        def gather(weights: float) -> float:
            return self.sent(weights * m.w, shard, stride)

        def reduce(weights: float) -> float:
            return self.sent(weights * 4, shard, stride)

        def copy(weights: float) -> float:
            return self.sent(weights * 4 / shard, copies, self.strides["copies"], 2)

        if layout.pipeline > 1:  # all before and after a filling of the pipeline
            fillings = many // layout.in_flight
            once = layers * gather(m.block) + gather(m.outside)
            return (
                once
                + fillings * (layers * reduce(m.block) + reduce(m.outside))
                + layers * copy(m.block)
                + copy(m.outside)
            )
        first = (
            m.outside - m.head
        )  # gathered before anything is computed, reduced when there is nothing left
        ends = (
            gather(first) + gather(m.block) + max(0.0, gather(m.head) - forward),
            reduce(first) + reduce(m.block) + max(0.0, reduce(m.head) - backward),
        )
        there = ends[0] + (layers - 1) * max(0.0, gather(m.block) - forward)
        back = ends[1] + (layers - 1) * max(0.0, reduce(m.block) - backward)
        both = reduce(m.block) + gather(m.block)
        again = ends[1] + gather(m.block) + (layers - 1) * max(0.0, both - backward)
        last = (
            copy(m.outside)
            + copy(m.block)
            + (layers - 1)
            * max(0.0, reduce(m.block) + copy(m.block) - max(backward, reduce(m.block)))
        )
        if copies == 1:
            last = 0.0
        if layout.zero_stage == 1:
            return there + back + last
        if layout.zero_stage == 2:
            return there + many * back + last
        return many * (there + again) + last

    # All of it.

    def parts(self) -> dict[str, float]:
        """Seconds by what they go to."""
        m, layout = self.m, self.layout
        many, layers = layout.micro_batches, m.layers
        there, back = self.block
        micro: dict[str, float] = defaultdict(float)
        for part in (there, back):
            for name, seconds in part.items():
                micro[name] += layers * seconds
        if m.last:
            for name, seconds in self.head.items():
                micro[name] += seconds
        if m.first:
            micro["head and embedding"] += self.moved(10 * m.V * m.E + 4 * m.R * m.E * m.w)
        if (
            m.mixed or m.sharded
        ):  # low-precision gradients into fp32 sums, or towards their reduction
            # The products of one GPU add by themselves, and so does the cross entropy: sums are read and written within them.
            inside = m.parameters - m.outside if not m.sharded and self.shape.halves else 0
            alone = m.V * m.E if m.adds else m.parameters - inside
            micro["gradients"] += self.moved(10 * alone + 6 * inside)
        micro["sent within blocks"] += layers * self.within
        if layout.pipeline > 1:
            handed = (
                m.R
                * m.E
                * m.w
                / (
                    self.device.link
                    if self.strides["pipeline"] < GPUS_PER_NODE
                    else self.device.network
                )
            )
            micro["sent within blocks"] += 2 * m.per_rank * handed
        total: dict[str, float] = {name: many * seconds for name, seconds in micro.items()}
        total["optimizer"] = self.optimizer
        total["weights and gradients sent"] = self.exposed(sum(there.values()), sum(back.values()))
        if m.sharded:
            gathers = many * 2 if layout.zero_stage == 3 and layout.pipeline == 1 else 1
            total["gradients"] = total.get("gradients", 0.0) + self.moved(
                6 * m.parameters * gathers
            )
        total["pipeline idle"] = self.idle() * sum(micro.values())
        return {name: seconds for name, seconds in total.items() if seconds}

    def idle(self) -> float:
        """The time of how many micro-batches a process of a pipeline waits in a step (Narayanan et al. 2021; Qi et al. 2023)."""
        layout = self.layout
        if layout.pipeline == 1:
            return 0.0
        each = layout.pipeline - 1.0
        if layout.schedule.endswith("zero_bubble"):
            each = each / 3
        stages = self.m.per_rank if layout.schedule != "zbv_zero_bubble" else 1
        return each / stages * (layout.micro_batches / layout.in_flight)


# Asking.


def read_config(document: Document, processes: int) -> TrainConfig:
    """The configuration, with all that is wrong with it on so many processes.

    Raises ConfigError.
    """
    document = with_pretrained_model(document, weights=False)[0]
    config = validate(TrainConfig, document, REFUSED, RENAMED)
    if problems := check(config, document, processes):
        raise ConfigError(problems)
    return config


def with_layout(config: TrainConfig, choice: Mapping[str, Any]) -> TrainConfig:
    """The same with other values at some dotted paths."""

    def put(section: Any, path: list[str], value: Any) -> Any:
        first, *rest = path
        return section.model_copy(
            update={first: put(getattr(section, first), rest, value) if rest else value}
        )

    for path, value in choice.items():
        config = put(config, path.split("."), value)
    return config


_DISTRIBUTED, _STAGES, _LEVEL = (
    "model.distributed",
    "model.multi_stage",
    "model.base_model.transformer.mlp_recompute_level",
)
_DEPTHS = tuple(
    f"batch.{name}_micro_batches" for name in ("sequential", "depth_first", "breadth_first")
)
_LEVELS = ("none", "activation", "activation_and_input", "selective", "full", "block")


def choices(config: TrainConfig, processes: int) -> Iterator[dict[str, Any]]:
    """Layouts that are worth a look, as settings. The batch stays; how it is cut into micro-batches does not."""
    sequence, size = config.batch.sequence_length, batch_size(config)
    for tensor, context, pipeline in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        rest = processes // (tensor * context * pipeline)
        if (
            rest < 1
            or rest * tensor * context * pipeline != processes
            or (context > 1 and sequence < 4096 * context)
        ):
            continue
        stages = (1,) if pipeline > 1 else (1, 2, 3)
        groups = (
            (None, GPUS_PER_NODE // min(tensor, GPUS_PER_NODE))
            if rest * context > GPUS_PER_NODE // tensor > 1
            else (None,)
        )
        for zero_stage, group in product(stages if rest * context > 1 else (1,), groups):
            for rows in (1, 2, 4, 8, 16):
                if rows > 1 and rows * rest > size:
                    break
                yield {
                    f"{_DISTRIBUTED}.tensor_parallel": tensor,
                    f"{_DISTRIBUTED}.sequence_tensor_parallel": tensor > 1,
                    f"{_DISTRIBUTED}.sequence_data_parallel": context,
                    f"{_DISTRIBUTED}.pipeline_parallel": pipeline,
                    f"{_STAGES}.zero_stage": zero_stage,
                    f"{_STAGES}.shard_size": group,
                    f"{_STAGES}.layers_per_stage": None,
                    f"{_STAGES}.pipeline_schedule": None,
                    "batch.micro_batch_size": rows,
                    "batch.batch_size": size,
                    **dict.fromkeys(_DEPTHS),
                }


def resolve_auto(config: TrainConfig, processes: int, memory: float, kind: str) -> TrainConfig:
    """What is `auto` decided, for processes with so many bytes each of a device of the `kind` cuda, cpu or UPCASTING_CPU.

    Moments are fp32 where that fits without computing matrix products again, else bf16. A micro-batch is the fastest that fits; where
    none does, it is the smallest.
    """
    decide, moments = config.batch.micro_batch_size == "auto", config.optimizer.moments_dtype
    if not decide and moments != "auto":
        return config
    flops = cost(config.model.base_model, config.batch.sequence_length).model_flops_per_token
    given = _LEVELS.index(config.model.base_model.transformer.mlp_recompute_level)
    changed = config
    for dtype in ("fp32", "bf16") if moments == "auto" else (moments,):
        found: list[tuple[float, TrainConfig]] = []
        for rows in (1, 2, 4, 8, 16, 32, 64) if decide else (config.batch.micro_batch_size,):
            for level in _LEVELS[given:] if decide else _LEVELS[given : given + 1]:
                if level in ("full", "block") and dtype == "fp32" and moments == "auto" and decide:
                    continue
                choice = {
                    "batch.micro_batch_size": rows,
                    _LEVEL: level,
                    "optimizer.moments_dtype": dtype,
                }
                changed = with_layout(config, choice)
                if next(iter(violations(changed, processes)), None) is not None:
                    continue
                layout = ParallelLayout.of(changed, processes)
                shape = Workload.of(changed, config.batch.batch_size or 0)
                if required_bytes(shape, layout, kind) <= memory and (
                    not decide or not layout.padding or rows == 1
                ):
                    found.append((of_layout(shape, layout, DEVICES["h100"], flops).rate, changed))
                    break  # those that follow are slower
        if found:
            return max(found, key=lambda one: one[0])[1]
    return with_layout(changed, {"batch.micro_batch_size": 1}) if decide else changed


def describe_memory(config: TrainConfig, processes: int) -> str:
    """What a process needs of several GPUs' memory, and which micro-batch would be the fastest on each."""
    lines: list[str] = []
    for name, count in (("h100", "80"), ("h200", "141"), ("b200", "180")):
        device = DEVICES[name]
        own = forecast(resolve_auto(config, processes, device.memory, "cuda"), processes, device)
        words = f"{format_bytes(own.memory)} as configured" + ("" if own.fits else ", too much")
        if config.batch.batch_size is not None:
            free: dict[str, Any] = {**dict.fromkeys(_DEPTHS), "batch.micro_batch_size": "auto"}
            best_one = forecast(
                resolve_auto(with_layout(config, free), processes, device.memory, "cuda"),
                processes,
                device,
            )
            words += (
                f"; fastest with micro_batch_size {best_one.layout.micro_batch_size},"
                f" mlp_recompute_level {best_one.layout.recompute}"
                if best_one.fits
                else "; no micro-batch fits, see `fast-llm plan`"
            )
        lines.append(f"{'Memory' if not lines else '':<14}a GPU of {count} GB: {words}")
    return "\n".join(lines)


def batch_size(config: TrainConfig) -> int:
    """The sequences of a step, which do not change with the layout."""
    batch = config.batch
    if batch.batch_size is not None:
        return batch.batch_size
    raise ConfigError(
        [
            "batch.batch_size: missing: without it the batch grows with the number of processes; give it to compare layouts"
        ]
    )


def fastest_layouts(
    config: TrainConfig, processes: int, device: DeviceSpec, count: int = 3
) -> list[tuple[dict[str, Any], Forecast]]:
    """The fastest layouts that fit, each arrangement once, fastest first."""
    flops = cost(config.model.base_model, config.batch.sequence_length).model_flops_per_token
    found: list[tuple[dict[str, Any], Forecast]] = []
    for choice in choices(config, processes):
        changed = with_layout(config, choice)
        if next(iter(violations(changed, processes)), None) is not None:
            continue
        layout = ParallelLayout.of(changed, processes)
        shape = Workload.of(changed, config.batch.batch_size or 0)
        for level in _LEVELS:
            one = of_layout(shape, replace(layout, recompute=level), device, flops)
            if one.fits:
                found.append((choice | {_LEVEL: level}, one))
                break  # those that follow are slower
    found.sort(key=lambda pair: (-pair[1].rate, pair[1].memory))
    arrangements: dict[tuple[int, ...], tuple[dict[str, Any], Forecast]] = {}
    for choice, one in found:
        layout = one.layout
        arrangements.setdefault(
            (layout.tensor, layout.context, layout.pipeline, layout.zero_stage, layout.shard),
            (choice, one),
        )
    return list(arrangements.values())[:count]


def describe(config: TrainConfig, processes: int, device: DeviceSpec) -> str:
    """Everything, in words and numbers."""
    batch_size(config)
    config = resolve_auto(config, processes, device.memory, "cuda")
    own = forecast(config, processes, device)
    lines = [
        "As configured",
        "",
        *_details(own),
        "",
        f"The fastest that fit {processes} × {device.name.upper()}",
        "",
    ]
    proposals = fastest_layouts(config, processes, device)
    lines += [_HEAD, *(_row(one) for _, one in proposals)] if proposals else [_NOTHING]
    if proposals:
        lines += ["", "For the first of them, set", "", *_changes(config, proposals[0][0])]
    lines += ["", "By number of GPUs", "", _HEAD]
    for number in (2**power for power in range(11)):
        for _, one in fastest_layouts(config, number, device, 1):
            lines.append(_row(one))
    return "\n".join(lines)


_HEAD = (
    f"{'GPUs':>5}  {'layout':<48} {'rows':>4} {'recompute':<21} {'tokens/s/GPU':>12} {'tokens/s':>12} {'step s':>7} {'MFU':>4}"
    f" {'memory':>9}  limited by"
)
_NOTHING = (
    "None: the batch has too few sequences for so many, or the model is too large for so few."
)


def _row(one: Forecast) -> str:
    layout = one.layout
    return (
        f"{layout.processes:>5}  {_arranged(layout):<48} {layout.micro_batch_size:>4} {layout.recompute:<21} {one.rate:>12,.0f}"
        f" {one.rate * layout.processes:>12,.0f} {one.seconds:>7.2f} {one.mfu:>4.0%} {format_bytes(one.memory):>9}  {one.limit}"
    )


def _arranged(layout: ParallelLayout) -> str:
    words = [f"zero_stage {layout.zero_stage}"] if layout.sharing > 1 else []
    words += [f"shard_size {layout.shard}"] if layout.shard < layout.sharing else []
    words += [f"tensor {layout.tensor}"] if layout.tensor > 1 else []
    words += [f"context {layout.context}"] if layout.context > 1 else []
    words += [f"pipeline {layout.pipeline}"] if layout.pipeline > 1 else []
    words += [f"data {layout.data}"]
    return ", ".join(words)


def _details(one: Forecast) -> list[str]:
    verdict = "fits" if one.fits else "DOES NOT FIT"
    layout = one.layout
    held = ", ".join(
        f"{name} {format_bytes(size)}"
        for name, size in sorted(one.peak.parts.items(), key=lambda part: -part[1])
        if size > one.peak.bytes / 100
    )
    spent = ", ".join(
        f"{name} {seconds / one.seconds:.1%}"
        for name, seconds in sorted(one.parts.items(), key=lambda part: -part[1])
    )
    return [
        f"ParallelLayout     {layout.processes} × {one.device.name.upper()}: {_arranged(layout)};"
        f" {layout.micro_batch_size} × {layout.micro_batches} sequences each, recompute {layout.recompute},"
        f" {_MOMENTS[one.shape.moments]} moments",
        f"Memory     {format_bytes(one.memory)} of {format_bytes(one.device.memory)}: {verdict}",
        f"           most {one.peak.name}: {held}",
        f"Step       {one.seconds:.3g} s for {one.shape.batch_size * one.shape.sequence:,} tokens:"
        f" {one.rate:,.0f} tokens/s a GPU, MFU {one.mfu:.1%}",
        f"           {spent}",
        f"Limit      {one.limit}",
    ]


def _changes(config: TrainConfig, choice: Mapping[str, Any]) -> list[str]:
    """What has to be set for it."""

    def value(path: str) -> Any:
        found: Any = config
        for key in path.split("."):
            found = getattr(found, key)
        return found

    written = {None: "null", True: "yes", False: "no"}
    return [
        f"  {path}={written.get(wanted, wanted) if not isinstance(wanted, int) or isinstance(wanted, bool) else wanted}"
        for path, wanted in choice.items()
        if wanted != value(path)
    ] or ["  nothing to change"]
