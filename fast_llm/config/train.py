"""The configuration of `train`: the YAML file, section for section, in its order.

The text under a setting is its documentation (docs/settings.md is made from it). What users of Fast-LLM 0.2
may have in their files and this project does not do is refused by name, in REFUSED at the end.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fast_llm.config.section import Interval, Section

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

_DTYPES = {
    spelling: name
    for name, spellings in {
        "fp32": ("fp32", "float32", "float"),
        "bf16": ("bf16", "bfloat16"),
        "fp16": ("fp16", "float16", "half"),
    }.items()
    for spelling in spellings
}


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


DType = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_dtype)]


class LogsConfig(Interval):
    """When metrics are written."""

    interval: int | None = Field(default=100, gt=0)
    """Every so many steps a line in the log and a record in metrics.jsonl; null is never."""


class ValidationConfig(Interval):
    """When and on how much the validation loss is measured: before the first step, every `interval` steps and
    at the end, always on the same sequences, so that the losses can be compared."""

    iterations: int | None = Field(default=None, gt=0)
    """Batches (of `batch.batch_size` sequences) that one validation measures."""


class CallbackConfig(Section):
    """A program that is started after something was saved, on the first process, and not waited for."""

    script: str | list[str] | None = None
    """The command: a line as for a shell, or a list of words. FAST_LLM_SAVED in its environment is the folder
    that was written."""
    environment: dict[str, str] = {}
    """Further environment variables of it. Secrets do not belong here: they would be written into config.yaml
    and checkpoints; set them where training is started, the program inherits them."""

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        words = ("token", "key", "secret", "password", "credential")
        for name in value:
            if any(word in name.lower() for word in words):
                raise ValueError(
                    f"{name} looks like a secret, which would be written into config.yaml; set it in the environment that training is started in"
                )
        return value


class SavedConfig(Interval):
    """When something is saved and how much of it is kept."""

    keep_every: int | None = Field(default=None, gt=0)
    """Every so many of them is permanent and not counted in `keep`: those whose step is a multiple of
    `keep_every` × `interval`, counted from `offset`. (Fast-LLM 0.2 was off by one here.)"""
    callback: CallbackConfig = CallbackConfig()

    def is_permanent(self, step: int) -> bool:
        """Whether what is saved after this step is never deleted."""
        if self.keep_every is None or self.interval is None:
            return False
        return (step - self.offset) % (self.keep_every * self.interval) == 0


class CheckpointConfig(SavedConfig):
    """Training state, from which the same command goes on: fp32 weights and both moments, 12 bytes a weight."""

    keep: int | None = Field(default=5, gt=0)
    """The newest so many are kept; null is all."""


class ExportConfig(SavedConfig):
    """Hugging Face folders: weights, configuration and tokenizer, in `export/<format>/<step>/`."""

    keep: int | None = Field(default=None, gt=0)
    """The newest so many are kept; null is all."""
    format: Literal["llama"] = "llama"
    """The kind of model folder. (Fast-LLM 0.2's default was a format of its own.)"""
    model_weights: Literal[True] = True
    """Exports hold weights."""
    optimizer_state: Literal[False] | None = None
    """Exports hold no optimizer state; checkpoints do."""
    parameters_per_file: int = Field(default=2**32, ge=2**20)
    """The most parameters in one safetensors file."""
    data_type: DType | None = None
    """The dtype of exported weights; null is `model.distributed.training_dtype`. (Fast-LLM 0.2 exported fp32.)"""


class ShutdownConfig(Interval):
    """Stop, to be queued again: the process ends with exit code 0 after a checkpoint, and the same command goes on."""


class AlertConfig(Interval):
    """Messages through Weights & Biases."""

    status_updates: bool | None = None
    """Also when the run starts, ends or fails; null is: if `interval` is set."""


class WandbConfig(Section):
    """Weights & Biases, on as soon as this section stands in the file. (In Fast-LLM 0.2 it stayed silent without an
    entity.)"""

    entity_name: str | None = None
    """User or team; null is your default one."""
    project_name: str = "fast_llm"
    group_name: str = "default"
    alert: AlertConfig = AlertConfig()


class TrainingConfig(Section):
    """How long, and what happens on the way."""

    train_iters: Count = 0
    """Steps in all. 0 only measures the validation loss and exports, if these are asked for."""
    test_iters: Count = 0
    """Batches whose loss is measured on the test split after the last step; 0 is none."""
    num_workers: Count = 2
    """Threads that make batches ahead of the step; 0 makes them in between."""
    prefetch_factor: int | None = Field(default=None, gt=0)
    """Steps' batches that each of these keeps ready; null is 2."""
    timeout: PositiveFloat | None = 3600
    """Seconds that processes wait for one another while one saves, exports or reads weights; null is a week."""
    logs: LogsConfig = LogsConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to `<experiment_dir>/tensorboard`."""
    wandb: WandbConfig | None = None


class BatchConfig(Section):
    """How many sequences a step takes, and how they are dealt. What is left out follows from the rest."""

    micro_batch_size: Positive | None = None
    """Sequences in one forward and backward pass of a process."""
    batch_size: Positive | None = None
    """Sequences in one step, over all processes and micro-batches."""
    depth_first_micro_batches: Positive | None = None
    """Micro-batches of a process one after the other (gradient accumulation)."""
    breadth_first_micro_batches: Literal[1] | None = None
    """Only 1: more of them need pipeline parallelism."""
    sequential_micro_batches: Positive | None = None
    """Micro-batches of a process in all: the product of the two above."""
    sequence_length: Positive = 2048
    """Tokens of a sequence."""
    cross_document_attention: bool = False
    """Whether tokens see documents before theirs in the same sequence, as in Fast-LLM 0.2. By default documents
    are kept apart, as when Llama 3.1 was pretrained: no attention, positions that start again, and no
    prediction of a document's first token from the one before it."""


class TokenizerConfig(Section):
    """The tokenizer of data without one of its own."""

    path: str | None = None
    """Folder or tokenizer.json with which the data was made; it is compared with the model's."""


class DataConfig(Section):
    """Where the tokens come from."""

    format: Literal["file", "list", "random"] = "list"
    """`file`: the dataset.json that `prepare` writes. `list`: token files' prefixes or dataset.json files, one or in
    turn with weights (`[0.9, code/dataset.json, 0.1, prose/dataset.json]`). `random`: random tokens, to try things."""
    path: Annotated[list[Any], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    """One path, or what `format: list` says; relative to the working directory."""
    split: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1, max_length=3)] = [969, 30, 1]
    """Shares of the documents for training, validation and test, in each shard from front to back."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_sets: dict[str, str] = {}
    """Further datasets whose loss is measured at every validation: name → dataset.json or prefix. With the
    old domain among them one sees what is forgotten. The loss is logged as `<name>_loss`."""
    data_sample_warn_time_ms: PositiveFloat = 1000
    """Warn when making one step's batches takes longer, in milliseconds."""

    @field_validator("split")
    @classmethod
    def _some_share(cls, value: list[float]) -> list[float]:
        if sum(value) <= 0:
            raise ValueError(f"given {value}, at least one share must be above 0")
        return value + [0.0] * (3 - len(value))

    @field_validator("validation_sets")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.isidentifier() or name in ("training", "validation", "test", "language_model"):
                raise ValueError(f"{name} can not name a set; use letters, digits and _")
        return value

    @model_validator(mode="after")
    def _path_fits_format(self) -> "DataConfig":
        count = len(self.path)
        if self.format == "file" and (count != 1 or not isinstance(self.path[0], str)):
            raise ValueError(f"format: file needs one path, the dataset.json of `fast-llm prepare`; given {count}")
        if self.format == "random" and count:
            raise ValueError("format: random reads no path; leave data.path out")
        if self.format == "list":
            if count == 0 or (count == 1 and isinstance(self.path[0], str)):
                return self  # no path at all is explained where it is needed
            weights, prefixes = self.path[::2], self.path[1::2]
            right = count and count % 2 == 0 and all(isinstance(prefix, str) for prefix in prefixes)
            if not right or not all(isinstance(w, int | float) and not isinstance(w, bool) and w > 0 for w in weights):
                raise ValueError("format: list needs one path, or weights above 0 and paths in turn: [0.9, a, 0.1, b]")
            if len(set(prefixes)) != len(prefixes):
                raise ValueError("format: list names a path twice; add up its weights")
        return self


