"""The command line: help, what is understood, and mistakes as the user sees them."""

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fast_llm
from fast_llm import cli
from fast_llm.errors import ConfigError, DataError, TrainingStopped

RECIPE = Path(__file__).parent / "recipe.yaml"
COMMANDS = ["train", "prepare", "convert", "demo"]
# A run that needs neither files nor a model.
TINY = [
    "data.format=random",
    "model.base_model.vocab_size=64",
    "model.base_model.transformer={num_layers: 1, hidden_size: 16, num_attention_heads: 2}",
    "batch={sequence_length: 8, batch_size: 4, micro_batch_size: 1}",
    "training.train_iters=2",
]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and what stands on stderr; nothing may stand on stdout."""
    code = cli.main(arguments)
    printed = capsys.readouterr()
    assert not printed.out
    return code, printed.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"fast-llm {fast_llm.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_quick(arguments: list[str]) -> None:
    """Under 0.3 s of the processor's time (others may use the machine too), and for a reason: nothing is loaded."""
    program = (
        "import sys\nfrom fast_llm.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'numpy', 'yaml', 'pydantic', 'datasets'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    if arguments == ["demo", "--help"]:
        assert "fast-llm-demo" in done.stdout
    else:
        assert "examples:\n  fast-llm" in done.stdout


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert all(f"\n    {command}" in capsys.readouterr().out for command in COMMANDS[:1])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["train"],
            "fast-llm train: no settings: give --config FILE, or section.setting=value; for example `fast-llm train gpt"
            " --config train.yaml`",
        ),
        (
            ["prepare", "gpt_memmap"],
            "fast-llm prepare: no settings: give --config FILE, or section.setting=value; for example `fast-llm prepare"
            " gpt_memmap --config prepare.yaml`",
        ),
        (
            ["convert"],
            "fast-llm convert: no settings: give --config FILE, or section.setting=value; for example `fast-llm convert"
            " gpt input.path=RUN/checkpoint/1000 output.path=MODEL`",
        ),
        (["train", "mamba"], "fast-llm train: mamba: must be gpt or a setting a.b=c"),
        (["prepare", "gpt", "a=b"], "fast-llm prepare: gpt: must be gpt_memmap or a setting a.b=c"),
        (
            ["train", "x.yaml"],
            "fast-llm train: x.yaml: must be gpt or a setting a.b=c; a file is given as --config x.yaml",
        ),
        (["train", "gpt", "-c", "/nowhere/x.yaml"], "fast-llm train: /nowhere/x.yaml: no such file"),
        (
            ["prepare", "output_path=x"],
            "fast-llm prepare: 2 mistakes\n"
            "  the command line: dataset.path: is missing; it must be text (numbers and dates in quotes)\n"
            "  the command line: tokenizer.path: is missing; it must be text (numbers and dates in quotes)",
        ),
        (
            ["convert", "input.path=a", "output.path=b", "use_cpu=yes"],
            "fast-llm convert: override use_cpu=yes: use_cpu: not offered: conversion always runs on the CPU; leave it out",
        ),
        (
            ["train", *TINY, "training.log_interval=3"],
            "fast-llm train: override training.log_interval=3: training.log_interval: no such setting; did you mean"
            " training.logs.interval? (allowed: train_iters, test_iters, num_workers, prefetch_factor, timeout, logs,"
            " validation, checkpoint, export, shutdown, tensorboard, wandb)",
        ),
        (
            ["train", *TINY, "batch.micro_batch_size=3"],
            "fast-llm train: override batch={sequence_length: 8, batch_size: 4, micro_batch_size: 1}: batch.batch_size:"
            " batch_size 4 must be a multiple of micro_batch_size 3 × 1 process = 3; the nearest are 3 and 6",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    assert told(capsys, *arguments) == (2, problem + "\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--confg", "x"], "unknown: --confg"),
        (["train", "--valid", "a.b=c"], "unknown: --valid; settings have the form section.setting=value"),
        (["demo", "a", "b"], "unknown: b"),
    ],
)
def test_words_that_are_not_understood(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "train gpt --config FILE --validate SETTINGS",
        "train -c FILE -v SETTINGS",
        "train gpt SETTINGS -c FILE -v",
        "train SETTINGS --config=FILE --validate",
        "train -v gpt -c FILE SETTINGS",
    ],
)
def test_the_recipe_in_every_spelling(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    """Settings may stand before and behind options."""
    settings = [*TINY, "data={format: random}", "pretrained.path=null", "run.experiment_dir=null"]
    settings += [f"training.{name}=null" for name in ("validation", "checkpoint", "export")]
    words: list[str] = []
    for word in arguments.split():
        words += settings if word == "SETTINGS" else [word.replace("FILE", str(RECIPE))]
    assert cli.main(words) == 0
    assert "2 steps of 32 tokens = 64 tokens" in capsys.readouterr().out


def test_validation_loads_no_torch() -> None:
    program = "import sys\nfrom fast_llm.cli import main\nassert main(sys.argv[1:]) == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "train", "-v", *TINY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prepare_and_convert_show_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "gpt", "input.path=a", "output.path=b", "-v"]) == 0
    assert capsys.readouterr().out.startswith("input:\n  format: distributed\n  path: a\n")
    assert cli.main(["prepare", "output_path=a", "dataset.path=b", "tokenizer.path=c", "--validate"]) == 0
    assert "tokens_per_shard: 1000000000\n" in capsys.readouterr().out


def test_only_the_first_process_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", "gpt", *TINY, "training.train_iters=-1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert told(capsys, *arguments) == (2, "")
    monkeypatch.setenv("RANK", "0")
    code, text = told(capsys, *arguments)
    assert code == 2 and text.endswith("training.train_iters: given -1, must be an integer of 0 or more\n")


def test_the_number_of_processes_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, text = told(capsys, "train", *TINY)
    assert code == 2 and "a multiple of micro_batch_size 1 × 3 processes = 3; the nearest are 3 and 6" in text
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert told(capsys, "train", *TINY) == (
        2,
        "fast-llm train: WORLD_SIZE: given 'many' in the environment, must be the number of processes; unset it\n",
    )


@pytest.mark.parametrize(
    ("error", "rank", "code", "text"),
    [
        (ConfigError(["a: wrong"]), "0", 2, "fast-llm demo: a: wrong\n"),
        (ConfigError(["a: wrong", "b: too"]), "0", 2, "fast-llm demo: 2 mistakes\n  a: wrong\n  b: too\n"),
        (TrainingStopped("no use"), "0", 1, "fast-llm demo: no use\n"),
        (TrainingStopped("no use"), "1", 1, ""),
        (DataError("on this one alone"), "1", 2, "fast-llm demo: on this one alone\n"),
        (KeyboardInterrupt(), "0", 130, ""),
    ],
)
def test_how_a_command_ends(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    rank: str,
    code: int,
    text: str,
) -> None:
    def fail(parsed: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_demo", fail)
    monkeypatch.setenv("RANK", rank)
    assert told(capsys, "demo") == (code, text)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parsed: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_demo", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_a_terminal_that_is_not_utf8(tmp_path: Path) -> None:
    """× and → become escapes instead of a traceback."""
    for arguments in (["--help"], ["train", "-v", *TINY]):
        done = subprocess.run(
            [sys.executable, "-m", "fast_llm.cli", *arguments],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0 and not done.stderr
        assert b"\\u2192" in done.stdout or b"\\xd7" in done.stdout


def test_output_that_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something in place of stdout that can not be reconfigured."""
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.main(["convert", "input.path=a", "output.path=b", "-v"]) == 0
    assert output.getvalue().startswith("input:")
