"""The YAML file of `fast-llm train`, section by section, in its order; the sections `model` and
`pretrained` are in model.py.

The text under a setting is its documentation: the command's help shows it, and
`python -m fast_llm.config.reference > docs/settings.md` writes it to the page of settings. Sections
derived from `Interval` (section.py) have `interval` and `offset`. Constraints across sections are
in checks.py; what Fast-LLM 0.2 had is in compat.py.
"""

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fast_llm.config.compat import EXPORT_FORMATS
from fast_llm.config.disabled import without_disabled
from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.model import ModelConfig, PretrainedConfig
from fast_llm.config.section import Interval, Section
from fast_llm.config.types import (
    Count,
    DType,
    Fraction,
    NonNegativeFloat,
    ParametersPerFile,
    PathText,
    Positive,
    PositiveFloat,
    Seconds,
    Shares,
    Text,
    WeightedPaths,
    Workers,
    no_fp64,
    path_text,
    short_dtype,
)


class LogsConfig(Interval):
    """When training metrics are logged."""

    interval: Positive | None = 100
    """Log one line and write one record to metrics.jsonl every this many steps. null turns it
    off."""


class ValidationConfig(Interval):
    """When the validation loss is measured: before the first step, every `interval` steps, and
    after the last step. The same sequences are used each time, so the losses can be compared.
    """

    iterations: Positive | None = None
    """Number of batches (of `batch.batch_size` sequences) that one validation measures. Required
    with `interval`."""


class CallbackConfig(Section):
    """A program that the first process starts after each checkpoint or export. Training does not
    wait for it.
    """

    script: Annotated[str | list[str], Allowed("a command, or a list of its words")] | None = None
    """The command, as a line for a shell or as a list of words. The environment variable
    FAST_LLM_SAVED holds the folder that was written. null starts nothing."""
    environment: dict[str, str] = {}
    """Further environment variables for the command. They are written to config.yaml and to
    checkpoints, so do not put secrets here: set those where training is started; the command
    inherits them."""

    @field_validator("script")
    @classmethod
    def _begins_with_a_program(cls, value: str | list[str] | None) -> str | list[str] | None:
        try:
            words = shlex.split(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(
                f"given {value}, which is not a valid command line: {str(error).lower()}"
            ) from error
        if words is not None and not (words and words[0]):
            raise ValueError("given no words, must begin with a program; leave it out for none")
        return value

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{name} cannot be the name of an environment variable; use letters, digits and"
                    " _"
                )
            if re.search("token|key|secret|password|credential", name, re.IGNORECASE):
                raise ValueError(
                    f"{name} looks like a secret, which would be written to config.yaml; set it in"
                    " the environment that training is started in"
                )
        return value


class SavedConfig(Interval):
    """When checkpoints or exports are written, and how many are kept."""

    keep_every: Positive | None = None
    """Keep one in this many saved folders permanently, in addition to `keep`: those of steps that
    are multiples of `keep_every` × `interval`, counted from `offset`. With `interval: 1000` and
    `keep_every: 10` these are the steps 10000, 20000, …"""
    callback: CallbackConfig = CallbackConfig()

    def is_permanent(self, step: int) -> bool:
        """Whether what is saved after this step is never deleted."""
        if self.keep_every is None or self.interval is None:
            return False
        return (step - self.offset) % (self.keep_every * self.interval) == 0


class CheckpointConfig(SavedConfig):
    """Checkpoints, from which the same command resumes: fp32 weights and both moments (12 bytes a
    parameter; 8 with bf16 or int8 moments, as int8 is stored as bf16), counters, settings and what
    identifies the data. With `interval` set, one is also saved after the last step. When a signal
    stops training and `run.experiment_dir` is set, one is saved even without `interval`.
    """

    keep: Positive | None = 5
    """Number of newest checkpoints to keep. null keeps all."""
    background: bool = True
    """Write checkpoints in the background while training continues. This copies a checkpoint's
    tensors to host memory, once for each group of `model.multi_stage.shard_size` processes. If the
    memory is too small, training waits instead."""


