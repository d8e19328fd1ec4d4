"""Test everything that runs on a GPU, on the GPUs of this machine; print one table.

    make test-gpu                     make the data (network and packages), then run the suite
    python -m tests.gpu [PART ...]    run it on a machine without network, with data copied there
                                      (folder FAST_LLM_GPU_DATA, by default build/gpu-data)

kernels   each kernel against float64
experts   grouped matmuls and routers
families  blocks of every family, against the CPU
recipe    the recipe with all 32 layers
resume    checkpoint, SIGKILL, resume, export, transformers
variants  with and without the compiler and cuDNN
settings  small models, every setting
layouts   small models, every layout

All parts should take at most ten minutes. The exit code is 1 if a row fails. The time of a row
counts from the row before it.
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

# Those of a line run at the same time; what takes a card's memory, and measures its speed, runs
# alone.
ORDER = [
    ["kernels", "experts", "families", "settings", "resume"],
    ["variants", "layouts"],
    ["recipe"],
]
PARTS = {
    "kernels": ["tests.gpu.kernels"],
    "families": ["tests.gpu.families"],
    "experts": ["tests.gpu.experts"],
    "recipe": ["tests.gpu.recipe", "recipe"],
    "resume": ["tests.gpu.recipe", "resume"],
    "variants": ["tests.gpu.recipe", "variants"],
    "settings": ["tests.gpu.breadth", "settings"],
    "layouts": ["tests.gpu.breadth", "layouts"],
}
PACKAGES = (
    "torch",
    "triton",
    "nvidia-cudnn-frontend",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
    "numpy",
)


def versions() -> str:
    """What was found, for the head of the table."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA"] = str(torch.version.cuda)
    found["cuDNN"] = str(torch.backends.cudnn.version())
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    names = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}; {names}"


def run(part: str) -> list[dict[str, Any]]:
    """The rows of a part; one that fails as such has a row that says so."""
    rows = []
    command = [sys.executable, "-m", *PARTS[part]]
    environment = os.environ | {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("row "):
                continue
            row = json.loads(line.removeprefix("row "))
            rows.append(row)
            print(show(row), flush=True)
            if not row["holds"] and "details" in row:
                print(row["details"], flush=True)
    if process.returncode:
        row = {
            "what": part,
            "measured": f"exit code {process.returncode}",
            "bound": None,
            "seconds": 0,
            "holds": False,
        }
        rows.append(row)
        print(show(row), flush=True)
    return rows


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    measured = (
        f"{row['measured']:.3g}" if isinstance(row["measured"], float) else f"{row['measured']}"
    )
    bound = "" if row["bound"] is None else f"{row['bound']:.0e}" if row["bound"] else "0"
    return (
        f"| {row['what']} | {measured} | {bound} | {'' if row['holds'] else 'FAILED'} |"
        f" {row['seconds']:.0f} |"
    )


def main() -> int:
    """All parts, or those that are named."""
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that PyTorch sees")
    unknown = [part for part in sys.argv[1:] if part not in PARTS]
    if unknown:
        raise SystemExit(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    began = time.monotonic()
    print(f"{versions()}\n\n| what | measured | bound | | s |\n|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor() as pool:
        for parts in ORDER:
            wanted = [part for part in parts if part in (sys.argv[1:] or PARTS)]
            rows += [row for some in pool.map(run, wanted) for row in some]
    failed = sum(not row["holds"] for row in rows)
    print(f"\n{len(rows)} rows, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
