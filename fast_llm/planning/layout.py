"""Inputs of the forecasts: the layout of a step, the workload, and one process's share of them.

`ParallelLayout` says how a step is spread over processes. `Workload` holds sizes that every layout
of a run shares. `LocalSizes` combines both into the sizes that one process has: tokens of a
micro-batch, columns of its matrices, its parameters. Only arithmetic: no torch, no cost.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from fast_llm.config.batch import derive_batch_sizes
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.parameter_rules import frozen_names
from fast_llm.config.stages import micro_batches_in_flight, schedule_name, stage_sizes
from fast_llm.config.train import TrainConfig
from fast_llm.models import family_of
from fast_llm.models.flops import BlockBackward
from fast_llm.models.parameters import attended_length, norm_names
from fast_llm.models.sizes import QUANTIZATION_BLOCK

# Bytes of both moments of a weight. 8-bit moments have a two-byte scale for each block of 128
# (kernels/rounding.py).
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "int8": 2 * (1 + 2 / QUANTIZATION_BLOCK)}
# A CPU without matmuls in the compute dtype: they are made in fp32 (model/linear.py).
UPCASTING_CPU = "upcasting cpu"


@dataclass(frozen=True)
class ParallelLayout:
    """How a step is spread over processes, and which tensors each of them keeps."""

    processes: int
    micro_batch_size: int
    micro_batches: int
    padding: int = 0
    tensor: int = 1
    sequence_parallel: bool = False  # the residual stream is split over the tensor group
    context: int = 1
    expert: int = 1  # processes that divide the experts of a layer
    pipeline: int = 1
    layers_per_stage: tuple[int, ...] = ()  # from the first stage to the last
    schedule: str = "1f1b"
    in_flight: int = 1  # micro-batches in the pipeline together
    zero_stage: int = 1
    shard_size: int | None = None  # None: all replicas are one sharding group
    recompute: str = "none"
    compiled: bool = False

    @staticmethod
    def of(config: TrainConfig, processes: int) -> "ParallelLayout":
        """The layout of a valid configuration without `auto` on this many processes."""
        distributed, multi = config.model.distributed, config.model.multi_stage
        pipeline = distributed.pipeline_parallel
        batch = derive_batch_sizes(config.batch, distributed.data_parallel(processes), pipeline > 1)
        in_flight = micro_batches_in_flight(config, batch)
        return ParallelLayout(
            processes=processes,
            micro_batch_size=batch.micro_batch_size,
            micro_batches=batch.micro_batches,
            padding=batch.padding,
            tensor=distributed.tensor_parallel,
            sequence_parallel=distributed.sequence_tensor_parallel
            and distributed.tensor_parallel > 1,
            context=distributed.sequence_data_parallel,
            expert=distributed.expert_parallel,
            pipeline=pipeline,
            layers_per_stage=tuple(stage_sizes(config)),
            schedule=schedule_name(config, in_flight) if pipeline > 1 else "",
            in_flight=in_flight,
            zero_stage=multi.zero_stage or 1,
            shard_size=multi.shard_size,
            recompute=config.model.base_model.transformer.mlp_recompute_level,
            compiled=multi.compile_all is True,
        )

    @property
    def data(self) -> int:
        """Data-parallel processes: the batch is divided among them."""
        return self.processes // (self.tensor * self.context * self.pipeline)

    @property
    def replicas(self) -> int:
        """Processes that need the same weights: data-parallel times context-parallel ones."""
        return self.data * self.context

    @property
    def shards(self) -> int:
        """Processes of one sharding group: each holds this fraction of the training state."""
        return min(self.shard_size or self.replicas, self.replicas)

    def forward_passes_in_flight(self, pipeline_rank: int) -> int:
        """The most forward passes of stages whose activations a process holds at once."""
        stages = len(self.layers_per_stage) // self.pipeline
        many, depth = self.in_flight, self.pipeline
        if self.schedule in ("gpipe", "looped_bfs"):
            return stages * many
        if self.schedule == "1f1b":
            return min(many, depth - pipeline_rank)
        if self.schedule == "zbv_zero_bubble":
            return min(2 * many, 2 * depth)
        # Interleaved: all but its last round of stages, and twice its distance from the end
        # (Narayanan et al. 2021).
        warm_up = (stages - 1) * depth + 2 * (depth - pipeline_rank - 1) + 1
        return min(stages * many, warm_up)


@dataclass(frozen=True)
class Workload:
    """The model's sizes and other settings that every layout of a run shares."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int  # of a token's experts together, in a model with experts
    mlp_inputs: int  # matrices of the MLP that have its input: gate and up, or up alone
    expert_rows: int  # copies of a token, one for each of its experts; 0 without experts
    vocabulary: int
    tied_embeddings: bool
    # Of a block, on average: blocks with and without experts differ.
    matrix_parameters: int  # weights of its matrices
    expert_parameters: int  # of these, weights of experts
    vector_parameters: int  # weights of its norms, and biases
    # Trained parameters: the share of each block, and the names of others; all without frozen ones.
    trained_shares: tuple[float, ...]  # by layer
    trains_embedding: bool
    trains_head: bool  # with tied embeddings, the embedding
    backward: tuple[BlockBackward, ...]  # what each block's backward pass computes
    backward_of_head: BlockBackward
    norms: int  # of a block, without those of queries and keys
    norms_results: bool  # of attention and MLP
    normed_heads: bool  # queries and keys have norms
    windows: tuple[int | None, ...]  # of each block's attention, in tokens
    limits_scores: bool  # attention_softcap
    attended_length: float  # of sequences, with windows: see models/parameters.py
    sequence_length: int
    dtype_bytes: int  # of the compute dtype
    moment_bytes: float  # of both moments of a weight
    flash: bool
    loss: str  # cross_entropy_impl
    loss_chunks: int | None  # cross_entropy_splits
    packed: bool  # attention stays within documents
    fp8: bool
    split_masters: bool  # one GPU keeps of a master only the bits that its bf16 weight lacks
    batch_size: int  # sequences a step

    @staticmethod
    def of(config: TrainConfig, batch_size: int) -> "Workload":
        """The workload of a valid configuration without `auto`."""
        base: BaseModelConfig = config.model.base_model
        t = base.transformer
        shapes = family_of(base).shapes(base)
        blocks = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
        frozen = frozen_names(config.optimizer, shapes)
        shares, trains_embedding, trains_head = _trained(base, shapes, set(frozen))
        backward, backward_of_head = family_of(base).backward(base, frozen)
        one_chunk = base.cross_entropy_impl == "torch" and base.z_loss_coefficient > 0
        return Workload(
            layers=t.num_layers,
            hidden=t.hidden_size,
            heads=t.num_attention_heads,
            kv_heads=t.head_groups,
            head_size=t.kv_channels,
            ffn=max(t.active_ffn_size(layer) for layer in range(t.num_layers)),
            mlp_inputs=2 if t.gated else 1,
            expert_rows=t.num_experts_per_token if t.expert_layers() else 0,
            vocabulary=base.vocab_size,
            tied_embeddings=base.tie_word_embeddings,
            matrix_parameters=sum(math.prod(shape) for shape in blocks if len(shape) > 1)
            // t.num_layers,
            expert_parameters=sum(
                math.prod(shape) for name, shape in shapes.items() if ".experts." in name
            )
            // t.num_layers,
            vector_parameters=sum(shape[0] for shape in blocks if len(shape) == 1) // t.num_layers,
            trained_shares=shares,
            trains_embedding=trains_embedding,
            trains_head=trains_head,
            backward=tuple(backward),
            backward_of_head=backward_of_head,
            norms=sum(name is not None for name in norm_names(t)),
            norms_results=t.norm_placement != "pre",
            normed_heads=t.qk_norm != "none",
            windows=tuple(t.window(layer) for layer in range(t.num_layers)),
            limits_scores=t.attention_softcap is not None,
            attended_length=attended_length(t, config.batch.sequence_length),
            sequence_length=config.batch.sequence_length,
            dtype_bytes=4 if config.model.distributed.training_dtype == "fp32" else 2,
            moment_bytes=MOMENT_BYTES[config.optimizer.moments_dtype],
            flash=t.use_flash_attention,
            # With a z-loss, `torch` is computed as one chunk of `fused` (model/loss.py).
            loss="fused" if one_chunk else base.cross_entropy_impl,
            loss_chunks=1 if one_chunk else base.cross_entropy_splits,
            packed=not config.batch.cross_document_attention and config.data.format != "random",
            fp8=config.model.distributed.fp8,
            split_masters=config.model.distributed.training_dtype == "bf16"
            and config.run.enable_triton_kernels,
            batch_size=batch_size,
        )


