"""Start `fast-llm train` as a user does: directly for one GPU, by torchrun for several."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
NO_CUDNN = Path(__file__).parent / "no_cudnn"  # hides the cuDNN package
KEYS = "language_model_loss", "grad_norm"


@dataclass(frozen=True)
class Started:
    """A run under way; `folder` is its run.experiment_dir."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def wait(self) -> "Started":
        """Wait for exit code 0; otherwise AssertionError with the end of its output."""
        code = self.process.wait()
        assert code == 0, f"exit code {code}: ...{self.printed()[-4000:]}"
        return self

    def kill(self) -> None:
        """Kill all of its processes."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.process.wait()

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def records(self, phase: str = "training") -> dict[int, dict[str, Any]]:
        """metrics.jsonl by step; of a step that was made twice the later record."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return {
            record["step"]: record for record in map(json.loads, lines) if record["phase"] == phase
        }


def start(
    place: Path,
    folder: Path,
    settings: Mapping[str, Any],
    gpus: int = 1,
    cudnn: bool = True,
    config: Path | None = None,
    program: str = "fast_llm.cli",
) -> Started:
    """Start `fast-llm train gpt` in `place`, with settings on the command line.

    `program`: the module that is run, in place of the command.
    """
    words = (
        []
        if gpus == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    )
    words += ["-m", program, "train", "gpt", *(["--config", str(config)] if config else [])]
    words += [f"{name}={value}" for name, value in settings.items()] + [
        f"run.experiment_dir={folder}"
    ]
    paths = [
        *([] if cudnn else [str(NO_CUDNN)]),
        str(ROOT),
        *os.environ.get("PYTHONPATH", "").split(":"),
    ]
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, paths)), "OMP_NUM_THREADS": "4"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(folder.name + ".log")
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=place,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    return Started(process, folder, log)


def wait_for(condition: Any, run: Started, seconds: float = 300) -> None:
    """Wait for a condition; AssertionError if the run ends before or it takes too long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert run.process.poll() is None, f"ended too early: ...{run.printed()[-1500:]}"
        assert time.monotonic() < limit, f"took more than {seconds} s: ...{run.printed()[-1500:]}"
        time.sleep(0.02)


def difference(
    found: Mapping[int, Mapping[str, Any]],
    exact: Mapping[int, Mapping[str, Any]],
    keys: Sequence[str] = KEYS,
) -> float:
    """Largest relative difference of losses and gradient norms; infinite if the steps differ."""
    if not exact or found.keys() != exact.keys():
        return float("inf")
    pairs = [(found[step][key], exact[step][key]) for step in exact for key in keys]
    worst = max(abs(one / other - 1) for one, other in pairs)
    return worst if worst == worst else float("inf")


def delete(folder: Path) -> None:
    """Remove a large folder."""
    shutil.rmtree(folder, ignore_errors=True)
