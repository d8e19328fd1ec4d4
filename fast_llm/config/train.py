"""The configuration of `train`: the YAML file, section for section, in its order.

The text under a setting is its documentation (docs/settings.md is made from it). What users of Fast-LLM 0.2
may have in their files and this project does not do is refused by name: whole settings in REFUSED at the end,
single values where they stand (`unsupported`). Constraints across sections are in checks.py.
"""

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.section import (
    Count,
    Interval,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    Section,
    Text,
    path_text,
)

Share = Annotated[float, Field(ge=0, lt=1), Allowed("a number from 0 to below 1")]
Seconds = Annotated[float, Field(gt=0, le=10**9), Allowed("a number of seconds above 0")]
Workers = Annotated[int, Field(ge=0, le=1024), Allowed("an integer from 0 to 1024")]

_DTYPES = {
    spelling: name
    for name, spellings in {
        "fp32": ("fp32", "float32", "float"),
        "bf16": ("bf16", "bfloat16"),
        "fp16": ("fp16", "float16", "half"),
        "fp64": ("fp64", "float64", "double"),  # refused below
    }.items()
    for spelling in spellings
}


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


_NO_FP64 = unsupported({"fp64": "the highest precision is fp32"})
# A dtype in any of its spellings; it becomes the short one.
DType = Annotated[
    Literal["fp32", "bf16", "fp16"],
    _NO_FP64,  # asked after the one below
    BeforeValidator(_dtype),
    Allowed("one of fp32, bf16, fp16 (or float32, bfloat16, float16)"),
]


class LogsConfig(Interval):
    """When metrics are written."""

    interval: Positive | None = 100
    """Every so many steps a line in the log and a record in metrics.jsonl; null is never."""


class ValidationConfig(Interval):
    """When and on how much the validation loss is measured: before the first step, every `interval` steps and
    at the end, always on the same sequences, so that the losses can be compared."""

    iterations: Positive | None = None
    """Batches (of `batch.batch_size` sequences) that one validation measures. Needed with `interval`."""


class CallbackConfig(Section):
    """A program that is started after something was saved, on the first process, and not waited for."""

    script: Annotated[str | list[str], Allowed("a command, or a list of its words")] | None = None
    """The command: a line as for a shell, or a list of words; null is none. FAST_LLM_SAVED in its environment is the
    folder that was written."""
    environment: dict[str, str] = {}
    """Further environment variables of it. Secrets do not belong here: they would be written into config.yaml
    and checkpoints; set them where training is started, the program inherits them."""

    @field_validator("script")
    @classmethod
    def _some_word(cls, value: str | list[str] | None) -> str | list[str] | None:
        try:
            words = shlex.split(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(
                f"given {value}, which is no command line: {str(error).lower()}"
            ) from error
        if words is not None and not (words and words[0]):
            raise ValueError("given no word, must begin with a program; leave it out for none")
        return value

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{name} cannot name an environment variable; use letters, digits and _"
                )
            if re.search("token|key|secret|password|credential", name, re.IGNORECASE):
                raise ValueError(
                    f"{name} looks like a secret, which would be written into config.yaml; set it in the environment"
                    " that training is started in"
                )
        return value


class SavedConfig(Interval):
    """When something is saved and how much of it is kept."""

    keep_every: Positive | None = None
    """Every so many of them is permanent and not counted in `keep`: those whose step is a multiple of
    `keep_every` × `interval`, counted from `offset`. With `interval: 1000` and `keep_every: 10` these are steps
    10000, 20000, … (Fast-LLM 0.2 was off by one here: 9000, 19000, …)"""
    callback: CallbackConfig = CallbackConfig()

    def is_permanent(self, step: int) -> bool:
        """Whether what is saved after this step is never deleted."""
        if self.keep_every is None or self.interval is None:
            return False
        return (step - self.offset) % (self.keep_every * self.interval) == 0


class CheckpointConfig(SavedConfig):
    """Training state, from which the same command goes on: fp32 weights and both moments, 12 bytes a weight. Also
    saved after the last step and when training is told to stop, if `interval` is set."""

    keep: Positive | None = 5
    """The newest so many are kept; null is all."""
    background: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in the host's memory: 12 bytes a weight in all, for
    each copy of the training state (`model.multi_stage.shard_size`). Where memory would not do, training waits."""


class ExportConfig(SavedConfig):
    """Hugging Face folders: weights, configuration and tokenizer, in `export/<format>/<step>/`. Also written after
    the last step, if `interval` is set."""

    keep: Positive | None = None
    """The newest so many are kept; null is all."""
    format: Annotated[
        Literal["llama"],
        unsupported(
            {
                "distributed": "a checkpoint is written by training.checkpoint; exports have format llama",
                "fast_llm": "a checkpoint is written by training.checkpoint; exports have format llama",
                "auto": "exports have format llama",
                **dict.fromkeys(
                    ("starcoder2", "mistral", "mixtral", "qwen2"),
                    "the models here are Llamas; exports have format llama",
                ),
            }
        ),
    ] = "llama"
    """The kind of model folder: a Llama of Hugging Face's transformers."""
    model_weights: Annotated[
        bool, unsupported({False: "an export without weights is no model; set interval: null"})
    ] = True
    """Only yes: exports hold weights."""
    optimizer_state: (
        Annotated[
            bool,
            unsupported({True: "a Hugging Face folder holds no optimizer state; checkpoints do"}),
        ]
        | None
    ) = None
    """Only no: exports hold no optimizer state, checkpoints do."""
    parameters_per_file: Annotated[
        int, Field(ge=2**20, le=2**62), Allowed("an integer of 2^20 (1048576) or more")
    ] = 2**32
    """The most parameters in one safetensors file."""
    data_type: DType | None = None
    """The dtype of exported weights; null is `model.distributed.training_dtype`."""


