"""The YAML file of `fast-llm train`, section by section, in its order.

The sections `model` and `pretrained` are in model.py, `training.checkpoint` and `training.export`
in saving.py, `optimizer` in optimizer.py.

The text under a setting is its documentation: the command's help shows it, and
`python -m fast_llm.config.reference > docs/settings.md` writes it to the page of settings. Sections
derived from `Interval` (section.py) have `interval` and `offset`. Constraints across sections are
in checks.py; what Fast-LLM 0.2 had is in compat.py.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fast_llm.config.disabled import without_disabled
from fast_llm.config.evaluation import EvaluationConfig
from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.mixture import DataSource, DataStageConfig
from fast_llm.config.model import ModelConfig, PretrainedConfig
from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.saving import AverageConfig, CheckpointConfig, ExportConfig
from fast_llm.config.section import Interval, Section
from fast_llm.config.types import (
    Count,
    PathText,
    Positive,
    PositiveFloat,
    Probability,
    Seconds,
    Shares,
    Text,
    WeightedPaths,
    Workers,
    path_text,
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


class SamplesConfig(Interval):
    """Text that the model continues, for the report: before the first step, every `interval` steps,
    and after the last step. Each next token is the most likely one. Texts are written to
    metrics.jsonl. Each time takes `max_tokens` forward passes of all prompts together, without a
    cache of keys and values.
    """

    prompts: Annotated[list[Text], Field(max_length=16), Allowed("a list of at most 16 texts")] = []
    """Beginnings of texts."""
    max_tokens: Annotated[int, Field(ge=1, le=1024), Allowed("an integer from 1 to 1024")] = 48
    """Tokens that continue each prompt, unless the text ends before."""


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
    evaluations: dict[str, EvaluationConfig] = {}
    """Evaluations on intervals of their own: name → settings. For example `quick: {interval: 500,
    tasks: [arc_easy], limit: 500}`, or `old: {interval: 100, validation_sets: [prose],
    iterations: 25}`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    averages: dict[str, AverageConfig] = {}
    """Running averages of the weights: name → settings. For example `ema: {decay: 0.999}`, or
    `tail: {start: 90_000}`."""
    samples: SamplesConfig = SamplesConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    spikes: SpikesConfig = SpikesConfig()
    double_check: DoubleCheckConfig = DoubleCheckConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    slow_process_factor: Annotated[float, Field(gt=1.0), Allowed("a number above 1")] | None = None
    """Name the process for which all others wait, if it takes more than this factor of the median
    over processes. Before the first step, each times matmuls, exchanges with its neighbours and a
    write to the experiment folder. While training, each times matmuls and its wait for data in
    every step, compared with each record of metrics.jsonl. 1.2 is a good value for GPUs. null
    turns it off."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard, to `<experiment_dir>/tensorboard`."""
    wandb: Annotated[WandbConfig | None, BeforeValidator(lambda value: value or None)] = None

    @field_validator("evaluations")
    @classmethod
    def _names_of_evaluations(
        cls, value: dict[str, EvaluationConfig]
    ) -> dict[str, EvaluationConfig]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{name} cannot be the name of an evaluation; use letters, digits and _"
                )
        return value

    @field_validator("averages")
    @classmethod
    def _names(cls, value: dict[str, AverageConfig]) -> dict[str, AverageConfig]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{name} cannot be the name of an average; use letters, digits and _"
                )
        return value


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
    """Tokens in a sequence. Stages of `data.stages` may have others."""
    micro_sequence_length: Positive | None = None
    """Only the value of sequence_length is allowed: sequences are not split into parts."""
    cross_document_attention: bool = False
    """Let tokens attend to earlier documents of their sequence, as Fast-LLM 0.2 does. By default
    documents are kept apart, as in the pretraining of Llama 3.1: attention stays within a document,
    positions start at 0 in each, and the first token of a document is not predicted from the
    previous document."""

    def for_length(self, length: int) -> Self:
        """These settings with sequences of `length` tokens, and the same tokens in a step.

        `batch_size` is given and divides. A micro-batch keeps its tokens if they divide, and has at
        least one sequence; if it cannot keep them, the numbers of micro-batches follow.
        """
        assert self.batch_size is not None
        values: dict[str, Any] = {
            "batch_size": self.batch_size * self.sequence_length // length,
            "sequence_length": length,
            "micro_sequence_length": None,
        }
        if isinstance(self.micro_batch_size, int):
            tokens = self.micro_batch_size * self.sequence_length
            values["micro_batch_size"] = max(1, tokens // length)
            if values["micro_batch_size"] * length != tokens:
                kinds = ("depth_first", "breadth_first", "sequential")
                values |= {f"{kind}_micro_batches": None for kind in kinds}
        return self.model_copy(update=values)


class TokenizerConfig(Section):
    """The tokenizer for datasets that do not name one."""

    path: PathText | None = None
    """Folder or tokenizer.json of the tokenizer that the data was made with. It must equal the
    model's."""


class FimConfig(Section):
    """Fill-in-the-middle (Bavarian et al. 2022): documents of training are cut at two random
    characters and rearranged. Validation, test and sources with masked tokens
    (`dataset.loss_masking_spans`) are not. The tokens must be the model's own; the tokenizer is the
    pretrained model's, or that of `data.tokenizer.path`.
    """

    rate: Probability = 0.0
    """Probability that a document, or the part of it in a sequence, is rearranged."""
    max_middle_len: Positive | None = None
    """Maximum length of the middle, in characters. null has no limit."""
    split_sample: Text | None = None
    """Token between the fragments of a document, such as the files of a repository. Each fragment
    of a document that is chosen by `rate` is then rearranged with `fragment_rate`."""
    fragment_rate: Probability = 0.0
    """Probability that a fragment is rearranged."""
    ignore_prefix: Text | None = None
    """Documents and fragments that begin with this text stay as they are."""
    spm_rate: Probability = 0.5
    """Share of suffix-prefix-middle (SPM); the rest is prefix-suffix-middle (PSM)."""
    truncate_or_pad: bool = False
    """Keep the length of each document by cutting or padding its suffix. A sequence keeps its
    length in any case."""
    prefix_token: Text = "<fim_prefix>"
    """Token before the prefix."""
    middle_token: Text = "<fim_middle>"
    """Token before the middle."""
    pad_token: Text = "<fim_pad>"
    """Token that fills a sequence that became shorter. It is no target there."""
    suffix_token: Text = "<fim_suffix>"
    """Token before the suffix."""


class DataConfig(Section):
    """The training data."""

    format: Annotated[
        Literal["file", "list", "mixture", "random"],
        unsupported({"sample": "use random, which also generates tokens"}),
    ] = "list"
    """`file`: a dataset.json written by `fast-llm prepare`. `list`: dataset.json files, prefixes of
    token files, or `.ds` files of datatrove; either one, or alternately weights and paths (`[0.9,
    code/dataset.json, 0.1, prose/dataset.json]`). `mixture`: the datasets of `sources`, in shares
    that may change during training (`stages`). `random`: random tokens, to try things out."""
    path: WeightedPaths = []
    """One path, or a list as described at `format`. Paths are relative to the working directory."""
    sources: dict[str, DataSource] = {}
    stages: list[DataStageConfig] = []
    split: Shares = [969, 30, 1]
    """Shares of the documents for training, validation and test. A share that is left out is 0. A
    hash of a document's number in the dataset decides its split. For data whose dataset.json has no
    `split`, the order in each token file decides, from front to back."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become sequences. `concatenate`: joined one after the other, and cut at the
    ends of sequences. `best_fit` (Ding et al. 2024): a document of up to sequence_length + 1 tokens
    is never cut; sequences are filled with documents that fit, and the rest is padding. Applies to
    training, validation and test."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    use_loss_masking_spans: bool = True
    """Do not train on tokens that the data masks (`dataset.loss_masking_spans` of `prepare`).
    Validation and test leave them out too. `no` trains on all tokens. Data without masks is not
    affected."""
    fim: FimConfig = FimConfig()
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

    @field_validator("sources")
    @classmethod
    def _source_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{name} cannot be the name of a source; use letters, digits and _"
                )
        return value

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


class BranchConfig(Section):
    """Begin a new run, in its own `run.experiment_dir`, with a checkpoint of another run: for a
    cooldown, for more steps, or for other data. It continues with the optimizer state, the data
    position and the loss scale of the checkpoint, and counts steps from there. Settings may differ
    without `accept_changes`, with two exceptions: the shape of the model, and which parameters are
    frozen (`optimizer.learning_rate_scales`). Once the branch has a checkpoint of its own, it
    resumes from that like any run.
    """

    run: PathText
    """Experiment folder of the other run. It is only read, and may still be running."""
    step: Count
    """Step of the other run after which the branch begins. There must be a checkpoint of it; keep
    one with `training.checkpoint.keep_every` of the other run."""


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
    branch_from: BranchConfig | None = None
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

    @property
    def stages_change_model(self) -> bool:
        """Whether a stage of `data.stages` has a length or positions of its own."""
        return any(stage.changes_model for stage in self.data.stages)

    def in_stage(self, number: int | None) -> Self:
        """The settings in force in a stage of `data.stages`; None: outside of all stages.

        Only `batch` and `rotary` differ. Raises nothing for a valid configuration.
        """
        if number is None or not self.data.stages or not self.data.stages[number].changes_model:
            return self
        stage, values = self.data.stages[number], dict[str, Any]()
        if stage.sequence_length not in (None, self.batch.sequence_length):
            values["batch"] = self.batch.for_length(stage.sequence_length)
        if stage.rotary is not None:
            base = self.model.base_model
            given = {name: getattr(stage.rotary, name) for name in stage.rotary.model_fields_set}
            base = base.with_rotary(base.transformer.rotary.model_copy(update=given))
            values["model"] = self.model.model_copy(update={"base_model": base})
        return self.model_copy(update=values)
