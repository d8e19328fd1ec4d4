"""The configuration of `train`: the recipe, the names of Fast-LLM 0.2, and mistakes of every kind."""

import copy
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fast_llm.config.checks import check, violations
from fast_llm.config.compat import CONVERT_REFUSED, DIFFERENT, PREPARE_REFUSED, REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.mistakes import iter_paths, nested_sections, refused_values
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.reference import meaning, page
from fast_llm.config.section import Section, dump
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "fast_llm/demo/train-config.yaml"
TEXT = RECIPE.read_text()
FIELDS = set(iter_paths(TrainConfig))


def load(*overrides: str, path: Path | None = None) -> TrainConfig:
    return validate(TrainConfig, read(path, overrides), REFUSED, RENAMED)


def wrong(*overrides: str, kind: Any = TrainConfig, refused: Any = REFUSED) -> list[str]:
    """What is wrong with overrides, without their names in front."""
    with pytest.raises(ConfigError) as caught:
        validate(kind, read(None, overrides), refused, RENAMED)
    return [
        next(
            (p for o in overrides if (p := problem.removeprefix(f"override {o}: ")) != problem),
            problem,
        )
        for problem in caught.value.problems
    ]


# The recipe.


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


# Every name that Fast-LLM 0.2 (and its documentation of March 2025) has.

_SAVED = "interval offset keep keep_every callback.script callback.environment"
_EXPORT = f"{_SAVED} format model_weights optimizer_state parameters_per_file data_type load_weights load_optimizer"
_INIT = " ".join(
    f"init_method_{kind}{part}"
    for kind in ("std", "min", "max")
    for part in ("", "_qkv", "_attn_proj", "_mlp_1", "_mlp_2")
)
_DEBUG = "layer_outputs layer_gradients param_init param_gradients all_param_gradients param_update global_tensors"
_SHIFTS = (
    "dp_seed_shift pp_seed_shift pp_gen_init_seed_shift tp_seed_shift tp_gen_init_seed_shift sample_seed_shift"
    " train_seed_shift valid_seed_shift test_seed_shift pp_gen_seed_shift tp_gen_seed_shift"
)
OLD: dict[str, str] = {
    "training": "train_iters test_iters num_workers prefetch_factor timeout",
    "training.logs": "interval offset",
    "training.validation": "interval offset iterations",
    "training.checkpoint": _SAVED,
    "training.export": _EXPORT,
    "training.shutdown": "interval offset",
    "training.wandb": "entity_name project_name group_name alert.interval alert.offset alert.status_updates",
    "batch": "micro_batch_size batch_size depth_first_micro_batches breadth_first_micro_batches"
    " sequential_micro_batches sequence_length micro_sequence_length num_micro_sequences",
    "data": "format path split tokenizer.path tokenizer.format data_sample_warn_time_ms multiprocessing_context"
    " datasets sampling use_loss_masking_spans",
    "data.sampling": "seed gpu shuffle use_loss_masking_spans",
    "data.fim": "rate max_middle_len split_sample fragment_rate ignore_prefix spm_rate truncate_or_pad"
    " prefix_token middle_token pad_token suffix_token",
    "optimizer": "weight_decay beta_1 beta_2 epsilon gradient_norm_clipping default_learning_rate_scale",
    "optimizer.learning_rate": "base minimum decay_style decay_iterations decay_power warmup_iterations schedule",
    "optimizer.gradient_scaler": "constant initial minimum window hysteresis",
    "pretrained": "path format model_weights optimizer_state load_config timeout load_weights load_optimizer",
    "model.base_model": "vocab_size max_position_embeddings use_position_embeddings tie_word_embeddings"
    " cross_entropy_impl cross_entropy_splits parallel_embeddings sequence_first logit_z_loss logits_scale_factor"
    " init_method_std_embed init_method_max_embed init_method_min_embed use_megatron_initialization",
    "model.base_model.transformer": "num_layers hidden_size num_attention_heads head_groups kv_channels"
    " ffn_hidden_size gated activation_type add_linear_biases num_experts num_shared_experts num_experts_per_token"
    " expert_routing_type expert_auxiliary_loss_coefficient expert_z_loss_coefficient moe_jitter_eps mlp_lr_scale"
    " router_lr_scale attention_lr_scale attention_softmax_scale_power dropless_moe dropless_dynamic_shape"
    " use_flash_attention window_size max_window_layers mlp_recompute_level full_precision_residual attention_dropout"
    " hidden_dropout debug_transformer debug_transformer_memory random_bias_init use_rotary_embeddings"
    f" rotary_embedding_scale triton_rotary {_INIT}",
    "model.base_model.transformer.normalization": "type epsilon zero_centered implementation initialization_range"
    " normalization_type layer_norm_eps zero_centered_normalization normalization_implementation",
    "model.base_model.transformer.rotary": "type theta scale_factor low_frequency_factor high_frequency_factor"
    " original_context_length attention_factor beta_fast beta_slow triton",
    "model.distributed": "training_dtype optimization_dtype tensor_parallel pipeline_parallel sequence_data_parallel"
    " sequence_tensor_parallel world_size rank local_world_size pipeline_first distributed_timeout timeout seed"
    f" {_SHIFTS} reproducible_init",
    "model.multi_stage": "zero_stage num_grad_buffers num_weight_buffers layers_per_stage stages_per_pipeline_stage"
    " full_precision_gradients pipeline_delay compile_all debug_activation_memory debug_tensor_parallel "
    + " ".join(f"debug_{name}" for name in _DEBUG.split()),
    "run": "experiment_dir experiment_name structured_logs log_timestamps enable_all_loggers tensor_logs.save"
    " tensor_logs.show tensor_logs.max_elements torch_dynamo_enable enable_triton_kernels triton_linear_kernels",
    "schedule": "pipeline_overlap data_overlap data_batch_warn_time_ms throttle_cpu throttle_cpu_rate"
    " throttle_cpu_delay debug_schedule debug_send_recv profile_schedule estimate_critical_batch skip_step",
    "profiling": "cpu cuda skip wait warmup cycles averages trace table_width ranks log export",
}
NAMES = [f"{section}.{name}" for section, names in OLD.items() for name in names.split()]