class ShutdownConfig(Interval):
    """Stop, to be queued again: the process ends with exit code 0 after a checkpoint, and the same command goes on."""


class DoubleCheckConfig(Interval):
    """When chips and memories are looked at that may be wrong without saying so: before the update of such a step the loss of a
    micro-batch is computed once more, and what several processes hold alike is compared, bit for bit. What differs is named
    (rank, host, tensor), and training stops with exit code 1. Costs a forward pass of a micro-batch, with a pipeline of all."""


class ProfilingConfig(Interval):
    """When a step is made under PyTorch's profiler, to see where its time goes: a table of its parts and of the operations that took
    longest, and a trace for Perfetto, in `<experiment_dir>/profile`. Such a step trains as any other; how long it takes is not told in
    metrics."""

    ranks: Annotated[
        list[Count], Field(min_length=1), Allowed("a list of one or more ranks, each 0 or more")
    ] = [0]
    """The processes that write one, by their rank."""


class SpikesConfig(Section):
    """What is done about a step whose loss or gradient norm stands out from those of the steps before: is above
    m + `threshold` × max(1.4826 × median |y - m|, 0.01 × |m|), where y are the last `window` steps' values and m their median.
    Such a step's update is not applied. (Infinities and NaN: `optimizer.max_nonfinite_steps`.)"""

    policy: Annotated[
        Literal["none", "skip", "rewind", "stop"],
        unsupported({False: "to do nothing about spikes is policy: none"}),
    ] = "none"
    """none looks for nothing. skip goes on with the next step. rewind goes back to the newest checkpoint, and on from there with
    the data after the spike's: what led to it is passed over. stop ends training, exit code 1."""
    window: Annotated[int, Field(ge=4, le=10_000), Allowed("an integer from 4 to 10000")] = 128
    """Steps that a step is compared with; before there are as many nothing is judged."""
    threshold: PositiveFloat = 6.0
    """How many deviations above the median a spike begins."""
    max_rewinds: Positive = 5
    """How often a run goes back before it stops."""


class AlertConfig(Interval):
    """Messages through Weights & Biases."""

    status_updates: bool | None = None
    """Also when the run starts, ends or fails; null is: if `interval` is set."""


class WandbConfig(Section):
    """Weights & Biases: on as soon as one of these settings is given, also without `entity_name` (in Fast-LLM 0.2 that one
    turned it on); `training.wandb: null` turns it off. Without a login or a network the run is recorded offline."""

    entity_name: Text | None = None
    """User or team; null is your default one."""
    project_name: Text = "fast_llm"
    """The project that the run appears in."""
    group_name: Text = "default"
    """The group of runs in it."""
    alert: AlertConfig = AlertConfig()


class TrainingConfig(Section):
    """How long, and what happens on the way."""

    train_iters: Count = 0
    """Steps in all. 0 only measures the validation loss and exports, if these are asked for."""
    test_iters: Count = 0
    """Batches whose loss is measured on the test split after the last step; 0 is none."""
    num_workers: Workers = 2
    """Threads that make batches ahead of the step; 0 makes them in between."""
    prefetch_factor: (
        Annotated[int, Field(ge=1, le=1024), Allowed("an integer from 1 to 1024")] | None
    ) = None
    """Steps' batches that each of these keeps ready; null is 2."""
    timeout: Seconds | None = 3600
    """Seconds that processes wait for one another while one saves, exports or reads weights; null is a week."""
    logs: LogsConfig = LogsConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    spikes: SpikesConfig = SpikesConfig()
    double_check: DoubleCheckConfig = DoubleCheckConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to `<experiment_dir>/tensorboard`."""
    wandb: Annotated[WandbConfig | None, BeforeValidator(lambda value: value or None)] = None


class BatchConfig(Section):
    """How many sequences a step takes, and how they are dealt. What is left out follows from the rest:
    batch_size = micro_batch_size × sequential_micro_batches × data-parallel processes, which are all the processes /
    (tensor_parallel × pipeline_parallel × sequence_data_parallel)."""

    micro_batch_size: Annotated[
        Positive | Literal["auto"] | None, Allowed("an integer above 0, auto or null")
    ] = None
    """Sequences in one forward and backward pass of a process; null follows from the rest, or is 1. auto is what a forecast says is
    the fastest that fits the memory that there is, with more recomputation than `mlp_recompute_level` says if need be; it
    needs batch_size."""
    batch_size: Positive | None = None
    """Sequences in one step, over all processes and micro-batches; null follows from the rest."""
    depth_first_micro_batches: Positive | None = None
    """Micro-batches of a process one after the other (gradient accumulation); with pipeline parallelism, how often the
    pipeline is filled and emptied in a step. null follows from the rest."""
    breadth_first_micro_batches: Positive | None = None
    """Micro-batches that are in the pipeline together; 1 without pipeline parallelism. null follows from the rest: all
    of them with pipeline parallelism."""
    sequential_micro_batches: Positive | None = None
    """Micro-batches of a process in all: the product of the two above; null follows from the rest."""
    sequence_length: Positive = 2048
    """Tokens of a sequence."""
    micro_sequence_length: Positive | None = None
    """Only the same as sequence_length: sequences are computed whole."""
    cross_document_attention: bool = False
    """Whether tokens see documents before theirs in the same sequence, as in Fast-LLM 0.2. By default documents
    are kept apart, as when Llama 3.1 was pretrained: no attention, positions that start again, and no
    prediction of a document's first token from the one before it."""


