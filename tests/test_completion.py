"""Completion as a user meets it: TAB pressed in real shells, in a pseudo-terminal."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fast_llm.command_texts import GROUPS
from fast_llm.commands import SHELLS, parsers
from fast_llm.completion import script
from fast_llm.config.mistakes import iter_settings
from fast_llm.config.train import TrainConfig

# The line up to TAB, and the arguments that the command then receives.
PRESSED = [
    ("trai", ["train"]),
    ("train --val", ["train", "--validate"]),
    ("train gpt --config tr", ["train", "gpt", "--config", "train.yaml"]),
    ("train training.train_it", ["train", "training.train_iters="]),
    ("train -v optimizer.learning_rate.b", ["train", "-v", "optimizer.learning_rate.base="]),
    ("train training.tensorboard=y", ["train", "training.tensorboard=yes"]),
    ("train data.path=tr", ["train", "data.path=train.yaml"]),
    ("train training.train_iters=y", ["train", "training.train_iters=y"]),  # a number
    ("prepare tokenize_w", ["prepare", "tokenize_workers="]),
    ("convert -v input.format=di", ["convert", "-v", "input.format=distributed"]),
    ("plan --device h1", ["plan", "--device", "h100"]),
    ("verify tr", ["verify", "train.yaml"]),
    ("settings training.checkpoint.keep_", ["settings", "training.checkpoint.keep_every"]),
    ("models --js", ["models", "--json"]),
    ("completion fi", ["completion", "fish"]),
]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "train.yaml").touch()
    (tmp_path / "script").write_text(script(shell))
    received = tmp_path / "received"
    start = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    setup = "" if shell == "bash" else "autoload -U compinit; compinit -u -d ./dump; "
    setup += f"source ./script; fast-llm() {{ printf '%s\\n' \"$@\" > {received}; }}"
    primary, secondary = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm"}
    with subprocess.Popen(
        start,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    ) as process:
        os.close(secondary)
        try:
            _type(primary, f"{setup}; touch ready\n", tmp_path / "ready")
            for typed, expected in PRESSED:
                received.unlink(missing_ok=True)
                _type(primary, f"fast-llm {typed}\t\n", received)
                assert received.read_text().split() == expected, typed
        finally:
            process.kill()
            os.close(primary)


def _type(terminal: int, keys: str, made: Path) -> None:
    """Type, and wait until the file that the line creates is complete."""
    os.write(terminal, keys.encode())
    seen = b""
    deadline = time.monotonic() + 30
    while not made.exists() or (made.name == "received" and not made.read_text().endswith("\n")):
        assert time.monotonic() < deadline, seen.decode(errors="replace")
        if select.select([terminal], [], [], 0.02)[0]:
            seen += os.read(terminal, 65536)


def test_fish(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "train.yaml").touch()
    (tmp_path / "script.fish").write_text(script("fish"))
    for typed, expected in PRESSED:
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source script.fish; complete -C 'fast-llm {typed}'"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found = [line.partition("\t")[0] for line in done.stdout.splitlines()]
        if typed.split()[-1] == expected[-1]:
            assert found == [], typed
        else:
            assert expected[-1] in found, (typed, done.stdout)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_has_every_word(shell: str) -> None:
    text = script(shell)
    for name, parser in parsers()[1].items():
        assert name in text
        for option in (option for action in parser._actions for option in action.option_strings):
            assert (option.lstrip("-") if shell == "fish" else option) in text, option
    assert all(f"{path}=" in text for path, _ in iter_settings(TrainConfig))
    assert not re.search(r"@\w+@", text)


def test_every_command_has_a_summary() -> None:
    assert [name for group in GROUPS.values() for name in group] == list(parsers()[1])
