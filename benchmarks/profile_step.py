"""Where the time of a step goes: a trace of torch.profiler as a table of floor, measured and gap, part by part.

    python benchmarks/profile_step.py [--trace file.json] [--length 512] [--steps 3] [--rate FLOP/s] [--copy bytes/s]

Without `--trace` it profiles the bf16 step of benchmarks/step_cpu.py on this machine. With one it reads what `profile(record_shapes=True)`
wrote with `export_chrome_trace`, of the CPU or of a GPU, whose kernels are counted then and not the operations that start them.
`--rate` and `--copy`: what the device does of 2,048³ bf16 products, and of copying; measured here if they are not given.

floor      products at the rate, those of attention (the causal half, two forward and five backward) as well; of other parts every tensor
           read or written once at the speed of copying; none where a trace has no shapes
gap        what is measured beyond the floor, in percent of the step
rest       time in which no operation ran: Python, and a GPU that waits
"""

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# The first part of which a word occurs in the name of an operation or kernel.
PARTS = (
    ("attention", ("attention", "flash", "fmha", "sdpa", "cudnn_generated")),
    ("cross entropy", ("cross_entropy", "log_softmax", "nll_loss")),
    ("optimizer", ("adam", "foreach", "linalg_vector_norm", "multi_tensor", "lpnorm")),
    ("norms and elementwise", ("rms_norm", "rotate", "swiglu", "silu")),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "nvjet", "cutlass", "xmma")),
    ("data", ("DataLoader", "Memcpy HtoD")),
)
OTHER = "copies, sums and the like"
BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4}


def part(name: str) -> str:
    """Which part of a step an operation or kernel belongs to."""
    return next((title for title, words in PARTS if any(word.lower() in name.lower() for word in words)), OTHER)


def own_times(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event of one thread with the microseconds that no event within it has."""
    open_events: list[tuple[dict[str, Any], list[float]]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_events and event["ts"] >= open_events[-1][0]["ts"] + open_events[-1][0]["dur"] - 1e-3:
            done, own = open_events.pop()
            yield done, own[0]
        if open_events:
            open_events[-1][1][0] -= event["dur"]
        open_events.append((event, [event["dur"]]))
    for done, own in reversed(open_events):
        yield done, own[0]


def floor(event: dict[str, Any], rate: float, copy: float) -> float:
    """Microseconds that an operation must take, 0 if its shapes are not known."""
    arguments = event.get("args", {})
    shapes = [shape for shape in arguments.get("Input Dims", []) if shape and all(isinstance(n, int) for n in shape)]
    kinds = [kind for kind in arguments.get("Input type", []) if kind in BYTES]
    name, title = event["name"], part(event["name"])
    if title == "products" and len(shapes) >= 2:
        left, right = shapes[-2:] if "addmm" in name else shapes[:2]
        return 2 * math.prod(left) * right[-1] / rate * 1e6
    if title == "attention" and name.startswith("fast_llm::attention"):
        back = name.endswith("back")
        query, ends = shapes[6 if back else 0], shapes[9 if back else 3][0]  # of documents that are alike
        pairs = query[0] * query[1] * (query[0] * query[1] / (ends - 1)) / 2 * query[2] * query[3]
        return (10 if back else 4) * pairs / rate * 1e6
    if title == "attention" and "scaled_dot_product" in name and len(shapes[0]) == 4:
        back = "backward" in name
        batch, heads, length, width = shapes[0]
        return (10 if back else 4) * batch * heads * length**2 / 2 * width / rate * 1e6
    if title == "attention":
        return 0.0
    return sum(math.prod(s) * BYTES[kind] for s, kind in zip(shapes, kinds, strict=False)) / copy * 1e6


def table(trace: dict[str, Any], steps: int, rate: float, copy: float) -> str:
    """The table, in Markdown: milliseconds of one step."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    counted = kernels or operations
    measured: dict[str, float] = defaultdict(float)
    floors: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    streams: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in counted:
        streams[event["tid"]].append(event)
    for stream in streams.values():
        for event, own in own_times(stream):
            measured[part(event["name"])] += own
            calls[part(event["name"])] += 1
    for event in operations:
        if event["name"].startswith(("aten::", "fast_llm::")) and part(event["name"]) != OTHER:
            floors[part(event["name"])] += floor(event, rate, copy)
    for event in operations:
        if event["name"] in ("aten::copy_", "aten::add_", "aten::add", "aten::mul", "aten::fill_", "aten::sum"):
            floors[OTHER] += floor(event, rate, copy)
    begin, end = min(e["ts"] for e in counted), max(e["ts"] + e["dur"] for e in counted)
    whole = end - begin
    measured["rest"] = max(0.0, whole - sum(measured.values()))
    lines = ["| part | calls | floor ms | measured ms | of the step | gap |", "|---|---|---|---|---|---|"]
    for title in sorted(measured, key=lambda name: -measured[name]):
        spent, least = measured[title] / steps / 1e3, floors[title] / steps / 1e3
        gap = f"{(spent - least) * steps * 1e3 / whole:.1%}"
        shown = f"{least:.1f}" if least else "–"
        lines.append(
            f"| {title} | {calls[title] // steps} | {shown} | {spent:.1f} | {measured[title] / whole:.1%} | {gap} |"
        )
    total = sum(floors[title] for title in measured) / steps / 1e3
    lines.append(f"| all | {len(counted) // steps} | {total:.1f} | {whole / steps / 1e3:.1f} | 100.0% | |")
    return "\n".join(lines)


def rates() -> tuple[float, float]:
    """What this CPU does of bf16 products in FLOP/s, and of copying in bytes/s, read and written."""
    one, other = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    product, source = torch.empty_like(one), torch.ones(2**24)
    copied = torch.zeros_like(source)
    return 2 * 2048**3 / _least(lambda: torch.mm(one, other, out=product)), 2 * source.nbytes / _least(
        lambda: copied.copy_(source)
    )


def _least(run: Any) -> float:
    times = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def profiled(length: int, steps: int) -> dict[str, Any]:
    """A trace of the step of benchmarks/step_cpu.py."""
    from step_cpu import ours

    step = ours(1, length)
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


def main() -> None:
    """Read or make a trace, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="that the trace holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--copy", type=float)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trace = json.loads(options.trace.read_text()) if options.trace else profiled(options.length, options.steps)
    rate, copy = (options.rate, options.copy) if options.rate and options.copy else rates()
    print(f"Products {rate / 1e9:.0f} GFLOP/s, copying {copy / 1e9:.0f} GB/s\n")
    print(table(trace, options.steps, rate, copy))


if __name__ == "__main__":
    main()
