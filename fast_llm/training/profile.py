"""Profile a step with torch.profiler, at an interval (`training.profiling`).

<experiment_dir>/profile/
├── step_<n>_rank_<r>.txt        time by category, and the longest operations
└── step_<n>_rank_<r>.json.gz    the trace, for Perfetto (ui.perfetto.dev) or chrome://tracing

On a GPU, kernels and copies count; on a CPU, operations, each without its nested ones. Python and
autograd's own functions do not count: they may wait for another process. When nothing counted runs,
the step is idle.

Streams and threads run in parallel. The time of a category adds them up. Its share of the step
counts each moment once, and communication and copies to the device only where nothing else ran. So
shares say what an optimization can gain, and add up to the step.
"""

import gzip
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fast_llm.config.train import ProfilingConfig
from fast_llm.parallel.mesh import Mesh

logger = logging.getLogger("fast_llm")

COPIES, COMMUNICATION, OTHER, IDLE = (
    "copies to the device",
    "communication",
    "everything else",
    "idle",
)
# An operation or kernel is of the first category of which a pattern occurs in its name. The
# compiler's matmuls are templates. Its CPU kernels have no names: their time is that of the code
# around them.
CATEGORIES = {
    COMMUNICATION: "nccl|gloo|c10d::",
    COPIES: "memcpy htod",
    "attention": "attention|attn|flash|fmha|sdpa",
    "cross entropy": "cross_entropy|log_?softmax|nll_loss",
    "optimizer": "adam|foreach|multi_tensor|lpnorm|linalg_vector_norm",
    "matmuls": "::(add|b|baddb)?mm|matmul|::linear|scaled_mm|gemm|gemv|nvjet|cutlass|xmma|splitk"
    "|triton_tem",
    OTHER: "copy_kernel|fillfunctor",
    "norms and elementwise": "norm|gammabeta|rotate|swiglu|silu|triton_|elementwise"
    "|compiledfxgraph|aten::(add|sub|mul|div|neg)",
}
# Of several categories that run at the same time, the first gets the time.
_ORDER = [
    *(title for title in CATEGORIES if title not in (OTHER, COPIES, COMMUNICATION)),
    OTHER,
    COPIES,
    COMMUNICATION,
]
_SHOWN = 30  # operations
_WIDTH = 110  # characters of a kernel's name

# Of a trace: name and category, begin and duration in microseconds, thread or stream.
Event = dict[str, Any]


@cache
def category(name: str) -> str:
    """The category of an operation or kernel."""
    return next(
        (title for title, words in CATEGORIES.items() if re.search(words, name.lower())), OTHER
    )


@dataclass
class TimeSpent:
    """The time of a category or operation, in microseconds."""

    calls: int = 0
    own: float = 0.0  # summed over threads or streams
    once: float = 0.0  # of the step, each moment counted once


@dataclass(frozen=True)
class Breakdown:
    """The time of a step by category and operation."""

    total: float  # microseconds
    categories: dict[str, TimeSpent]  # the longest first; includes idle
    operations: dict[str, TimeSpent]  # by name, the longest first, without `once`

    def share(self, title: str) -> float:
        """A category's share of the step, from 0 to 1; all shares add up to 1."""
        return self.categories[title].once / self.total


