"""Every constraint across settings: violated alone, with its exact message and place, and kept."""

import ast
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from fast_llm.config import checks, data_checks, model_checks
from fast_llm.config import learning_rate as rate_checks
from fast_llm.config.checks import check, violations
from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.disabled import DISABLED_BY
from fast_llm.config.document import Document, read
from fast_llm.config.section import dump
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError
from tests.config import mixtures

# The smallest configuration that keeps all constraints; overrides are laid over it.
GOOD = ["training.train_iters=10", "data.format=random"]
FP8 = [*GOOD, "model.distributed.training_dtype=bf16", "model.distributed.fp8=yes"]
FILES = ["training.train_iters=10", "data.path=tokens"]
TRANSFORMER = "model.base_model.transformer"
RATE = "optimizer.learning_rate"


def messages(overrides: list[str], processes: int = 1) -> list[str]:
    """The mistakes of overrides, without their places in the file."""
    document = read(None, overrides)
    config = validate(TrainConfig, document, REFUSED, RENAMED)
    found = [f"{paths[0]}: {text}" for paths, text in violations(config, processes)]
    assert check(config, document, processes) == [
        f"{document.where(text.partition(':')[0])}: {text}" for text in found
    ]
    return found


BROKEN: list[tuple[list[str], str]] = [
    (
        [*GOOD, "training.evaluations.rare={interval: 5}"],
        "training.evaluations.rare: give tasks or validation_sets; neither is given",
    ),
    (
        [*GOOD, "training.evaluations.rare={interval: 5, iterations: 1, validation_sets: [a]}"],
        "training.evaluations.rare.validation_sets.0: given a, not a name of data.validation_sets"
        " (it has no sets)",
    ),
    (
        [
            *GOOD,
            "data.validation_sets.a=b",
            *(
                f"training.evaluations.{name}={{interval: 5, iterations: 1, validation_sets: [a]}}"
                for name in ("one", "two")
            ),
        ],
        "training.evaluations.two.validation_sets.0: given a, which training.evaluations.one"
        " measures already; name it once",
    ),
    (
        [*GOOD, "model.base_model.transformer.expert_bias_update_rate=0.001"],
        "model.base_model.transformer.expert_bias_update_rate: given 0.001, but the model has no"
        " experts; set it to null",
    ),
    (
        [*GOOD, "run.experiment_dir=x", "training.samples={prompts: [a]}"],
        "training.samples.interval: missing: training.samples.prompts requires it (number of steps,"
        " e.g. 1000)",
    ),
    (
        [*GOOD, "run.experiment_dir=x", "training.samples={interval: 5}"],
        "training.samples.prompts: missing: training.samples.interval requires it (a list of"
        " texts)",
    ),
    (
        [*GOOD, "training.export.push_to_hub.repo=a/b"],
        "training.export.interval: missing: training.export.push_to_hub.repo requires it (number of"
        " steps, e.g. 1000)",
    ),
    (
        [*GOOD, "training.export.push_to_hub.average=ema"],
        "training.export.push_to_hub.average: given ema, must be an average of training.averages:"
        " none",
    ),
    (
        [
            *GOOD,
            "batch.batch_size=6",
            "batch.micro_batch_size=2",
            "batch.sequential_micro_batches=2",
        ],
        "batch.sequential_micro_batches: given 2, but batch_size 6 / (micro_batch_size 2 × 1"
        " process) = 3; leave it out",
    ),
    (
        [*GOOD, "batch.micro_sequence_length=512"],
        "batch.micro_sequence_length: given 512, must be sequence_length 2048: sequences are not"
        " split into parts; leave it out, and use micro_batch_size: 1 and mlp_recompute_level:"
        " full to save memory",
    ),
    (
        [*GOOD, "data.path=x"],
        "data.path: format: random reads no path; leave it out, or set format: file",
    ),
    (
        ["training.train_iters=10"],
        "data.path: missing: format: list needs it; give the dataset.json of `fast-llm prepare`"
        " with format: file, or try things with format: random",
    ),
    (
        ["training.train_iters=10", "data.format=file"],
        "data.path: missing: format: file needs it; give the dataset.json of `fast-llm prepare`"
        " with format: file, or try things with format: random",
    ),
    *(
        (
            ["training.train_iters=10", "data.format=file", f"data.path={path}"],
            "data.path: format: file needs one path, the dataset.json of `fast-llm prepare`;"
            " format: list takes several",
        )
        for path in ("[a, b]", "[1]", "['']", "[[a]]")
    ),
    *(
        (
            ["training.train_iters=10", f"data.path={path}"],
            "data.path: format: list needs one path, or weights above 0 and paths in turn: [0.9,"
            " code/dataset.json, 0.1, prose/dataset.json]",
        )
        for path in (
            "[0.5]",
            "['']",
            "[0.5, a, 0.5]",
            "[a, 0.5]",
            "[0, a]",
            "[-1, a]",
            "[.inf, a]",
            "[.nan, a]",
            "[yes, a]",
            "[null, a]",
            "[1, a, 1, 2]",
            "[1, '']",
            "[1, [a]]",
            "[{a: 1}, b]",
        )
    ),
    (
        ["training.train_iters=10", "data.path=[1, a, 2, a]"],
        "data.path: names a twice; name it once, with the sum of its weights",
    ),
    (
        [*FILES, "data.packing=best_fit", "data.fim.rate=0.5"],
        "data.packing: given best_fit, which never cuts a document that fits; fill-in-the-middle"
        " (data.fim) makes documents longer unless data.fim.truncate_or_pad=yes: set that, or"
        " packing=concatenate",
    ),
    (
        [*FILES, "data.split=[0, 1, 0]"],
        "data.split: given [0, 1, 0], which leaves no documents for training.train_iters; give"
        " them a share, e.g. [99, 1, 0]",
    ),
    (
        [
            *FILES,
            "data.split=[0.5]",
            "training.validation.interval=1",
            "training.validation.iterations=1",
        ],
        "data.split: given [0.5, 0, 0], which leaves no documents for"
        " training.validation.interval; give them a share, e.g. [99, 1, 0]",
    ),
    (
        [*FILES, "data.split=[9, 1, 0]", "training.test_iters=1"],
        "data.split: given [9, 1, 0], which leaves no documents for training.test_iters; give them"
        " a share, e.g. [98, 1, 1]",
    ),
    *(
        (
            [*GOOD, f"{RATE}.decay_style={style}"],
            f"{RATE}.decay_iterations: missing: decay_style {style} needs the step at which it"
            " ends, e.g. 10",
        )
        for style in ("linear", "power", "cosine")
    ),
    (
        [
            *GOOD,
            f"{RATE}.decay_style=linear",
            f"{RATE}.decay_iterations=10",
            f"{RATE}.warmup_iterations=10",
        ],
        f"{RATE}.warmup_iterations: given 10, must be below decay_iterations 10, which counts from"
        " the start and includes the warmup",
    ),
    (
        [
            *GOOD,
            f"{RATE}.decay_style=linear",
            f"{RATE}.decay_iterations=10",
            f"{RATE}.minimum=1e-3",
        ],
        f"{RATE}.minimum: given 0.001, must be at most base 0.0001",
    ),
    *(
        ([*GOOD, *(f"{RATE}.{one}" for one in given)], f"{RATE}.{problem}")
        for given, problem in (
            (
                ["decay_style=wsd", "decay_iterations=10"],
                "cooldown: missing: decay_style wsd needs the length of its decay, in steps or as a"
                " fraction of decay_iterations, e.g. 1 or 0.1",
            ),
            (
                ["decay_style=wsd", "cooldown=5"],
                "decay_iterations: missing: decay_style wsd needs the step at which it ends, e.g."
                " 10",
            ),
            (
                ["decay_style=wsd", "decay_iterations=10", "cooldown=0.8", "warmup_iterations=3"],
                "cooldown: given 0.8; its 8 steps and warmup_iterations 3 must together be at most"
                " decay_iterations 10, which counts from the start",
            ),
            (
                ["cooldown=5"],
                "cooldown: given 5, but decay_style constant has no cooldown; set decay_style to"
                " wsd or inverse_sqrt, or leave it out",
            ),
            (
                ["decay_style=cosine", "decay_iterations=10", "cooldown_style=1-sqrt"],
                'cooldown_style: given "1-sqrt", but decay_style cosine has no cooldown; set'
                " decay_style to wsd or inverse_sqrt, or leave it out",
            ),
            (
                ["decay_style=inverse_sqrt"],
                "warmup_iterations: given 0, but decay_style inverse_sqrt counts its decay in"
                " lengths of the warmup; set it, e.g. 1000",
            ),
            (
                ["decay_style=inverse_sqrt", "warmup_iterations=1", "decay_iterations=10"],
                "decay_iterations: given 10, but decay_style inverse_sqrt ends only with a"
                " cooldown; set cooldown, or leave it out",
            ),
            (
                ["decay_style=wsd", "decay_iterations=10", "cooldown=5", "decay_power=2"],
                "decay_power: given 2.0, but decay_style wsd has none; leave it out, and choose"
                " cooldown_style",
            ),
            (
                ["stages=[{until: 9, shape: linear, end_rate: 1}]", "base=1e-3", "minimum=1e-5"],
                "stages: given with base, minimum, which the stages replace: leave out one or the"
                " other",
            ),
            (
                ["stages=[{until: 9, shape: linear, end_rate: 1}, {until: 9, shape: constant}]"],
                "stages.1.until: given 9, must be above 9, the last step of the stage before it",
            ),
            (
                ["stages=[{until: 9, shape: linear}]"],
                "stages.0.end_rate: missing: shape linear needs the rate at which it ends",
            ),
            (
                ["stages=[{until: 9, shape: constant, start_rate: 1, end_rate: 1}]"],
                "stages.0.end_rate: given 1.0, but shape constant has none; leave it out, or set"
                " start_rate",
            ),
            (
                ["stages=[{until: 9, shape: constant}]"],
                "stages.0.start_rate: missing: the first stage is constant and needs its rate, e.g."
                " 1e-4",
            ),
        )
    ),
    (
        [*GOOD, "optimizer.gradient_scaler.minimum=8", "optimizer.gradient_scaler.initial=4"],
        "optimizer.gradient_scaler.minimum: given 8.0, must be at most initial 4.0",
    ),
    *(
        (
            [*GOOD, "run.experiment_dir=x", "training.shutdown.interval=30", *further],
            "training.shutdown.interval: given 30, must be a multiple of"
            f" training.checkpoint.interval ({given}) with the same offset: a run can only stop"
            " where it saves",
        )
        for given, further in (
            ("null", []),
            ("20", ["training.checkpoint.interval=20"]),
            ("10", ["training.checkpoint.interval=10", "training.checkpoint.offset=3"]),
        )
    ),
    *(
        (
            [
                *GOOD,
                "training.wandb.alert.interval=30",
                f"training.logs.interval={given}",
                *further,
            ],
            "training.wandb.alert.interval: given 30, must be a multiple of training.logs.interval"
            f" ({given}) with the same offset: an alert posts what is logged",
        )
        for given, further in (("20", []), ("10", ["training.wandb.alert.offset=5"]))
    ),
    *(
        (
            [*GOOD, f"training.{name}.keep_every=3"],
            f"training.{name}.keep_every: given 3, but nothing is saved: set"
            f" training.{name}.interval, or leave it out",
        )
        for name in ("checkpoint", "export")
    ),
    (
        [*GOOD, "training.spikes.policy=rewind"],
        "training.spikes.policy: given rewind, but no checkpoint is saved to go back to: set"
        " training.checkpoint.interval, or use skip or stop",
    ),
    *(
        ([*GOOD, f"{name}={value}"], f"{name}: needs a folder to write to: set run.experiment_dir")
        for name, value in (
            ("training.checkpoint.interval", "5"),
            ("training.export.interval", "5"),
            ("training.profiling.interval", "5"),
            ("training.tensorboard", "yes"),
        )
    ),
    (
        [*GOOD, "training.validation.interval=5"],
        "training.validation.iterations: missing: training.validation.interval requires it (number"
        " of batches, e.g. 25)",
    ),
    (
        [*GOOD, "training.validation.iterations=5"],
        "training.validation.interval: missing: training.validation.iterations requires it (number"
        " of steps, e.g. 1000, or null)",
    ),
    (
        [*GOOD, "data.validation_sets.prose=prose.json"],
        "training.validation.interval: missing: data.validation_sets requires it (number of steps,"
        " e.g. 1000, or null for never)",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.head_groups=3"],
        f"{TRANSFORMER}.head_groups: given 3, must divide num_attention_heads 8",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.num_attention_heads=7"],
        f"{TRANSFORMER}.num_attention_heads: given 7, must divide hidden_size 1024, or kv_channels"
        " must be given",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.kv_channels=7"],
        f"{TRANSFORMER}.kv_channels: given 7, must be even: rotary embedding turns pairs",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.hidden_size=8"],
        f"{TRANSFORMER}.kv_channels: given 1, must be even: rotary embedding turns pairs",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.rotary.type=llama3",
            f"{TRANSFORMER}.rotary.low_frequency_factor=4",
        ],
        f"{TRANSFORMER}.rotary.high_frequency_factor: given 4.0, must be above low_frequency_factor"
        " 4.0",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.rotary.type=yarn", f"{TRANSFORMER}.rotary.beta_slow=32"],
        f"{TRANSFORMER}.rotary.beta_fast: given 32.0, must be above beta_slow 32.0",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.gated=no"],
        f"{TRANSFORMER}.gated: given no with activation_type silu, must be yes, or xielu",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.activation_type=xielu"],
        f"{TRANSFORMER}.gated: given yes with activation_type xielu, must be no: xielu is for MLPs"
        " without a gate",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.activation_type=xielu",
            f"{TRANSFORMER}.gated=no",
            f"{TRANSFORMER}.add_linear_biases=yes",
        ],
        f"{TRANSFORMER}.add_linear_biases: given everywhere, but MLPs without a gate have no"
        " biases",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.rotary.partial_rotary_factor=0.51"],
        f"{TRANSFORMER}.rotary.partial_rotary_factor: given 0.51, which rotates 65 dimensions of a"
        " head of 128; they must be even and above 0",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.rotary.type=longrope",
            f"{TRANSFORMER}.rotary.short_factor=[1,2]",
            f"{TRANSFORMER}.rotary.long_factor={[1] * 64}",
        ],
        f"{TRANSFORMER}.rotary.short_factor: given 2 numbers, must be 64: one for each pair of"
        " rotated dimensions",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.rotary.type=longrope",
            f"{TRANSFORMER}.rotary.short_factor={[1] * 64}",
        ],
        f"{TRANSFORMER}.rotary.long_factor: is missing; rotary.type: longrope needs it",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.rotary.type=longrope",
            f"{TRANSFORMER}.rotary.original_context_length=1",
            f"{TRANSFORMER}.rotary.short_factor={[1] * 64}",
            f"{TRANSFORMER}.rotary.long_factor={[1] * 64}",
        ],
        f"{TRANSFORMER}.rotary.original_context_length: given 1, must be above 1 for longrope",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.rotary.type=dynamic", f"{TRANSFORMER}.kv_channels=2"],
        f"{TRANSFORMER}.rotary.type: given dynamic, which needs more than 2 rotated dimensions",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.layer_types=[full_attention]"],
        f"{TRANSFORMER}.layer_types: given 1 entries, must be num_layers 12",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.num_layers=2",
            f"{TRANSFORMER}.layer_types=[full_attention, sliding_attention]",
        ],
        f"{TRANSFORMER}.window_size: missing: blocks with sliding_attention need it, e.g. 4096",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.num_layers=1",
            f"{TRANSFORMER}.layer_types=[full_attention]",
            f"{TRANSFORMER}.window_size=64",
        ],
        f"{TRANSFORMER}.window_size: given 64, but no block of layer_types has sliding_attention;"
        " set it to null",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.num_experts=4", f"{TRANSFORMER}.num_experts_per_token=5"],
        f"{TRANSFORMER}.num_experts_per_token: given 5, must be at most num_experts 4",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.layers_without_experts=[12]"],
        f"{TRANSFORMER}.layers_without_experts: given 12, must be below num_layers 12",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.num_experts=4",
            f"{TRANSFORMER}.activation_type=gelu_pytorch_tanh",
        ],
        f"{TRANSFORMER}.activation_type: given gelu_pytorch_tanh, must be silu or clamped_swiglu"
        " with experts",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.layers_without_rotary=[3, 12]"],
        f"{TRANSFORMER}.layers_without_rotary: given 12, must be below num_layers 12",
    ),
    (
        [
            *GOOD,
            f"{TRANSFORMER}.layers_without_rotary=[3]",
            f"{TRANSFORMER}.attention_temperature.length=64",
        ],
        f"{TRANSFORMER}.attention_temperature: needs rotary positions in every block, which block 3"
        " has not",
    ),
    (
        [*GOOD, "training.export.format=qwen3"],
        "training.export.format: given qwen3, but the model is llama; use auto",
    ),
    (
        [*GOOD, f"{TRANSFORMER}.init_method_min=2", f"{TRANSFORMER}.init_method_max=1"],
        f"{TRANSFORMER}.init_method_min: given 2.0, must be at most init_method_max 1.0",
    ),
    *(
        (
            [*GOOD, f"{above}.init_method_min_{part}=2", f"{TRANSFORMER}.init_method_max=1"],
            f"{above}.init_method_min_{part}: given 2.0, must be at most init_method_max_{part}"
            " 1.0",
        )
        for above, part in (
            *((TRANSFORMER, part) for part in ("qkv", "attn_proj", "mlp_1", "mlp_2")),
            ("model.base_model", "embed"),
        )
    ),
    (
        [*GOOD, "pretrained.optimizer_state=yes", "pretrained.path=x"],
        "pretrained.optimizer_state: given yes, but a Hugging Face folder has no optimizer state;"
        " only format: distributed has",
    ),
    (
        [*GOOD, "pretrained.format=distributed"],
        "pretrained.path: missing: format: distributed needs the folder of a checkpoint",
    ),
    (
        [*FP8, "model.distributed.training_dtype=fp16"],
        "model.distributed.fp8: given yes, which requires training_dtype: bf16, not fp16",
    ),
    (
        [*FP8, "model.base_model.transformer.ffn_hidden_size=100"],
        "model.distributed.fp8: given yes, which requires ffn_hidden_size 100 to be a multiple"
        " of 16",
    ),
    (
        [*FP8, "batch.sequence_length=100"],
        "model.distributed.fp8: given yes, which requires each process's part of sequence_length"
        " 100 to be a multiple of 16",
    ),
    (
        ["data.format=random"],
        "training.train_iters: is 0, and nothing is measured or saved either: set the number of"
        " steps, e.g. 100_000",
    ),
    *mixtures.BROKEN,
]


