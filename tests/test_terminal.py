"""What a person sees in a terminal of 80 and 100 columns, and what a pipe gets."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fast_llm import terminal

ROOT = Path(__file__).parent.parent


def see(columns: int, *arguments: str, **environment: str) -> str:
    """The output of a command in a pseudo-terminal of so many columns."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    left_out = ("COLUMNS", "NO_COLOR", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    process = subprocess.Popen(
        [sys.executable, "-m", "fast_llm.cli", *arguments],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=kept | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | environment,
        start_new_session=True,
    )
    os.close(secondary)
    seen = b""
    while True:
        try:
            read = os.read(primary, 65536)
        except OSError:  # the terminal's other side is closed
            break
        if not read:
            break
        seen += read
    process.wait(60)
    os.close(primary)
    return seen.decode().replace("\r\n", "\n")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


MISTAKES = """\
training:
  train_iters: x
batch:
  seq_len: 5
optimizer:
  moments_dtype: fp8
"""


@pytest.mark.parametrize("columns", [80, 100])
def test_mistakes_are_blocks(tmp_path: Path, columns: int) -> None:
    (tmp_path / "c.yaml").write_text(MISTAKES)
    seen = see(columns, "train", "-c", f"{tmp_path}/c.yaml", "batch.batch_size=0")
    assert "\x1b[1;31mfast-llm train: 4 mistakes\x1b[0m\n\n" in seen
    text = plain(seen)
    blocks = text.strip().split("\n\n")
    assert blocks[0] == "fast-llm train: 4 mistakes"
    assert blocks[1] == (
        "training.train_iters\n"
        f"  where    {tmp_path}/c.yaml:2\n"
        '  given    "x"\n'
        "  allowed  an integer of 0 or more"
    )
    assert blocks[2].startswith(
        f"batch.seq_len: no such setting\n  where    {tmp_path}/c.yaml:4\n  allowed "
        " micro_batch_size, "
    )
    assert blocks[2].endswith("\n  fix      did you mean batch.sequence_length?")
    assert blocks[4].startswith("batch.batch_size\n  where    override batch.batch_size=0\n")
    assert blocks[3].startswith(
        f'optimizer.moments_dtype\n  where    {tmp_path}/c.yaml:6\n  given    "fp8"\n  allowed  '
    )
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert columns - 25 < max(map(len, lines)) <= columns


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "c.yaml").write_text(MISTAKES)
    seen = see(80, "train", "-c", f"{tmp_path}/c.yaml", **environment)
    assert "\x1b" not in seen
    if "TERM" in environment:
        where = f"{tmp_path}/c.yaml:2"
        assert f'\n  {where}: training.train_iters: given "x", must be an integer' in seen
    help_seen = see(80, "train", "--help", **environment)
    assert "\x1b" not in help_seen and "\noptions:\n" in help_seen


def test_help_has_bold_headings() -> None:
    seen = see(80, "--help")
    assert "\x1b[1mtrain:\x1b[0m\n  train " in seen
    assert max(map(len, plain(seen).splitlines())) <= 80


def test_one_mistake_is_one_block() -> None:
    assert plain(see(80, "train", "training.train_iters=x")) == (
        "fast-llm train: training.train_iters\n"
        "  where    override training.train_iters=x\n"
        '  given    "x"\n'
        "  allowed  an integer of 0 or more\n"
    )
    assert plain(see(80, "verify", "none")).startswith(
        "fast-llm verify: none: nothing to verify\n  fix      give a dataset.json, "
    )


@pytest.mark.parametrize(
    ("mistake", "heading", "rows"),
    [
        ("c.yaml: no such file; did you mean d.yaml?", "c.yaml: no such file",
         {"fix": "did you mean d.yaml?"}),
        ('c.yaml:3: a.b: given "x; y", must be an integer; write 1', "a.b",
         {"where": "c.yaml:3", "given": '"x; y"', "allowed": "an integer", "fix": "write 1"}),
        ("override a.b={c: 1}: a.b: not supported: set d", "a.b: not supported: set d",
         {"where": "override a.b={c: 1}"}),
        ("c.yaml: dataset.path: is missing; it must be text", "dataset.path: is missing",
         {"where": "c.yaml", "allowed": "text"}),
        ("c.yaml:1: a: no such setting; did you mean b? (allowed: b, c)", "a: no such setting",
         {"where": "c.yaml:1", "allowed": "b, c", "fix": "did you mean b?"}),
        ("rank 1 on node: override a.b=1: a.b: too large; lower it", "a.b: too large",
         {"where": "rank 1 on node: override a.b=1", "fix": "lower it"}),
        ("run.experiment_dir: another run writes to run: wait", "run.experiment_dir: another run"
            " writes to run: wait", {}),
        ("stopped by SIGTERM", "stopped by SIGTERM", {}),
    ],
)  # fmt: skip
def test_parts(mistake: str, heading: str, rows: dict[str, str]) -> None:
    assert terminal.parts(mistake) == (heading, list(rows.items()))


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    terminal.print_error("fast-llm train", "2 mistakes\n  a: b; c\n  d: e", stream)
    assert stream.getvalue() == "fast-llm train: 2 mistakes\n  a: b; c\n  d: e\n"


def test_wrap_keeps_words_and_commands() -> None:
    long = "/a/path/" + "x" * 90
    text = terminal.wrap(f"see {long} and `fast-llm train --config c.yaml` twice", 40)
    assert f"\n{long}\n" in text and "`fast-llm train --config c.yaml`" in text
    assert max(len(line) for line in text.splitlines() if long not in line) <= 40


def test_table() -> None:
    assert terminal.table(("name", "tokens"), [("code", "1,000"), ("b", "10")], right={1}) == (
        "name  tokens\ncode   1,000\nb         10"
    )


def test_width(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    for given, expected in (("80", 80), ("200", 100), ("0", 100), ("x", 100), ("3", 40)):
        monkeypatch.setenv("COLUMNS", given)
        assert terminal.width(stream) == expected


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (987, "987"), (999.6, "1.00k"), (9876, "9.88k"), (12345, "12.3k"), (98765, "98.8k"),
     (999_499, "999k"), (1.234e6, "1.23M"), (5e9, "5.00G"), (2e12, "2T")],
)  # fmt: skip
def test_short_count(count: float, text: str) -> None:
    assert terminal.short_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (545, "9m05s"), (600, "10m"), (3599, "59m"), (11_520, "3h12m"),
     (86_399, "23h"), (183_600, "2d")],
)  # fmt: skip
def test_short_duration(seconds: float, text: str) -> None:
    assert terminal.short_duration(seconds) == text
