"""The Triton kernels in Triton's interpreter on the CPU (triton_checks.py), in a process each."""

import os
import subprocess
import sys

import pytest

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