@pytest.mark.parametrize(("overrides", "problem"), BROKEN)
def test_a_law_that_is_broken(overrides: list[str], problem: str) -> None:
    assert messages(overrides) == [problem]


def test_a_run_that_is_to_stop_without_a_folder_is_reported_both() -> None:
    overrides = [*GOOD, "training.shutdown.interval=5", "training.checkpoint.interval=5"]
    assert messages(overrides) == [
        "training.checkpoint.interval: needs a folder to write to: set run.experiment_dir",
        "training.shutdown.interval: needs a folder to write to: set run.experiment_dir",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        GOOD,
        FILES,
        [*GOOD, "batch.micro_sequence_length=2048"],
        [*GOOD, "model.base_model.cross_entropy_splits=4"],
        *mixtures.MET,
        ["training.train_iters=10", "data.path=[0.9, a, 0.1, b]"],
        ["training.train_iters=10", "data.path=['0.9', a, '1e-1', b]"],
        ["training.train_iters=10", "data.path=[a]", "data.split=[1]"],
        ["training.train_iters=10", "data.format=file", "data.path=[a]"],
        [*GOOD, "data.split=[1]", "training.test_iters=3"],
        [
            *GOOD,
            f"{RATE}.decay_style=cosine",
            f"{RATE}.decay_iterations=10",
            f"{RATE}.warmup_iterations=9",
        ],
        [
            *GOOD,
            f"{RATE}.decay_style=linear",
            f"{RATE}.decay_iterations=10",
            f"{RATE}.minimum=1e-4",
        ],
        [
            *GOOD,
            f"{RATE}.decay_iterations=10",
            f"{RATE}.warmup_iterations=10",
            f"{RATE}.minimum=1e-3",
        ],  # constant
        [*GOOD, f"{RATE}.base=0"],
        [*GOOD, f"{RATE}.decay_style=wsd", f"{RATE}.decay_iterations=10", f"{RATE}.cooldown=0.5"],
        [*GOOD, f"{RATE}.decay_style=inverse_sqrt", f"{RATE}.warmup_iterations=1"],
        [*GOOD, f"{RATE}.stages=[{{until: 2, shape: linear, end_rate: 1e-3}}]"],
        [
            *GOOD,
            "run.experiment_dir=x",
            "training.checkpoint.interval=10",
            "training.shutdown.interval=30",
            "training.checkpoint.offset=3",
            "training.shutdown.offset=13",
        ],
        [*GOOD, "training.wandb.alert.interval=200"],
        [
            *GOOD,
            "run.experiment_dir=x",
            "training.export.interval=2",
            "training.export.keep_every=3",
        ],
        [*GOOD, f"{TRANSFORMER}.num_attention_heads=7", f"{TRANSFORMER}.kv_channels=128"],
        [*GOOD, f"{TRANSFORMER}.rotary.low_frequency_factor=9"],
        [*GOOD, f"{TRANSFORMER}.init_method_min=2", f"{TRANSFORMER}.init_method_min_qkv=0"],
        [
            *GOOD,
            "pretrained.optimizer_state=yes",
            "pretrained.path=x",
            "pretrained.format=distributed",
        ],
        [
            "training.validation.interval=1",
            "training.validation.iterations=1",
            "data.format=random",
        ],
        ["training.export.interval=1", "run.experiment_dir=x", "data.format=random"],
        ["training.checkpoint.interval=1", "run.experiment_dir=x", "data.format=random"],
        ["training.test_iters=1", "data.format=random"],
    ],
)
def test_constraints_that_are_met(overrides: list[str]) -> None:
    assert messages(overrides) == []


