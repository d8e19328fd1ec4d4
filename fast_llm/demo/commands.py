"""Run fast-llm commands as a user would, and read what they log."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fast_llm.errors import UserError


def words(arguments: list[str]) -> list[str]:
    """A command as one would type it."""
    return [shlex.quote(word) for word in ("fast-llm", *arguments)]


def command(arguments: list[str]) -> list[str]:
    """The same command, run by this Python."""
    return [sys.executable, "-m", "fast_llm.cli", *arguments]


def run(*arguments: str) -> None:
    """Show a command and run it; a failure ends the demo."""
    print("$ " + " ".join(words(list(arguments))), flush=True)
    code = subprocess.run(command(list(arguments)), check=False).returncode
    if code:
        raise UserError(f"the command above ended with exit code {code}")


def run_and_kill(arguments: list[str], metrics: Path, step: int) -> int:
    """Start a command and kill it at a step. Returns the step that it had logged."""
    print("$ " + " ".join(words(arguments)), flush=True)
    with subprocess.Popen(
        command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            reached = max((r["step"] for r in read(metrics) if r["phase"] == "training"), default=0)
            if reached >= step:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        process.wait()
    return reached


def read(metrics: Path) -> list[dict[str, Any]]:
    """The records of a run so far; the last line may be half written."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
