"""The command as a process: help, exit codes, settings before and after --config, lazy imports."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_llm import __version__, cli
from fast_llm.models import FAMILIES
from tests.data import synthetic

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "fast_llm/demo/train-config.yaml")
HEAVY = ("torch", "transformers", "datasets", "triton", "tensorboard", "wandb")
# Runs the command, and writes to the last line of stderr which heavy modules it loaded.
PROBE = f"""
import sys
from fast_llm.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
RUN = [
    "data.path=[]",
    "pretrained=null",
    "training.export=null",
]  # overrides of the recipe, whose files do not exist here
SMALL = [
    "training.train_iters=10",
    "data.format=random",
    "batch.sequence_length=16",
    "model.base_model.vocab_size=64",
    "model.base_model.transformer.hidden_size=32",
]


def start(*arguments: str, code: str = PROBE, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in its own process."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=kept | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


COMMANDS = [
    "train",
    "plan",
    "convert",
    "merge",
    "upcycle",
    "prepare",
    "extend-vocabulary",
    "evaluate",
    "report",
    "inspect",
    "verify",
    "why",
    "demo",
    "models",
    "settings",
    "completion",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_comes_at_once_and_without_torch(command: str) -> None:
    best = float("inf")
    for _ in range(4):  # other programs may use the processor
        started = time.perf_counter()
        code, out, err = start(*command.split(), "--help", COLUMNS="80")
        best = min(best, time.perf_counter() - started)
        assert (code, err) == (0, "loaded:\n")
        assert out.startswith(f"usage: fast-llm {command}".rstrip())
        if best < 1:
            break
    assert best < 1
    assert "examples:\n" in out and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    if command in ("train", "plan", "prepare", "convert"):
        assert "section.setting=value" in out
    if not command:
        assert all(f"\n  {name} " in out for name in COMMANDS)


def test_plan_without_torch() -> None:
    code, out, err = start("plan", *SMALL, "batch.batch_size=8", "--gpus", "2")
    assert (code, err) == (0, "loaded:\n")
    assert "As configured" in out


def test_models_without_torch() -> None:
    code, out, err = start("models")
    assert (code, err) == (0, "loaded:\n")
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["model_type", "family", "TP"]
    assert [line.split()[0] for line in lines[1:]] == list(FAMILIES)
    assert "\x1b" not in out
    code, out, err = start("models", "--json")
    assert (code, err) == (0, "loaded:\n")
    assert [one["model_type"] for one in json.loads(out)] == list(FAMILIES)


def test_help_loads_next_to_nothing() -> None:
    code, _, err = start(
        "train", "--help", code="import sys; from fast_llm.cli import main\ntry:"
            " main(sys.argv[1:])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )  # fmt: skip
    assert code == 0
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(err.split())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, f"fast-llm {__version__}\n"),
        ([], 2, ""),
        (["trian"], 2, "fast-llm: unknown command trian; did you mean train?\n"),
        (["x"], 2, f"fast-llm: unknown command x; the commands are {', '.join(COMMANDS)}\n"),
        (["--config", "x", "train"], 2, "fast-llm: unknown option --config; options follow the"
            " command\n"),
        (["train", "--confg", "x"], 2, "fast-llm train: unknown option --confg; did you mean"
            " --config?\n"),
        (["train", "--valdate=x", "a.b=1"], 2, "fast-llm train: unknown option --valdate=x; did"
            " you mean --validate?\n"),
        (["train", "--zz"], 2, "fast-llm train: unknown option --zz\n"),
        (["plan", "--device", "h10"], 2, "--device: given h10, must be one of h100, h200, b200,"
            " a100; did you mean h100?\n"),
        (["train", "--config"], 2, "argument -c/--config: expected one argument"),
        (["demo", "a", "b"], 2, "fast-llm demo: unexpected argument b; `fast-llm demo --help`"
            " shows the usage\n"),
        (["train", "gpt", "--config", "none.yaml"], 2, "fast-llm train: none.yaml: no such file\n"),
        (["train", "training.train_iter=5"], 2, "did you mean training.train_iters?"),
        (
            ["train", "--validate", *SMALL, "batch.batch_size=3", "batch.micro_batch_size=2"],
            0,
            "with 1 empty row",
        ),
        (
            ["train", *SMALL, "data.format=file", "data.path=none.json"],
            2,
            "none.json: no such file",
        ),
        (["train", *SMALL, "pretrained.path=./none"], 2, "pretrained.path: ./none: no such folder"),
        (["train", "--validate", *SMALL], 0, "Training      10 steps"),
        (["prepare", "output_path=x"], 2, "dataset.path: is missing"),
        (["prepare", "--validate", "output_path=x", "dataset.path=y", "tokenizer.path=z"], 2,
            "override tokenizer.path=z: tokenizer.path: z: no such file or folder"),
        (["prepare", "output_path=x", "dataset.path=y", "tokenizer.path=z"], 2,
            "override tokenizer.path=z: tokenizer.path: z: no such file or folder"),
        (["convert", "input.path=x"], 2, "output.path: is missing"),
        (["verify", "none"], 2, "none: nothing to verify; give a dataset.json, a checkpoint"),
        (["why", "none", "1"], 2, "none: no config.yaml in it"),
        (["why", "none", "x"], 2, "argument STEP: given x, must be an integer\n"),
        (["convert", "-v", "input.path=x", "output.path=y"], 0, "exist_ok: false\n"),
    ],
)  # fmt: skip
def test_exit_codes_without_traceback_or_torch(arguments: list[str], code: int, said: str) -> None:
    found, out, err = start(*arguments)
    assert found == code, err
    assert err.endswith("loaded:\n"), f"{arguments} loads {err.splitlines()[-1]}"
    assert said in (out if code == 0 else err)
    assert "Traceback" not in err and "File " not in err


