"""What a checkpoint and an export cost: how long training pauses, and how fast they are written.

    PYTHONPATH=. python benchmarks/checkpoints.py DATA [LAYERS]

Trains the recipe's YAML with LAYERS blocks of Llama-3.1-8B's shape (default 32) on DATA (made by
tests/gpu/data.py), on all GPUs of this host, compiled. Step 6 has a checkpoint and an export; the
run is killed when both are written. Needs 12 bytes of disk and 8 of host memory a weight. Prints
the pauses that training logged, the times of all steps, and the rates of writing beside those of
plain writes by as many processes to the same disk, before and after.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.gpu.files import write_tutorial
from tests.gpu.runs import start, wait_for

BLOCK, PLAIN = 2**26, 2**33  # bytes of a write, and of the plain file of each process
WRITER = """
import os, sys
block = os.urandom(2**26)
with open(sys.argv[1], "wb", buffering=0) as file:
    for _ in range(int(sys.argv[2]) // len(block)):
        file.write(block)
    os.fsync(file.fileno())
"""


def plain_rate(place: Path, processes: int) -> float:
    """GiB/s of plain writes, flushed to the disk."""
    files = [place / f"plain-{number}" for number in range(processes)]
    began = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(PLAIN // processes)])
        for file in files
    ]
    codes = [one.wait() for one in running]
    seconds = time.perf_counter() - began
    for file in files:
        file.unlink()
    assert not any(codes)
    return PLAIN / 2**30 / seconds


def main() -> None:
    data, layers = Path(sys.argv[1]).absolute(), int(sys.argv[2] if len(sys.argv) > 2 else 32)
    gpus = torch.cuda.device_count()
    print(f"{gpus} × {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {layers} blocks")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        config = write_tutorial(place, layers, data)
        plain = [plain_rate(place, gpus)]
        settings = {
            "training.train_iters": 100,
            "training.logs.interval": 1,
            "training.validation.interval": "null",
            "training.validation.iterations": "null",
            "training.test_iters": 0,
            "data.split": "[70,18,12]",
            "training.checkpoint.interval": 6,
            "training.checkpoint.keep": 1,
            "training.export.interval": 6,
            "model.multi_stage.compile_all": "yes",
            "batch.batch_size": 16 * gpus,
            "optimizer.moments_dtype": os.environ.get("MOMENTS", "bf16"),
        }
        run = start(place, place / "run", settings, gpus, config=config)
        wait_for(lambda: "Saved " in run.printed() and "Exported " in run.printed(), run, 500)
        run.kill()
        plain.append(plain_rate(place, gpus))
        said = run.printed()
        for line in said.splitlines():
            if re.search(r"Saved |Exported |Training waits|page-locked", line):
                print(line)
        times = {step: record["step_time_ms"] / 1e3 for step, record in run.records().items()}
        usual = statistics.median(seconds for step, seconds in times.items() if step in (4, 5, 6))
        print(f"median step before the first save: {usual:.2f} s; of each step:")
        print(json.dumps({step: round(seconds, 2) for step, seconds in times.items()}))
        for kind in ("checkpoint", "export"):
            folders = sorted((run.folder / kind).rglob("*.safetensors"))
            newest = folders[-1].parent
            size = sum(file.stat().st_size for file in newest.iterdir()) / 2**30
            seconds = [
                float(found)
                for found in re.findall(rf"(?:Saved|Exported) \S+/{kind}/\S+ in ([\d.]+) s", said)
            ]
            rates = ", ".join(f"{size / one:.2f}" for one in seconds)
            print(f"{kind}: {size:.2f} GiB, {rates} GiB/s from the decision to the manifest")
        print(f"plain writes by {gpus} processes: {plain[0]:.2f} and {plain[1]:.2f} GiB/s")


if __name__ == "__main__":
    main()