class TokenizerConfig(Section):
    """The tokenizer of data without one of its own."""

    path: PathText | None = None
    """Folder or tokenizer.json with which the data was made; it is compared with the model's."""


def _weights_and_paths(value: Any) -> Any:
    """A lone path becomes a list; weights written as text ("0.9") become numbers."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or len(value) % 2:
        return value
    number = re.compile(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")
    return [
        float(item) if i % 2 == 0 and isinstance(item, str) and number.fullmatch(item) else item
        for i, item in enumerate(value)
    ]


class DataConfig(Section):
    """Where the tokens come from."""

    format: Annotated[
        Literal["file", "list", "random"],
        unsupported({"sample": "use random, which makes its tokens up as well"}),
    ] = "list"
    """`file`: the dataset.json that `prepare` writes. `list`: token files' prefixes or dataset.json files, one or in
    turn with weights (`[0.9, code/dataset.json, 0.1, prose/dataset.json]`). `random`: random tokens, to try things."""
    path: Annotated[
        list[Any],  # text and numbers, which checks.py looks at
        BeforeValidator(_weights_and_paths),
        Allowed("a path, or a list of weights and paths in turn"),
    ] = []
    """One path, or what `format: list` says; relative to the working directory."""
    split: Annotated[
        list[Annotated[float, Field(ge=0, le=10**15)]],
        Field(min_length=1, max_length=3),
        Allowed("a list of one to three numbers of 0 or more"),
    ] = [969, 30, 1]
    """Shares of the documents for training, validation and test. A hash of a document's number in the dataset decides;
    of data without `split` in its dataset.json, the order in each token file, from front to back. A share that is left out is 0."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_sets: dict[str, PathText] = {}
    """Further datasets whose loss is measured at every validation: name → dataset.json or prefix. Of data that is also trained on
    (recognised by its content, wherever it lies), only validation's share is used; all documents of any other. With the old domain
    among them one sees what is forgotten. The loss is logged as `<name>_loss`."""
    data_sample_warn_time_ms: PositiveFloat = 1000
    """Warn when making one step's batches takes longer, in milliseconds."""

    @field_validator("path")
    @classmethod
    def _paths(cls, value: list[Any]) -> list[Any]:
        return [path_text(item) if isinstance(item, str) else item for item in value]

    @field_validator("split")
    @classmethod
    def _some_share(cls, value: list[float]) -> list[float]:
        if not any(value):
            raise ValueError(f"given {value}, at least one share must be above 0")
        return value + [0.0] * (3 - len(value))

    @field_validator("validation_sets")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            taken = ("training", "validation", "test", "language_model")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in taken:
                raise ValueError(
                    f"{name} cannot name a set; use letters, digits and _, and none of {', '.join(taken)}"
                )
        return value


class LearningRateConfig(Section):
    """The learning rate: a linear warmup from 0, then a decay."""

    base: NonNegativeFloat = 1e-4
    """The highest."""
    minimum: NonNegativeFloat = 0.0
    """The one at the end of the decay and after it."""
    decay_style: Literal["constant", "linear", "power", "cosine"] = "constant"
    """How it falls from base to minimum: not at all, in a straight line (with decay_power: along a power), or along
    half a cosine. linear and power are the same."""
    decay_iterations: Positive | None = None
    """The step at which the decay ends, counted from the start of training: it includes the warmup. Needed by every
    style but constant."""
    decay_power: PositiveFloat = 1.0
    """Exponent of the share of the decay that is done."""
    warmup_iterations: Count = 0
    """Steps of the warmup."""


class GradientScalerConfig(Section):
    """The factor against underflow of fp16 gradients."""

    constant: PositiveFloat | None = None
    """A fixed factor, with any dtype; null is a dynamic one for fp16 and none otherwise."""
    initial: PositiveFloat = 65536
    """The dynamic factor at the start."""
    minimum: PositiveFloat = 1.0
    """The lowest that the dynamic factor falls to."""
    window: Positive = 1000
    """Steps without overflow before the dynamic factor doubles."""
    hysteresis: Positive = 2
    """Overflows that are put up with before it halves."""


