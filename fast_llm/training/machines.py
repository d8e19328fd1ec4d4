"""Slow machines: at the start and while training, name the process for which all others wait.

Step times do not show it: in every step the processes wait for each other, so all of them take as
long as the slowest. Therefore each process times work of its own, the same on all:

matmul      some matmuls on its device, once before the first step and once before each step
host        a loop of Python, before each step; on the CPU the matmuls show the same
data        how long its step waited for a batch
exchange    sending a block to a neighbour and receiving one, before the first step
write       a file in the experiment folder, written and flushed to disk, before the first step

A time is compared with the median over the processes. While training, the times of the steps since
the last record are gathered with it: no step waits for another process because of them. On a GPU
the matmuls are timed by events that are read after the step, which has waited for the device
anyway. Cost of a step: the matmuls, 0.2 ms on an H100 by its sustained rate, and 0.5 ms of Python.
"""

import logging
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fast_llm.collectives import all_gather_object
from fast_llm.parallel.mesh import Mesh
from fast_llm.terminal import counted

logger = logging.getLogger("fast_llm")

# Size of the square matrices, matmuls in a row, and bytes that are sent, by kind of device.
_SIZES = {"cuda": (2048, 8, 2**26), "cpu": (256, 2, 2**22)}
_FILE = 2**24  # bytes
_LOOP = 10_000
_REPEATS = 5  # of a measurement before the first step; the median counts
_WHAT = {
    "matmul": "matmuls",
    "host": "Python on the host",
    "data": "waiting for data",
    "exchange": "exchanging data with its neighbours",
    "write": "writing to the experiment folder",
}
_REMEDY = "look at its clocks, its temperature and other programs there, or replace the machine"


@dataclass(frozen=True)
class Slowest:
    """The process that took longest for something."""

    rank: int
    what: str  # a key of _WHAT
    times: float  # as long as the median

    def sentence(self, names: Sequence[str], factor: float) -> str:
        """Which process it is, how slow, and what to do."""
        count = counted(len(names), "process", "processes")
        return (
            f"Rank {self.rank} on {names[self.rank]} takes {self.times:.3g} times as long as the"
            f" median of {count} for {_WHAT[self.what]}, above training.slow_process_factor"
            f" {factor:g}: the others wait for it; {_REMEDY}"
        )


def slow_processes(
    seconds: Sequence[float], what: str, factor: float, step: float = 0.0
) -> list[Slowest]:
    """The processes above `factor` × the median, the slowest first. `seconds`: by rank.

    With `step`, the seconds of a step, a time counts by what it adds to the step: waiting for data
    has a median near 0.
    """
    middle = statistics.median(seconds)
    times = [
        1 + (one - middle) / step if step else one / middle if middle else 1.0 for one in seconds
    ]
    found = [Slowest(rank, what, each) for rank, each in enumerate(times) if each > factor]
    return sorted(found, key=lambda slow: -slow.times)


class Matmuls:
    """The matmuls that every process times."""

    def __init__(self, device: torch.device):
        size, self.count, _ = _SIZES[device.type]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        # Random: on a GPU, zeros take less power and run faster.
        generator = torch.Generator(device).manual_seed(0)
        self.left, self.right = (
            torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)

    def run(self) -> Callable[[], float]:
        """Start them. Returns a function that gives their seconds, once the device is done."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            self._multiply()
            seconds = time.perf_counter() - started
            return lambda: seconds
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        self._multiply()
        events[1].record()
        return lambda: events[0].elapsed_time(events[1]) / 1e3

    def _multiply(self) -> None:
        for _ in range(self.count):
            torch.mm(self.left, self.right, out=self.out)


@dataclass
class SpeedMonitor:
    """Compares the processes of a run while it trains. Does nothing with one process."""

    mesh: Mesh
    factor: float
    names: list[str]  # of all processes: host and device
    _pending: Callable[[], float] | None = None
    _seconds: dict[str, float] = field(default_factory=lambda: {"matmul": 0.0, "host": 0.0})
    _steps: int = 0
    _warned: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        self.matmuls = Matmuls(self.mesh.device)

    @staticmethod
    def of(mesh: Mesh, factor: float | None) -> "SpeedMonitor | None":
        """The monitor of a run, or None without a factor or with one process. A collective."""
        if factor is None or mesh.size == 1:
            return None
        return SpeedMonitor(
            mesh, factor, all_gather_object(describe_process(mesh), mesh.slow_group)
        )

    def before_step(self) -> None:
        """Time this process's own work. The device has finished the step before."""
        self._collect()
        started = time.perf_counter()
        for _ in range(_LOOP):
            pass
        self._seconds["host"] += time.perf_counter() - started
        self._pending = self.matmuls.run()

    def _collect(self) -> None:
        if self._pending is not None:
            self._seconds["matmul"] += self._pending()
            self._steps += 1
            self._pending = None

    def discard(self) -> None:
        """Forget the steps since the last record."""
        self._collect()
        self._seconds, self._steps = dict.fromkeys(self._seconds, 0.0), 0

    def summary(self, step_seconds: float, data_seconds: float) -> dict[str, Any]:
        """Fields of a training record: spreads, and the slowest process if it is above the bound.

        A collective. Both arguments are of this process, per step. Warns of a process once.
        """
        self._collect()
        steps = max(1, self._steps)
        own = [self._seconds["matmul"] / steps, self._seconds["host"] / steps, data_seconds]
        self.discard()
        every = all_gather_object(own, self.mesh.slow_group)
        matmul, host, data = (list(column) for column in zip(*every, strict=True))
        slow = [
            *slow_processes(matmul, "matmul", self.factor),
            *(slow_processes(host, "host", self.factor) if self._has_gpu else []),
            *slow_processes(data, "data", self.factor, step_seconds),
        ]
        values: dict[str, Any] = {
            "matmul_spread": max(matmul) / statistics.median(matmul),
            "host_spread": max(host) / statistics.median(host),
            "data_wait_max_ms": max(data) * 1e3,
        }
        if not slow:
            return values
        worst = max(slow, key=lambda one: one.times)
        if (worst.rank, worst.what) != self._warned:
            self._warned = worst.rank, worst.what
            logger.warning(f"{worst.sentence(self.names, self.factor)}.")
        return values | {
            "slowest_rank": worst.rank,
            "slowest_host": self.names[worst.rank],
            "slowest_in": worst.what,
            "slowest_times": worst.times,
        }

    @property
    def _has_gpu(self) -> bool:
        return self.mesh.device.type == "cuda"


