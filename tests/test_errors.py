"""Every mistake that planning and commands report: exact message, exit code 2, torch not loaded.

Mistakes of YAML and settings are in tests/config; those of damaged files with the modules that read
them. Here a whole command is given one wrong thing, made with small files.
"""

import errno
import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fast_llm import cli
from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.document import read
from fast_llm.config.mistakes import iter_settings
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.train import TrainConfig
from fast_llm.data import tokenizer
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingPackage,
    ReportedElsewhere,
    TrainingStopped,
    UserError,
)
from fast_llm.models import FAMILIES
from fast_llm.planning.preflight import preflight
from fast_llm.storage import content_digest

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with token files, and a model with weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    tokens("tokens")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    block, heads = "model.layers.0.", {"q": 8, "k": 4, "v": 4}
    weights = {
        "model.embed_tokens.weight": np.zeros((64, 8), np.float32),
        "model.norm.weight": np.zeros(8, np.float32),
        f"{block}input_layernorm.weight": np.zeros(8, np.float32),
        f"{block}post_attention_layernorm.weight": np.zeros(8, np.float32),
        **{
            f"{block}self_attn.{name}_proj.weight": np.zeros((size, 8), np.float32)
            for name, size in heads.items()
        },
        f"{block}self_attn.o_proj.weight": np.zeros((8, 8), np.float32),
        f"{block}mlp.gate_proj.weight": np.zeros((12, 8), np.float32),
        f"{block}mlp.up_proj.weight": np.zeros((12, 8), np.float32),
        f"{block}mlp.down_proj.weight": np.zeros((8, 12), np.float32),
    }
    safetensors.numpy.save_file(weights, model / "model.safetensors")
    return tmp_path


def tokens(prefix: str, documents: int = 20, length: int = 50, token: int = 7) -> None:
    writer = TokenFileWriter(Path(prefix), np.dtype("uint16"))
    for _ in range(documents):
        writer.append(np.full(length, token))
    writer.close()


MODEL = "pretrained.path=model"
SMALL = [
    "training.train_iters=10",
    "data.path=tokens",
    "data.split=[8,1,1]",
    "batch.batch_size=2",
    "batch.sequence_length=16",
]


def messages(
    capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "train"
) -> list[str]:
    """The lines of a command that must fail, without its name in front."""
    capsys.readouterr()
    validate = ["--validate"] if command == "train" else []
    assert cli.main([command, *validate, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"fast-llm {command}: ") and "Traceback" not in err
    lines = err.removeprefix(f"fast-llm {command}: ").splitlines()
    return lines if len(lines) == 1 else [line.removeprefix("  ") for line in lines]


def test_what_the_mistakes_are_made_in_is_right(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--validate", *SMALL, MODEL]) == 0
    out, err = capsys.readouterr()
    assert (
        out.startswith("Model         1,")
        and "Start         the weights of model\n" in out
        and err == ""
    )


# The classes themselves.


def test_classes() -> None:
    assert str(ConfigError(["a", "b"])) == "a\nb" and ConfigError(["a", "b"]).problems == ["a", "b"]
    assert str(MissingPackage("wandb", "training.wandb")) == (
        "training.wandb needs the package wandb: pip install wandb"
    )
    for kind in (ConfigError, DataError, CheckpointError, MissingPackage, TrainingStopped):
        assert issubclass(kind, UserError)
        assert kind.exit_code == (1 if kind is TrainingStopped else 2)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["train", "gpt"],
            "no settings: give --config FILE, or section.setting=value; for example `fast-llm"
            " train gpt --config"
            " train.yaml`",
        ),
        (
            ["prepare"],
            "no settings: give --config FILE, or section.setting=value; for example `fast-llm"
            " prepare gpt_memmap"
            " --config prepare.yaml`",
        ),
        (
            ["convert", "gpt"],
            "no settings: give --config FILE, or section.setting=value; for example `fast-llm"
            " convert gpt"
            " input.path=RUN/checkpoint/1000 output.path=MODEL`",
        ),
        (["train", "llama", "a.b=1"], "llama: must be gpt or a setting a.b=c"),
        (["prepare", "gpt", "a.b=1"], "gpt: must be gpt_memmap or a setting a.b=c"),
        (
            ["train", "a.b", "50"],
            "a.b: must be gpt or a setting a.b=c; write a.b=50",
        ),
        (
            ["train", "c.yaml"],
            "c.yaml: must be gpt or a setting a.b=c; a file is given as --config c.yaml",
        ),
        (
            ["train", "gpt", "a.b=1", "gpt"],
            "2 mistakes\n  override gpt: must have the form section.setting=value, e.g."
            " training.train_iters=1000\n"
            "  override a.b=1: a: no such setting (allowed: training, batch, data, optimizer,"
            " pretrained, model, run)",
        ),
        (["train", "-c", "no.yaml"], "no.yaml: no such file"),
        (["train", "-c", "model"], "model: a folder; give the YAML file in it"),
    ],
)
def test_the_command_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"fast-llm {arguments[0]}: {problem}\n"