class OptimizerConfig(Section):
    """AdamW. Norms and biases do not decay; every matrix does, embeddings and head included."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay: each update takes learning rate × this of a matrix."""
    beta_1: Share = 0.9
    """Decay of the mean of gradients."""
    beta_2: Share = 0.999
    """Decay of the mean of their squares."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean of squares."""
    gradient_norm_clipping: PositiveFloat | None = 1.0
    """The largest L2 norm of all gradients together; null is no clipping."""
    default_learning_rate_scale: NonNegativeFloat = 1.0
    """Factor on the learning rate."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    gradient_scaler: GradientScalerConfig = GradientScalerConfig()
    moments_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "int8"],
        _NO_FP64,
        BeforeValidator(_dtype),
        Allowed("auto, fp32, bf16 or int8 (float32, bfloat16)"),
    ] = "auto"
    """The dtype of both moments. bf16 saves 4 bytes a weight; int8, with a common exponent for each 128 neighbours, 6, for long
    sequences. auto is fp32, but bf16 on a GPU whose memory would not do, and never int8. A run that goes on with auto keeps what it
    began with; any may go on as any other."""
    max_nonfinite_steps: Positive = 5
    """Steps in a row with infinite or NaN gradients after which training stops. Such steps never touch the weights."""


class NormalizationConfig(Section):
    """RMSNorm."""

    type: Annotated[
        Literal["rms_norm"], unsupported({"layer_norm": "a Llama's norm is rms_norm"})
    ] = "rms_norm"
    """Llama's."""
    epsilon: PositiveFloat = 1e-5
    """Added to the mean of squares."""


class RotaryConfig(Section):
    """Rotary position embedding."""

    type: Annotated[
        Literal["default", "llama3"],
        unsupported(
            {
                "none": "a Llama has rotary positions: default, or llama3 with Llama 3.1's scaling",
                "yarn": "no Llama up to 3.2 uses it; use llama3",
            }
        ),
    ] = "default"
    """`default`: none of the scaling below. `llama3`: stretches low frequencies as Llama 3.1 does."""
    theta: PositiveFloat = 10000
    """The base of the frequencies."""
    scale_factor: PositiveFloat = 8.0
    """llama3: by how much low frequencies are stretched."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: waves longer than original_context_length divided by this are stretched in full."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: waves shorter than original_context_length divided by this are not stretched."""
    original_context_length: Positive = 8192
    """llama3: the context, in tokens, that the model had before."""


def _biases(value: Any) -> Any:
    return ("everywhere" if value else "nowhere") if isinstance(value, bool) else value


Std = Annotated[float, Field(ge=0), Allowed("a number of 0 or more")] | None


class TransformerConfig(Section):
    """The blocks. With `pretrained.path` their shape comes from the model's config.json: leave it out."""

    num_layers: Annotated[int, Field(gt=0, le=10_000), Allowed("an integer from 1 to 10000")] = 12
    """Blocks."""
    hidden_size: Positive = 1024
    """Dimensions of the residual stream."""
    num_attention_heads: Positive = 8
    """Heads of queries."""
    head_groups: Positive = 1
    """Heads of keys and values, each shared by a group of query heads; divides num_attention_heads."""
    kv_channels: Positive = Field(
        default_factory=lambda data: max(
            1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1)
        ),
        json_schema_extra={"default": "hidden_size / num_attention_heads"},
    )
    """Dimensions of a head; even."""
    ffn_hidden_size: Positive = Field(
        default_factory=lambda data: 4 * data.get("hidden_size", 1),
        json_schema_extra={"default": "4 × hidden_size"},
    )
    """Inner size of the MLP."""
    gated: Annotated[bool, unsupported({False: "a Llama's MLP has a gate"})] = True
    """Only yes: Llama's MLP has a gate."""
    activation_type: Annotated[
        Literal["silu"],
        unsupported(
            dict.fromkeys(("gelu", "relu", "squared_relu"), "a Llama's activation is silu")
        ),
    ] = "silu"
    """Llama's."""
    add_linear_biases: Annotated[
        Literal["nowhere", "everywhere", "only_attention", "only_mlp"],
        BeforeValidator(_biases),
        unsupported(
            {
                "only_attn_qkv": "Llamas have biases in all of attention (only_attention) or in none of it"
            }
        ),
        Allowed("yes, no, or one of nowhere, everywhere, only_attention, only_mlp"),
    ] = "nowhere"
    """Which linear layers have biases; yes and no are everywhere and nowhere."""
    normalization: NormalizationConfig = NormalizationConfig()
    rotary: RotaryConfig = RotaryConfig()
    use_flash_attention: bool = True
    """Attention that never holds a document's scores, through PyTorch's kernels, in every dtype; no computes with plain
    matrix products."""
    mlp_recompute_level: Literal[
        "none", "activation", "activation_and_input", "full", "selective", "block"
    ] = "none"
    """What the backward pass computes again instead of keeping: an MLP's activation, also its normalised input, or all
    of the MLP; `selective`: everything in a block but matrix products and attention; `block`: the whole block."""
    init_method_std: Std = None
    """Standard deviation of random matrices; null is hidden_size^-0.5."""
    init_method_min: float | None = None
    """Random matrices are clamped to this from below; null is no clamping."""
    init_method_max: float | None = None
    """And to this from above."""
    init_method_std_qkv: Std = None
    """Of the projections to queries, keys and values; null is init_method_std."""
    init_method_min_qkv: float | None = None
    """Their lower clamp; null is init_method_min."""
    init_method_max_qkv: float | None = None
    """Their upper clamp; null is init_method_max."""
    init_method_std_attn_proj: Std = None
    """Of attention's output projection; null is init_method_std / √(2 num_layers)."""
    init_method_min_attn_proj: float | None = None
    """Its lower clamp; null is init_method_min."""
    init_method_max_attn_proj: float | None = None
    """Its upper clamp; null is init_method_max."""
    init_method_std_mlp_1: Std = None
    """Of gate and up projections; null is init_method_std."""
    init_method_min_mlp_1: float | None = None
    """Their lower clamp; null is init_method_min."""
    init_method_max_mlp_1: float | None = None
    """Their upper clamp; null is init_method_max."""
    init_method_std_mlp_2: Std = None
    """Of the down projection; null is init_method_std / √(2 num_layers)."""
    init_method_min_mlp_2: float | None = None
    """Its lower clamp; null is init_method_min."""
    init_method_max_mlp_2: float | None = None
    """Its upper clamp; null is init_method_max."""