class ExportConfig(SavedConfig):
    """Exports: Hugging Face folders with weights, configuration and tokenizer, in
    `export/<format>/<step>/`. With `interval` set, one is also written after the last step.
    """

    keep: Positive | None = None
    """Number of newest exports to keep. null keeps all."""
    format: Annotated[
        Literal["llama"],
        unsupported(EXPORT_FORMATS),
    ] = "llama"
    """Format of the folder: `llama`, as transformers reads it."""
    model_weights: Annotated[
        bool, unsupported({False: "exports always hold weights; to write none set interval: null"})
    ] = True
    """Only yes is allowed: exports always hold weights."""
    optimizer_state: (
        Annotated[
            bool,
            unsupported({True: "a Hugging Face folder holds no optimizer state; checkpoints do"}),
        ]
        | None
    ) = None
    """Only no is allowed: a Hugging Face folder holds no optimizer state."""
    parameters_per_file: ParametersPerFile = 2**32
    """Maximum number of parameters in one safetensors file."""
    data_type: DType | None = None
    """Dtype of the exported weights. null means `model.distributed.training_dtype`."""


class ShutdownConfig(Interval):
    """Stop after every `interval` steps, for queues with a time limit. The process saves a
    checkpoint and exits with code 0; the same command resumes.
    """


class DoubleCheckConfig(Interval):
    """Checks for silent data corruption: chips or memory that compute or store wrong values without
    an error. Every `interval` steps, before the update, the loss of one micro-batch is computed
    again, and tensors that several processes hold are compared bit for bit. A difference is
    reported with rank, host and tensor, and training stops with exit code 1. A check costs one
    forward pass of a micro-batch (of all micro-batches with pipeline parallelism).
    """


class ProfilingConfig(Interval):
    """Profile single steps with PyTorch's profiler. Each writes a table of the time by part and by
    operation, and a trace for Perfetto, to `<experiment_dir>/profile`. The step trains as usual;
    the speed metrics count it as an average step.
    """

    ranks: Annotated[
        list[Count], Field(min_length=1), Allowed("a list of one or more ranks, each 0 or more")
    ] = [0]
    """Ranks of the processes that write a profile."""


class SpikesConfig(Section):
    """What to do about spikes: steps whose loss or gradient norm is far above those of the previous
    steps. With y the values of the last `window` steps and m their median, a spike is a value above
    m + `threshold` × max(1.4826 × median |y - m|, 0.01 × |m|). The update of such a step is not
    applied. `optimizer.max_nonfinite_steps` handles infinite and NaN gradients.
    """

    policy: Annotated[
        Literal["none", "skip", "rewind", "stop"],
        unsupported({False: "to ignore spikes, set policy: none"}),
    ] = "none"
    """`none`: do not look for spikes. `skip`: drop this update; the batch is not trained again.
    `rewind`: go back to the newest checkpoint and continue with the data after the spike. `stop`:
    end training with exit code 1."""
    window: Annotated[int, Field(ge=4, le=10_000), Allowed("an integer from 4 to 10000")] = 128
    """Number of previous steps to compare with. No spike is detected before there are as many."""
    threshold: PositiveFloat = 6.0
    """Number of (robust) standard deviations above the median at which a spike begins."""
    max_rewinds: Positive = 5
    """Number of rewinds after which training stops."""


class AlertConfig(Interval):
    """When losses are posted as Weights & Biases alerts."""

    status_updates: bool | None = None
    """Also post an alert when the run starts, ends or fails. null means yes if `interval` is
    set."""


class WandbConfig(Section):
    """Weights & Biases. Giving any of these settings turns it on; `training.wandb: null` turns it
    off. Without a login or a network, the run is recorded offline.
    """

    entity_name: Text | None = None
    """User or team. null means your default entity."""
    project_name: Text = "fast_llm"
    """Project of the run."""
    group_name: Text = "default"
    """Group of the run."""
    alert: AlertConfig = AlertConfig()


