"""Configuration of `train`, `prepare` and `convert`: recipe, defaults, mistakes of every kind."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from fast_llm.config.checks import check, violations
from fast_llm.config.compat import CONVERT_REFUSED, PREPARE_REFUSED, REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.section import dump
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError
from tests.config.common import RECIPE, TEXT, load, wrong


def test_the_recipe_loads_unchanged() -> None:
    document = read(RECIPE)
    config = validate(
        TrainConfig, document, REFUSED, RENAMED, constraints=partial(violations, processes=8)
    )
    assert check(config, document, 8) == check(config, document, 1) == []
    given = config.model_dump(mode="json", exclude_unset=True)
    expected = yaml.safe_load(TEXT)
    expected["data"]["path"] = [expected["data"]["path"]]
    assert given == expected
    assert config.training.train_iters == 100_000
    assert config.training.export.interval == 20_000
    assert config.data.split == [99, 1, 0]
    assert config.optimizer.learning_rate.base == 1e-4
    assert config.pretrained.model_weights is True
    assert document.where("optimizer.learning_rate.warmup_iterations") == f"{RECIPE}:32"


def test_the_recipe_of_the_demo_is_the_recipe() -> None:
    from fast_llm.demo import RECIPE as DEMO

    assert DEMO.read_bytes() == RECIPE.read_bytes()


def test_nothing_is_all_defaults() -> None:
    assert load() == TrainConfig()


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().training.train_iters = 5


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.split=[1]", "training.wandb.entity_name=x", "run.accept_changes=[data.path]"],
        [
            "model.base_model.transformer.hidden_size=256",
            "model.base_model.transformer.num_attention_heads=4",
        ],
        [
            "training.export.callback.script=echo 'a b'",
            "training.export.callback.environment={A: '1', _b: 'yes'}",
        ],
        [
            "optimizer.epsilon=1e-12",
            "optimizer.gradient_norm_clipping=null",
            "data.path=[0.1, '1e-4', 3, 'no']",
        ],
        ["run.experiment_dir='2024-01-01'", "data.validation_sets={prose: 'null', code: '5'}"],
        [
            "model.base_model.transformer.add_linear_biases=yes",
            "model.distributed.training_dtype=torch.float16",
        ],
    ],
)
@pytest.mark.parametrize("path", [None, RECIPE])
def test_what_is_dumped_reads_to_an_equal_configuration(
    path: Path | None, overrides: list[str], tmp_path: Path
) -> None:
    config = load(*overrides, path=path)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(path=tmp_path / "config.yaml") == config
    assert dump(load(path=tmp_path / "config.yaml")) == dump(config)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.train_iters=-1", "given -1, must be an integer of 0 or more"),
        (
            "training.train_iters=1e5",
            "given 100000.0, must be an integer of 0 or more; write 100000",
        ),
        ("training.train_iters=1e300", "given 1.0e+300, must be an integer of 0 or more"),
        ("training.train_iters=yes", "given true, must be an integer of 0 or more"),
        ("training.train_iters='5'", 'given "5", must be an integer of 0 or more'),
        (f"training.train_iters={10**16}", "given 10000000000000000, must be an integer of 0 or"
            " more"),
        ("training.logs.interval=0", "given 0, must be an integer above 0 or null"),
        ("training.logs=5", "given 5, must be a section of settings; did you mean"
            " training.logs.interval?"),
        ("training.num_workers=2000", "given 2000, must be an integer from 0 to 1024"),
        ("training.timeout=0", "given 0, must be a number of seconds above 0 or null"),
        ("training.export.parameters_per_file=5", "given 5, must be an integer of 2^20 (1048576)"
            " or more"),
        (
            "training.checkpoint.callback.script=echo 'a",
            "given echo 'a, which is not a valid command line: no closing quotation",
        ),
        ("training.checkpoint.callback.script=[]", "given no words, must begin with a program;"
            " leave it out for none"),
        ("training.checkpoint.callback.script=5", "given 5, must be a command, or a list of its"
            " words or null"),
        (
            "training.export.callback.environment={WANDB_API_KEY: x}",
            "WANDB_API_KEY looks like a secret, which would be written to config.yaml; set it in"
            " the environment that"
            " training is started in",
        ),
        (
            "training.export.callback.environment={A B: x}",
            "A B cannot be the name of an environment variable; use letters, digits and _",
        ),
        ("data.split=[0, 0]", "given [0.0, 0.0], at least one share must be above 0"),
        ("data.split=[1, 2, 3, 4]", "given [1, 2, 3, 4], must be a list of one to three numbers of"
            " 0 or more"),
        ("data.split=[]", "given [], must be a list of one to three numbers of 0 or more"),
        (
            "data.split=[1, -1]",
            "given [1, -1], must be a list of one to three numbers of 0 or more",
        ),
        (
            "data.validation_sets={test: x}",
            "test cannot be the name of a set; use letters, digits and _, and none of training,"
            " validation, test, language_model",
        ),
        ("data.path=5", "given 5, must be a path, or a list of weights and paths in turn"),
        ("optimizer.beta_1=1", "given 1, must be a number from 0 to below 1"),
        ("optimizer.gradient_norm_clipping=0", "given 0, must be a number above 0 or null"),
        (
            "optimizer.learning_rate.decay_style=cosin",
            'given "cosin", must be one of constant, linear, power, cosine, wsd, inverse_sqrt',
        ),
        ("optimizer.learning_rate.cooldown=1.0", "given 1.0, must be a number of steps above 0, a"
            " fraction below 1 such as 0.1, or null"),
        ("optimizer.learning_rate.stages=[]", "given [], must be a list of one or more stages or"
            " null"),
        (
            "optimizer.learning_rate=1e-4",
            "given 0.0001, must be a section of settings; did you mean"
            " optimizer.learning_rate.base?",
        ),
        (
            "pretrained=model",
            'given "model", must be a section of settings; did you mean pretrained.path?',
        ),
        ("pretrained.path=''", "given empty text; write null, or leave it out, for none"),
        ("model.multi_stage.zero_stage=0", "given 0, must be 1, 2 or 3 or null"),
        ("model.distributed.training_dtype=float8", 'given "float8", must be one of fp32, bf16,'
            ' fp16 (or float32, bfloat16, float16)'),
        ("model.distributed.training_dtype=float64", 'given "fp64", which is not supported: the'
            ' highest precision is fp32'),
        ("optimizer.moments_dtype=int4", 'given "int4", must be auto, fp32, bf16 or int8 (float32,'
            ' bfloat16)'),
        ("optimizer.moments_dtype=fp16", 'given "fp16", must be auto, fp32, bf16 or int8 (float32,'
            ' bfloat16)'),
        ("model.distributed.tensor_parallel=0", "given 0, must be an integer above 0"),
        ("model.multi_stage.layers_per_stage=half", 'given "half", must be a number of layers, or'
            ' a list with one for each stage or null'),
        ("run.accept_changes=data.path", 'given "data.path", must be a list, each item text'
            ' (numbers and dates in quotes)'),
        ("model.base_model.transformer.init_method_std=.inf", "given .inf, must be a number of 0"
            " or more or null"),
    ],
)  # fmt: skip
def test_values_that_are_not_allowed(override: str, problem: str) -> None:
    assert wrong(override) == [f"{override.partition('=')[0]}: {problem}"]


def test_mistakes_inside_a_list_of_sections(tmp_path: Path) -> None:
    """Each has the line of its item."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "optimizer:\n  learning_rate:\n    stages:\n"
        "    - {until: 5, shape: linear, end_rate: 1e-4}\n"
        "    - {until: 9, shape: konstant}\n"
        "    - {until: 12, shape: linear, endrate: 1e-5}\n"
        "    - 13\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(path=path)
    above = "optimizer.learning_rate.stages"
    assert caught.value.problems == [
        f'{path}:5: {above}.1.shape: given "konstant", must be one of constant, linear, cosine,'
        " 1-sqrt",
        f"{path}:6: {above}.2.endrate: no such setting; did you mean {above}.2.end_rate? (allowed:"
        " until, shape, start_rate, end_rate)",
        f"{path}:7: {above}.3: given 13, must be a section of settings with until, shape,"
        " start_rate or end_rate",
    ]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("batch.micro_batchsize", "batch.micro_batch_size"),
        ("batch.seq_length", "batch.sequence_length"),
        ("sequence_length", "batch.sequence_length"),
        ("train_iters", "training.train_iters"),
        ("training.max_steps", "training.train_iters"),
        ("training.logs.intervall", "training.logs.interval"),
        ("training.checkpoints.interval", "training.checkpoint"),
        ("optimizer.lr", "optimizer.learning_rate.base"),
        ("lr", "optimizer.learning_rate.base"),
        ("optimizer.learning_rate.warmup_steps", "optimizer.learning_rate.warmup_iterations"),
        ("optimiser.beta_1", "optimizer"),
        ("optimizer.beta1", "optimizer.beta_1"),
        ("optimizer.max_grad_norm", "optimizer.gradient_norm_clipping"),
        ("model.zero_stage", "model.multi_stage.zero_stage"),
        ("model.transformer.hidden_size", "model.base_model.transformer"),
        ("model.base_model.hidden_size", "model.base_model.transformer.hidden_size"),
        ("model.training_dtype", "model.distributed.training_dtype"),
        ("seed", "model.distributed.seed"),
        ("pretrained.pth", "pretrained.path"),
        ("output_dir", "run.experiment_dir"),
        ("run.experiment_directory", "run.experiment_dir"),
        ("data.paths", "data.path"),
        ("global_batch_size", "batch.batch_size"),
    ],
)
def test_the_nearest_name(name: str, near: str) -> None:
    (problem,) = wrong(f"{name}=1")
    assert f": no such setting; did you mean {near}? (allowed: " in problem, problem