def sentence(path: str) -> str | None:
    """What is said about a refused setting, or its section."""
    while path:
        if path in REFUSED:
            return REFUSED[path]
        path = path.rpartition(".")[0]
    return None


def test_no_name_stands_twice() -> None:
    assert len(NAMES) == len(set(NAMES)) > 200


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_fast_llm_is_known(name: str) -> None:
    if name in FIELDS:
        assert name not in REFUSED and name not in RENAMED
    elif name in RENAMED:
        assert RENAMED[name] in FIELDS
    else:
        said = sentence(name)
        assert said is not None, f"{name} would be told to be a typing error"
        assert wrong(f"{name}=1") == [f"{name}: not supported: {said}"]


def test_refusals_are_sentences_and_not_settings() -> None:
    for name, said in REFUSED.items():
        assert name not in FIELDS and name not in RENAMED
        assert len(said.split()) >= 2 and not said.endswith("."), name
    assert {old.rpartition(".")[0] for old in RENAMED} <= FIELDS
    assert set(RENAMED.values()) <= FIELDS


def test_settings_that_refusals_point_to_exist() -> None:
    every = [REFUSED[name] for name in REFUSED] + [
        said for _, field in leaves() for said in refused_values(field).values()
    ]
    for said in every:
        for path in re.findall(
            r"\b(?:training|batch|data|optimizer|pretrained|model|run)\.[a-z_0-9.]+[a-z_0-9]", said
        ):
            assert path in FIELDS, f"{path} in: {said}"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_older_names_do_what_the_new_ones_do(old: str, new: str) -> None:
    value = {"type": "rms_norm", "epsilon": "1e-6", "timeout": "7"}.get(new.rpartition(".")[2])
    value = value or ("yes" if "weights" in new else "no")
    assert load(f"{old}={value}") == load(f"{new}={value}")
    (problem,) = wrong(f"{old}={value}", f"{new}={value}")
    assert (
        problem
        == f"{old}: an older name of {new}, which is given too (override {new}={value}); keep that one"
    )