def timed_events(trace: dict[str, Any]) -> list[Event]:
    """The events that count: kernels and copies if there was a GPU, else CPU operations."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    kernels = [
        event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return kernels or [event for event in events if _is_operation(event)]


def _is_operation(event: Event) -> bool:
    name: str = event["name"]
    if event.get("cat") == "user_annotation":  # gloo's threads, and the compiler's code for the CPU
        return name.startswith(("gloo:", "## Call CompiledFxGraph"))
    return event.get("cat") == "cpu_op" and "::" in name and "autograd::" not in name


def exclusive_intervals(events: Iterable[Event]) -> Iterator[tuple[float, float, Event]]:
    """Divide the time of one thread or stream: each moment is of the innermost running event."""
    begun: list[Event] = []
    now = 0.0

    def until(moment: float) -> Iterator[tuple[float, float, Event]]:
        nonlocal now
        while begun and now < moment:
            end = min(begun[-1]["ts"] + begun[-1]["dur"], moment)
            if end > now:
                yield now, end, begun[-1]
                now = end
            if now < moment:
                begun.pop()

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        yield from until(event["ts"])
        now = max(now, event["ts"])
        begun.append(event)
    yield from until(float("inf"))


def break_down(trace: dict[str, Any]) -> Breakdown:
    """Break down a trace of `export_chrome_trace`.

    A trace of `Profile` is broken down over its step, others from the first operation to the last.
    Raises ValueError if no operation ran.
    """
    events = timed_events(trace)
    if not events:
        raise ValueError("the trace holds no operation")
    begin, end = (
        min(event["ts"] for event in events),
        max(event["ts"] + event["dur"] for event in events),
    )
    for event in trace["traceEvents"]:
        if event.get("cat") == "user_annotation" and event["name"].startswith(_STEP):
            begin, end = event["ts"], event["ts"] + event["dur"]
    threads: dict[Any, list[Event]] = defaultdict(list)
    categories: dict[str, TimeSpent] = defaultdict(TimeSpent)
    operations: dict[str, TimeSpent] = defaultdict(TimeSpent)
    for event in events:
        threads[event.get("pid"), event["tid"]].append(event)
        for spent in (categories[category(event["name"])], operations[event["name"]]):
            spent.calls += 1
    busy: list[tuple[float, float, str]] = []
    for thread in threads.values():
        for since, until, event in exclusive_intervals(thread):
            title = category(event["name"])
            for spent in (categories[title], operations[event["name"]]):
                spent.own += until - since
            busy.append((max(since, begin), min(until, end), title))
    for title, microseconds in _attribute(busy).items():
        if microseconds:
            categories[title].once = microseconds
    idle = max(0.0, end - begin - sum(spent.once for spent in categories.values()))
    categories[IDLE] = TimeSpent(0, idle, idle)
    return Breakdown(
        end - begin,
        dict(sorted(categories.items(), key=lambda item: -item[1].once)),
        dict(sorted(operations.items(), key=lambda item: -item[1].own)),
    )


def _attribute(busy: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """The time of each category, where each moment counts for one category."""
    changes = sorted(
        (moment, change, _ORDER.index(title))
        for since, until, title in busy
        if since < until
        for moment, change in ((since, 1), (until, -1))
    )
    running, spent = [0] * len(_ORDER), dict.fromkeys(_ORDER, 0.0)
    for (moment, change, which), (following, _, _) in pairwise(changes):
        running[which] += change
        first = next((title for title, count in zip(_ORDER, running, strict=True) if count), None)
        if first is not None:
            spent[first] += following - moment
    return spent


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(found: Breakdown, title: str) -> str:
    """Format a breakdown as text under a title."""
    lines = [title, "", f"{'part':24}{'calls':>9}{'ms':>12}{'of the step':>14}"]
    for name, spent in found.categories.items():
        calls = f"{spent.calls:,}" if spent.calls else ""
        lines.append(
            f"{name:24}{calls:>9}{spent.own / 1e3:>12,.2f}{_percent(found.share(name)):>14}"
        )
    calls = f"{sum(spent.calls for spent in found.categories.values()):,}"
    lines += [
        f"{'the step':24}{calls:>9}{found.total / 1e3:>12,.2f}{_percent(1):>14}",
        "",
        "ms: of all threads or streams together. of the step: each moment counts once, and"
        " communication and copies to the",
        "device only where nothing else ran. idle: no operation ran, but Python, or a device that"
        " waits.",
        "",
        f"{'calls':>9}{'ms':>12}  {'part':24}what took longest, without what it calls",
    ]
    for name, spent in list(found.operations.items())[:_SHOWN]:
        shown = name if len(name) <= _WIDTH else name[: _WIDTH - 1] + "…"
        lines.append(f"{spent.calls:>9,}{spent.own / 1e3:>12,.2f}  {category(name):24}{shown}")
    return "\n".join(lines) + "\n"


_STEP = "training step "


class Profile:
    """A context around a step: records it, and writes the trace and its breakdown.

    Errors are logged as warnings: a profile never ends a run.
    """

    def __init__(self, step: int, folder: Path, mesh: Mesh):
        """`folder`: for profiles; created if missing."""
        self.step, self.folder, self.mesh = step, folder, mesh
        self.annotation = record_function(f"{_STEP}{step}")
        self.profiler: profile | None = None  # while it records

    def __enter__(self) -> Self:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it prints on the terminal
        try:
            gpu = [ProfilerActivity.CUDA] if self.mesh.device.type == "cuda" else []
            profiler = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._settle()
            profiler.start()
            self.profiler = profiler
            self.annotation.__enter__()
        except Exception as error:
            self._warn(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.profiler is None:
            return
        try:
            if kind is None:
                self._settle()
            self.annotation.__exit__(None, None, None)
            self.profiler.stop()
            if kind is None:
                self._write(self.profiler)
        except Exception as wrong:
            self._warn(wrong)

    def _settle(self) -> None:
        """Wait for the device: the trace has the step's kernels, and no others."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)

    def _write(self, profiler: profile) -> None:
        name = f"step_{self.step}_rank_{self.mesh.rank}"
        partial = self.folder / f".{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            profiler.export_chrome_trace(str(partial))
            trace = partial.read_bytes()
            found = break_down(_parsed(trace, partial))
            place = f"rank {self.mesh.rank} of {self.mesh.size}, {self.mesh.device.type.upper()}"
            text = table(
                found, f"Step {self.step}, {place}: {found.total / 1e3:,.1f} ms under the profiler"
            )
            for ending, content in ((".txt", text.encode()), (".json.gz", gzip.compress(trace, 5))):
                partial.write_bytes(content)
                partial.replace(self.folder / f"{name}{ending}")
        finally:
            partial.unlink(missing_ok=True)
        largest = ", ".join(
            f"{title} {_percent(found.share(title))}" for title in list(found.categories)[:3]
        )
        logger.info(f"Profile of step {self.step}: {largest}; see {self.folder / name}.txt")

    def _warn(self, error: Exception) -> None:
        logger.warning(f"Step {self.step} could not be profiled; training continues: {error!r}")


def _parsed(trace: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(trace)
    except ValueError as error:  # the profiler does not report a full disk
        raise OSError(f"{path} could not be written completely; free space on the disk") from error
    return parsed


@contextmanager
def profiled(
    step: int, config: ProfilingConfig, folder: Path, mesh: Mesh, heartbeat: Callable[..., None]
) -> Iterator[None]:
    """Profile the step inside on `training.profiling.ranks`; the other processes wait."""
    heartbeat("profiling", slow=True)
    with Profile(step, folder, mesh) if mesh.rank in config.ranks else nullcontext():
        yield
        heartbeat("profiling", slow=True)
    mesh.barrier()
