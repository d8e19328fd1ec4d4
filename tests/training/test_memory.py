"""Freed memory is kept."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
if sys.argv[1] == "keep":
    from fast_llm.training.memory import keep_freed_memory
    assert keep_freed_memory()
def touch():
    for size in (2**24, 2**22, 2**24):
        torch.ones(size)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_allocated_again_meets_no_page_faults() -> None:
    faults = {}
    for how in ("keep", "as it is"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    # Ten rounds of 9 · 2²² numbers of 4 bytes are 370,000 pages of 4 KiB, or 700 of 2 MiB.
    assert faults["as it is"] > 650
    assert faults["keep"] < 100