FOLDER = "run.experiment_dir=x"
SAVES = [FOLDER, "training.checkpoint.interval=10", "training.checkpoint.keep_every=2"]
# The settings, the one that turns them off, and the settings that then have no effect.
OFF: list[tuple[list[str], str, list[str]]] = [
    (
        [
            "training.validation.interval=5",
            "training.validation.iterations=5",
            "data.validation_sets.prose=prose.json",
        ],
        "training.validation.interval=null",
        ["training.validation.iterations"],
    ),
    (
        [*SAVES, "training.shutdown.interval=30"],
        "training.checkpoint.interval=null",
        ["training.checkpoint.keep_every", "training.shutdown.interval"],
    ),
    ([*SAVES, "training.spikes.policy=rewind"], "training.checkpoint.interval=null", []),
    ([*SAVES, "training.spikes.policy=rewind"], "run.experiment_dir=null", []),
    (
        [
            FOLDER,
            "training.export.interval=5",
            "training.export.keep_every=2",
            "training.export.data_type=fp32",
        ],
        "training.export.interval=null",
        ["training.export.keep_every"],
    ),
    (
        [
            *(
                *SAVES,
                "training.export.interval=5",
                "training.export.keep_every=3",
                "training.shutdown.interval=10",
            ),
            *("training.profiling.interval=7", "training.tensorboard=yes"),
        ],
        "run.experiment_dir=null",
        [
            *(
                "training.checkpoint.interval",
                "training.export.interval",
                "training.shutdown.interval",
            ),
            *("training.checkpoint.keep_every", "training.export.keep_every"),
            *("training.profiling.interval", "training.tensorboard"),
        ],
    ),
    (
        [FOLDER, "training.profiling.interval=7", "training.profiling.offset=3"],
        "training.profiling.interval=null",
        [],
    ),
    (
        ["training.double_check.interval=7", "training.double_check.offset=3"],
        "training.double_check.interval=null",
        [],
    ),
    (
        [*SAVES, "training.shutdown.interval=30", "training.shutdown.offset=0"],
        "training.shutdown.interval=null",
        [],
    ),
    (
        [*SAVES, "training.spikes.policy=rewind", "training.spikes.window=9"],
        "training.spikes.policy=none",
        [],
    ),
    (["training.test_iters=3"], "training.test_iters=0", []),
    (
        ["training.wandb.alert.interval=100"],
        "training.logs.interval=null",
        ["training.wandb.alert.interval"],
    ),
    (["training.wandb.alert.interval=100"], "training.wandb.alert.interval=null", []),
    (
        ["training.wandb.alert.interval=100", "training.wandb.group_name=x"],
        "training.wandb=null",
        [],
    ),
    (
        [f"{RATE}.decay_style=cosine", f"{RATE}.decay_iterations=10", f"{RATE}.minimum=1e-5"],
        f"{RATE}.decay_style=constant",
        [],
    ),
    (
        [f"{RATE}.decay_style=wsd", f"{RATE}.decay_iterations=10", f"{RATE}.cooldown=5"],
        f"{RATE}.decay_style=constant",
        [],
    ),
    (
        [
            *(
                "model.distributed.tensor_parallel=2",
                "model.distributed.sequence_tensor_parallel=yes",
            ),
            f"{TRANSFORMER}.head_groups=2",
        ],
        "model.distributed.tensor_parallel=1",
        [],
    ),
    (
        [
            *("model.distributed.pipeline_parallel=2", "model.multi_stage.layers_per_stage=3"),
            *(
                "model.multi_stage.pipeline_schedule=looped_bfs",
                "batch.breadth_first_micro_batches=4",
            ),
        ],
        "model.distributed.pipeline_parallel=1",
        [
            *("model.multi_stage.layers_per_stage", "model.multi_stage.pipeline_schedule"),
            "batch.breadth_first_micro_batches",
        ],
    ),
    (
        ["model.base_model.cross_entropy_splits=4"],
        "model.base_model.cross_entropy_impl=torch",
        ["model.base_model.cross_entropy_splits"],
    ),
    (["model.base_model.cross_entropy_impl=triton"], "run.enable_triton_kernels=no", []),
    (
        ["model.multi_stage.compile_all=yes"],
        "run.torch_dynamo_enable=no",
        ["model.multi_stage.compile_all"],
    ),
    (
        ["pretrained.path=x", "pretrained.format=distributed", "pretrained.optimizer_state=yes"],
        "pretrained.path=null",
        ["pretrained.format", "pretrained.optimizer_state"],
    ),
    (
        ["pretrained.path=x", "pretrained.format=distributed", "pretrained.optimizer_state=yes"],
        "pretrained.model_weights=no",
        ["pretrained.optimizer_state"],
    ),
]


