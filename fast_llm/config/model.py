"""The sections `model` and `pretrained` of the YAML file: shape, initialization, parallelism and
number formats.

As in train.py, the text under a setting is its documentation.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from fast_llm.config.compat import LOAD_CONFIGS, PRETRAINED_FORMATS
from fast_llm.config.families import FamilyName
from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.rotary import RotaryConfig as RotaryConfig
from fast_llm.config.section import Section
from fast_llm.config.types import (
    Count,
    DType,
    NonNegativeFloat,
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
        Literal["rms_norm"],
        unsupported({"layer_norm": "the families that can be trained use rms_norm"}),
    ] = "rms_norm"
    """Only `rms_norm` is allowed."""
    epsilon: PositiveFloat = 1e-5
    """Added to the mean of squares."""
    zero_centered: bool = False
    """Multiply by 1 + weight instead of weight, as Gemma does. Weights then start at 0."""


class AttentionTemperatureConfig(Section):
    """Sharper attention at positions beyond the trained length (Llama 4, Ministral 3): queries are
    multiplied by 1 + beta · ln(1 + ⌊position / length⌋).
    """

    beta: NonNegativeFloat = 0.1
    """Strength. 0 changes nothing."""
    length: Positive = 8192
    """Positions, in tokens, over which queries do not change."""


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
    num_experts: Positive = 1
    """Number of experts in a block: MLPs of which a router chooses a few for each token. 1 means an
    ordinary MLP."""
    num_experts_per_token: Positive = 1
    """Number of experts that compute a token. At most num_experts."""
    expert_hidden_size: Positive | None = None
    """Intermediate size of an expert. null means ffn_hidden_size."""
    normalize_expert_weights: bool = True
    """Scale the weights of a token's experts to a sum of 1, as Mixtral does."""
    layers_without_experts: list[Count] = []
    """Numbers of blocks, from 0, that have an ordinary MLP of ffn_hidden_size."""
    expert_auxiliary_loss_coefficient: NonNegativeFloat = 0.001
    """Weight of the load-balancing loss, which spreads tokens evenly over experts. With
    `pretrained.path` the default is router_aux_loss_coef of config.json; of gpt-oss at
    most 0.001, unless its output_router_logits is true."""
    expert_z_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the z-loss, which keeps the router's logits small."""
    expert_bias_update_rate: NonNegativeFloat | None = None
    """Load balancing without a loss (DeepSeek-V3): each expert has a bias, which is added to its
    probability when experts are chosen, and not to its weight. After a step the bias grows by this
    rate if the expert had fewer tokens than the mean of its layer, and falls if it had more. 0
    keeps biases as they are. null means no biases. Exports cannot hold them."""
    gated: bool = True
    """Whether the MLP has a gate. Only MLPs with xielu have none."""
    activation_type: Annotated[
        Literal["silu", "gelu_pytorch_tanh", "xielu", "clamped_swiglu"],
        unsupported(
            {
                "gelu": "gated models use silu, or gelu_pytorch_tanh (Gemma)",
                **dict.fromkeys(("relu", "squared_relu"), "gated models use silu"),
            }
        ),
    ] = "silu"
    """Activation of the gate: `silu`, or `gelu_pytorch_tanh`, GELU in its tanh approximation.
    `xielu` (Apertus), with two trained parameters, is for MLPs without a gate. `clamped_swiglu`
    (gpt-oss): g · sigmoid(swiglu_alpha · g) · (u + 1), with g and u limited to swiglu_limit."""
    swiglu_limit: PositiveFloat = 7.0
    """clamped_swiglu: limit of g from above, and of u on both sides."""
    swiglu_alpha: PositiveFloat = 1.702
    """clamped_swiglu: factor of the gate's sigmoid."""
    add_linear_biases: Annotated[
        Literal["nowhere", "everywhere", "only_attention", "only_attn_qkv", "only_mlp"],
        BeforeValidator(_biases),
        Allowed("yes, no, or one of nowhere, everywhere, only_attention, only_attn_qkv, only_mlp"),
    ] = "nowhere"
    """Which linear layers have biases. yes means everywhere, no means nowhere. `only_attn_qkv`:
    query, key and value projections, as in Qwen2."""
    normalization: NormalizationConfig = NormalizationConfig()
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Norms of a block: `pre`: before attention and MLP, as in Llama. `post`: on their results,
    before these are added to the residual stream, as in OLMo 2. `both`: as in Gemma."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Norms of queries and keys, before their rotation. `head`: of each head, with one weight for
    all heads, as in Qwen3. `projection`: of all heads together, as in OLMo 2."""
    layer_types: (
        list[
            Annotated[
                Literal["full_attention", "sliding_attention"],
                Allowed("full_attention or sliding_attention"),
            ]
        ]
        | None
    ) = None
    """Attention of each block, from the first to the last: `full_attention`, or
    `sliding_attention`, which uses window_size. null means sliding_attention for all if
    window_size is given, else full_attention."""
    window_size: Positive | None = None
    """Tokens that a token of a sliding_attention block attends to, itself included. null means no
    limit."""
    softmax_scale: PositiveFloat | None = None
    """Factor of the scores before their softmax. null means kv_channels^-0.5."""
    attention_softcap: PositiveFloat | None = None
    """Limit of the scores before their softmax: cap · tanh(score / cap), as in Gemma 2. null means
    no limit."""
    attention_sinks: bool = False
    """A trained score for each head that takes part in its softmax, without a value (gpt-oss)."""
    attention_temperature: AttentionTemperatureConfig | None = None
    residual_multiplier: PositiveFloat = 1.0
    """Factor of what attention and MLP add to the residual stream (Granite)."""
    rotary: RotaryConfig = RotaryConfig()
    sliding_rotary: RotaryConfig | None = None
    """Rotary position embedding of sliding_attention blocks, with the settings of `rotary`. null
    means that of the others."""
    layers_without_rotary: list[Count] = []
    """Numbers of blocks, from 0, that have no position embedding, as in SmolLM3."""
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

    def has_experts(self, layer: int) -> bool:
        """Whether a block has experts instead of an ordinary MLP."""
        return self.num_experts > 1 and layer not in self.layers_without_experts

    @property
    def has_mlp_biases(self) -> bool:
        """Whether MLPs, or routers and experts, have biases."""
        return self.add_linear_biases in ("everywhere", "only_mlp")

    @property
    def expert_size(self) -> int:
        """Intermediate size of an expert."""
        return self.expert_hidden_size or self.ffn_hidden_size

    def active_ffn_size(self, layer: int) -> int:
        """Intermediate size of all that computes one token in a block's MLP or experts."""
        if self.has_experts(layer):
            return self.num_experts_per_token * self.expert_size
        return self.ffn_hidden_size

    def expert_layers(self) -> list[int]:
        """The numbers of the blocks that have experts."""
        return [layer for layer in range(self.num_layers) if self.has_experts(layer)]

    def is_sliding(self, layer: int) -> bool:
        """Whether the attention of a block has the window."""
        if self.layer_types is None:
            return self.window_size is not None
        return self.layer_types[layer] == "sliding_attention"

    def window(self, layer: int) -> int | None:
        """Tokens that a token of a block attends to, itself included; None means no limit."""
        return self.window_size if self.is_sliding(layer) else None

    def rotary_of(self, layer: int) -> RotaryConfig | None:
        """The position embedding of a block; None where it has none."""
        sliding = self.sliding_rotary is not None and self.is_sliding(layer)
        rotary = self.sliding_rotary if sliding else self.rotary
        assert rotary is not None
        return None if rotary.type == "none" or layer in self.layers_without_rotary else rotary