# Every setting.


def leaves(kind: type[Any] = TrainConfig, above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in kind.model_fields.items():
        inside = nested_sections(field.annotation)
        found += leaves(inside[0], f"{above}{name}.") if inside else [(above + name, field)]
    return found


@pytest.mark.parametrize("kind", [TrainConfig, PrepareConfig, ConvertConfig])
def test_every_setting_and_section_is_documented(kind: type[Section]) -> None:
    def inside(section: Any) -> Any:
        yield section
        for field in section.model_fields.values():
            for below in nested_sections(field.annotation):
                yield from inside(below)

    for section in inside(kind):
        assert section.__doc__ and section.__doc__ != Section.__doc__, section
        for name, field in section.model_fields.items():
            assert nested_sections(field.annotation) or meaning(section, name), (section, name)


@pytest.mark.parametrize(("path", "field"), leaves())
def test_every_setting_says_what_it_must_be(path: str, field: Any) -> None:
    if path.endswith(("environment", "validation_sets")):  # names are the user's
        assert wrong(f"{path}={{zzz: [1]}}")[0].startswith(f"{path}.zzz: given [1], must be text")
        return
    (problem,) = wrong(f"{path}={{zzz: [1]}}")
    assert problem.startswith(f"{path}: given {{zzz: [1]}}, must be ")
    assert not problem.endswith("must be ") and "something" not in problem and "<" not in problem
    # A null is taken where the message says so, and nowhere else.
    if " or null" in problem or field.default_factory is not None:
        load(f"{path}=null")
    else:
        assert wrong(f"{path}=null")[0].startswith(f"{path}: given null, must be ")


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, field in leaves() if refused_values(field)]
)
def test_single_values_that_are_refused_say_why(path: str, field: Any) -> None:
    for value, said in refused_values(field).items():
        shown = value if value in ("true", "false") else f'"{value}"'
        assert wrong(f"{path}={value}") == [
            f"{path}: given {shown}, which is not supported: {said}"
        ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.train_iters=-1", "given -1, must be an integer of 0 or more"),
        ("training.train_iters=1e5", "given 100000.0, must be an integer of 0 or more; write 100000"),
        ("training.train_iters=1e300", "given 1.0e+300, must be an integer of 0 or more"),
        ("training.train_iters=yes", "given true, must be an integer of 0 or more"),
        ("training.train_iters='5'", 'given "5", must be an integer of 0 or more'),
        (f"training.train_iters={10**16}", "given 10000000000000000, must be an integer of 0 or more"),
        ("training.logs.interval=0", "given 0, must be an integer above 0 or null"),
        ("training.logs=5", "given 5, must be a section of settings; did you mean training.logs.interval?"),
        ("training.num_workers=2000", "given 2000, must be an integer from 0 to 1024"),
        ("training.timeout=0", "given 0, must be a number of seconds above 0 or null"),
        ("training.export.parameters_per_file=5", "given 5, must be an integer of 2^20 (1048576) or more"),
        (
            "training.checkpoint.callback.script=echo 'a",
            "given echo 'a, which is not a valid command line: no closing quotation",
        ),
        ("training.checkpoint.callback.script=[]", "given no words, must begin with a program; leave it out for none"),
        ("training.checkpoint.callback.script=5", "given 5, must be a command, or a list of its words or null"),
        (
            "training.export.callback.environment={WANDB_API_KEY: x}",
            "WANDB_API_KEY looks like a secret, which would be written to config.yaml; set it in the environment that"
            " training is started in",
        ),
        (
            "training.export.callback.environment={A B: x}",
            "A B cannot be the name of an environment variable; use letters, digits and _",
        ),
        ("data.split=[0, 0]", "given [0.0, 0.0], at least one share must be above 0"),
        ("data.split=[1, 2, 3, 4]", "given [1, 2, 3, 4], must be a list of one to three numbers of 0 or more"),
        ("data.split=[]", "given [], must be a list of one to three numbers of 0 or more"),
        ("data.split=[1, -1]", "given [1, -1], must be a list of one to three numbers of 0 or more"),
        (
            "data.validation_sets={test: x}",
            "test cannot be the name of a set; use letters, digits and _, and none of training, validation, test, language_model",
        ),
        ("data.path=5", "given 5, must be a path, or a list of weights and paths in turn"),
        ("optimizer.beta_1=1", "given 1, must be a number from 0 to below 1"),
        ("optimizer.gradient_norm_clipping=0", "given 0, must be a number above 0 or null"),
        (
            "optimizer.learning_rate.decay_style=cosin",
            'given "cosin", must be one of constant, linear, power, cosine',
        ),
        (
            "optimizer.learning_rate=1e-4",
            "given 0.0001, must be a section of settings; did you mean optimizer.learning_rate.base?",
        ),
        (
            "pretrained=model",
            'given "model", must be a section of settings; did you mean pretrained.path?',
        ),
        ("pretrained.path=''", "given empty text; write null, or leave it out, for none"),
        ("model.multi_stage.zero_stage=0", "given 0, must be 1, 2 or 3 or null"),
        ("model.distributed.training_dtype=float8", 'given "float8", must be one of fp32, bf16, fp16 (or float32, bfloat16, float16)'),
        ("model.distributed.training_dtype=float64", 'given "fp64", which is not supported: the highest precision is fp32'),
        ("optimizer.moments_dtype=int4", 'given "int4", must be auto, fp32, bf16 or int8 (float32, bfloat16)'),
        ("optimizer.moments_dtype=fp16", 'given "fp16", must be auto, fp32, bf16 or int8 (float32, bfloat16)'),
        ("model.distributed.tensor_parallel=0", "given 0, must be an integer above 0"),
        ("model.multi_stage.layers_per_stage=half", 'given "half", must be a number of layers, or a list with one for each stage or null'),
        ("run.accept_changes=data.path", 'given "data.path", must be a list, each item text (numbers and dates in quotes)'),
        ("model.base_model.transformer.init_method_std=.inf", "given .inf, must be a number of 0 or more or null"),
    ],
)  # fmt: skip
def test_values_that_are_not_allowed(override: str, problem: str) -> None:
    assert wrong(override) == [f"{override.partition('=')[0]}: {problem}"]


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