@pytest.mark.parametrize(
    ("given", "off", "left_out"), OFF, ids=[f"{i}-{row[1]}" for i, row in enumerate(OFF)]
)
def test_a_thing_is_turned_off_by_one_override(
    given: list[str], off: str, left_out: list[str]
) -> None:
    processes = 2 if any("_parallel" in one for one in given) else 1
    assert messages([*GOOD, *given], processes) == []
    assert messages([*GOOD, *given, off], processes) == []
    config = validate(TrainConfig, read(None, [*GOOD, *given, off]), REFUSED, RENAMED)
    plain = validate(TrainConfig, read(None, GOOD), REFUSED, RENAMED)
    for path in left_out:
        assert at(config, path) == at(plain, path), path
    assert (
        config.training.spikes.policy
        == ("skip" if any("rewind" in one for one in given) else "none")
        or "none" in off
    )
    written = Document(yaml.safe_load(dump(config)), {}, "config.yaml")  # which is valid input
    assert validate(TrainConfig, written, REFUSED, RENAMED).model_dump() == config.model_dump()


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)  # wandb may be null
    return config


def test_every_pair_of_one_that_turns_off_is_tried() -> None:
    tried = {(off.partition("=")[0], path) for _, off, left_out in OFF for path in left_out}
    for path, _, others in DISABLED_BY:
        for other in others:
            names = {other, f"{other}.interval"}
            assert any((path, name) in tried for name in names), (path, other)
            assert not other.startswith(f"{path}.")


