"""Running averages of the weights (`training.averages`), in fp32 in host memory.

With w the weights when an average is updated for the k-th time, the average becomes
a + c (w - a), where c = 1 / k for a uniform mean, and 1 - decay after the first time for an
exponential one (EMA).

On a GPU the weights are copied as for a checkpoint (checkpoint/staging.py), while the next forward
and backward pass runs, and a thread computes the averages. On the CPU they are computed at once.
A checkpoint holds the averages, so that a resumed run continues them to the bit.
"""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fast_llm.checkpoint import state as tensor_files
from fast_llm.checkpoint.staging import HostCopy, copied_bytes
from fast_llm.collectives import all_gather_object
from fast_llm.config.saving import AverageConfig
from fast_llm.errors import ConfigError
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.weights import Weights
from fast_llm.planning.disk import format_bytes
from fast_llm.tensors import Stored, local_part, on_host
from fast_llm.terminal import counted
from fast_llm.training.saving import available_memory


class Average:
    """One average: this process's part of each weight, and how often it was updated."""

    def __init__(self, config: AverageConfig):
        self.config = config
        self.updates = 0  # of the stretch that has begun
        self.tensors: dict[str, Tensor] = {}

    def begin(self, stored: Mapping[str, Stored]) -> None:
        """Allocate the tensors."""
        for name, one in stored.items():
            # Written to: memory that is only reserved would look free to other checks.
            empty = torch.empty(local_part(one.like).shape, dtype=torch.float32)
            self.tensors[name] = empty.zero_()

    def add(self, name: str, weight: Tensor, in_place: bool) -> None:
        """Move the average of a weight towards its present value.

        Not `in_place`: whoever reads the tensor of before may go on.
        """
        config, updates = self.config, self.updates + 1
        share = 1 / updates if config.decay is None or updates == 1 else 1 - config.decay
        before = self.tensors[name]
        self.tensors[name] = before.lerp_(weight, share) if in_place else before.lerp(weight, share)


class WeightAverages:
    """The averages of a run. Every process calls each method."""

    def __init__(
        self,
        configs: Mapping[str, AverageConfig],
        weights: Weights,
        mesh: Mesh,
        writing: Callable[[], bool],
    ):
        """`writing`: whether a checkpoint or export is being written, whose tensors must stay."""
        self.weights = weights
        self.mesh = mesh
        self.writing = writing
        self.averages = {name: Average(config) for name, config in configs.items()}
        self.host_copy = HostCopy()
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def begin(self) -> None:
        """Allocate the averages, and on a GPU the copy of the weights that updates need.

        Raises ConfigError on all processes if a host has too little memory.
        """
        if not self.averages:
            return
        stored = self.weights.stored()
        self._check_memory(stored)
        for average in self.averages.values():
            average.begin(stored)
        if self.device is not None:
            self.host_copy.allocate(stored)

    def _check_memory(self, stored: Mapping[str, Stored]) -> None:
        parts = sum(4 * local_part(one.like).numel() for one in stored.values())
        own = parts * len(self.averages)
        own += copied_bytes(stored) if self.device is not None else 0
        needed = own * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        hosts = all_gather_object((needed, available_memory()), self.mesh.slow_group)
        worst = max(hosts, key=lambda host: host[0] - host[1])
        if worst[0] > worst[1]:
            raise ConfigError(
                [
                    f"training.averages: {counted(len(self.averages), 'average')} need"
                    f"{'s' * (len(self.averages) == 1)} {format_bytes(worst[0])} of host memory,"
                    f" but a host has {format_bytes(worst[1])}; use fewer averages, or hosts with"
                    " more memory"
                ]
            )

    def update(self, step: int) -> None:
        """Add the weights after a step to the averages that are due."""
        due = [average for average in self.averages.values() if average.config.due(step)]
        if not due:
            return
        self.wait()  # the thread of the last update counts
        for average in due:
            if average.config.begins_anew(step):
                average.updates = 0
        stored = self.weights.stored()
        if self.device is None:
            self._add(due, {name: one.part for name, one in stored.items()})
            return
        self.host_copy.copy(stored)

        def part(name: str) -> Callable[[], Tensor]:
            return lambda: self.host_copy.part(name, stored[name])

        def run() -> None:
            try:
                torch.cuda.set_device(self.device)
                self.host_copy.wait()
                self._add(due, {name: part(name) for name in stored})
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="averages", daemon=True)
        self.thread.start()

    def _add(self, due: list[Average], parts: Mapping[str, Callable[[], Tensor]]) -> None:
        in_place = not self.writing()
        for name, part in parts.items():
            weight = part()
            for average in due:
                average.add(name, weight, in_place)
        for average in due:
            average.updates += 1

    def wait(self) -> None:
        """Wait until the last update is complete. Raises its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error

    # Checkpoints.

    def counts(self) -> dict[str, int]:
        """How often each average was updated, for a checkpoint's manifest."""
        self.wait()
        return {name: average.updates for name, average in self.averages.items()}

    def stored(self, name: str) -> dict[str, Stored]:
        """An average as checkpoints and exports hold it. Its tensors stay as they are."""
        self.wait()
        likes = self.weights.stored()
        tensors = self.averages[name].tensors
        return {
            weight: Stored(likes[weight].like, (), lambda tensor=tensor: tensor)
            for weight, tensor in tensors.items()
        }

    def load(self, path: Path, counts: Mapping[str, int]) -> list[str]:
        """Restore the averages from a checkpoint. Returns the names of those that it lacks.

        `counts`: of its manifest.
        """
        self.wait()
        likes = self.weights.stored() if self.averages else {}
        wanted: dict[str, Tensor] = {}
        for name, average in self.averages.items():
            average.updates = counts.get(name, 0)
            average.begin(likes)
            if name in counts:
                wanted |= {
                    f"{prefix(name)}{weight}": on_host(likes[weight].like, tensor)
                    for weight, tensor in average.tensors.items()
                }
        tensor_files.load(path, wanted, self.mesh.slow_group)
        return [name for name in self.averages if name not in counts]


def prefix(name: str) -> str:
    """What precedes the names of weights of an average in a checkpoint."""
    return f"average.{name}/"