def test_a_thousand_wrong_names_are_told_in_time() -> None:
    assert len(wrong(*(f"q{i}=1" for i in range(1000)))) <= 100


# prepare and convert.


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
                "saving_workers: not supported: token files are written while tokenizing; set tokenize_workers",
                "output_path: is missing; it must be text (numbers and dates in quotes)",
                "tokens_per_shard: given 5, must be an integer of 100000 or more",
                "dataset.path: is missing; it must be text (numbers and dates in quotes)",
                "tokenizer.path: is missing; it must be text (numbers and dates in quotes)",
                'tokenizer.bos: given "maybe", must be auto, yes or no',
                "distributed.rank: given 2, must be below distributed.world_size 2: ranks count from 0",
            ],
        ),
        (
            PrepareConfig,
            PREPARE_REFUSED,
            ["output_path=x", "dataset={path: y, trust_remote_code: yes}", "tokenizer.path=z"],
            [
                "dataset.trust_remote_code: given true, which is not supported: `datasets` no longer runs code"
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
                "tokenizer: given 7, must be a section of settings with path, bos or eos",
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
            ["output: data_type belongs to format: llama; a checkpoint holds fp32 weights"],
        ),
    ],
)
def test_prepare_and_convert(
    kind: Any, refused: Any, overrides: list[str], problems: list[str]
) -> None:
    told = wrong(*overrides, kind=kind, refused=refused)
    assert sorted(problem.removeprefix("the command line: ") for problem in told) == sorted(
        problems
    )


# Whatever stands in the file: a configuration or a ConfigError.