def test_groups_of_processes() -> None:
    size = "model.multi_stage.shard_size"
    assert messages([*GOOD, f"{size}=4"], 6) == [
        f"{size}: given 4, must divide the 6 processes: 1, 2, 3, 6"
    ]
    for processes, fits in ((1, 8), (6, 3), (6, 1), (6, 6), (6, 8)):
        assert messages([*GOOD, f"{size}={fits}"], processes) == []


AXES, STAGES, SCHEDULE = (
    "model.distributed",
    "model.multi_stage.layers_per_stage",
    "model.multi_stage.pipeline_schedule",
)
SHAPE = [
    *GOOD,
    f"{TRANSFORMER}.num_layers=8",
    f"{TRANSFORMER}.num_attention_heads=8",
    f"{TRANSFORMER}.head_groups=4",
]
PIPELINE = [*SHAPE, f"{AXES}.pipeline_parallel=2", "batch.batch_size=8", "batch.micro_batch_size=1"]
# The settings of a layout, the number of processes, the message.
LAYOUTS: list[tuple[list[str], int, str]] = [
    *mixtures.LAYOUTS,
    (
        [
            *PIPELINE,
            f"{AXES}.pipeline_parallel=2",
            "run.experiment_dir=x",
            "training.samples={interval: 5, prompts: [a]}",
        ],
        2,
        "training.samples.interval: is not possible with model.distributed.pipeline_parallel: a"
        " process needs all layers and all tokens of a text; leave one of them out. `fast-llm"
        " convert` and transformers generate text from any checkpoint",
    ),
    (
        [
            *GOOD,
            "run.experiment_dir=x",
            "training.profiling.interval=5",
            "training.profiling.ranks=[0, 2, 3]",
        ],
        2,
        "training.profiling.ranks: given [0, 2, 3], each must be below the number of processes,"
        " which is 2",
    ),
    (
        [*SHAPE, f"{AXES}.tensor_parallel=4", f"{AXES}.sequence_data_parallel=2"],
        4,
        f"{AXES}.tensor_parallel: tensor_parallel 4 × sequence_data_parallel 2 = 8 must divide the"
        " number of processes, which is 4; start that many with torchrun (to --validate alone, set"
        " WORLD_SIZE=8 in the environment)",
    ),
    (
        [*SHAPE, f"{AXES}.pipeline_parallel=2"],
        1,
        f"{AXES}.pipeline_parallel: pipeline_parallel 2 must divide the number of processes, which"
        " is 1; start that many with torchrun (to --validate alone, set WORLD_SIZE=2 in the"
        " environment)",
    ),
    (
        [*SHAPE, f"{AXES}.tensor_parallel=2", "model.multi_stage.shard_size=2"],
        6,
        "model.multi_stage.shard_size: given 2, must divide the 3 processes that share training"
        " state: 1, 3",
    ),
    (
        [*SHAPE, f"{AXES}.tensor_parallel=2", *FP8],
        2,
        f"{AXES}.fp8: given yes, which is not supported with tensor_parallel: 2; turn one of them"
        " off",
    ),
    (
        [*SHAPE, f"{AXES}.tensor_parallel=8"],
        8,
        f"{AXES}.tensor_parallel: given 8, must divide the model's head_groups 4, e.g. 4",
    ),
    (
        [*SHAPE, f"{AXES}.expert_parallel=2"],
        2,
        f"{AXES}.expert_parallel: given 2, but the model has no experts; leave it out",
    ),
    (
        [*SHAPE, f"{AXES}.expert_parallel=4", f"{TRANSFORMER}.num_experts=6"],
        4,
        f"{AXES}.expert_parallel: given 4, must divide the model's num_experts 6, e.g. 2",
    ),
    (
        [*SHAPE, f"{AXES}.expert_parallel=3", f"{TRANSFORMER}.num_experts=6"],
        4,
        f"{AXES}.expert_parallel: given 3, must divide the 4 processes that share training state",
    ),
    (
        [*SHAPE, f"{AXES}.tensor_parallel=2", "model.base_model.vocab_size=1001"],
        2,
        f"{AXES}.tensor_parallel: given 2, must divide the model's vocab_size 1001, e.g. 1",
    ),
    (
        [*SHAPE, f"{AXES}.sequence_data_parallel=2", "batch.sequence_length=1002"],
        2,
        "batch.sequence_length: given 1002, must be a multiple of 2 × sequence_data_parallel 2 ="
        " 4: each process holds a chunk from the front and one from the back",
    ),
    (
        [
            *SHAPE,
            f"{AXES}.tensor_parallel=4",
            f"{AXES}.sequence_tensor_parallel=yes",
            "batch.sequence_length=1002",
        ],
        4,
        "batch.sequence_length: given 1002, must be a multiple of tensor_parallel 4 with"
        " sequence_tensor_parallel",
    ),
    (
        [
            *SHAPE,
            f"{AXES}.tensor_parallel=4",
            f"{AXES}.sequence_tensor_parallel=yes",
            f"{AXES}.sequence_data_parallel=3",
            "batch.sequence_length=1002",
        ],
        12,
        "batch.sequence_length: given 1002, must be a multiple of tensor_parallel 4 ×"
        " sequence_data_parallel 3 = 12 with sequence_tensor_parallel",
    ),
    (
        [*SHAPE, f"{STAGES}=2"],
        1,
        f"{STAGES}: given 2, but model.distributed.pipeline_parallel is 1; leave it out",
    ),
    (
        [*SHAPE, f"{SCHEDULE}=gpipe"],
        1,
        f"{SCHEDULE}: given gpipe, but model.distributed.pipeline_parallel is 1; leave it out",
    ),
    (
        [*SHAPE, "batch.breadth_first_micro_batches=2"],
        1,
        "batch.breadth_first_micro_batches: given 2, but model.distributed.pipeline_parallel is 1;"
        " use depth_first_micro_batches",
    ),
    ([*PIPELINE, f"{STAGES}=0"], 2, f"{STAGES}: given 0, must be 1 or more"),
    ([*PIPELINE, f"{STAGES}=[4,3]"], 2, f"{STAGES}: given [4, 3], must add up to num_layers 8"),
    (
        [*PIPELINE, f"{AXES}.pipeline_parallel=9"],
        9,
        f"{AXES}.pipeline_parallel: given 9, must be at most num_layers 8",
    ),
    (
        [*PIPELINE, f"{STAGES}=3"],
        2,
        f"{STAGES}: given 3, which makes 3 stages of 8 layers; their number must be a multiple of"
        " pipeline_parallel 2",
    ),
    (
        [*PIPELINE, "batch.breadth_first_micro_batches=3"],
        2,
        "batch.breadth_first_micro_batches: given 3, must divide the 8 micro-batches of a step",
    ),
    (
        [*PIPELINE, "batch.depth_first_micro_batches=3"],
        2,
        "batch.depth_first_micro_batches: given 3, must divide the 8 micro-batches of a step",
    ),
    (
        [*PIPELINE, f"{STAGES}=2", f"{SCHEDULE}=1f1b"],
        2,
        f"{SCHEDULE}: given 1f1b, which needs one stage a process, but there are 2; set"
        " layers_per_stage to 4",
    ),
    (
        [*PIPELINE, f"{SCHEDULE}=zbv_zero_bubble"],
        2,
        f"{SCHEDULE}: given zbv_zero_bubble, which needs 2 stages a process, but there is 1; set"
        " layers_per_stage to 2",
    ),
    (
        [*PIPELINE, f"{SCHEDULE}=1f1b", "batch.batch_size=1"],
        2,
        f"{SCHEDULE}: given 1f1b, which needs at least 2 micro-batches, not 1; use gpipe",
    ),
    (
        [*PIPELINE, f"{STAGES}=2", f"{SCHEDULE}=interleaved_1f1b", "batch.batch_size=5"],
        2,
        f"{SCHEDULE}: interleaved_1f1b takes a multiple of pipeline_parallel 2 micro-batches, not"
        " 5; choose a batch_size with 4 or 6, or looped_bfs",
    ),
    (
        [
            *PIPELINE,
            f"{STAGES}=2",
            f"{SCHEDULE}=interleaved_zero_bubble",
            "model.multi_stage.zero_stage=3",
        ],
        2,
        f"{SCHEDULE}: given interleaved_zero_bubble, but with zero_stage: 3 it loses gradients:"
        " weights are freed before theirs are made; use zero_stage: 2 or another schedule",
    ),
    (
        [
            *PIPELINE,
            f"{STAGES}=2",
            f"{SCHEDULE}=interleaved_zero_bubble",
            "model.base_model.transformer.mlp_recompute_level=selective",
        ],
        2,
        f"{SCHEDULE}: given interleaved_zero_bubble, which computes gradients in two passes, but"
        " mlp_recompute_level: selective saves results for one; use full, block or none, or another"
        " schedule",
    ),
    (
        [*PIPELINE, f"{STAGES}=2", f"{SCHEDULE}=zbv_zero_bubble"],
        2,
        f"{SCHEDULE}: given zbv_zero_bubble, which puts embedding and head on one process as two"
        " weights, but tie_word_embeddings makes them one; use interleaved_zero_bubble",
    ),
]


