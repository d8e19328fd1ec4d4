"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

CHECK = """
import resource, sys
import torch
from fast_llm.model.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def use():
    for _ in range(5):
        torch.ones(2**24)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_memory_is_asked_for_once() -> None:
    faults = {}
    for mode in ("leave", "keep"):
        done = subprocess.run([sys.executable, "-c", CHECK, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    # Five times 64 MiB in pages of 4 KiB, or of 2 MiB where the kernel gives such.
    assert faults["leave"] >= 5 * 32
    assert faults["keep"] < faults["leave"] / 5