class TrainingConfig(Section):
    """How long to train, and what else happens during training."""

    train_iters: Count = 0
    """Number of training steps. 0 only measures the validation loss and exports, if those are
    set."""
    test_iters: Count = 0
    """Number of batches of the test split whose loss is measured after the last step. 0 measures
    none."""
    num_workers: Workers = 2
    """Number of threads that prepare batches in advance. 0 prepares them between steps."""
    prefetch_factor: (
        Annotated[int, Field(ge=1, le=1024), Allowed("an integer from 1 to 1024")] | None
    ) = None
    """Number of steps whose batches each of these threads keeps ready. null means 2."""
    timeout: Seconds | None = 3600
    """Seconds that processes wait for each other during saves, exports and reading weights. Within
    a step they wait `model.distributed.timeout`. null means a week."""
    logs: LogsConfig = LogsConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    spikes: SpikesConfig = SpikesConfig()
    double_check: DoubleCheckConfig = DoubleCheckConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    tensorboard: bool = False
    """Also write metrics for TensorBoard, to `<experiment_dir>/tensorboard`."""
    wandb: Annotated[WandbConfig | None, BeforeValidator(lambda value: value or None)] = None


class BatchConfig(Section):
    """Number of sequences in a step, and how processes share them. Omitted settings are derived
    from the rest: batch_size = micro_batch_size × sequential_micro_batches × data-parallel
    processes, where the number of data-parallel processes is the number of processes /
    (tensor_parallel × pipeline_parallel × sequence_data_parallel). If a given batch_size does not
    divide, the derived numbers are rounded up and the missing rows are empty.
    """

    micro_batch_size: Annotated[
        Positive | Literal["auto"] | None, Allowed("an integer above 0, auto or null")
    ] = None
    """Sequences in one forward and backward pass of a process. null derives it from the rest, or
    means 1. `auto` chooses the fastest size that is predicted to fit in memory, if necessary with
    more recomputation than `mlp_recompute_level` asks for; it requires batch_size."""
    batch_size: Positive | None = None
    """Sequences in one step, over all processes and micro-batches. null derives it from the
    rest."""
    depth_first_micro_batches: Positive | None = None
    """Micro-batches that a process computes one after another (gradient accumulation). With
    pipeline parallelism: how often the pipeline is filled and drained in a step. null derives it
    from the rest."""
    breadth_first_micro_batches: Positive | None = None
    """Micro-batches that are in the pipeline at the same time; 1 without pipeline parallelism. null
    derives it from the rest: all micro-batches with pipeline parallelism."""
    sequential_micro_batches: Positive | None = None
    """Micro-batches of a process in a step: depth_first_micro_batches ×
    breadth_first_micro_batches. null derives it from the rest."""
    sequence_length: Positive = 2048
    """Tokens in a sequence."""
    micro_sequence_length: Positive | None = None
    """Only the value of sequence_length is allowed: sequences are not split into parts."""
    cross_document_attention: bool = False
    """Let tokens attend to earlier documents of their sequence, as Fast-LLM 0.2 does. By default
    documents are kept apart, as in the pretraining of Llama 3.1: attention stays within a document,
    positions start at 0 in each, and the first token of a document is not predicted from the
    previous document."""


class TokenizerConfig(Section):
    """The tokenizer for datasets that do not name one."""

    path: PathText | None = None
    """Folder or tokenizer.json of the tokenizer that the data was made with. It must equal the
    model's."""