@pytest.mark.parametrize(("overrides", "processes", "message"), LAYOUTS)
def test_layouts_that_cannot_be(overrides: list[str], processes: int, message: str) -> None:
    assert messages(overrides, processes) == [message]


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([*SHAPE, f"{AXES}.tensor_parallel=4", f"{AXES}.sequence_tensor_parallel=yes"], 8),
        ([*SHAPE, f"{AXES}.sequence_data_parallel=4", "model.multi_stage.shard_size=2"], 8),
        ([*PIPELINE, f"{STAGES}=[1,3,3,1]"], 2),
        ([*PIPELINE, f"{STAGES}=2", f"{SCHEDULE}=looped_bfs", "batch.batch_size=10"], 4),
        ([*PIPELINE, "batch.depth_first_micro_batches=4"], 2),
        ([*GOOD, "training.profiling.ranks=[2]"], 1),  # nothing is profiled
        (
            [
                *GOOD,
                "run.experiment_dir=x",
                "training.profiling.interval=5",
                "training.profiling.ranks=[1]",
            ],
            2,
        ),
        (
            [*PIPELINE, f"{AXES}.pipeline_parallel=4", "batch.batch_size=1"],
            4,
        ),  # too few for 1f1b: gpipe by default
    ],
)
def test_layouts_that_can_be(overrides: list[str], processes: int) -> None:
    assert messages(overrides, processes) == []