VALUES = yaml.safe_load(TEXT)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "bf16",
            "1e-4",
            "~",
            "llama",
            "2024-01-01",
            "=",
            "<<",
            "[",
            "&a",
            "*a",
            "0x",
            "1:30",
            "",
            -1,
            0,
        ]
    ),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
)
PLACES = sorted(FIELDS | set(REFUSED) | set(RENAMED))
fuzz = partial(
    settings,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def survives(text: str | bytes, path: Path, overrides: list[str] = []) -> None:  # noqa: B006
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        document = read(path, overrides)
        config = validate(
            TrainConfig, document, REFUSED, RENAMED, constraints=partial(violations, processes=4)
        )
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert isinstance(problem, str) and "\n" not in problem and len(problem) < 1000
        return
    path.write_text(dump(config))
    assert load(path=path) == config


@fuzz(max_examples=100)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), ANYTHING), min_size=1, max_size=4))
def test_values_put_anywhere(changes: list[tuple[str, Any]], tmp_path: Path) -> None:
    values = copy.deepcopy(VALUES)
    for name, value in changes:
        place = values
        *above, last = name.split(".")
        for key in above:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[last] = value
    survives(yaml.safe_dump(values, allow_unicode=True), tmp_path / "c.yaml")


@fuzz(max_examples=200)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(TEXT)),
            st.integers(0, 30),
            st.text(alphabet=":\n -[]{}#&*!|>'\"%@`,?~0aé\t\r\x00\x07\ud800=.", max_size=6)
            | st.text(max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_text_cut_and_pasted(edits: list[tuple[int, int, str]], tmp_path: Path) -> None:
    text = TEXT
    for start, length, new in edits:
        text = text[:start] + new + text[start + length :]
    survives(text, tmp_path / "c.yaml")


@fuzz(max_examples=150)
@given(
    lines=st.lists(
        st.tuples(st.integers(0, TEXT.count("\n") - 1), st.integers(0, 3), st.integers(0, 45)),
        max_size=6,
    )
)
def test_lines_moved_repeated_and_dedented(
    lines: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    rows = TEXT.splitlines()
    for row, action, target in lines:
        row %= len(rows)
        line = rows[row]
        if action == 0:
            del rows[row]
        elif action == 1:
            rows.insert(target, line)
        elif action == 2:
            rows[row] = line.lstrip()
        else:
            rows[row] = "  " + line
        rows = rows or [""]
    survives("\n".join(rows), tmp_path / "c.yaml")


@fuzz(max_examples=100)
@given(content=st.binary(max_size=60), at=st.integers(0, len(TEXT)))
def test_bytes_pasted(content: bytes, at: int, tmp_path: Path) -> None:
    raw = TEXT.encode()
    survives(raw[:at] + content + raw[at:], tmp_path / "c.yaml")


@fuzz(max_examples=200)
@given(
    overrides=st.lists(
        st.text(max_size=12)
        | st.builds(
            lambda name, value: f"{name}={value}",
            st.sampled_from(PLACES),
            SCALARS | st.text(max_size=8),
        ),
        max_size=4,
    )
)
def test_overrides_of_any_kind(overrides: list[str], tmp_path: Path) -> None:
    survives(TEXT, tmp_path / "c.yaml", overrides)


# The page of all settings.


def test_the_page_of_settings_is_current() -> None:
    written = (ROOT / "docs/settings.md").read_text()
    assert written == page(), "python -m fast_llm.config.reference > docs/settings.md"


def test_the_page_names_everything() -> None:
    text = " ".join(page().split())
    for kind in (TrainConfig, PrepareConfig, ConvertConfig):
        for path, _ in leaves(kind):
            assert f"- **`{path}`** (" in text
    for said in (*REFUSED.values(), *PREPARE_REFUSED.values(), *CONVERT_REFUSED.values()):
        assert f": {said}" in text
    for old, new in RENAMED.items():
        assert f"- `{old}` is now `{new}`" in text
    assert set(DIFFERENT) <= FIELDS


def test_the_page_is_made_without_torch() -> None:
    code = (
        "import runpy, sys; runpy.run_module('fast_llm.config.reference', run_name='__main__');"
        " assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (ROOT / "docs/settings.md").read_text()