class DataConfig(Section):
    """The training data."""

    format: Annotated[
        Literal["file", "list", "random"],
        unsupported({"sample": "use random, which also generates tokens"}),
    ] = "list"
    """`file`: a dataset.json written by `fast-llm prepare`. `list`: prefixes of token files or
    dataset.json files; either one, or alternately weights and paths (`[0.9, code/dataset.json, 0.1,
    prose/dataset.json]`). `random`: random tokens, to try things out."""
    path: WeightedPaths = []
    """One path, or a list as described at `format`. Paths are relative to the working directory."""
    split: Shares = [969, 30, 1]
    """Shares of the documents for training, validation and test. A share that is left out is 0. A
    hash of a document's number in the dataset decides its split. For data whose dataset.json has no
    `split`, the order in each token file decides, from front to back."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_sets: dict[str, PathText] = {}
    """Further datasets whose loss is measured at every validation: name → dataset.json or prefix.
    The loss is logged as `<name>_loss`. If a set is also trained on (recognized by content, at any
    path), only its validation share is used, otherwise all its documents. Add data of the old
    domain to see what the model forgets."""
    data_sample_warn_time_ms: PositiveFloat = 1000
    """Warn if preparing the batches of one step takes longer than this, in milliseconds."""

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
                    f"{name} cannot be the name of a set; use letters, digits and _, and none of"
                    f" {', '.join(taken)}"
                )
        return value


class LearningRateConfig(Section):
    """The learning rate: a linear warmup from 0, then a decay."""

    base: NonNegativeFloat = 1e-4
    """Peak learning rate."""
    minimum: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay and after it."""
    decay_style: Literal["constant", "linear", "power", "cosine"] = "constant"
    """How the rate falls from base to minimum, with c the fraction of the decay that is done.
    `constant`: not at all. `power`: by c^decay_power of the difference. `linear`: an alias of
    `power`. `cosine`: by ½ (1 - cos(π c^decay_power)) of it."""
    decay_iterations: Positive | None = None
    """Step at which the decay ends, counted from the start of training, so it includes the warmup.
    Required unless decay_style is constant."""
    decay_power: PositiveFloat = 1.0
    """Exponent of the fraction of the decay that is done."""
    warmup_iterations: Count = 0
    """Steps of the warmup."""


class GradientScalerConfig(Section):
    """Loss scaling against underflow of fp16 gradients."""

    constant: PositiveFloat | None = None
    """A fixed loss scale, with any dtype. null means a dynamic scale for fp16 and none
    otherwise."""
    initial: PositiveFloat = 65536
    """Dynamic loss scale at the start."""
    minimum: PositiveFloat = 1.0
    """Lower limit of the dynamic loss scale."""
    window: Positive = 1000
    """Steps without overflow after which the dynamic loss scale doubles."""
    hysteresis: Positive = 2
    """Overflows after which the dynamic loss scale is halved."""


class OptimizerConfig(Section):
    """AdamW. Weight decay applies to all matrices, including embedding and head, but not to norms
    and biases.
    """

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay: each update subtracts learning rate × weight_decay × weight."""
    beta_1: Fraction = 0.9
    """Decay rate of the average of gradients (first moment)."""
    beta_2: Fraction = 0.999
    """Decay rate of the average of squared gradients (second moment)."""
    epsilon: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    gradient_norm_clipping: PositiveFloat | None = 1.0
    """Maximum L2 norm of all gradients together. null turns clipping off."""
    default_learning_rate_scale: NonNegativeFloat = 1.0
    """Factor on the learning rate."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    gradient_scaler: GradientScalerConfig = GradientScalerConfig()
    moments_dtype: Annotated[
        Literal["auto", "fp32", "bf16", "int8"],
        no_fp64,
        short_dtype,
        Allowed("auto, fp32, bf16 or int8 (float32, bfloat16)"),
    ] = "auto"
    """Dtype of both moments. `bf16` saves 4 bytes a parameter. `int8` saves 6, with one exponent
    per 128 adjacent values; meant for long sequences. `auto` is fp32, or bf16 on a GPU whose memory
    is too small, never int8; a resumed run with auto keeps its dtype. A run may resume with any
    other."""
    max_nonfinite_steps: Positive = 5
    """Consecutive steps with infinite or NaN loss or gradients after which training stops. With a
    dynamic loss scale, it stops only once the scale is at its minimum. Such steps never change the
    weights."""


class RunConfig(Section):
    """Where the run is written, and how it executes."""

    experiment_dir: PathText | None = None
    """Folder for checkpoints, exports, logs and metrics. null writes nothing."""
    experiment_name: Text | None = None
    """Name of the run in Weights & Biases. null means the name of the folder."""
    log_timestamps: bool = True
    """Begin each line of the log with the time."""
    torch_dynamo_enable: bool = True
    """Allow torch.compile. `no` disables it everywhere."""
    enable_triton_kernels: bool = True
    """Allow this project's Triton kernels."""
    accept_changes: list[Text] = []
    """Settings that may differ from those of the checkpoint although they change what is trained,
    for example `data.path`, `batch.batch_size`, `batch.sequence_length` or
    `model.distributed.seed`. Each data source continues from its own count."""


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
    def _drop_disabled(cls, values: Any) -> Any:
        return without_disabled(values)
