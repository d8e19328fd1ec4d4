"""The numeric tests as on other processors.

A processor decides the order of sums: by the width of its vectors and by the blockings that
libraries choose for it. Each name below is one that this machine can emulate, in PyTorch, oneDNN,
MKL and our own kernels. `make test-all` runs a few tests under each; all of them, in some ten
minutes a processor:

    make test-processors
    .venv/bin/python -m tests.test_processors avx2 sse4 -- -x tests/model
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.helpers import slow

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Processor:
    """The variables that emulate it, and the instructions that the machine must have."""

    compiler: str  # of -march
    pytorch: str  # ATEN_CPU_CAPABILITY
    onednn: str  # ONEDNN_MAX_CPU_ISA
    mkl: str  # MKL_CBWR
    flags: tuple[str, ...]  # of /proc/cpuinfo


PROCESSORS = {
    "sse4": Processor("x86-64-v2", "default", "SSE41", "COMPATIBLE", ("sse4_2",)),
    "avx": Processor("sandybridge", "default", "AVX", "AVX", ("avx",)),
    "avx2": Processor("x86-64-v3", "avx2", "AVX2", "AVX2", ("avx2", "fma")),
    "avx512": Processor(
        "x86-64-v4", "avx512", "AVX512_CORE", "AVX512", ("avx512f", "avx512bw", "avx512vl")
    ),
    "avx512_bf16": Processor("x86-64-v4", "avx512", "AVX512_CORE_BF16", "AVX512", ("avx512_bf16",)),
}
# Where numbers are compared: the model, layouts, optimizer, runs, exports.
NUMERIC = [
    "tests/kernels",
    "tests/model",
    "tests/parallel",
    "tests/optim",
    "tests/training/test_reference.py",
    "tests/training/test_curves.py",
    "tests/training/test_moments.py",
    "tests/resume/test_resume.py",
    "tests/resume/test_elastic.py",
    "tests/checkpoint/test_exports.py",
    "tests/checkpoint/test_transformers.py",
    "tests/checkpoint/test_state.py",
    "tests/layouts/test_layouts.py",
]
FEW = [
    "tests/model/test_llama.py",
    "tests/model/test_norm.py",
    "tests/parallel/test_gradients.py::test_one_process_is_near_float64",
    "tests/parallel/test_gradients.py::test_tied_embeddings",
    "tests/parallel/test_gradients.py::test_a_cross_entropy_that_adds_in_fp32",
]
SEEN = (
    "import torch; print(torch.backends.cpu.get_cpu_capability(),"
    " torch.ops.mkldnn._is_mkldnn_bf16_supported())"
)
COMPILER = """#!{python}
import os, sys
native = {{"-march=native": "-march={target}"}}
arguments = [native.get(argument, argument) for argument in sys.argv[1:]]
os.execvp("{compiler}", ["{compiler}", *arguments])
"""


def possible() -> list[str]:
    """The processors that this machine can emulate."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    here = set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))
    return [name for name, processor in PROCESSORS.items() if here.issuperset(processor.flags)]


@contextmanager
def emulated(name: str) -> Iterator[dict[str, str]]:
    """The environment of a process that emulates a processor; our kernels are built for it."""
    processor = PROCESSORS[name]
    with TemporaryDirectory() as folder:
        compiler = Path(folder) / "c++"
        original = os.environ.get("CXX", "c++")
        compiler.write_text(
            COMPILER.format(python=sys.executable, target=processor.compiler, compiler=original)
        )
        compiler.chmod(0o755)
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        yield own | {
            "ATEN_CPU_CAPABILITY": processor.pytorch,
            "ONEDNN_MAX_CPU_ISA": processor.onednn,
            "MKL_CBWR": processor.mkl,
            "CXX": str(compiler),
            "XDG_CACHE_HOME": folder,  # the cache of our kernels
        }


def run(name: str, arguments: list[str], quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pytest on an emulated processor."""
    with emulated(name) as environment:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=quiet, text=True)


@slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_numbers(name: str) -> None:
    if name not in possible():
        pytest.skip(f"this machine cannot emulate {name}")
    with emulated(name) as environment:
        seen = subprocess.run(
            [sys.executable, "-c", SEEN],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    # oneDNN has bf16 from AVX-512 on; without bf16 instructions it casts to fp32 within the matmul.
    assert seen.stdout.split() == [PROCESSORS[name].pytorch.upper(), str(name.startswith("avx512"))]
    result = run(name, FEW, quiet=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2000:]


def main(arguments: list[str]) -> int:
    """`[NAME …] [-- ARGUMENTS OF PYTEST]`; by default each processor and all numeric tests."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, given = arguments[:split] or possible(), arguments[split + 1 :] or NUMERIC
    if unknown := set(names) - set(possible()):
        print(
            f"{', '.join(sorted(unknown))}: here it must be one of {', '.join(possible())}",
            file=sys.stderr,
        )
        return 2
    failed = []
    for name in names:
        print(f"\n== {name}", flush=True)
        if run(name, given).returncode != 0:
            failed.append(name)
    print(f"\nFailed on: {', '.join(failed) or 'none'}, of {', '.join(names)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