def _trained(
    base: BaseModelConfig, shapes: Mapping[str, tuple[int, ...]], frozen: Set[str]
) -> tuple[tuple[float, ...], bool, bool]:
    """The trained share of each block's parameters, and whether embedding and head are trained."""
    family, layers = family_of(base), base.transformer.num_layers
    if not frozen:
        return (1.0,) * layers, True, True
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    shares = []
    for layer in range(layers):
        names = [name for name in sizes if name.startswith(f"model.layers.{layer}.")]
        trained = sum(sizes[name] for name in names if name not in frozen)
        shares.append(trained / sum(sizes[name] for name in names))
    embedding = family.embedding not in frozen
    head = embedding if base.tie_word_embeddings else family.head not in frozen
    return tuple(shares), embedding, head


class LocalSizes:
    """The sizes of one process's share of a step.

    The letters of docs/forecasts.md: T `tokens`, R `stream_tokens`, E `hidden`, A `query_size`, K
    `key_size`, F `ffn`, V `vocabulary`, w `dtype_bytes`. Tensors of a micro-batch are given in
    bytes: `stream` [R, E], `normed` [T, E], `queries` [T, A], `keys` [T, K] (as many for values),
    `mlp` [T, F].
    """

    def __init__(
        self, workload: Workload, layout: ParallelLayout, device_kind: str, pipeline_rank: int = 0
    ):
        """`device_kind`: cuda, cpu or UPCASTING_CPU, whose kernels keep different tensors."""
        self.workload, self.layout, self.pipeline_rank = workload, layout, pipeline_rank
        self.on_cpu = device_kind != "cuda"
        self.dtype_bytes = workload.dtype_bytes
        self.mixed_precision = workload.dtype_bytes != 4
        self.upcasts = device_kind == UPCASTING_CPU and self.mixed_precision
        self.sharded = layout.processes > 1
        # One GPU's cross entropy adds the head's gradient to its fp32 sum.
        self.fuses_head_gradient = (
            not self.on_cpu
            and not self.sharded
            and workload.split_masters
            and workload.loss != "torch"
        )
        self.tokens = layout.micro_batch_size * workload.sequence_length // layout.context
        self.stream_tokens = (
            self.tokens // layout.tensor if layout.sequence_parallel else self.tokens
        )
        self.hidden = workload.hidden
        self.query_size = workload.heads * workload.head_size // layout.tensor
        self.key_size = workload.kv_heads * workload.head_size // layout.tensor
        self.ffn = workload.ffn // layout.tensor
        self.vocabulary = workload.vocabulary // layout.tensor
        self.stream = self.stream_tokens * self.hidden * self.dtype_bytes
        self.normed = self.tokens * self.hidden * self.dtype_bytes
        self.queries = self.tokens * self.query_size * self.dtype_bytes
        self.keys = self.tokens * self.key_size * self.dtype_bytes
        self.mlp = self.tokens * self.ffn * self.dtype_bytes
        self._count_parameters()

    def _count_parameters(self) -> None:
        """Count this process's parameters: of a block, outside of blocks, of a separate head."""
        workload, layout = self.workload, self.layout
        sizes = layout.layers_per_stage or (workload.layers,)
        self.stages_per_rank = len(layout.layers_per_stage) // layout.pipeline or 1
        own = self._own_stages(len(sizes))
        numbers = [sum(sizes[:stage]) + place for stage in own for place in range(sizes[stage])]
        # Stages after the first one always send a gradient to the stage before.
        self.backward = [
            replace(workload.backward[number], inputs=1.0, attention=True)
            if number >= sizes[0] and len(sizes) > 1
            else workload.backward[number]
            for number in numbers
        ]
        self.layers = len(numbers)
        self.has_embedding, self.has_head = 0 in own, len(sizes) - 1 in own
        self.block_parameters = (
            workload.matrix_parameters // layout.tensor + workload.vector_parameters
        )
        matrix = self.vocabulary * self.hidden
        shared = self.has_embedding and self.has_head and workload.tied_embeddings
        matrices = self.has_embedding + self.has_head - shared
        self.outside_parameters = matrix * matrices + self.hidden * self.has_head
        own_unit = self.sharded and self.has_head and not workload.tied_embeddings
        self.head_parameters = matrix if own_unit else 0
        self.parameters = self.block_parameters * self.layers + self.outside_parameters
        # Of a block and micro-batch this process computes with, or gathers: its experts alone.
        experts = workload.expert_parameters // layout.tensor
        self.own_block_parameters = self.block_parameters - experts + experts // layout.expert
        self.own_parameters = self.own_block_parameters * self.layers + self.outside_parameters
        self.own_share = self.own_block_parameters / self.block_parameters
        self._count_trained([workload.trained_shares[number] for number in numbers])

    def _count_trained(self, shares: list[float]) -> None:
        """Count this process's trained parameters. `shares`: of each of its blocks."""
        workload = self.workload
        matrix = self.vocabulary * self.hidden
        frozen = matrix * (not workload.trains_embedding) * self.has_embedding
        if self.has_head and not (self.has_embedding and workload.tied_embeddings):
            frozen += matrix * (not workload.trains_head)
        # Of the block with the most, and of all blocks.
        self.trained_block_parameters = self.block_parameters * max(shares, default=1.0)
        self.trained_in_blocks = self.block_parameters * sum(shares)
        self.trained_outside_parameters = self.outside_parameters - frozen
        self.trained_head_parameters = self.head_parameters * workload.trains_head
        self.trained_parameters = self.trained_in_blocks + self.trained_outside_parameters
        # Blocks below the first trained weight have no backward pass. In a pipeline, only the first
        # stage could have such blocks; they are not left out.
        below = 0
        if self.layout.pipeline == 1 and not workload.trains_embedding:
            below = next((place for place, one in enumerate(shares) if one), self.layers - 1)
        self.layers_with_backward = self.layers - below

    def _own_stages(self, stages: int) -> list[int]:
        if self.layout.schedule == "zbv_zero_bubble":
            return [self.pipeline_rank, stages - 1 - self.pipeline_rank]
        return list(range(self.pipeline_rank, stages, self.layout.pipeline))