class BaseModelConfig(Section):
    """The model. With `pretrained.path` its shape comes from there: leave it out."""

    vocab_size: Positive = 49152
    """Rows of the embedding."""
    max_position_embeddings: Positive = 2048
    """The context length that an export's config.json states, or batch.sequence_length if that is larger."""
    tie_word_embeddings: bool = True
    """Whether embedding and head are one matrix. `no` trains the separate head that a pretrained folder has although its
    config.json says `tie_word_embeddings: true`."""
    transformer: TransformerConfig = TransformerConfig()
    cross_entropy_impl: Literal["auto", "torch", "fused", "triton"] = "auto"
    """`fused`: the logits of a few tokens at a time, never all of them; `triton`: as fused, with a GPU kernel;
    `torch`: all logits at once; `auto`: triton where it runs, else fused."""
    cross_entropy_splits: Positive | None = None
    """Into how many stretches fused and triton cut a micro-batch's tokens; null is by size."""
    init_method_std_embed: Std = None
    """Of embedding and head; null is transformer.init_method_std."""
    init_method_min_embed: float | None = None
    """Their lower clamp; null is transformer.init_method_min."""
    init_method_max_embed: float | None = None
    """Their upper clamp; null is transformer.init_method_max."""


class MultiStageConfig(Section):
    """How training state is spread over processes."""

    zero_stage: Annotated[int, Field(ge=1, le=3), Allowed("1, 2 or 3")] | None = None
    """What is sharded over processes: always optimizer state, fp32 weights and reduced gradients; from 2 on also
    full gradients, with 3 also the weights that are computed with. null is 1. One process shards nothing."""
    shard_size: Positive | None = None
    """Over how many neighbouring processes that state is sharded; further groups of as many keep copies of it, and only
    sums of sharded gradients pass between them. The processes of a node, when nodes are many or their network is slow.
    null, or more than there are processes, is all of them."""
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
    """In which order pipeline stages take micro-batches, by PyTorch's names. One stage a process: `gpipe` all forward, then
    all backward; `1f1b` as few in flight as can be. Several: `looped_bfs` (breadth first), `interleaved_1f1b`, and
    `interleaved_zero_bubble`, which fills gaps with gradients of weights; `zbv_zero_bubble` has two stages a process, one
    from the front and one from the back. null is 1f1b, or interleaved_1f1b with several stages a process."""
    layers_per_stage: (
        Annotated[
            int | list[Annotated[int, Field(ge=0)]],
            Allowed("a number of layers, or a list with one for each stage"),
        ]
        | None
    ) = None
    """Layers of a pipeline stage: one number, or a list with one for each, from the first stage to the last. Fewer than
    num_layers / pipeline_parallel give each process several stages. null is one stage a process, as even as can be; the
    first and the last have fewer where it does not divide, for the embedding and the head."""
    compile_all: bool = False
    """Compile each block with torch.compile."""