class LearningRateConfig(Section):
    """The learning rate: a linear warmup from 0, then a decay."""

    base: Annotated[float, Field(ge=0)] = 1e-4
    """The highest."""
    minimum: Annotated[float, Field(ge=0)] = 0.0
    """The one at the end of the decay and after it."""
    decay_style: Literal["constant", "linear", "power", "cosine"] = "constant"
    decay_iterations: Positive | None = None
    """The step at which the decay ends, counted from the start of training: it includes the warmup."""
    decay_power: PositiveFloat = 1.0
    """Exponent of the share of the decay that is done."""
    warmup_iterations: Count = 0
    """Steps of the warmup."""


class GradientScalerConfig(Section):
    """The factor against underflow of fp16 gradients."""

    constant: PositiveFloat | None = None
    """A fixed factor, with any dtype; null is a dynamic one for fp16 and none otherwise."""
    initial: PositiveFloat = 65536
    minimum: PositiveFloat = 1.0
    window: Positive = 1000
    """Clean steps before it doubles."""
    hysteresis: Positive = 2
    """Overflows that are put up with before it halves."""


class OptimizerConfig(Section):
    """AdamW. Norms and biases do not decay; every matrix does, embeddings and head included."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta_1: Share = 0.9
    beta_2: Share = 0.999
    epsilon: PositiveFloat = 1e-8
    gradient_norm_clipping: PositiveFloat | None = 1.0
    """The largest L2 norm of all gradients together; null is no clipping."""
    default_learning_rate_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the learning rate."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    gradient_scaler: GradientScalerConfig = GradientScalerConfig()
    moments_dtype: Annotated[Literal["fp32", "bf16"], BeforeValidator(_dtype)] = "fp32"
    """The dtype of both moments. bf16 saves 4 bytes a weight."""
    max_nonfinite_steps: Positive = 5
    """Steps in a row with infinite or NaN gradients after which training stops. Such steps never touch the weights."""


class NormalizationConfig(Section):
    """RMSNorm."""

    type: Literal["rms_norm"] = "rms_norm"
    """Llama's. (Fast-LLM 0.2's default was layer_norm.)"""
    epsilon: PositiveFloat = 1e-5


class RotaryConfig(Section):
    """Rotary position embedding."""

    type: Literal["default", "llama3"] = "default"
    """`llama3` stretches low frequencies as Llama 3.1 does. (Fast-LLM 0.2's default was none.)"""
    theta: PositiveFloat = 10000
    scale_factor: PositiveFloat = 8.0
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_context_length: Positive = 8192


def _biases(value: Any) -> Any:
    return {True: "everywhere", False: "nowhere"}.get(value, value) if isinstance(value, bool) else value


Std = Annotated[float, Field(ge=0)] | None


class TransformerConfig(Section):
    """The blocks. With `pretrained.path` their shape comes from the model's config.json."""

    num_layers: Count = 12
    hidden_size: Positive = 1024
    num_attention_heads: Positive = 8
    head_groups: Positive = 1
    """Heads of keys and values, each shared by a group of query heads."""
    kv_channels: Positive = Field(
        default_factory=lambda data: max(1, data.get("hidden_size", 1) // data.get("num_attention_heads", 1))
    )
    """Dimensions of a head; by default hidden_size / num_attention_heads."""
    ffn_hidden_size: Positive = Field(default_factory=lambda data: 4 * data.get("hidden_size", 1))
    """Inner size of the MLP; by default 4 × hidden_size."""
    gated: Literal[True] = True
    """Llama's MLP has a gate. (Fast-LLM 0.2's default was none.)"""
    activation_type: Literal["silu"] = "silu"
    add_linear_biases: Annotated[
        Literal["nowhere", "everywhere", "only_attention", "only_mlp"], BeforeValidator(_biases)
    ] = "nowhere"
    """Which linear layers have biases; yes and no are everywhere and nowhere. (Fast-LLM 0.2's default was yes.)"""
    normalization: NormalizationConfig = NormalizationConfig()
    rotary: RotaryConfig = RotaryConfig()
    use_flash_attention: bool = True
    """Attention that never holds a document's scores, through PyTorch's kernels, in every dtype; no computes with plain
    matrix products."""
    mlp_recompute_level: Literal["none", "activation", "activation_and_input", "full"] = "none"
    """What the backward pass of an MLP computes again instead of keeping: its activation, also its normalised
    input, or all of it."""
    init_method_std: Std = None
    """Standard deviation of random matrices; null is hidden_size^-0.5."""
    init_method_min: float | None = None
    """Random matrices are clamped to this from below."""
    init_method_max: float | None = None
    """And to this from above."""
    init_method_std_qkv: Std = None
    """Of the projections to queries, keys and values; null is init_method_std."""
    init_method_min_qkv: float | None = None
    init_method_max_qkv: float | None = None
    init_method_std_attn_proj: Std = None
    """Of attention's output projection; null is init_method_std / √(2 num_layers)."""
    init_method_min_attn_proj: float | None = None
    init_method_max_attn_proj: float | None = None
    init_method_std_mlp_1: Std = None
    """Of gate and up projections; null is init_method_std."""
    init_method_min_mlp_1: float | None = None
    init_method_max_mlp_1: float | None = None
    init_method_std_mlp_2: Std = None
    """Of the down projection; null is init_method_std / √(2 num_layers)."""
    init_method_min_mlp_2: float | None = None
    init_method_max_mlp_2: float | None = None


class BaseModelConfig(Section):
    """The model. With `pretrained.path` its shape comes from there."""

    vocab_size: Positive = 49152
    max_position_embeddings: Positive = 2048
    """The context length that an export's config.json states; training does not use it."""
    tie_word_embeddings: bool = True
    transformer: TransformerConfig = TransformerConfig()
    cross_entropy_impl: Literal["auto", "torch", "fused", "triton"] = "auto"
    """`fused`: the logits of a few tokens at a time, never all of them; `triton`: as fused, with a GPU kernel;
    `torch`: all logits at once; `auto`: triton where it runs, else fused."""
    cross_entropy_splits: Positive | None = None
    """Into how many stretches fused and triton cut a micro-batch's tokens; null is by size."""
    init_method_std_embed: Std = None
    """Of embedding and head; null is transformer.init_method_std."""
    init_method_min_embed: float | None = None
    init_method_max_embed: float | None = None


class MultiStageConfig(Section):
    """How training state is spread over processes."""

    zero_stage: Literal[1, 2, 3] | None = None
    """What is sharded over processes: always optimizer state, fp32 weights and reduced gradients; from 2 on also
    full gradients, with 3 also the weights that are computed with. null is 1. One process shards nothing."""
    compile_all: bool = False
    """Compile each block with torch.compile."""


class DistributedConfig(Section):
    """Number formats and processes."""

    training_dtype: DType = "fp32"
    """The dtype that is computed in. Weights, gradients and their sums are kept in fp32 besides."""
    optimization_dtype: Annotated[Literal["fp32"], BeforeValidator(_dtype)] = "fp32"
    """The optimizer works in fp32."""
    tensor_parallel: Literal[1] = 1
    """Only 1: spread training state with zero_stage 3 instead."""
    pipeline_parallel: Literal[1] = 1
    """Only 1: spread training state with zero_stage 3 instead."""
    sequence_data_parallel: Literal[1] = 1
    """Only 1: use a smaller micro_batch_size and mlp_recompute_level for long sequences."""
    timeout: PositiveFloat = 60
    """Seconds a process waits for the others within a step. Saves, exports and reading weights have
    training.timeout."""
    seed: Count = 1234
    """Of random weights and the order of the data."""
    reproducible_init: Literal[True] = True
    """Random weights are the same whatever the number of processes."""


class ModelConfig(Section):
    """The model and how it is computed."""

    base_model: BaseModelConfig = BaseModelConfig()
    multi_stage: MultiStageConfig = MultiStageConfig()
    distributed: DistributedConfig = DistributedConfig()


class PretrainedConfig(Section):
    """The model to start from."""

    path: str | None = None
    """A folder, or a model on the Hugging Face Hub (`meta-llama/Llama-3.1-8B`)."""
    format: Literal["llama", "distributed"] = "llama"
    """`llama`: a Hugging Face folder. `distributed`: a checkpoint of this project."""
    model_weights: bool = True
    """Whether to start from its weights; no takes its shape alone and starts from random ones."""
    optimizer_state: bool = False
    """Whether to start from its moments too; only a checkpoint has them."""
    load_config: Literal["architecture"] = "architecture"
    """The model's shape comes from its configuration, everything else from this file."""


class RunConfig(Section):
    """Where the run is written to."""

    experiment_dir: str | None = None
    """The folder for checkpoints, exports, logs and metrics; null writes nothing."""
    experiment_name: str | None = None
    """The name in Weights & Biases; null is the folder's."""
    log_timestamps: bool = True
    torch_dynamo_enable: bool = True
    """No forbids torch.compile everywhere."""
    enable_triton_kernels: bool = True
    """No forbids Triton kernels of this project."""
    accept_changes: list[str] = []
    """Settings that may differ from those of the checkpoint although they change what is trained (as
    `data.path`, `batch.batch_size`, `model.distributed.seed`)."""


class TrainConfig(Section):
    """The whole file."""

    training: TrainingConfig = TrainingConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pretrained: PretrainedConfig = PretrainedConfig()
    model: ModelConfig = ModelConfig()
    run: RunConfig = RunConfig()


# Spellings of before, and where their values go.
RENAMED = {
    "pretrained.load_weights": "pretrained.model_weights",
    "pretrained.load_optimizer": "pretrained.optimizer_state",
    "model.base_model.transformer.normalization.normalization_type": "model.base_model.transformer.normalization.type",
    "model.base_model.transformer.normalization.layer_norm_eps": "model.base_model.transformer.normalization.epsilon",
    "model.distributed.distributed_timeout": "model.distributed.timeout",
}


def _all(section: str, names: str, sentence: str) -> dict[str, str]:
    return {f"{section}.{name}": sentence for name in names.split()}


_BASE, _TRANSFORMER = "model.base_model", "model.base_model.transformer"
_ONLY_LLAMA = "the models here are Llamas, which have none; leave it out"

# What is not done here, and what to use instead.
REFUSED: dict[str, str] = {
    **_all(
        "schedule",
        "pipeline_overlap data_overlap data_batch_warn_time_ms throttle_cpu throttle_cpu_rate throttle_cpu_delay"
        " debug_schedule debug_send_recv profile_schedule estimate_critical_batch skip_step",
        "steps are scheduled by PyTorch; leave it out (data.data_sample_warn_time_ms warns of slow data)",
    ),
    **_all(
        "profiling",
        "cpu cuda skip wait warmup cycles averages trace table_width ranks log export",
        "run a few steps under torch.profiler instead, or nsys on a GPU",
    ),
    "batch.micro_sequence_length": "sequences are computed whole; use mlp_recompute_level or a smaller micro_batch_size to save memory",
    "batch.num_micro_sequences": "sequences are computed whole; leave it out",
    "data.fim": "fill-in-the-middle is not done while training; write it into the documents before `fast-llm prepare`",
    "data.datasets": "describe the data with data.format and data.path (and data.validation_sets)",
    "data.sampling": "the order of the data follows from model.distributed.seed; leave it out",
    "data.use_loss_masking_spans": "every token of a document is a target; leave it out",
    "data.multiprocessing_context": "batches are made by threads (training.num_workers); leave it out",
    "data.tokenizer.format": "tokenizers are Hugging Face's tokenizer.json; leave it out",
    "optimizer.learning_rate.schedule": "use decay_style, decay_iterations, warmup_iterations and minimum",
    "pretrained.timeout": "use training.timeout",
    **_all(
        _BASE,
        "use_position_embeddings use_absolute_position_embeddings",
        "positions are rotary (transformer.rotary); leave it out",
    ),
    f"{_BASE}.parallel_embeddings": "embeddings are spread with multi_stage.zero_stage; leave it out",
    f"{_BASE}.sequence_first": "activations are laid out batch first; leave it out",
    f"{_BASE}.logit_z_loss": "the loss is the cross entropy alone; leave it out",
    f"{_BASE}.logits_scale_factor": "the loss is the cross entropy of the unscaled logits; leave it out",
    f"{_BASE}.use_megatron_initialization": "random weights follow init_method_std; leave it out",
    **_all(
        _TRANSFORMER,
        "num_experts num_shared_experts num_experts_per_token expert_routing_type expert_auxiliary_loss_coefficient"
        " expert_z_loss_coefficient moe_jitter_eps dropless_moe dropless_dynamic_shape router_lr_scale",
        "the models here are dense; leave it out",
    ),
    **_all(
        _TRANSFORMER,
        "mlp_lr_scale attention_lr_scale",
        "one learning rate serves all parameters (optimizer.default_learning_rate_scale scales it)",
    ),
    f"{_TRANSFORMER}.attention_softmax_scale_power": "attention is scaled by kv_channels^-0.5, as in every Llama; leave it out",
    **_all(_TRANSFORMER, "window_size max_window_layers attention_dropout hidden_dropout", _ONLY_LLAMA),
    f"{_TRANSFORMER}.full_precision_residual": "the residual stream has training_dtype; train in fp32 for more",
    f"{_TRANSFORMER}.use_rotary_embeddings": "Llamas always have them; choose transformer.rotary.type",
    f"{_TRANSFORMER}.rotary_embedding_scale": "give transformer.rotary.theta = exp(-rotary_embedding_scale)",
    f"{_TRANSFORMER}.triton_rotary": "rotary embedding is PyTorch's; leave it out",
    **_all(
        _TRANSFORMER,
        "debug_transformer debug_transformer_memory random_bias_init",
        "a debugging aid of Fast-LLM 0.2; use a debugger or torch.profiler",
    ),
    **_all(
        f"{_TRANSFORMER}.normalization",
        "zero_centered zero_centered_normalization initialization_range",
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
        "belongs to YaRN, which no Llama up to 3.2 uses; use type llama3",
    ),
    **_all(
        "model.multi_stage",
        "num_grad_buffers num_weight_buffers layers_per_stage stages_per_pipeline_stage pipeline_delay",
        "FSDP2 manages its buffers block by block; choose zero_stage",
    ),
    "model.multi_stage.full_precision_gradients": "gradients are always reduced and summed in fp32; leave it out",
    **_all(
        "model.multi_stage",
        "debug_layer_outputs debug_layer_gradients debug_param_init debug_param_gradients debug_all_param_gradients"
        " debug_param_update debug_global_tensors debug_activation_memory debug_tensor_parallel",
        "a debugging aid of Fast-LLM 0.2; use a debugger or torch.profiler",
    ),
    **_all(
        "model.distributed",
        "world_size rank local_world_size",
        "torchrun tells each process its place; start with `torchrun --nproc_per_node N --no-python fast-llm …`",
    ),
    "model.distributed.sequence_tensor_parallel": "there is no tensor parallelism yet; use zero_stage 3",
    "model.distributed.pipeline_first": "there is no pipeline parallelism yet; use zero_stage 3",
    **_all(
        "model.distributed",
        "dp_seed_shift pp_seed_shift pp_gen_init_seed_shift tp_seed_shift tp_gen_init_seed_shift sample_seed_shift"
        " train_seed_shift valid_seed_shift test_seed_shift pp_gen_seed_shift tp_gen_seed_shift",
        "all randomness follows from model.distributed.seed; leave it out",
    ),
    "run.structured_logs": "logs always go to runs/<k>/logs and metrics to metrics.jsonl; leave it out",
    "run.enable_all_loggers": "set the level of other loggers in Python's own way; leave it out",
    "run.tensor_logs": "tensors are not logged; look at metrics.jsonl",
    "run.triton_linear_kernels": "matrix products are cuBLAS'; leave it out",
}