def test_a_name_like_no_other() -> None:
    assert wrong("qqq=1") == [
        "qqq: no such setting (allowed: training, batch, data, optimizer, pretrained, model, run)"
    ]
    (problem,) = wrong("model.base_model.transformer.zzz=1")
    assert problem.endswith("…, all in docs/settings.md)")


def test_a_thousand_wrong_names_are_reported_in_time() -> None:
    assert len(wrong(*(f"q{i}=1" for i in range(1000)))) <= 100


@pytest.mark.parametrize(
    ("kind", "refused", "overrides", "problems"),
    [
        (
            PrepareConfig,
            PREPARE_REFUSED,
            [
                "tokens_per_shard=5",
                "distributed={world_size: 2, rank: 2}",
                "saving_workers=3",
                "tokenizer.bos=maybe",
            ],
            [
                "saving_workers: not supported: token files are written while tokenizing; set"
                " tokenize_workers",
                "output_path: is missing; it must be text (numbers and dates in quotes)",
                "tokens_per_shard: given 5, must be an integer of 100000 or more",
                "dataset.path: is missing; it must be text (numbers and dates in quotes)",
                "tokenizer.path: is missing; it must be text (numbers and dates in quotes)",
                'tokenizer.bos: given "maybe", must be auto, yes or no',
                "distributed.rank: given 2, must be below distributed.world_size 2: ranks count"
                " from 0",
            ],
        ),
        (
            PrepareConfig,
            PREPARE_REFUSED,
            ["output_path=x", "dataset={path: y, trust_remote_code: yes}", "tokenizer.path=z"],
            [
                "dataset.trust_remote_code: given true, which is not supported: `datasets` no"
                " longer runs code"
                " from datasets; convert the dataset to parquet"
            ],
        ),
        (
            PrepareConfig,
            PREPARE_REFUSED,
            ["output_path=5", "dataset={path: 6}", "tokenizer=7"],
            [
                "output_path: given 5, must be text (numbers and dates in quotes)",
                "dataset.path: given 6, must be text (numbers and dates in quotes)",
                "tokenizer: given 7, must be a section of settings with path, bos, eos,"
                " special_tokens or engine",
            ],
        ),
        (
            ConvertConfig,
            CONVERT_REFUSED,
            ["use_cpu=yes"],
            [
                "use_cpu: not supported: conversion always runs on the CPU; leave it out",
                "input.path: is missing; it must be text (numbers and dates in quotes)",
                "output.path: is missing; it must be text (numbers and dates in quotes)",
            ],
        ),
        (
            ConvertConfig,
            CONVERT_REFUSED,
            ["input.path=a", "output={path: b, format: distributed}"],
            ["output: the input is already in distributed format; copy the folder"],
        ),
        (
            ConvertConfig,
            CONVERT_REFUSED,
            [
                "input={path: a, format: llama}",
                "output={path: b, format: distributed, data_type: bf16}",
            ],
            ["output: data_type belongs to a Hugging Face folder; a checkpoint holds fp32 weights"],
        ),
    ],
)
def test_prepare_and_convert(
    kind: Any, refused: Any, overrides: list[str], problems: list[str]
) -> None:
    found = wrong(*overrides, kind=kind, refused=refused)
    assert sorted(problem.removeprefix("the command line: ") for problem in found) == sorted(
        problems
    )