class DistributedConfig(Section):
    """Number formats and processes."""

    training_dtype: DType = "fp32"
    """The dtype that is computed in. Weights, gradients and their sums are kept in fp32 besides."""
    optimization_dtype: Annotated[
        Literal["fp32"],
        _NO_FP64,
        BeforeValidator(_dtype),
        Allowed("fp32; optimizer.moments_dtype: bf16 or int8 saves memory"),
    ] = "fp32"
    """Only fp32: the optimizer works in it. optimizer.moments_dtype: bf16 or int8 saves memory."""
    fp8: bool = False
    """Make the blocks' matrix products in fp8, on GPUs from Hopper (or Ada) on; weights, sums, and all else stay as they are. For
    speed it needs `multi_stage.compile_all: yes`; look at what it does to the loss."""
    tensor_parallel: Positive = 1
    """Over how many neighbouring processes each matrix is cut: heads, the MLP's inner size and the vocabulary are divided
    by it. Within a node, for models too large or batches too small for ZeRO alone."""
    sequence_tensor_parallel: bool = False
    """With tensor_parallel: also cut, along the sequence, what lies between the matrices (norms and the residual stream).
    Saves memory at the same traffic."""
    sequence_data_parallel: Positive = 1
    """Over how many processes each sequence is cut (context parallelism), for sequences too long for one. Each holds one
    stretch from the front and one from the back, so that causal attention is the same work for all."""
    pipeline_parallel: Positive = 1
    """Over how many groups of processes the layers are divided, one behind the other."""
    timeout: Seconds = 60
    """Seconds a process waits for the others within a step. Saves, exports and reading weights have
    training.timeout."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Allowed("an integer from 0 to 2^63 - 1")] = 1234
    """Of random weights and the order of the data."""
    reproducible_init: Annotated[
        bool,
        unsupported({False: "random weights are always the same whatever the number of processes"}),
    ] = True
    """Only yes: random weights are the same whatever the number of processes."""

    def data_parallel(self, processes: int) -> int:
        """Over how many of the processes the batch is dealt."""
        return max(
            1,
            processes
            // (self.tensor_parallel * self.pipeline_parallel * self.sequence_data_parallel),
        )


class ModelConfig(Section):
    """The model and how it is computed."""

    base_model: BaseModelConfig = BaseModelConfig()
    multi_stage: MultiStageConfig = MultiStageConfig()
    distributed: DistributedConfig = DistributedConfig()


class PretrainedConfig(Section):
    """The model to start from."""

    path: PathText | None = None
    """A folder, or a model on the Hugging Face Hub (`meta-llama/Llama-3.1-8B`); null starts from random weights."""
    format: Annotated[
        Literal["llama", "distributed"],
        BeforeValidator(lambda value: "llama" if value == "auto" else value),
        unsupported(
            {
                "fast_llm": "convert it to a Hugging Face folder with Fast-LLM 0.2, and use llama",
                **dict.fromkeys(
                    ("starcoder2", "mistral", "mixtral", "qwen2"), "the models here are Llamas"
                ),
            }
        ),
        Allowed("llama (or auto), or distributed"),
    ] = "llama"
    """`llama` (or `auto`): a Hugging Face folder. `distributed`: a checkpoint of this project."""
    model_weights: bool = True
    """Whether to start from its weights; no takes its shape alone and starts from random ones."""
    optimizer_state: bool = False
    """Whether to start from its moments too; only a checkpoint (`format: distributed`) has them."""
    load_config: Annotated[
        Literal["architecture"],
        unsupported(
            {
                "none": "the model's shape always comes from its configuration",
                "model": "settings other than the model's shape come from this file alone",
                "fast_llm": "settings other than the model's shape come from this file alone",
            }
        ),
    ] = "architecture"
    """Only this: the model's shape comes from its configuration, everything else from this file."""


class RunConfig(Section):
    """Where the run is written to."""

    experiment_dir: PathText | None = None
    """The folder for checkpoints, exports, logs and metrics; null writes nothing."""
    experiment_name: Text | None = None
    """The name in Weights & Biases; null is the folder's."""
    log_timestamps: bool = True
    """Begin lines of the log with the time."""
    torch_dynamo_enable: bool = True
    """No forbids torch.compile everywhere."""
    enable_triton_kernels: bool = True
    """No forbids Triton kernels of this project."""
    accept_changes: list[Text] = []
    """Settings that may differ from those of the checkpoint although they change what is trained (as
    `data.path`, `batch.batch_size`, `batch.sequence_length`, `model.distributed.seed`). Each source of data continues
    from its own count."""


# A thing is turned off by one setting, whatever else is said about it: when the first is given and has that value,
# the others count as left out. Left out itself, it turns nothing off, and what needs it is a mistake.
DISABLED_BY: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("training.validation.interval", None, ("training.validation.iterations",)),
    ("training.checkpoint.interval", None, ("training.checkpoint.keep_every", "training.shutdown")),
    ("training.export.interval", None, ("training.export.keep_every",)),
    ("training.logs.interval", None, ("training.wandb.alert.interval",)),
    (
        "run.experiment_dir",
        None,
        (
            *("training.checkpoint.interval", "training.checkpoint.keep_every"),
            *("training.export.interval", "training.export.keep_every"),
            *("training.shutdown", "training.profiling", "training.tensorboard"),
        ),
    ),
    (
        "model.distributed.pipeline_parallel",
        1,
        (
            "model.multi_stage.pipeline_schedule",
            "model.multi_stage.layers_per_stage",
            "batch.breadth_first_micro_batches",
        ),
    ),
    ("model.base_model.cross_entropy_impl", "torch", ("model.base_model.cross_entropy_splits",)),
    ("pretrained.path", None, ("pretrained.format", "pretrained.optimizer_state")),
    ("pretrained.model_weights", False, ("pretrained.optimizer_state",)),
    ("run.torch_dynamo_enable", False, ("model.multi_stage.compile_all",)),
)


