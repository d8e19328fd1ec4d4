"""What a layout will need: memory of a process at its worst moment, counted tensor by tensor.

Nothing is measured or fitted here: each term is a tensor that `model/`, `parallel/`, `optim/` or FSDP2 holds at that moment.
docs/planning.md has the formulas, and what was measured beside what is forecast. No torch: it answers at once, anywhere.

Letters, all of one process: T tokens of a micro-batch, R those of them between the matrices (fewer with
sequence_tensor_parallel), E hidden size, A dimensions of its query heads, K of its key heads, F its MLP size, V its rows of
the vocabulary, w bytes of the dtype that is computed in.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fast_llm.config.batch import BatchSizes, derive_batch_sizes
from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import BaseModelConfig, TrainConfig
from fast_llm.models.llama import shapes

_ROWS = 1024  # model/linear.py: rows of a factor, or of the head's gradient, at a time
STRETCH = {"cuda": 2**29, "cpu": 2**25}  # model/loss.py: logits at once
_PIECE = 2**26  # model/loss.py: logits in fp32, without a kernel
MOMENT_BYTES = {
    "bf16": 4,
    "int8": 2 * (1 + 2 / 128),
}  # kernels/rounding.py: two bytes for each block of 128

# A CPU that has no products in the dtype that is computed in, and makes them in fp32 (model/linear.py).
UPCASTING_CPU = "widening cpu"
# Bytes that are not tensors': CUDA, cuBLAS and NCCL on a GPU; Python and its libraries in a process's memory.
RESERVED = {"cuda": 2 * 2**30, "cpu": 2**29, UPCASTING_CPU: 2**29}
FRAGMENTS = 0.03  # of PyTorch's memory, between tensors

Parts = dict[str, float]  # part → bytes


@dataclass(frozen=True)
class ParallelLayout:
    """How a step is spread over processes, and what each keeps."""

    processes: int
    micro_batch_size: int
    micro_batches: int
    padding: int = 0
    tensor: int = 1
    sequence_tensor: bool = False
    context: int = 1
    pipeline: int = 1
    stages: tuple[int, ...] = ()  # layers of each, from first to last
    schedule: str = "1f1b"
    in_flight: int = 1
    zero_stage: int = 1
    shard_size: int | None = None
    recompute: str = "none"
    compiled: bool = False

    @staticmethod
    def of(config: TrainConfig, processes: int) -> "ParallelLayout":
        """What a configuration that meets the constraints means on so many processes."""
        distributed, multi = config.model.distributed, config.model.multi_stage
        batch: BatchSizes = derive_batch_sizes(
            config.batch, distributed.data_parallel(processes), distributed.pipeline_parallel > 1
        )
        in_flight = micro_batches_in_flight(config, batch)
        return ParallelLayout(
            processes=processes,
            micro_batch_size=batch.micro_batch_size,
            micro_batches=batch.micro_batches,
            padding=batch.padding,
            tensor=distributed.tensor_parallel,
            sequence_tensor=distributed.sequence_tensor_parallel
            and distributed.tensor_parallel > 1,
            context=distributed.sequence_data_parallel,
            pipeline=distributed.pipeline_parallel,
            stages=tuple(stage_sizes(config)),
            schedule=schedule_name(config, in_flight) if distributed.pipeline_parallel > 1 else "",
            in_flight=in_flight,
            zero_stage=multi.zero_stage or 1,
            shard_size=multi.shard_size,
            recompute=config.model.base_model.transformer.mlp_recompute_level,
            compiled=multi.compile_all,
        )

    @property
    def data(self) -> int:
        """Processes that the batch is dealt to."""
        return self.processes // (self.tensor * self.context * self.pipeline)

    @property
    def sharing(self) -> int:
        """Processes that hold the training state of the same weights."""
        return self.data * self.context

    @property
    def shard(self) -> int:
        """Over how many of them it is sharded."""
        return min(self.shard_size or self.sharing, self.sharing)


@dataclass(frozen=True)
class Workload:
    """The model's sizes, and what is the same for every layout of a run."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    ffn: int
    vocabulary: int
    tied: bool
    matrices: int  # weights of a block's matrices
    vectors: int  # and of its norms and biases
    sequence: int
    width: int  # bytes of the dtype that is computed in
    moments: float  # bytes of both moments of a weight
    moments_auto: bool  # they may be 4 where 8 do not fit
    flash: bool
    loss: str
    splits: int | None
    packed: bool  # documents of a sequence are kept apart
    fp8: bool
    halves: bool  # one GPU keeps of a weight's master what its bf16 weight lacks
    batch_size: int

    @staticmethod
    def of(config: TrainConfig, batch_size: int) -> "Workload":
        """From a configuration."""
        base: BaseModelConfig = config.model.base_model
        t = base.transformer
        block = [
            shape for name, shape in shapes(base).items() if name.startswith("model.layers.0.")
        ]
        return Workload(
            layers=t.num_layers,
            hidden=t.hidden_size,
            heads=t.num_attention_heads,
            groups=t.head_groups,
            head=t.kv_channels,
            ffn=t.ffn_hidden_size,
            vocabulary=base.vocab_size,
            tied=base.tie_word_embeddings,
            matrices=sum(math.prod(shape) for shape in block if len(shape) > 1),
            vectors=sum(shape[0] for shape in block if len(shape) == 1),
            sequence=config.batch.sequence_length,
            width=4 if config.model.distributed.training_dtype == "fp32" else 2,
            moments=MOMENT_BYTES.get(config.optimizer.moments_dtype, 8),
            moments_auto=config.optimizer.moments_dtype == "auto",
            flash=t.use_flash_attention,
            loss=base.cross_entropy_impl,
            splits=base.cross_entropy_splits,
            halves=config.model.distributed.training_dtype == "bf16"
            and config.run.enable_triton_kernels,
            fp8=config.model.distributed.fp8,
            packed=not config.batch.cross_document_attention and config.data.format != "random",
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class StepPhase:
    """What a process holds at one moment of a step."""

    name: str
    parts: Parts

    @cached_property
    def bytes(self) -> float:
        """All of it."""
        return sum(self.parts.values())


class Memory:
    """Of one process, at one place of the pipeline."""

    def __init__(self, shape: Workload, layout: ParallelLayout, device: str, place: int = 0):
        """`device`: cuda, cpu or UPCASTING_CPU, whose kernels keep different things; `place` in the pipeline."""
        self.shape, self.layout, self.cpu, self.place = shape, layout, device != "cuda", place
        self.T = layout.micro_batch_size * shape.sequence // layout.context
        self.R = self.T // layout.tensor if layout.sequence_tensor else self.T
        self.E, self.w = shape.hidden, shape.width
        self.A = shape.heads * shape.head // layout.tensor
        self.K = shape.groups * shape.head // layout.tensor
        self.F = shape.ffn // layout.tensor
        self.V = shape.vocabulary // layout.tensor
        self.block = shape.matrices // layout.tensor + shape.vectors  # weights of a block
        self.sharded = layout.processes > 1
        self.mixed = shape.width != 4
        # One GPU's cross entropy adds the head's gradient to its fp32 sum.
        self.adds = not self.cpu and not self.sharded and shape.halves and shape.loss != "torch"
        self.widens = device == UPCASTING_CPU and self.mixed
        per_rank = len(layout.stages) // layout.pipeline or 1
        self.per_rank = per_rank
        sizes = layout.stages or (shape.layers,)
        own = self._own(len(sizes))
        self.layers = sum(sizes[stage] for stage in own)
        self.first, self.last = 0 in own, len(sizes) - 1 in own
        head = self.V * self.E
        both = self.first and self.last
        self.outside = head * (self.first + self.last - (both and shape.tied)) + self.E * self.last
        self.head = (
            head if self.sharded and self.last and not shape.tied else 0
        )  # weights of one that is a unit of its own
        self.parameters = self.block * self.layers + self.outside

    def _own(self, stages: int) -> list[int]:
        if self.layout.schedule == "zbv_zero_bubble":
            return [self.place, stages - 1 - self.place]
        return list(range(self.place, stages, self.layout.pipeline))

    # Activations.

    def _attention(self) -> tuple[float, float]:
        """What attention keeps for its backward pass: queries, keys and values; its results."""
        shape, T, A, K = self.shape, self.T, self.A, self.K
        w = 4 if self.widens else self.w  # model/attention.py: it is in fp32 then
        sums = 4 * T * A // shape.head  # log Σ exp
        if not shape.flash:
            # Scores before and after softmax, of whole sequences.
            return (A + 2 * K) * T * w, A * T * w + 2 * T * shape.sequence * (A // shape.head) * 4
        n = self.layout.context
        if self.cpu and n > 1:
            # Stretches go through PyTorch's attention, with a mask for each piece of the sequence but its first.
            copied = A if shape.groups != shape.heads else K
            keys = T * n * (1 + 0.5 / n)
            return w * (A * T + 2 * copied * keys) + T * T * (2 * n + 1), A * T * w + sums
        keys = self.keys
        return A * T * w + 2 * K * keys * w, A * T * w + sums

    def _kept(self, level: str) -> float:
        """Of one block, its input included, between forward and backward."""
        T, R, E, A, K, F, w = self.T, self.R, self.E, self.A, self.K, self.F, self.w
        x = R * E * w
        fp8, once = self.shape.fp8, self.layout.compiled
        norm = T * E * w + 4 * R  # what the matrices see, and one number a token
        inputs, results = self._attention()
        if level == "block":
            return x
        if level == "selective":  # products, and attention's results
            return 3 * x + (A + 2 * K + 2 * F) * T * w + results
        rounded = (
            A * T * w if self.widens else 0.0
        )  # attention's result, as the next product takes it
        seen = norm
        mlp = norm + (3 if once or self.cpu else 4) * F * T * w
        if fp8:  # each product keeps what it saw; what several saw is one with the compiler
            rounded = A * T
            seen = (1 if once else 3) * T * E + 4 * R
            mlp = (
                (1 if once else 2) * T * E
                + 4 * R
                + (2 if once or self.cpu else 3) * F * T * w
                + F * T
            )
        front = (
            x + seen + inputs + results + rounded + x
        )  # and the residual stream between attention and MLP
        inner = {
            "none": mlp,
            "activation": norm + 2 * F * T * w + x,  # the result of the last product, too
            "activation_and_input": 2 * F * T * w + x,
            "full": 0.0,
        }[level]
        return front + inner

    @property
    def keys(self) -> float:
        """Those that attention sees: of the whole sequence up to the later of the two pieces that this process has."""
        context = self.layout.context
        return self.T * (context + 0.5) if context > 1 else self.T

    @cached_property
    def kept(self) -> float:
        """Of one block with the layout's level of recomputation."""
        return self._kept(self.layout.recompute)

    @cached_property
    def again(self) -> float:
        """What the backward pass of one block makes again, and holds beside what was kept."""
        level = self.layout.recompute
        if level == "none":
            return 0.0
        T, E, F, w = self.T, self.E, self.F, self.w
        if level == "activation":
            return 2 * F * T * w
        if level == "activation_and_input":
            return 2 * F * T * w + T * E * w
        if level == "selective":
            x, (_, results) = self.R * E * w, self._attention()
            values = self.K * T * w  # the product's result itself
            # Widened, results of products are gone as soon as they have been read again.
            read = (self.A + 2 * self.K) * T * w + 2 * x if self.widens else values
            return self._kept("none") - x - 2 * F * T * w - results - read
        return self._kept("none") - self.kept

    @cached_property
    def passing(self) -> float:
        """Gradients of activations at the widest place of a block's backward pass, beside the incoming one: the MLP, or attention
        where a process has the keys of a long sequence."""
        F, T, E, w = self.F, self.T, self.E, self.w
        widest: float = max(2 * F * T * w, F * T * w + E * F * w)
        if not self.cpu and self.shape.flash:
            # Of the queries and, for each query head, of keys and values in fp32; and the results. The MLP's share is gone.
            widest = max(
                widest,
                4 * self.A * (T + 2 * self.keys)
                + w * (2 * self.A * T + 2 * self.K * self.keys)
                - 3 * F * T * w,
            )
        if self.shape.fp8:
            # The gradient and the weight in fp8, and in fp32 on their way where there is no kernel; then both products. What down's
            # product saw is gone.
            there, wide = F * T * (2 * w + 1), 4 if self.cpu else 0
            widest = max(
                widest,
                there + wide * F * T,
                there + E * F * (1 + wide),
                there + E * F * (1 + w) + T * E * w,
            )
        if self.shape.fp8 or not self.widens:
            return widest
        return max(
            widest,
            F * T * w + _widened(T, E, F),
            F * T * w + E * F * w + _widened(E, T, F),
            T * E * w
            + E * F * w
            - F * T * w
            + _widened(F, T, E),  # gate, up and their product are gone
        )

    # State.

    def _gathered(self, blocks: int) -> float:
        """Weights of so many blocks, and those outside of blocks, in the dtype that is computed in."""
        return (self.block * blocks + self.outside) * self.w if self.sharded else 0.0

    @property
    def state(self) -> Parts:
        """What is there all the time."""
        count, shard = self.parameters, self.layout.shard
        if not self.sharded:
            masters = (2 if self.shape.halves and not self.cpu else 4) * count if self.mixed else 0
            gradients = 4 * count if self.mixed else 0
            return {
                "weights": self.w * count,
                "masters": masters,
                "moments": self.shape.moments * count,
                "gradients": gradients,
            }
        return {
            "weights": 0.0,
            "masters": 4 * count / shard,
            "moments": self.shape.moments * count / shard,
        }

    def _alive(self) -> tuple[float, int]:
        """Activations of how many blocks are kept at most, and in how many passes of a stage."""
        layout = self.layout
        if layout.pipeline == 1:
            return self.layers, 1
        passes = stages_in_flight(layout, self.place)
        return self.layers / self.per_rank * passes, passes

    def moments(self) -> Iterator[StepPhase]:
        """Those at which a step can be at its peak."""
        shape, layout, T, R, E, V, w = (
            self.shape,
            self.layout,
            self.T,
            self.R,
            self.E,
            self.V,
            self.w,
        )
        pipeline = layout.pipeline > 1
        several = layout.micro_batches > 1
        alive, passes = self._alive()
        # Gradients come together over micro-batches, unsharded, if they are reduced at the last one only.
        full = self.sharded and several and (layout.zero_stage == 1 or pipeline)
        whole = layout.zero_stage < 3 or pipeline  # weights stay gathered
        gathered = self._gathered(self.layers if whole else 1)
        state = self.state
        gradients = 4 * self.parameters
        before = state.pop("gradients", 0.0)
        if not before and several:
            before = gradients if full or not self.sharded else gradients / layout.shard
        width = 8 * shape.head * T  # cosines and sines
        batches = (
            24 * T * (layout.micro_batches if self.cpu else layout.in_flight if pipeline else 1)
        )
        activations = alive * self.kept + width * passes
        handed = 2 * self.per_rank * layout.in_flight * R * E * w if pipeline else 0.0
        gather_out = self.block * w if self.sharded and layout.shard > 1 else 0.0
        fixed = state | {"buffers": batches + handed}
        final = (
            R * E * w * 2 + 4 * R if self.last else 0.0
        )  # the last norm: what it had and what it gave
        synchronised = self.sharded and not (full and several)
        # FSDP2 keeps the last reduction's input to the next: that of the embedding, from one micro-batch into the next.
        ends = self.outside - self.head
        if synchronised and several:
            fixed["communication"] = 4.0 * ends
        held = 0.0
        if self.last:
            # Gradients of hidden states and head are made with the loss.
            held = T * E * w + 4 * V * E if shape.loss != "torch" or layout.tensor > 1 else 0.0
            logits, scratch = self._loss()
            gathering = 0.0
            if gather_out and not (whole and several):
                # What the last unit came in; with zero_stage 3 no block is there.
                gathering = ((self.head or self.block) - (0 if whole else self.block)) * w
            yield StepPhase(
                "in the cross entropy",
                fixed
                | {
                    "gradients": before,
                    "gathered": gathered + gathering,
                    "activations": activations + final,
                    "logits": logits + scratch + held,
                },
            )
            yield StepPhase(
                "in the cross entropy's backward pass",
                fixed
                | {
                    "gradients": before,
                    "gathered": gathered,
                    "activations": activations + final,
                    "logits": held + T * E * w + self._loss_back(),
                },
            )
        head_gradient = V * E * w if self.last and self.sharded and not self.head else 0.0
        head_reduced = 0.0
        if self.head and synchronised:
            head_reduced = 0.0 if before else 4 * self.head / layout.shard
            yield StepPhase(
                "reducing the head",
                fixed
                | {
                    "gradients": before,
                    "gathered": gathered,
                    "activations": activations + final,
                    "passing": T * E * w,
                    "communication": self.head * (w + 4) + head_reduced,
                },
            )
            fixed["communication"] = 4.0 * self.head
        if self.head and not (whole and several):
            gathered -= self.head * w
        if self.last and self.cpu:
            yield StepPhase(
                "in the last norm's backward pass",
                fixed
                | {
                    "gradients": before + head_reduced,
                    "gathered": gathered,
                    "activations": activations + final,
                    "logits": head_gradient,
                    "passing": 2 * R * E * w,
                },
            )
        for behind in sorted({0, min(1, self.layers - 1), self.layers - 1}):
            kept = activations - behind * self.kept
            reduced = 0.0 if full else 4 * self.block * behind / layout.shard
            if before:
                reduced = 0.0
            elif not self.sharded:
                reduced = 4 * (self.block * behind + V * E * self.last)
            # The block's own gradients, in the dtype that is computed in, and those of the one behind on their way.
            own = self.block * w if self.sharded else 0.0
            sent = 4 * self.block if (synchronised or full) and behind else 0.0
            if whole:
                there = gathered - (0.0 if several else self.block * w * behind)
            else:
                there = gathered + (gather_out if behind < self.layers - 1 else 0.0)
            if behind:
                fixed.pop("communication", None)
            common = fixed | {
                "gradients": before + reduced + head_reduced,
                "gathered": there,
                "logits": head_gradient,
            }
            name = f"in the backward pass of block {self.layers - behind} of {self.layers}"
            yield StepPhase(
                name,
                common
                | {
                    "activations": kept,
                    "recomputed": self.again,
                    "passing": self.passing + R * E * w,
                    "communication": sent or fixed.get("communication", 0.0),
                },
            )
            if self.sharded:
                yield StepPhase(
                    f"reducing block {self.layers - behind} of {self.layers}",
                    common
                    | {
                        "activations": kept - self.kept,
                        "passing": R * E * w + own,
                        "communication": 4 * self.block * (1 + (0 if before else 1 / layout.shard)),
                    },
                )
        if self.sharded:
            yield StepPhase(
                "reducing the embedding",
                fixed
                | {
                    "gradients": before
                    + head_reduced
                    + (0.0 if before else 4 * self.block * self.layers / layout.shard),
                    "gathered": gathered
                    - (0 if whole and several else self.block * w * (self.layers if whole else 1)),
                    "communication": ends * (w + 4 + (0 if before else 4 / layout.shard)),
                },
            )
        fixed.pop("communication", None)
        temporary = 0.0
        if shape.moments < 8 and (self.cpu or not shape.halves):
            # The fp32 copies of one weight's moments.
            largest = max(V * E if self.first or self.last else 0, E * self.F)
            temporary = 8 * largest / (layout.shard if self.sharded else 1)
        yield StepPhase(
            "in the optimizer",
            fixed
            | {
                "gradients": 4 * self.parameters / (layout.shard if self.sharded else 1),
                "gathered": gathered if whole and several else 0.0,
                "passing": temporary,
            },
        )
        if shape.moments < 4 and not self.cpu and (self.sharded or not shape.halves):
            yield StepPhase(
                "copying moments for a checkpoint",  # in bf16; those of one GPU go to the host's memory one by one
                state
                | {
                    "gradients": 4 * self.parameters / (layout.shard if self.sharded else 1),
                    "passing": 4 * self.parameters / (layout.shard if self.sharded else 1),
                },
            )

    def _loss(self) -> tuple[float, float]:
        """Bytes of logits, and of what is made of them."""
        shape, T, V = self.shape, self.T, self.V
        device = "cpu" if self.cpu else "cuda"
        if shape.loss == "torch" and self.layout.tensor == 1:
            return (
                12.0 * T * V,
                0.0,
            )  # fp32: probabilities, and gradients before and after the softmax
        length = stretch(device, T, V, shape.splits)
        scratch = 0.0
        if shape.loss == "fused" and not self.cpu:
            scratch = 4 * V * min(max(1, _PIECE // V), length)
        if self.widens:
            scratch += max(_widened(length, self.E, V), _widened(length, V, self.E))
        elif self.cpu and self.mixed:
            scratch += (4 + self.w) * min(_ROWS, V) * self.E
        return length * V * self.w, scratch

    def _loss_back(self) -> float:
        """The head's gradient and what passes while it is made: some rows in fp32, or the logits' gradient and the product with it."""
        T, V, E, w = self.T, self.V, self.E, self.w
        if self.widens and self.shape.loss == "torch" and self.layout.tensor == 1:
            return V * E * w + T * V * w + _widened(V, T, E)
        if self.cpu:
            return V * E * w + 4.0 * min(_ROWS, V) * E
        return 0.0 if self.adds else V * E * w

    def peak(self) -> StepPhase:
        """The worst moment."""
        return max(self.moments(), key=lambda moment: moment.bytes)


def peak(shape: Workload, layout: ParallelLayout, device: str) -> StepPhase:
    """The worst moment of the process that needs most."""
    moments = [Memory(shape, layout, device, place).peak() for place in range(layout.pipeline)]
    return max(moments, key=lambda moment: moment.bytes)


def with_reserve(moment: StepPhase, device: str) -> float:
    """Bytes of a process's memory that are needed for it."""
    return moment.bytes * (1 + FRAGMENTS) + RESERVED[device]


def required_bytes(shape: Workload, layout: ParallelLayout, device: str) -> float:
    """Bytes of a process's memory that are needed for all of it."""
    return with_reserve(peak(shape, layout, device), device)


def _widened(rows: int, inner: int, columns: int) -> float:
    """Bytes in fp32 that a product [rows, inner] · [inner, columns] in 16 bits holds while model/linear.py makes it."""
    # The left factor as a whole and rows of the right one; or the sum as a whole and rows of both.
    whole, pieces = sorted((inner, columns))
    return 4.0 * (rows * whole + (rows + whole) * min(_ROWS, pieces))


def stretch(device: str, tokens: int, vocabulary: int, splits: int | None) -> int:
    """How many tokens have logits at once, as model/loss.py has it."""
    halves = -(-tokens // (splits or 2))
    if splits is None:
        halves = min(halves, STRETCH[device] // vocabulary)
    return max(1, halves)


def stages_in_flight(layout: ParallelLayout, place: int) -> int:
    """Forward passes of stages that a process holds at most, under a pipeline schedule."""
    each, many, depth = len(layout.stages) // layout.pipeline, layout.in_flight, layout.pipeline
    if layout.schedule in ("gpipe", "looped_bfs"):
        return each * many
    if layout.schedule == "1f1b":
        return min(many, depth - place)
    if layout.schedule == "zbv_zero_bubble":
        return min(2 * many, 2 * depth)
    # Interleaved: all but its last round of stages, and twice its distance from the end (Narayanan et al. 2021).
    return min(each * many, (each - 1) * depth + 2 * (depth - place - 1) + 1)