def describe_process(mesh: Mesh) -> str:
    """Host and device of this process."""
    device = "the CPU"
    if mesh.device.type == "cuda":
        device = f"GPU {mesh.device.index} ({torch.cuda.get_device_name(mesh.device)})"
    return f"{socket.gethostname()}, {device}"


# Before the first step.


def check_machines(mesh: Mesh, factor: float, folder: Path | None) -> list[Slowest]:
    """Time matmuls, exchanges between neighbours, an all-reduce and a write on every process.

    Logs the medians, and warns of processes above `factor` times the median. A collective.
    """
    names = all_gather_object(describe_process(mesh), mesh.slow_group)
    own = {"matmul": _time_matmuls(mesh.device)}
    reduction = _time_all_reduce(mesh)
    own["exchange"] = _time_exchange(mesh)
    if folder is not None:
        own["write"] = _time_write(folder, mesh.rank)
    every = all_gather_object(own, mesh.slow_group)
    columns = {what: [one[what] for one in every] for what in own}
    logger.info(f"Speed of {counted(mesh.size, 'process', 'processes')}: {_rates(mesh, columns)}"
        f", all-reduce {_SIZES[mesh.device.type][2] / reduction / 1e9:.3g} GB/s.")  # fmt: skip
    slow = [one for what in columns for one in slow_processes(columns[what], what, factor)]
    for one in slow:
        logger.warning(f"{one.sentence(names, factor)}.")
    return slow


def _rates(mesh: Mesh, columns: dict[str, list[float]]) -> str:
    """The medians, as rates."""
    size, count, sent = _SIZES[mesh.device.type]
    work = {
        "matmul": (2 * count * size**3 / 1e12, "TFLOP/s"),
        "exchange": (sent / 1e9, "GB/s"),
        "write": (_FILE / 1e9, "GB/s"),
    }
    return ", ".join(
        f"{what} {work[what][0] / statistics.median(seconds):.3g} {work[what][1]}"
        for what, seconds in columns.items()
    )


def _time_matmuls(device: torch.device) -> float:
    matmuls, times = Matmuls(device), []
    for _ in range(2 * _REPEATS):
        seconds = matmuls.run()
        _finish(device)
        times.append(seconds())
    return statistics.median(times[_REPEATS:])  # the first ones load kernels and raise clocks


def _time_all_reduce(mesh: Mesh) -> float:
    """Seconds of an all-reduce of all processes, the same on each of them."""
    block = torch.zeros(_SIZES[mesh.device.type][2] // 4, device=mesh.device)

    def reduce() -> None:
        dist.all_reduce(block)

    return _time(mesh, reduce)


def neighbours(rank: int, size: int, stride: int) -> Iterator[int | None]:
    """The partner of a rank in each round of exchanges, or None in a round that it sits out.

    Ranks `stride` apart form a ring, so that each exchanges with the machines before and after its
    own. A slow one is slow with both, its neighbours with one of them.
    """
    if size % stride or size == stride:
        stride = 1
    members, place = size // stride, rank // stride

    def at(position: int) -> int:
        return position % members * stride + rank % stride

    last = members - 1
    for first in (0, 1):
        paired = (place - first) % members
        alone = members % 2 and paired == last
        yield None if alone else at(place + (1 if paired % 2 == 0 else -1))
        if members == 2:
            return
    if members % 2:  # the ends of an odd ring
        yield at(place + (1 if place == last else -1)) if place in (0, last) else None


def _time_exchange(mesh: Mesh) -> float:
    """Seconds to exchange a block with a neighbour: of the faster neighbour."""
    out = torch.zeros(_SIZES[mesh.device.type][2] // 4, device=mesh.device)
    into, times = torch.empty_like(out), []
    stride = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for partner in neighbours(mesh.rank, mesh.size, stride):

        def exchange(partner: int | None = partner) -> None:
            if partner is not None:
                sends = dist.P2POp(dist.isend, out, partner), dist.P2POp(dist.irecv, into, partner)
                for work in dist.batch_isend_irecv(list(sends)):
                    work.wait()

        seconds = _time(mesh, exchange)
        times += [seconds] if partner is not None else []
    return min(times)


def _time(mesh: Mesh, action: Callable[[], None]) -> float:
    """The median seconds of an action that starts at once on all processes."""
    ready, times = torch.zeros(1, device=mesh.device), []
    for _ in range(1 + _REPEATS):
        dist.all_reduce(ready)
        _finish(mesh.device)
        started = time.perf_counter()
        action()
        _finish(mesh.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _time_write(folder: Path, rank: int) -> float:
    """Seconds to write a file and flush it to disk. Raises OSError."""
    path, content = folder / f".speed_{rank}", os.urandom(_FILE)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - started
    finally:
        with suppress(OSError):
            path.unlink()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