def _without_disabled(values: Any) -> Any:
    """The values of a file without those that DISABLED_BY names; `values` is not changed."""

    def at(path: str) -> Any:
        here = values
        for key in path.split("."):
            if not isinstance(here, dict) or key not in here:
                return ...
            here = here[key]
        return here

    def changed(here: Any, keys: list[str], value: Any = ...) -> Any:
        if not isinstance(here, dict) or keys[0] not in here:
            return here
        if len(keys) > 1:
            return here | {keys[0]: changed(here[keys[0]], keys[1:], value)}
        return {key: old for key, old in here.items() if key != keys[0]} | (
            {} if value is ... else {keys[0]: value}
        )

    off = [
        path
        for path, value, _ in DISABLED_BY
        if type(at(path)) is type(value) and at(path) == value
    ]
    for path, _, others in DISABLED_BY:
        for other in others if path in off else ():
            values = changed(values, other.split("."))
    if {"training.checkpoint.interval", "run.experiment_dir"} & set(off) and at(
        "training.spikes.policy"
    ) == "rewind":
        values = changed(
            values, ["training", "spikes", "policy"], "skip"
        )  # there is nothing to go back to
    if (
        at("run.enable_triton_kernels") is False
        and at("model.base_model.cross_entropy_impl") == "triton"
    ):
        values = changed(values, ["model", "base_model", "cross_entropy_impl"], "fused")
    return values


class TrainConfig(Section):
    """The YAML file of `fast-llm train`."""

    training: TrainingConfig = TrainingConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pretrained: PretrainedConfig = PretrainedConfig()
    model: ModelConfig = ModelConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _off(cls, values: Any) -> Any:
        return _without_disabled(values)


_BASE, _TRANSFORMER = "model.base_model", "model.base_model.transformer"

# Spellings of before, and where their values go.
RENAMED = {
    "pretrained.load_weights": "pretrained.model_weights",
    "pretrained.load_optimizer": "pretrained.optimizer_state",
    "training.export.load_weights": "training.export.model_weights",
    "training.export.load_optimizer": "training.export.optimizer_state",
    f"{_TRANSFORMER}.normalization.normalization_type": f"{_TRANSFORMER}.normalization.type",
    f"{_TRANSFORMER}.normalization.layer_norm_eps": f"{_TRANSFORMER}.normalization.epsilon",
    "model.distributed.distributed_timeout": "model.distributed.timeout",
}


def _all(section: str, names: str, sentence: str) -> dict[str, str]:
    return {f"{section}.{name}": sentence for name in names.split()}


_DEBUGGING = "a debugging aid of Fast-LLM 0.2; use a debugger, or torch.profiler"