def test_the_installed_command_and_the_module_are_the_same() -> None:
    script = Path(sys.executable).with_name("fast-llm")
    for command in (
        [sys.executable, "-m", "fast_llm.cli"],
        [str(script)] if script.exists() else [],
    ):
        if command:
            done = subprocess.run(
                [*command, "train"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 2
            assert done.stderr.startswith("fast-llm train: no settings: give --config FILE")


def test_validation_of_the_recipe_does_not_import_torch(tmp_path: Path) -> None:
    # -X importtime names every module that is imported.
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "fast_llm.cli",
            "train",
            "--validate",
            "-c",
            RECIPE,
            *SMALL[1:],
            *RUN,
            f"run.experiment_dir={tmp_path}/run",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Training      100,000 steps of 4,096 tokens" in done.stdout
    assert not (tmp_path / "run").exists()
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "fast_llm.config.train" in imported and "torch" not in imported


def test_settings_on_both_sides_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    rest = [
        *SMALL[1:],
        "data.path=[]",
        "pretrained=null",
        "run.experiment_dir=null",
        "training.checkpoint=null",
    ]
    rest += ["training.export=null"]
    for arguments in (
        ["train", "gpt", "training.train_iters=7", "--config", RECIPE, *rest],
        ["train", "training.train_iters=7", *rest, "-c", RECIPE],
        ["train", "--config", RECIPE, "gpt", "training.train_iters=7", *rest],
        ["train", "gpt", f"--config={RECIPE}", *rest, "training.train_iters=7"],
        ["train", *rest, "training.train_iters=8", "-c", RECIPE, "training.train_iters=7"],
        [
            "train",
            "gpt",
            *rest[:2],
            "--validate",
            *rest[2:],
            "-c",
            RECIPE,
            "training.train_iters=7",
        ],
    ):
        assert cli.main([*arguments, "--validate"]) == 0, capsys.readouterr().err
        assert "Training      7 steps of 4,096 tokens" in capsys.readouterr().out


def test_the_last_of_a_name_wins(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["train", "-v", "training.train_iters=1", *SMALL[1:], "training.train_iters=3"])
        == 0
    )
    assert "Training      3 steps" in capsys.readouterr().out


def test_all_mistakes_of_file_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  train_iters: x\nbatch:\n  seq_len: 5\nprofiling:\n  cuda: yes\n")
    assert cli.main(["train", "gpt", "-c", str(path), "optimizer.beta_1=2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "fast-llm train: 4 mistakes",
        f'  {path}:2: training.train_iters: given "x", must be an integer of 0 or more',
        f"  {path}:4: batch.seq_len: no such setting; did you mean batch.sequence_length?"
        " (allowed: micro_batch_size,"
        " batch_size, depth_first_micro_batches, breadth_first_micro_batches,"
        " sequential_micro_batches, sequence_length,"
        " micro_sequence_length, cross_document_attention)",
        f"  {path}:6: profiling.cuda: not supported: set training.profiling.interval: it profiles"
        " the CPU, and the GPU if there is one",
        "  override optimizer.beta_1=2: optimizer.beta_1: given 2, must be a number from 0 to"
        " below 1",
    ]


def test_a_terminal_that_is_not_utf_8() -> None:
    code, out, err = start("train", "-v", *SMALL, PYTHONIOENCODING="ascii")
    assert code == 0, err
    assert "a micro-batch \\xd7 " in out
    code, _, err = start(
        "train",
        *SMALL,
        "batch.batch_size=8",
        "batch.depth_first_micro_batches=3",
        "batch.micro_batch_size=2",
        PYTHONIOENCODING="ascii",
    )
    assert code == 2 and "micro_batch_size 2 \\xd7 1 process" in err


def test_only_the_first_process_speaks() -> None:
    for rank, expected in (("0", "Training      10 steps"), ("1", "")):
        code, out, err = start("train", "-v", *SMALL, RANK=rank, WORLD_SIZE="2")
        assert (code, err) == (0, "loaded:\n") and expected in out and bool(out) == bool(expected)


def test_only_the_first_process_explains_the_words() -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        code, out, err = start("train", "--confg", "x", RANK=rank, WORLD_SIZE="2")
        assert code == 2 and out == "" and len(err.splitlines()) - 1 == lines, (
            err
        )  # the last line is the probe's


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("fast_llm.config.document.read", fail)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["train", "a.b=1"])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fast_llm.config.document.read", interrupt)
    assert cli.main(["train", "a.b=1"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["plan", "--gpus=1", *SMALL], 0),
        (["train", "--validate", *SMALL], 0),
        (["prepare", "a.b=1"], 141),
    ],
)
def test_output_that_is_closed(command: list[str], code: int) -> None:
    """Exit code 0 for commands that only print; other commands were interrupted."""
    broken = """
import sys
from fast_llm import cli
from fast_llm.config import document

def fail(*_):
    raise BrokenPipeError

document.read = fail
sys.exit(cli.main())
"""
    assert start(*command, code=broken) == (code, "", "")