@pytest.mark.parametrize("given", ["0", "-1", "two", "", "1.5"])
def test_a_wrong_number_of_processes(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    assert messages(capsys, *SMALL) == [
        f"WORLD_SIZE: given {given!r} in the environment, must be the number of processes; unset it"
    ]


@pytest.mark.parametrize(
    ("given", "found"), [(None, "missing"), ("2", "given '2'"), ("x", "given 'x'")]
)
def test_a_wrong_place_among_the_processes(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    found: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    if given is not None:
        monkeypatch.setenv("RANK", given)
    assert cli.main(["train", *SMALL]) == 2
    assert capsys.readouterr().err == (
        f"fast-llm train: RANK: {found} in the environment, must be from 0 to 1, as WORLD_SIZE is"
        " 2; start the processes with"
        " torchrun, or unset both\n"
    )


def test_a_mistake_that_all_processes_see_is_reported_by_the_first(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (problem,) = messages(capsys, *SMALL, "batch.micro_batch_size=1")
    assert problem.endswith(
        ": batch.batch_size: batch_size 2 / micro_batch_size 1 = 2 micro-batches for 3 processes:"
        " 1 would have nothing to"
        " do; raise it, lower micro_batch_size or start fewer"
    )
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", *SMALL, "batch.micro_batch_size=1"]) == 2
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_no_demo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert messages(capsys, "model", command="demo") == [
        "model: exists already and is not from an earlier demo; give another folder"
    ]
    assert (here / "model" / "config.json").exists()  # and nothing was deleted


# The pretrained model.


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (
            "./none",
            "./none: no such folder, and not the name of a model on the Hugging Face Hub"
            " (organisation/name); fetch it"
            " with `git lfs install` and `git clone https://huggingface.co/<name>`",
        ),
        ("mode", "mode: no such folder; did you mean model?"),
        ("tokens.bin", "tokens.bin: a file; give the folder with config.json and the weights"),
        ("empty", "empty/config.json: no such file; empty is not a complete model folder"),
    ],
)
def test_a_pretrained_model_that_is_not_there(
    here: Path, capsys: pytest.CaptureFixture[str], path: str, problem: str
) -> None:
    (here / "empty").mkdir()
    (here / "c.yaml").write_text(f"pretrained:\n  format: llama\n  path: {path}\n")
    assert messages(capsys, "-c", "c.yaml", *SMALL) == [f"c.yaml:3: pretrained.path: {problem}"]
    assert messages(capsys, f"pretrained.path={path}", *SMALL) == [
        f"override pretrained.path={path}: pretrained.path: {problem}"
    ]


def test_a_model_of_the_hub_without_a_network(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (problem,) = messages(capsys, *SMALL, "pretrained.path=nobody/nothing")
    assert problem.startswith(
        "override pretrained.path=nobody/nothing: pretrained.path: nobody/nothing: not a local"
        " folder, and downloading it from the Hugging Face Hub failed: "
    )


def test_a_model_of_the_hub_without_its_client(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert messages(capsys, *SMALL, "pretrained.path=a/b") == [
        "override pretrained.path=a/b: pretrained.path: a/b is not a local folder; downloading"
        " it from the Hub needs the package huggingface_hub: pip install huggingface_hub"
    ]


def test_another_architecture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = here / "model" / "config.json"
    allowed = ", ".join(f'"{name}"' for name in sorted(FAMILIES))
    for kind, reason in (
        ("deepseek_v3", "; it has multi-head latent attention"),
        ("unheard_of", ""),
    ):
        file.write_text(json.dumps(CONFIG | {"model_type": kind}))
        assert [line.partition("model/")[2] for line in messages(capsys, *SMALL, MODEL)] == [
            f'config.json: model_type: given "{kind}", must be one of {allowed}{reason}'
        ]
    file.write_text(json.dumps(CONFIG | {"model_type": "qwen2", "hidden_act": "gelu"}))
    assert [line.partition("model/")[2] for line in messages(capsys, *SMALL, MODEL)] == [
        'config.json: hidden_act: given "gelu", must be "silu"'
    ]


def test_a_format_of_another_family(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = messages(capsys, *SMALL, MODEL, "pretrained.format=qwen3")
    assert len(said) == 1 and said[0].startswith(
        "override pretrained.format=qwen3: pretrained.format: given qwen3, but "
    )
    assert said[0].endswith("model/config.json says model_type llama; use auto")


def test_settings_that_a_family_has_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = "model.base_model"
    own = [f"{base}.transformer.qk_norm=head", f"{base}.family=olmo2"]
    above = f"{base}.transformer"
    said = [line.partition(": ")[2] for line in messages(capsys, *SMALL, *own)]
    assert [line for line in said if line] == [
        f'{above}.norm_placement: given "pre", but OLMo 2 has "post"; choose another'
        " model.base_model.family",
        f'{above}.qk_norm: given "head", but OLMo 2 has "projection"; choose another'
        " model.base_model.family",
    ]


def test_a_shape_that_contradicts_the_models(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override = "model.base_model.transformer.hidden_size=16"
    assert messages(capsys, *SMALL, MODEL, override) == [
        f"override {override}: model.base_model.transformer.hidden_size: given 16, but"
        " model/config.json says 8; leave"
        " it out, the pretrained model decides"
    ]


def test_mistakes_in_settings_do_not_hide_those_of_the_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["training.train_iters=-1", "model.base_model.transformer.hidden_size=16"]
    for path, about_the_model in ((MODEL, "says 8"), ("pretrained.path=none", "no such folder")):
        count, *problems = messages(capsys, *SMALL, path, *wrong)
        assert count == "2 mistakes"
        assert sum("training.train_iters: given -1" in problem for problem in problems) == 1
        assert sum(about_the_model in problem for problem in problems) == 1


def test_weights_that_are_missing_or_do_not_fit(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = here / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    weights.unlink()
    assert messages(capsys, *SMALL, MODEL) == [
        "override pretrained.path=model: pretrained.path: model: no model.safetensors and no"
        " model.safetensors.index.json; fetch the weights, or set"
        " pretrained.model_weights: no to start from random ones"
    ]
    assert cli.main(["train", "--validate", *SMALL, MODEL, "pretrained.model_weights=no"]) == 0
    missing = {name: tensor for name, tensor in tensors.items() if "down_proj" not in name}
    safetensors.numpy.save_file(missing | {"model.norm.weight": np.zeros(9, np.float32)}, weights)
    problems = messages(capsys, *SMALL, MODEL)
    assert any("down_proj" in problem for problem in problems)
    assert any("model.norm.weight" in problem and "9" in problem for problem in problems)


@pytest.mark.parametrize("path", ["none", "model"])
def test_a_checkpoint_to_start_from_that_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (problem,) = messages(
        capsys, *SMALL, f"pretrained.path={path}", "pretrained.format=distributed"
    )
    assert problem.endswith(
        f"{path}: has no fast_llm_manifest.json; it is not a complete checkpoint of this project"
    )


# Tokenizer and data.


def test_a_tokenizer_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert messages(capsys, *SMALL, MODEL, "data.tokenizer.path=./none") == [
        "override data.tokenizer.path=./none: data.tokenizer.path: ./none: no such file or folder,"
        " and not a model on the"
        " Hugging Face Hub (organisation/name)"
    ]
    (here / "model" / "tokenizer.json").write_text("[]")
    assert messages(capsys, *SMALL, MODEL) == [
        "override pretrained.path=model: pretrained.path: model/tokenizer.json: not a JSON object"
    ]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.path=none"], "none.idx: no such file"),  # and how to make it
        (["data.path=tokens.bin"], "data.path: given tokens.bin, must be without .bin: tokens"),
        (
            ["data.path=none.json"],
            "none.json: no such file; `fast-llm prepare` writes it next to its output_path",
        ),
        (
            ["batch.sequence_length=1000"],
            "tokens: 800 tokens for training, fewer than one sequence of 1000 + 1; lower"
            " batch.sequence_length, prepare"
            " more data, or leave it out",
        ),
        (
            ["training.validation.interval=1", "training.validation.iterations=9"],
            "data.split: validation needs 9 batches × 2 sequences = 18 sequences of 16 tokens, but"
            " [8, 1, 1] of the"
            " documents leaves 6; lower training.validation.iterations to 3, or give validation a"
            " larger share, or"
            " prepare more data",
        ),
        (
            ["training.test_iters=9"],
            "data.split: test needs 9 batches × 2 sequences = 18 sequences of 16 tokens, but [8,"
            " 1, 1] of the documents"
            " leaves 6; lower training.test_iters to 3, or give test a larger share, or prepare"
            " more data",
        ),
        (
            [
                "training.validation.interval=1",
                "training.validation.iterations=1",
                "batch.batch_size=5",
                "data.validation_sets.few=few",
            ],
            "data.validation_sets.few: needs one batch of 5 sequences of 16 tokens, but it has 1;"
            " prepare more of it,"
            " or leave it out",
        ),
    ],
)
def test_data_that_does_not_do(
    here: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], problem: str
) -> None:
    tokens("few", documents=1, length=20)
    (said,) = messages(capsys, *SMALL, MODEL, *overrides)
    assert problem in said


def test_data_of_another_vocabulary(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens("large", token=99)
    entry = {
        "prefix": "large",
        "num_tokens": 1000,
        "num_documents": 20,
        "dtype": "uint16",
        "weight": 1.0,
    }
    (here / "large.json").write_text(json.dumps({"datasets": [entry], "max_token_id": 99}))
    assert messages(capsys, *SMALL, MODEL, "data.path=large.json", "data.format=file") == [
        "override data.path=large.json: data.path: large.json: holds token 99,"
        " but the model's vocab_size is 64; prepare the data with the model's own tokenizer, or, if"
        " this is it, give the model rows for its new tokens: fast-llm extend-vocabulary MODEL OUT"
    ]


def test_data_of_another_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save("model/tokenizer.json")
    fingerprint = tokenizer.load("model").fingerprint([], [])
    entry = {
        "prefix": "tokens",
        "num_tokens": 1000,
        "num_documents": 20,
        "dtype": "uint16",
        "weight": 1.0,
    }
    (here / "other.json").write_text(
        json.dumps({"datasets": [entry], "tokenizer": {"fingerprint": "f" * 64}})
    )
    assert messages(capsys, *SMALL, MODEL, "data.path=other.json") == [
        "override data.path=other.json: data.path: other.json: made with another tokenizer than"
        f" the model's (fingerprint ffffffffffff…, the model's is"
        f" {fingerprint[:12]}…); prepare the data again with tokenizer.path set to the model's"
        " folder"
    ]


def test_mistakes_in_different_things_are_reported_together(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "model" / "model.safetensors").unlink()
    (here / "model" / "tokenizer.json").write_text("[]")
    (here / "file").touch()
    problems = messages(capsys, *SMALL, MODEL, "data.path=none", "run.experiment_dir=file")
    assert problems[0] == "4 mistakes"
    model = "override pretrained.path=model: pretrained.path: "
    assert problems[1] == f"{model}model/tokenizer.json: not a JSON object"
    assert problems[2].startswith("override data.path=none: data.path: none.idx: no such file")
    assert problems[3].startswith(f"{model}model: no model.safetensors")
    assert (
        problems[4]
        == "override run.experiment_dir=file: run.experiment_dir: file cannot be a folder: file is"
        " a file"
    )


# Optional packages.


@pytest.mark.parametrize(
    ("package", "override", "problem"),
    [
        (
            "tensorboard",
            "training.tensorboard=yes",
            "training.tensorboard: yes needs the package tensorboard: pip install tensorboard",
        ),
        (
            "wandb",
            "training.wandb.entity_name=me",
            "training.wandb needs the package wandb: pip install wandb",
        ),
    ],
)
def test_optional_packages(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    override: str,
    problem: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )
    assert messages(capsys, *SMALL, MODEL, override, "run.experiment_dir=run") == [
        f"override {override}: {problem}"
    ]


@pytest.mark.parametrize("name", ["model/config.json", "model/model.safetensors", "data.json"])
def test_a_pipe_is_not_waited_for(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Path(name).unlink(missing_ok=True)
    os.mkfifo(name)
    said = messages(
        capsys, *SMALL, MODEL, *(["data.path=data.json"] if name == "data.json" else [])
    )
    assert any(f"{name}: not a file" in line for line in said), said


# The experiment folder.


def test_a_folder_inside_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").touch()
    for name in ("file", "file/run"):
        assert messages(capsys, *SMALL, MODEL, f"run.experiment_dir={name}") == [
            f"override run.experiment_dir={name}: run.experiment_dir: {name} cannot be a folder:"
            " file is a file"
        ]


@pytest.mark.parametrize(
    "setting",
    [
        "run.experiment_dir",
        "data.path",
        "pretrained.path",
        "data.tokenizer.path",
        "data.validation_sets.a",
    ],
)
def test_text_that_can_name_no_file(
    here: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    model = [] if setting == "pretrained.path" else [MODEL]
    for given, problem in (
        ("a" * 300, "which is too long for the name of a file or folder"),
        ("a/" * 3000, "which is too long for the name of a file or folder"),
        ("~nobody-here/x", "but there is no user nobody-here"),
    ):
        said = messages(capsys, *SMALL, *model, f"{setting}={given}")
        assert len(said) == 1 and said[0].endswith(problem) and setting in said[0], said


def test_a_folder_that_cannot_be_written_to(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    (here / "run").mkdir()
    assert messages(capsys, *SMALL, MODEL, "run.experiment_dir=run") == [
        "override run.experiment_dir=run: run.experiment_dir: run cannot be written to"
    ]


def test_a_full_disk(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    wanted = [
        "training.checkpoint.interval=5",
        "training.export.interval=5",
        "run.experiment_dir=run",
    ]
    parameters = 64 * 8 + 8 * 3 + 8 * 8 * 2 + 4 * 8 * 2 + 12 * 8 * 3
    needed = parameters * (12 + 4) / 1000
    (problem,) = messages(capsys, *SMALL, MODEL, *wanted)
    assert problem == (
        "override run.experiment_dir=run: run.experiment_dir: a checkpoint and an export need"
        f" {needed:.3g} kB, but . has 1 kB free"
    )


# Resuming.


@pytest.fixture
def begun(here: Path) -> Path:
    """A run whose checkpoint of step 10 is there."""
    made = preflight(read(None, [*SMALL, MODEL, "run.experiment_dir=run"]), 1, weights=False)
    final = here / "run" / "checkpoint" / "10"
    partial = checkpoints.begin(final)
    info: dict[str, Any] = {
        "identity": made.identity,
        "settings": made.config.model_dump(mode="json"),
    }
    info |= {"step": 10, "samples": 20, "updates": 10, "skipped": 0}
    info["loss_scale"] = {"value": 1.0, "clean_updates": 0, "failures_left": 2}
    checkpoints.publish(partial, final, "checkpoint", 10, info, {})
    return Path("run/checkpoint/10")


DATA_CHANGED = "override data.path=tokens: data.path: data (its content): given "
GOING_ON = [*SMALL, MODEL, "run.experiment_dir=run"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"samples": -8}, "info.samples: input should be greater than or equal to 0"),
        ({"loss_scale": []}, "info.loss_scale: input should be a valid dictionary"),
        ({"settings": {}}, "info.settings.optimizer: field required"),
        ({"step": 3}, "info.step: given 3, but step is 10"),
        (
            {"history": {"batches": [], "orders": []}},
            "info.history: value error, batches and orders must begin",
        ),
    ],
)
def test_a_manifest_that_training_did_not_write(
    begun: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], problem: str
) -> None:
    """Anyone can compute its digest."""
    manifest = begun / checkpoints.MANIFEST
    content = json.loads(manifest.read_bytes())
    content.pop("sha256")
    content["info"] |= changes
    manifest.write_text(json.dumps(content | {"sha256": content_digest(content)}))
    (said,) = messages(capsys, *SMALL, MODEL, "run.experiment_dir=run")
    assert said.startswith(
        f"override run.experiment_dir=run: run.experiment_dir: {manifest}: {problem}"
    ), said
    assert said.endswith(f"; training did not write this: delete {begun}, or take another")


def test_nothing_changed(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--validate", *GOING_ON]) == 0
    out = capsys.readouterr().out
    assert f"Start         resumes from {begun}, after step 10" in out and "Changed" not in out


@pytest.mark.parametrize(
    ("override", "before", "now", "name"),
    [
        ("batch.batch_size=4", "2", "4", "batch.batch_size"),
        ("model.distributed.seed=5", "1234", "5", "model.distributed.seed"),
        ("batch.cross_document_attention=yes", "false", "true", "batch.cross_document_attention"),
        ("data.split=[7,2,1]", "[8.0, 1.0, 1.0]", "[7.0, 2.0, 1.0]", "data.split"),
    ],
)
def test_what_is_trained_changed(
    begun: Path, capsys: pytest.CaptureFixture[str], override: str, before: str, now: str, name: str
) -> None:
    problems = messages(capsys, *GOING_ON, override)
    assert (
        f"override {override}: {name}: given {now}, but {begun} was trained with {before}; set it"
        " back, choose another"
        " run.experiment_dir, or"
        f" consent with run.accept_changes=[{name}]"
    ) in problems
    # Of another seed or split the documents that are trained on differ too.
    own = (f"override {override}: {name}: ", f"{len(problems) - 1} mistakes")
    others = [problem for problem in problems if not problem.startswith(own)]
    assert len(others) == (name in ("model.distributed.seed", "data.split"))
    assert all(problem.startswith(DATA_CHANGED) for problem in others)
    consent = f"run.accept_changes=[{name}{', data.path' if others else ''}]"
    assert cli.main(["train", "--validate", *GOING_ON, override, consent]) == 0
    assert f"Changed       {name}: {before} → {now}" in capsys.readouterr().out


def test_other_data(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens("tokens", token=9)
    (problem,) = messages(capsys, *GOING_ON)
    assert problem.startswith(DATA_CHANGED)
    assert problem.endswith("or consent with run.accept_changes=[data.path]")
    assert cli.main(["train", "--validate", *GOING_ON, "run.accept_changes=[data.path]"]) == 0


def test_another_shape(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIG | {"intermediate_size": 24}
    (Path("model") / "config.json").write_text(json.dumps(config))
    assert messages(
        capsys, *GOING_ON, "run.accept_changes=[model.base_model.transformer.ffn_hidden_size]"
    ) == [
        f"model/config.json: model.base_model.transformer.ffn_hidden_size: given 24, but {begun}"
        " was trained with 12; a model cannot"
        " change its shape"
    ]


def test_fewer_steps_than_are_done(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert messages(capsys, *GOING_ON, "training.train_iters=9") == [
        f"override training.train_iters=9: training.train_iters: given 9, but {begun} has 10"
        " steps; raise it, or choose another"
        " run.experiment_dir"
    ]


def test_settings_that_may_change(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            [
                "train",
                "--validate",
                *GOING_ON,
                "optimizer.weight_decay=0.2",
                "training.train_iters=20",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "Changed       optimizer.weight_decay: 0.01 → 0.2\n" in out
    assert "Changed       training.train_iters: 10 → 20" in out


# Files and folders that settings name.


TEXT = ["output_path=new", "dataset.path=texts", "tokenizer.path=model"]
PATHS: list[tuple[str, str, list[str]]] = [  # command, setting, and further settings
    ("train", "data.path", SMALL),
    (
        "train",
        "data.validation_sets.few",
        [*SMALL, "training.validation.interval=1", "training.validation.iterations=1"],
    ),
    (
        "train",
        "data.sources.NAME.path",
        ["data.format=mixture", *(one for one in SMALL if not one.startswith("data.path"))],
    ),
    ("train", "data.tokenizer.path", SMALL),
    ("train", "pretrained.path", SMALL),
    ("train", "pretrained.path", [*SMALL, "pretrained.format=distributed"]),
    ("train", "run.experiment_dir", SMALL),
    ("plan", "pretrained.path", SMALL),
    ("prepare", "output_path", TEXT),
    ("prepare", "dataset.path", TEXT),
    ("prepare", "tokenizer.path", TEXT),
    ("convert", "input.path", ["output.path=new"]),
    ("convert", "input.path", ["output.path=new", "input.format=llama"]),
    ("convert", "output.path", ["input.path=model", "input.format=llama"]),
]
NO_MISTAKE = {  # a folder that is written to may be missing or exist
    *(
        (setting, name)
        for setting in ("run.experiment_dir", "output_path")
        for name in ("empty-folder", "./missing")
    ),
    *(
        (setting, "./missing.json")
        for setting in ("run.experiment_dir", "output_path", "output.path")
    ),
    ("output.path", "./missing"),
}


def every_path(kind: Any) -> set[str]:
    return {
        path
        for path, _ in iter_settings(kind)
        if path.rpartition(".")[2] in ("path", "experiment_dir", "output_path")
    }


def test_every_setting_that_names_a_file_is_tried() -> None:
    tried = {(command, setting) for command, setting, _ in PATHS}
    for command, kind in (
        ("train", TrainConfig),
        ("prepare", PrepareConfig),
        ("convert", ConvertConfig),
    ):
        assert {(command, path) for path in every_path(kind)} <= tried


@pytest.mark.parametrize(
    "given",
    ["./missing", "./missing.json", "empty-folder", "empty.json", "locked.json", "file/inside"],
)
@pytest.mark.parametrize(
    ("command", "setting", "further"),
    PATHS,
    ids=[f"{i}-{row[0]}-{row[1]}" for i, row in enumerate(PATHS)],
)
def test_a_file_or_folder_that_will_not_do(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    setting: str,
    further: list[str],
    given: str,
) -> None:
    """One line with the setting and its place, in a file and on the command line."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save("model/tokenizer.json")
    Path("model/tokenizer_config.json").write_text('{"eos_token": "b"}')
    Path("texts").mkdir()
    Path("texts/a.jsonl").write_text('{"text": "a b"}\n')
    Path("empty-folder").mkdir()
    for name in ("empty.json", "locked.json", "file"):
        Path(name).touch()
    refuse(monkeypatch, "locked.json")
    *above, name = setting.split(".")
    written = (
        "".join(f"{'  ' * i}{key}:\n" for i, key in enumerate(above))
        + f"{'  ' * len(above)}{name}: {given}\n"
    )
    Path("c.yaml").write_text(written)
    others = [one for one in further if not one.startswith(f"{setting}=")]
    for arguments, place in (
        (["-c", "c.yaml", *others], f"c.yaml:{len(above) + 1}: {setting}: "),
        ([f"{setting}={given}", *others], f"override {setting}={given}: {setting}: "),
    ):
        if command == "train":
            arguments = ["--validate", *arguments]
        capsys.readouterr()
        code = cli.main([command, *arguments])
        said = capsys.readouterr().err
        if code == 0:
            assert (setting, given) in NO_MISTAKE, (setting, given)
            for made in ("missing", "missing.json", "new"):
                shutil.rmtree(made, ignore_errors=True)
            continue
        assert code == 2 and "Traceback" not in said
        lines = [line.strip() for line in said.removeprefix(f"fast-llm {command}: ").splitlines()]
        assert all(line.startswith(place) for line in lines if not line.endswith(" mistakes")), said


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Refuse permission to read a file, also for root."""
    import builtins
    import io

    def refusing(real: Any) -> Any:
        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(name):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return real(path, *arguments, **more)

        return call

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", refusing(open))


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(["a: wrong", "b: wrong"]),
        DataError("x"),
        MissingPackage("zstandard lz4", "reading a.zst"),
        TrainingStopped("x", resumable=True),
        ReportedElsewhere(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: UserError) -> None:
    """Worker processes send them to the process that prints them."""
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error) and str(error)
    assert found.report() == error.report() and vars(found) == vars(error)
