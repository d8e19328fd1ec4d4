"""The Triton kernels in Triton's interpreter on the CPU (triton_checks.py), in a process each.

And compiled for a GPU (triton_compiles.py): the interpreter accepts what the compiler refuses.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import slow

pytest.importorskip("triton", reason="Triton is installed with PyTorch for NVIDIA GPUs alone")


@pytest.mark.parametrize(
    "check", ["softmax_cross_entropy", "adamw", "rms_norm", "add", "quantize_fp8"]
)
def test_in_the_interpreter(check: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_checks", check],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "equal", run.stderr


@slow
def test_compiled(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_compiles"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 50