# An object that is deleted at the very end, when Python has restored its handlers.
_LATE = """
import os, signal, sys
from fast_llm import cli

numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), numbers=numbers):
        for number in numbers:
            kill(process, number)

late = Late()
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    "command",
    [
        ["train", "gpt", "--validate", *SMALL],
        ["prepare", "gpt_memmap", "--validate", "output_path=a"],
    ],
    ids=lambda command: command[0],
)
def test_signals_when_all_is_done_change_nothing(command: list[str], tmp_path: Path) -> None:
    if command[0] == "prepare":
        (tmp_path / "text.txt").write_text("text")
        command = [
            *command,
            f"dataset.path={tmp_path}",
            f"tokenizer.path={synthetic.llama(tmp_path.parent / 'model')}",
        ]
    code, stdout, stderr = start(*command, code=_LATE)
    assert code == 0 and stdout and not stderr


def test_a_disk_that_fails_is_no_fault_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> None:
        def command(_: object) -> int:
            raise OSError(code, os.strerror(code), "run/config.yaml")

        monkeypatch.setattr(cli, "_verify", command)

    fail(errno.ENOSPC)
    assert cli.main(["verify", "x"]) == 1
    assert capsys.readouterr().err == (
        "fast-llm verify: run/config.yaml: No space left on device; free space on the disk or"
        " repair it, then start the same"
        " command again\n"
    )
    fail(errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["verify", "x"])