class BaseModelConfig(Section):
    """The model. With `pretrained.path` its shape comes from the model's config.json: leave it
    out.
    """

    family: FamilyName = "llama"
    """Family of the model, which is `model_type` in config.json: names of parameters, and the
    config.json of exports."""
    vocab_size: Positive = 49152
    """Number of rows of the embedding."""
    max_position_embeddings: Positive = 2048
    """Context length in the config.json of exports, unless sequences of training are longer."""
    tie_word_embeddings: bool = True
    """Share one matrix between embedding and head. `no` trains the separate head that a pretrained
    folder has although its config.json says `tie_word_embeddings: true`."""
    embedding_multiplier: PositiveFloat = 1.0
    """Factor of the embeddings (Gemma: √hidden_size; Granite), rounded to the dtype of
    computation."""
    logits_divisor: PositiveFloat = 1.0
    """Divisor of the logits (Granite)."""
    logits_softcap: PositiveFloat | None = None
    """Limit of the logits: cap · tanh(logit / cap), as in Gemma 2. null means no limit."""
    transformer: TransformerConfig = TransformerConfig()
    cross_entropy_impl: Literal["auto", "torch", "fused", "triton"] = "auto"
    """`torch`: computes all logits at once. `fused`: computes the logits of a few tokens at a time
    and never stores all of them. `triton`: like fused, with a GPU kernel. `auto`: triton where it
    runs, else fused."""
    cross_entropy_splits: Positive | None = None
    """Number of chunks into which fused and triton divide the tokens of a micro-batch. null chooses
    by size."""
    z_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the z-loss, log(Σ exp(logits))² of each target token, which keeps logits small
    (PaLM). 0 means none; 1e-4 and 1e-5 are usual. The metric `z_loss` is without this factor;
    `language_model_loss` stays the cross entropy alone."""
    init_method_std_embed: Std = None
    """Standard deviation for embedding and head. null means transformer.init_method_std."""
    init_method_min_embed: float | None = None
    """Lower limit for embedding and head. null means transformer.init_method_min."""
    init_method_max_embed: float | None = None
    """Upper limit for embedding and head. null means transformer.init_method_max."""

    def with_rotary(self, rotary: RotaryConfig) -> Self:
        """This model with other positions (`transformer.rotary`)."""
        transformer = self.transformer.model_copy(update={"rotary": rotary})
        return self.model_copy(update={"transformer": transformer})

    def for_context(self, length: int) -> Self:
        """This model with rotary angles for contexts of `length`, in tokens."""
        transformer, sliding = self.transformer, self.transformer.sliding_rotary
        rotary = {
            "rotary": transformer.rotary.for_context(length),
            "sliding_rotary": None if sliding is None else sliding.for_context(length),
        }
        return self.model_copy(update={"transformer": transformer.model_copy(update=rotary)})


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
    compile_all: Annotated[bool | Literal["auto"], Allowed("yes, no or auto")] = "auto"
    """Compile each block with torch.compile. `auto` means yes on GPUs, where the family and the
    layout were tested compiled, and no on the CPU; the plan says which. A run that resumes with
    `auto` keeps what it began with."""


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
    Experts and routers are not computed in fp8.
    Weights, sums and everything else keep their dtype. Without `multi_stage.compile_all` it is
    slower. Check the effect on the loss."""
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
    expert_parallel: Positive = 1
    """Expert parallelism: number of adjacent processes that divide the experts of each block, and
    exchange tokens. Must divide the number of experts, and the processes that share training
    state: it uses these and needs no others. Use it within a node."""
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
        Literal["auto", "distributed", FamilyName],
        unsupported(PRETRAINED_FORMATS),
    ] = "auto"
    """`auto`: a Hugging Face folder, whose config.json names the family, or a checkpoint of this
    project. A family's name: a folder of this family. `distributed`: a checkpoint."""
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