def test_every_constraint_is_violated_above() -> None:
    sources = {
        str(module.__file__): Path(str(module.__file__))
        for module in (checks, data_checks, model_checks, rate_checks)
    }
    yields = {
        (name, node.lineno)
        for name, path in sources.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Yield)
    }
    assert {name for name, _ in yields} == set(sources)
    reached: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in sources:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for overrides, _ in BROKEN:
            messages(overrides)
        for overrides, processes, _ in LAYOUTS:
            messages(overrides, processes)
    finally:
        sys.settrace(before)
    missed = sorted(yields - reached)
    assert not missed, [sources[name].read_text().splitlines()[line - 1] for name, line in missed]


def test_constraints_and_single_settings_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "training:\n  train_iters: many\n  shutdown: {interval: 5}\ndata:\n  format: file\n "
        " splitt: [1]\nbatch:\n  batch_size: 1\n  micro_batch_size: 2\nrun:\n  experiment_dir: x\n"
    )
    constraints: Any = partial(violations, processes=2)
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, read(path), REFUSED, RENAMED, constraints=constraints)
    assert [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems] == [
        'c.yaml:2: training.train_iters: given "many", must be an integer of 0 or more',
        "c.yaml:3: training.shutdown.interval: given 5, must be a multiple of"
        " training.checkpoint.interval (null) with the same offset: a run can only stop where it"
        " saves",
        "c.yaml:4: data.path: missing: format: file needs it; give the dataset.json of `fast-llm"
        " prepare` with format: file, or try things with format: random",
        "c.yaml:6: data.splitt: no such setting; did you mean data.split? (allowed: format, path,"
        " sources, stages, split, packing, tokenizer, use_loss_masking_spans, fim, validation_sets,"
        " data_sample_warn_time_ms)",
        "c.yaml:8: batch.batch_size: batch_size 1 / micro_batch_size 2 = 1 micro-batch for 2"
        " processes: 1 would have nothing to do; raise it, lower micro_batch_size or start fewer",
    ]
