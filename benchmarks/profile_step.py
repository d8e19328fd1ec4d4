"""Compare the time of each part of a step with the least it could take.

    PYTHONPATH=. python benchmarks/profile_step.py [--trace FILE] [--length 512] [--steps 3]
                                                   [--rate FLOP/s] [--copy bytes/s]

Without `--trace` it profiles the bf16 step of benchmarks/step_cpu.py on this machine. With it, it
reads a trace that `training.profiling` or `export_chrome_trace` wrote, of a CPU or a GPU. Of a GPU
kernels count, not the operations that launch them. Parts are those of fast_llm/training/profile.py.
`--rate` and `--copy` are the device's speed of 2,048³ bf16 matmuls and of copying; by default they
are measured here.

floor      matmuls at the rate, including those of attention (causal half, two forward and five
           backward); for other parts, every tensor read or written once at the speed of copying;
           empty where a trace has no shapes
gap        measured time beyond the floor, in percent of the step
idle       time in which no operation ran: Python, or a GPU that waits
"""

import argparse
import gzip
import json
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fast_llm.training.profile import OTHER, break_down, category

BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4}
# Of everything else what reads or writes tensors; the rest hands them on.
COPYING = ("aten::copy_", "aten::fill_", "aten::sum")


def floor(event: dict[str, Any], rate: float, copy: float) -> float:
    """Microseconds that an operation must take, 0 if its shapes are not known."""
    arguments = event.get("args", {})
    shapes = [
        shape
        for shape in arguments.get("Input Dims", [])
        if shape and all(isinstance(n, int) for n in shape)
    ]
    kinds = [kind for kind in arguments.get("Input type", []) if kind in BYTES]
    name, title = event["name"], category(event["name"])
    if title == "products":
        if (
            not name.startswith(("aten::mm", "aten::addmm", "aten::bmm")) or len(shapes) < 2
        ):  # what calls these
            return 0.0
        left, right = shapes[-2:] if "addmm" in name else shapes[:2]
        return float(2 * math.prod(left) * right[-1] / rate * 1e6)
    if title == "attention" and name.startswith("fast_llm::attention"):
        back = name.endswith("back")
        query, ends = (
            shapes[6 if back else 0],
            shapes[9 if back else 3][0],
        )  # of documents that are alike
        pairs = query[0] * query[1] * (query[0] * query[1] / (ends - 1)) / 2 * query[2] * query[3]
        return float((10 if back else 4) * pairs / rate * 1e6)
    if title == "attention" and "scaled_dot_product" in name and len(shapes[0]) == 4:
        back = "backward" in name
        batch, heads, length, width = shapes[0]
        return float((10 if back else 4) * batch * heads * length**2 / 2 * width / rate * 1e6)
    if title == "attention":
        return 0.0
    moved = sum(math.prod(s) * BYTES[kind] for s, kind in zip(shapes, kinds, strict=False))
    return float(moved / copy * 1e6)


def table(trace: dict[str, Any], steps: int, rate: float, copy: float) -> str:
    """The table, in Markdown: milliseconds of one step."""
    found = break_down(trace)
    floors: dict[str, float] = defaultdict(float)
    for event in trace["traceEvents"]:
        name = event.get("name", "")
        if (
            event.get("ph") == "X"
            and event.get("cat") == "cpu_op"
            and name.startswith(("aten::", "fast_llm::"))
        ):
            title = category(name)
            floors[title] += floor(event, rate, copy) if title != OTHER or name in COPYING else 0.0
    lines = [
        "| part | calls | floor ms | measured ms | of the step | gap |",
        "|---|---|---|---|---|---|",
    ]
    for title, spent in found.categories.items():
        least, took = floors[title] / steps / 1e3, spent.own / steps / 1e3
        gap = f"{(spent.once - floors[title]) / found.total:.1%}"
        shown = f"{least:.1f}" if least else "–"
        lines.append(
            f"| {title} | {spent.calls // steps} | {shown} | {took:.1f} | {found.share(title):.1%}"
            f" | {gap} |"
        )
    total, calls = (
        sum(floors.values()) / steps / 1e3,
        sum(spent.calls for spent in found.categories.values()) // steps,
    )
    lines.append(f"| all | {calls} | {total:.1f} | {found.total / steps / 1e3:.1f} | 100.0% | |")
    return "\n".join(lines)


def rates() -> tuple[float, float]:
    """This CPU's rate of bf16 matmuls, in FLOP/s, and of copying, in bytes/s read and written."""
    one, other = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    product, source = torch.empty_like(one), torch.ones(2**24)
    copied = torch.zeros_like(source)
    return 2 * 2048**3 / _least(
        lambda: torch.mm(one, other, out=product)
    ), 2 * source.nbytes / _least(lambda: copied.copy_(source))


def _least(run: Any) -> float:
    times = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def profiled(length: int, steps: int) -> dict[str, Any]:
    """A trace of the step of benchmarks/step_cpu.py."""
    from benchmarks.step_cpu import ours

    step = ours("smollm2", 1, length)
    for _ in range(3):
        step()
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(steps):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
        return trace


def read(path: Path) -> dict[str, Any]:
    """A trace, as it is or gzipped."""
    data = path.read_bytes()
    trace: dict[str, Any] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return trace


def main() -> None:
    """Read or make a trace, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="that the trace holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--copy", type=float)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trace = read(options.trace) if options.trace else profiled(options.length, options.steps)
    rate, copy = (options.rate, options.copy) if options.rate and options.copy else rates()
    print(f"Products {rate / 1e9:.0f} GFLOP/s, copying {copy / 1e9:.0f} GB/s\n")
    print(table(trace, options.steps, rate, copy))


if __name__ == "__main__":
    main()
