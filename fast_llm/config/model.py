"""The sections `model` and `pretrained` of the YAML file: shape, initialization, parallelism and
number formats.

As in train.py, the text under a setting is its documentation.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fast_llm.config.compat import LOAD_CONFIGS, PRETRAINED_FORMATS, ROTARY_TYPES
from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.section import Section
from fast_llm.config.types import (
    DType,
    PathText,
    Positive,
    PositiveFloat,
    Seconds,
    no_fp64,
    short_dtype,
)


class NormalizationConfig(Section):
    """RMSNorm."""

    type: Annotated[
        Literal["rms_norm"], unsupported({"layer_norm": "Llama models use rms_norm"})
    ] = "rms_norm"
    """Only `rms_norm` is allowed."""
    epsilon: PositiveFloat = 1e-5
    """Added to the mean of squares."""


class RotaryConfig(Section):
    """Rotary position embedding."""

    type: Annotated[
        Literal["default", "llama3"],
        unsupported(ROTARY_TYPES),
    ] = "default"
    """`default`: no scaling. `llama3`: the frequency scaling of Llama 3.1, with the settings
    below."""
    theta: PositiveFloat = 10000
    """Base of the frequencies."""
    scale_factor: PositiveFloat = 8.0
    """llama3: factor by which low frequencies are divided."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_context_length / low_frequency_factor are scaled fully."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_context_length / high_frequency_factor are not scaled."""
    original_context_length: Positive = 8192
    """llama3: context length of the model before scaling, in tokens."""


def _biases(value: Any) -> Any:
    return ("everywhere" if value else "nowhere") if isinstance(value, bool) else value


Std = Annotated[float, Field(ge=0), Allowed("a number of 0 or more")] | None


class TransformerConfig(Section):
    """The transformer blocks. With `pretrained.path` their shape comes from the model's
    config.json: leave it out.
    """

    num_layers: Annotated[int, Field(gt=0, le=10_000), Allowed("an integer from 1 to 10000")] = 12
    """Number of blocks."""
    hidden_size: Positive = 1024
    """Size of the residual stream."""
    num_attention_heads: Positive = 8
    """Number of query heads."""
    head_groups: Positive = 1
    """Number of key and value heads (grouped-query attention). Must divide num_attention_heads."""
    kv_channels: Positive = Field(
        default_factory=lambda data: max(
            1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1)
        ),
        json_schema_extra={"default": "hidden_size / num_attention_heads"},
    )
    """Size of a head. Must be even."""
    ffn_hidden_size: Positive = Field(
        default_factory=lambda data: 4 * data.get("hidden_size", 1),
        json_schema_extra={"default": "4 × hidden_size"},
    )
    """Intermediate size of the MLP."""
    gated: Annotated[bool, unsupported({False: "Llama models have a gated MLP"})] = True
    """Only yes is allowed: the MLP is gated."""
    activation_type: Annotated[
        Literal["silu"],
        unsupported(dict.fromkeys(("gelu", "relu", "squared_relu"), "Llama models use silu")),
    ] = "silu"
    """Only `silu` is allowed."""
    add_linear_biases: Annotated[
        Literal["nowhere", "everywhere", "only_attention", "only_mlp"],
        BeforeValidator(_biases),
        unsupported(
            {"only_attn_qkv": "attention has biases in all its layers (only_attention) or in none"}
        ),
        Allowed("yes, no, or one of nowhere, everywhere, only_attention, only_mlp"),
    ] = "nowhere"
    """Which linear layers have biases. yes means everywhere, no means nowhere."""
    normalization: NormalizationConfig = NormalizationConfig()
    rotary: RotaryConfig = RotaryConfig()
    use_flash_attention: bool = True
    """Use attention kernels that never store the scores of a document, in any dtype. `no` uses
    plain matrix multiplications."""
    mlp_recompute_level: Literal[
        "none", "activation", "activation_and_input", "full", "selective", "block"
    ] = "none"
    """Activation checkpointing: what the backward pass recomputes instead of storing. `activation`:
    the activation of the MLP. `activation_and_input`: also the normalized input of the MLP. `full`:
    the entire MLP. `selective`: everything in a block except matrix multiplications and attention.
    `block`: the entire block."""
    init_method_std: Std = None
    """Standard deviation of random weight matrices. null means hidden_size^-0.5."""
    init_method_min: float | None = None
    """Lower limit of random weight matrices. null means no limit."""
    init_method_max: float | None = None
    """Upper limit of random weight matrices. null means no limit."""
    init_method_std_qkv: Std = None
    """Standard deviation for the query, key and value projections. null means init_method_std."""
    init_method_min_qkv: float | None = None
    """Lower limit for the query, key and value projections. null means init_method_min."""
    init_method_max_qkv: float | None = None
    """Upper limit for the query, key and value projections. null means init_method_max."""
    init_method_std_attn_proj: Std = None
    """Standard deviation for the output projection of attention. null means init_method_std / √(2
    num_layers)."""
    init_method_min_attn_proj: float | None = None
    """Lower limit for the output projection of attention. null means init_method_min."""
    init_method_max_attn_proj: float | None = None
    """Upper limit for the output projection of attention. null means init_method_max."""
    init_method_std_mlp_1: Std = None
    """Standard deviation for the gate and up projections. null means init_method_std."""
    init_method_min_mlp_1: float | None = None
    """Lower limit for the gate and up projections. null means init_method_min."""
    init_method_max_mlp_1: float | None = None
    """Upper limit for the gate and up projections. null means init_method_max."""
    init_method_std_mlp_2: Std = None
    """Standard deviation for the down projection. null means init_method_std / √(2 num_layers)."""
    init_method_min_mlp_2: float | None = None
    """Lower limit for the down projection. null means init_method_min."""
    init_method_max_mlp_2: float | None = None
    """Upper limit for the down projection. null means init_method_max."""


class BaseModelConfig(Section):
    """The model. With `pretrained.path` its shape comes from the model's config.json: leave it
    out.
    """

    vocab_size: Positive = 49152
    """Number of rows of the embedding."""
    max_position_embeddings: Positive = 2048
    """Context length in the config.json of exports, unless batch.sequence_length is larger."""
    tie_word_embeddings: bool = True
    """Share one matrix between embedding and head. `no` trains the separate head that a pretrained
    folder has although its config.json says `tie_word_embeddings: true`."""
    transformer: TransformerConfig = TransformerConfig()
    cross_entropy_impl: Literal["auto", "torch", "fused", "triton"] = "auto"
    """`torch`: computes all logits at once. `fused`: computes the logits of a few tokens at a time
    and never stores all of them. `triton`: like fused, with a GPU kernel. `auto`: triton where it
    runs, else fused."""
    cross_entropy_splits: Positive | None = None
    """Number of chunks into which fused and triton divide the tokens of a micro-batch. null chooses
    by size."""
    init_method_std_embed: Std = None
    """Standard deviation for embedding and head. null means transformer.init_method_std."""
    init_method_min_embed: float | None = None
    """Lower limit for embedding and head. null means transformer.init_method_min."""
    init_method_max_embed: float | None = None
    """Upper limit for embedding and head. null means transformer.init_method_max."""


class MultiStageConfig(Section):
    """How processes share the training state, and pipeline stages."""

    zero_stage: Annotated[int, Field(ge=1, le=3), Allowed("1, 2 or 3")] | None = None
    """ZeRO stage: what is sharded over processes. 1: optimizer state, fp32 weights and reduced
    gradients. 2: also full gradients. 3: also the weights used for computation. null means 1. A
    single process shards nothing."""
    shard_size: Positive | None = None
    """Number of adjacent processes that share one copy of the training state (hybrid sharding).
    Further groups hold copies, and exchange only sharded gradients. Use the processes of a node if
    there are many nodes or the network is slow. null, or a number above the number of processes,
    means all processes."""
    pipeline_schedule: (
        Literal[
            "gpipe",
            "1f1b",
            "interleaved_1f1b",
            "looped_bfs",
            "interleaved_zero_bubble",
            "zbv_zero_bubble",
        ]
        | None
    ) = None
    """Pipeline schedule, as PyTorch names them. With one stage per process: `gpipe` (all forward
    passes, then all backward passes) or `1f1b` (fewest micro-batches in flight). With several:
    `looped_bfs` (breadth first), `interleaved_1f1b`, or `interleaved_zero_bubble`, which fills gaps
    with weight gradients. `zbv_zero_bubble` requires two stages per process, one from the front and
    one from the back. null means 1f1b, or interleaved_1f1b with several stages per process."""
    layers_per_stage: (
        Annotated[
            int | list[Annotated[int, Field(ge=0)]],
            Allowed("a number of layers, or a list with one for each stage"),
        ]
        | None
    ) = None
    """Layers in a pipeline stage: one number for all, or a list from the first stage to the last. A
    number below num_layers / pipeline_parallel gives each process several stages. null means one
    stage per process, divided as evenly as possible; the first and last stages have fewer layers,
    to make up for embedding and head."""
    compile_all: bool = False
    """Compile each block with torch.compile."""


class DistributedConfig(Section):
    """Number formats, and how processes share the work."""

    training_dtype: DType = "fp32"
    """Dtype of computation. Weights, gradients and their sums are also kept in fp32."""
    optimization_dtype: Annotated[
        Literal["fp32"],
        no_fp64,
        short_dtype,
        Allowed("fp32; optimizer.moments_dtype: bf16 or int8 saves memory"),
    ] = "fp32"
    """Only fp32 is allowed: the optimizer computes in fp32. To save memory, set
    optimizer.moments_dtype."""
    fp8: bool = False
    """Compute the matrix multiplications of the blocks in fp8, on Hopper (or Ada) and later GPUs.
    Weights, sums and everything else keep their dtype. For speed, set `multi_stage.compile_all:
    yes` too. Check the effect on the loss."""
    tensor_parallel: Positive = 1
    """Tensor parallelism: number of adjacent processes that share each matrix. Must divide the
    heads, the intermediate size of the MLP and the vocabulary. Use it within a node, for models too
    large or batches too small for ZeRO alone."""
    sequence_tensor_parallel: bool = False
    """With tensor_parallel: also shard norms and the residual stream, along the sequence (sequence
    parallelism). Saves memory at the same amount of communication."""
    sequence_data_parallel: Positive = 1
    """Context parallelism: number of processes that share each sequence, for sequences too long for
    one process. Each holds one chunk from the front and one from the back, so that causal attention
    is equal work for all."""
    pipeline_parallel: Positive = 1
    """Pipeline parallelism: number of groups of processes that share the layers."""
    timeout: Seconds = 60
    """Seconds that a process waits for others within a step. training.timeout applies to saves,
    exports and reading of weights."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Allowed("an integer from 0 to 2^63 - 1")] = 1234
    """Seed of random weights and of the order of the data."""
    reproducible_init: Annotated[
        bool,
        unsupported({False: "random weights never depend on the number of processes"}),
    ] = True
    """Only yes is allowed: random weights do not depend on the number of processes."""

    def data_parallel(self, processes: int) -> int:
        """Number of data-parallel processes, which share the batch."""
        model_parallel = self.tensor_parallel * self.pipeline_parallel * self.sequence_data_parallel
        return max(1, processes // model_parallel)

    def replicas(self, processes: int) -> int:
        """Number of processes that need the same weights: data- times context-parallel ones."""
        return self.data_parallel(processes) * self.sequence_data_parallel


class ModelConfig(Section):
    """The model and how it is computed."""

    base_model: BaseModelConfig = BaseModelConfig()
    multi_stage: MultiStageConfig = MultiStageConfig()
    distributed: DistributedConfig = DistributedConfig()


class PretrainedConfig(Section):
    """The model to start from."""

    path: PathText | None = None
    """A folder, or a model on the Hugging Face Hub (`meta-llama/Llama-3.1-8B`). null starts from
    random weights."""
    format: Annotated[
        Literal["llama", "distributed"],
        BeforeValidator(lambda value: "llama" if value == "auto" else value),
        unsupported(PRETRAINED_FORMATS),
        Allowed("llama (or auto), or distributed"),
    ] = "llama"
    """`llama` (or `auto`): a Hugging Face folder. `distributed`: a checkpoint of this project."""
    model_weights: bool = True
    """Start from the weights of that model. `no` uses only its shape and starts from random
    weights."""
    optimizer_state: bool = False
    """Start from its optimizer state too, which only a checkpoint (`format: distributed`) has."""
    load_config: Annotated[
        Literal["architecture"],
        unsupported(LOAD_CONFIGS),
    ] = "architecture"
    """Only `architecture` is allowed: the shape of the model comes from its configuration,
    everything else from this file."""
