"""The laws across settings, one function each. Each gives (dotted path, what is wrong) for every breach."""

from collections.abc import Iterator

from fast_llm.config.batch import plan_batch
from fast_llm.config.section import Document
from fast_llm.config.train import TrainConfig
from fast_llm.errors import ConfigError

Breaches = Iterator[tuple[str, str]]


def check(config: TrainConfig, document: Document, processes: int) -> list[str]:
    """Every breach, with its place in the file."""
    problems = [
        f"{document.where(path)}: {path}: {text}"
        for law in (
            _learning_rate,
            _intervals,
            _experiment_dir,
            _validation,
            _model,
            _pretrained,
            _compilation,
            _training_steps,
        )
        for path, text in law(config)
    ]
    try:
        plan_batch(config.batch, processes)
    except ConfigError as error:
        problems += [f"{document.where('batch.batch_size')}: {problem}" for problem in error.problems]
    return problems


def _learning_rate(config: TrainConfig) -> Breaches:
    rate, above = config.optimizer.learning_rate, "optimizer.learning_rate"
    if rate.decay_style != "constant" and rate.decay_iterations is None:
        yield (
            f"{above}.decay_iterations",
            f"decay_style {rate.decay_style} needs the step at which it ends, e.g. {config.training.train_iters or 100_000}",
        )
    if rate.decay_iterations is not None and rate.warmup_iterations >= rate.decay_iterations:
        yield (
            f"{above}.warmup_iterations",
            f"given {rate.warmup_iterations}, must be below decay_iterations {rate.decay_iterations}, which includes the warmup",
        )
    if rate.minimum > rate.base:
        yield f"{above}.minimum", f"given {rate.minimum}, must be at most base {rate.base}"


def _intervals(config: TrainConfig) -> Breaches:
    training = config.training
    if not training.shutdown.within(training.checkpoint):
        yield (
            "training.shutdown.interval",
            f"given {training.shutdown.interval}, must be a multiple of training.checkpoint.interval"
            f" ({training.checkpoint.interval}) with the same offset: a run can only stop where it saves",
        )
    if training.wandb is not None and not training.wandb.alert.within(training.logs):
        yield (
            "training.wandb.alert.interval",
            f"given {training.wandb.alert.interval}, must be a multiple of training.logs.interval ({training.logs.interval})",
        )


def _experiment_dir(config: TrainConfig) -> Breaches:
    training = config.training
    if config.run.experiment_dir is not None:
        return
    for name, wanted in (
        ("training.checkpoint.interval", training.checkpoint.interval is not None),
        ("training.export.interval", training.export.interval is not None),
        ("training.shutdown.interval", training.shutdown.interval is not None),
        ("training.tensorboard", training.tensorboard),
    ):
        if wanted:
            yield name, "needs a folder to write to: set run.experiment_dir"


def _validation(config: TrainConfig) -> Breaches:
    validation, split = config.training.validation, config.data.split
    if validation.interval is not None and validation.iterations is None:
        yield (
            "training.validation.iterations",
            "needed with training.validation.interval: how many batches, e.g. 25",
        )
    if validation.iterations is not None and validation.interval is None:
        yield (
            "training.validation.interval",
            "needed with training.validation.iterations: every how many steps, e.g. 1000",
        )
    if config.data.format == "random":
        return
    if validation.interval is not None and split[1] == 0:
        yield (
            "data.split",
            f"given {split}, which leaves no documents for validation; give it a share, e.g. [99, 1, 0]",
        )
    if config.training.test_iters and split[2] == 0:
        yield (
            "data.split",
            f"given {split}, which leaves no documents for training.test_iters; give it a share, e.g. [98, 1, 1]",
        )
    if config.training.train_iters and split[0] == 0:
        yield "data.split", f"given {split}, which leaves no documents for training"
    if not config.data.path:
        yield "data.path", "no data: give the dataset.json of `fast-llm prepare` and format: file"


def _model(config: TrainConfig) -> Breaches:
    transformer, above = config.model.base_model.transformer, "model.base_model.transformer"
    heads, groups = transformer.num_attention_heads, transformer.head_groups
    if heads % groups:
        yield f"{above}.head_groups", f"given {groups}, must divide num_attention_heads {heads}"
    if "kv_channels" not in transformer.model_fields_set and transformer.hidden_size % heads:
        yield (
            f"{above}.num_attention_heads",
            f"given {heads}, must divide hidden_size {transformer.hidden_size}, or kv_channels must be given",
        )
    elif transformer.kv_channels % 2:
        yield (
            f"{above}.kv_channels",
            f"given {transformer.kv_channels}, must be even: rotary embedding turns pairs",
        )
    rotary = transformer.rotary
    if rotary.type == "llama3" and rotary.high_frequency_factor <= rotary.low_frequency_factor:
        yield (
            f"{above}.rotary.high_frequency_factor",
            f"given {rotary.high_frequency_factor}, must be above low_frequency_factor {rotary.low_frequency_factor}",
        )


def _pretrained(config: TrainConfig) -> Breaches:
    pretrained = config.pretrained
    if pretrained.optimizer_state and pretrained.format != "distributed":
        yield (
            "pretrained.optimizer_state",
            "a Hugging Face folder has no moments; only format: distributed has",
        )
    if pretrained.optimizer_state and not pretrained.model_weights:
        yield (
            "pretrained.optimizer_state",
            "moments without their weights are of no use; set model_weights: yes",
        )
    if pretrained.format == "distributed" and pretrained.path is None:
        yield "pretrained.path", "format: distributed needs the folder of a checkpoint"


def _compilation(config: TrainConfig) -> Breaches:
    if config.model.multi_stage.compile_all and not config.run.torch_dynamo_enable:
        yield "model.multi_stage.compile_all", "given yes, but run.torch_dynamo_enable: no forbids it"


def _training_steps(config: TrainConfig) -> Breaches:
    splits = config.model.base_model.cross_entropy_splits
    if splits is not None and config.batch.micro_batch_size is not None:
        tokens = config.batch.micro_batch_size * config.batch.sequence_length
        if tokens % splits:
            yield (
                "model.base_model.cross_entropy_splits",
                f"given {splits}, must divide the {tokens} tokens of a micro-batch",
            )