# What is not done here, and what to use instead. A section's sentence serves all settings inside without their own.
REFUSED: dict[str, str] = {
    "batch.num_micro_sequences": "sequences are computed whole; leave it out",
    "data.fim": "fill-in-the-middle is not done while training; write it into the documents before `fast-llm prepare`",
    "data.datasets": "describe the data with data.format and data.path (and data.validation_sets)",
    "data.sampling": "the order of the data follows from model.distributed.seed; leave it out",
    "data.use_loss_masking_spans": "every token of a document is a target; leave it out",
    "data.multiprocessing_context": "batches are made by threads (training.num_workers); leave it out",
    "data.tokenizer.format": "tokenizers are Hugging Face's tokenizer.json; leave it out",
    "optimizer.learning_rate.schedule": "use decay_style, decay_iterations, warmup_iterations and minimum",
    "pretrained.timeout": "reading weights has training.timeout",
    f"{_BASE}.use_position_embeddings": "positions are rotary (transformer.rotary); leave it out",
    f"{_BASE}.use_absolute_position_embeddings": "positions are rotary (transformer.rotary); leave it out",
    f"{_BASE}.parallel_embeddings": "embeddings are spread with model.multi_stage.zero_stage; leave it out",
    f"{_BASE}.sequence_first": "activations are laid out batch first; leave it out",
    f"{_BASE}.logit_z_loss": "the loss is the cross entropy alone; leave it out",
    f"{_BASE}.logits_scale_factor": "the loss is the cross entropy of the unscaled logits; leave it out",
    f"{_BASE}.use_megatron_initialization": "random weights follow init_method_std; leave it out",
    **_all(
        _BASE,
        "prediction_heads prediction_loss_coefficient",
        "Llamas predict one token; leave it out",
    ),
    **_all(
        _TRANSFORMER,
        "num_experts num_shared_experts num_experts_per_token expert_routing_type expert_auxiliary_loss_coefficient"
        " expert_z_loss_coefficient moe_jitter_eps dropless_moe dropless_dynamic_shape router_lr_scale",
        "the models here are dense; leave it out",
    ),
    **_all(
        _TRANSFORMER,
        "mlp_lr_scale attention_lr_scale",
        "one learning rate serves all parameters; optimizer.default_learning_rate_scale scales it",
    ),
    f"{_TRANSFORMER}.attention_softmax_scale_power": "attention is scaled by kv_channels^-0.5, as in every Llama;"
    " leave it out",
    **_all(
        _TRANSFORMER,
        "window_size max_window_layers",
        "a Llama's attention has no window; shorten batch.sequence_length to save work",
    ),
    **_all(
        _TRANSFORMER,
        "attention_dropout hidden_dropout",
        "Llamas are trained without dropout; use optimizer.weight_decay",
    ),
    f"{_TRANSFORMER}.full_precision_residual": "the residual stream has model.distributed.training_dtype; fp32 is more"
    " precise",
    f"{_TRANSFORMER}.use_rotary_embeddings": "Llamas always have them; choose transformer.rotary.type",
    f"{_TRANSFORMER}.rotary_embedding_scale": "give transformer.rotary.theta = exp(-rotary_embedding_scale)",
    f"{_TRANSFORMER}.triton_rotary": "rotary embedding is PyTorch's; leave it out",
    **_all(_TRANSFORMER, "debug_transformer debug_transformer_memory random_bias_init", _DEBUGGING),
    **_all(
        f"{_TRANSFORMER}.normalization",
        "zero_centered zero_centered_normalization initialization_range layer_norm_init_range",
        "Llama's norms are weighted by 1 at the start; leave it out",
    ),
    **_all(
        f"{_TRANSFORMER}.normalization",
        "implementation normalization_implementation",
        "the fastest kernel at hand is taken; leave it out",
    ),
    f"{_TRANSFORMER}.rotary.triton": "the layout is Hugging Face's half-split one; leave it out",
    **_all(
        f"{_TRANSFORMER}.rotary",
        "attention_factor beta_fast beta_slow",
        "belongs to YaRN, which no Llama up to 3.2 uses; use type: llama3",
    ),
    **_all(
        "model.multi_stage",
        "num_grad_buffers num_weight_buffers pipeline_delay",
        "FSDP2 manages its buffers block by block; choose zero_stage",
    ),
    "model.multi_stage.stages_per_pipeline_stage": "stages follow from layers_per_stage; leave it out",
    "model.multi_stage.full_precision_gradients": "gradients are always reduced and summed in fp32; leave it out",
    **_all(
        "model.multi_stage",
        "debug_layer_outputs debug_layer_gradients debug_param_init debug_param_gradients debug_all_param_gradients"
        " debug_param_update debug_global_tensors debug_activation_memory debug_tensor_parallel",
        _DEBUGGING,
    ),
    **_all(
        "model.distributed",
        "world_size rank local_world_size",
        "torchrun tells each process its place; start with `torchrun --nproc_per_node N --no-python fast-llm …`",
    ),
    "model.distributed.pipeline_first": "neighbours are tensor, then context, then data, then pipeline; leave it out",
    **_all(
        "model.distributed",
        "dp_seed_shift pp_seed_shift pp_gen_init_seed_shift tp_seed_shift tp_gen_init_seed_shift sample_seed_shift"
        " train_seed_shift valid_seed_shift test_seed_shift pp_gen_seed_shift tp_gen_seed_shift",
        "all randomness follows from model.distributed.seed; leave it out",
    ),
    "run.structured_logs": "logs always go to runs/<k>/logs and metrics to metrics.jsonl; leave it out",
    "run.enable_all_loggers": "the log holds this project's messages; leave it out",
    "run.tensor_logs": "tensors are not logged; look at metrics.jsonl, or use a debugger",
    "run.triton_linear_kernels": "matrix products are PyTorch's; leave it out",
    "schedule": "PyTorch schedules the work of a step; leave the section out",
    "schedule.pipeline_overlap": "stages send while they compute; choose model.multi_stage.pipeline_schedule",
    "schedule.data_overlap": "PyTorch overlaps communication and computation by itself; leave it out",
    "schedule.data_batch_warn_time_ms": "use data.data_sample_warn_time_ms",
    **_all(
        "schedule",
        "throttle_cpu throttle_cpu_rate throttle_cpu_delay",
        "the CPU runs ahead of the device by itself; leave it out",
    ),
    **_all("schedule", "debug_schedule debug_send_recv", _DEBUGGING),
    "schedule.profile_schedule": "set training.profiling.interval, and look at the traces",
    "schedule.estimate_critical_batch": "was never done; leave it out",
    "schedule.skip_step": "to measure the loss without updates set training.train_iters: 0 and training.validation",
    "profiling": "use training.profiling: every training.profiling.interval steps one is profiled",
    **_all(
        "profiling",
        "cpu cuda",
        "set training.profiling.interval: the CPU is profiled, and the GPU if there is one",
    ),
    "profiling.skip": "use training.profiling.offset, the first step that is profiled",
    **_all(
        "profiling",
        "wait warmup cycles",
        "one step is profiled every training.profiling.interval, counted from training.profiling.offset",
    ),
    "profiling.ranks": "use training.profiling.ranks",
    **_all(
        "profiling",
        "averages trace table_width log export",
        "set training.profiling.interval: a table and a trace are written to profile/ in run.experiment_dir",
    ),
}
