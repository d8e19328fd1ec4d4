"""The processes of a run, their device, and what they say to one another outside the model.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK; without it there is one process and no process group at all.

Every process has a place on four axes. From neighbours to strangers:

tensor      each matrix is cut over it
context     each sequence is cut over it
data        the batch is dealt over it
pipeline    the layers are divided over it

Training state is sharded over context × data, which is cut once more: `shard` neighbours hold it between them, and
`copies` groups of these hold the same.

Three groups of all processes exist: the default one, whose timeout (`model.distributed.timeout`) catches a lost
process within a step; a patient one (`training.timeout`) for what takes long on one process while the others
wait: exports, reading weights; and one as patient for checkpoints, which a thread writes while training goes on.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fast_llm.errors import ConfigError
from fast_llm.parallel.failures import Failures


@dataclass(frozen=True)
class Axis:
    """One direction in which processes lie, and this process's place in it."""

    rank: int
    size: int
    device_mesh: DeviceMesh | None  # None where the size is 1


def _slow_group(timeout: float, slow_timeout: float) -> dist.ProcessGroup:
    """A group of all processes that waits for long, once it is made: who is lost while they meet is waited for `timeout`."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=slow_timeout), group)
    return group


class Mesh:
    """This process's place among the others."""

    def __init__(
        self,
        timeout: float,
        slow_timeout: float,
        shard_size: int | None = None,
        *,
        tensor: int = 1,
        context: int = 1,
        pipeline: int = 1,
        failures: Failures | None = None,
    ):
        """Join the other processes, if there are any; timeouts in seconds. Without `shard_size` there is one copy. `failures`:
        what has found them already.

        The sizes divide the number of processes: config/checks.py sees to it. Raises UserError if that cannot be, and ReportedElsewhere
        if it is another process that cannot.
        """
        self.failures = failures or Failures.connect(timeout)
        self.rank, self.size = self.failures.rank, self.failures.size
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        problem: ConfigError | None = None
        if not torch.cuda.is_available():
            self.device = torch.device("cpu")
        elif local_rank < torch.cuda.device_count():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            here, gpus = (
                os.environ.get("LOCAL_WORLD_SIZE", str(local_rank + 1)),
                torch.cuda.device_count(),
            )
            problem = ConfigError(
                [
                    f"--nproc_per_node: given {here}, must be at most {gpus}: {socket.gethostname()} has so many GPUs"
                ]
            )
        self.failures.wait_for_all(problem, timeout)
        sizes = {
            "pipeline": pipeline,
            "data": self.size // (pipeline * context * tensor),
            "context": context,
        }
        sizes["tensor"] = tensor
        sharing = sizes["data"] * context  # processes that share training state
        shard = min(shard_size or sharing, sharing)
        self.copies = sharing // shard
        self.slow_group: dist.ProcessGroup | None = None
        self.checkpoint_group: dist.ProcessGroup | None = None
        # How weights are spread: over [shard] or [copies, shard], and over [tensor] if that is an axis.
        self.weights_mesh: DeviceMesh | None = None
        axes: DeviceMesh | None = None
        if self.size > 1:
            if not dist.is_initialized():
                assert self.failures.root_store is not None
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                    store=dist.PrefixStore(
                        f"default_pg/{self.failures.token}", self.failures.root_store
                    ),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=timeout),
                    device_id=self.device if self.device.type == "cuda" else None,
                )
            kind = self.device.type
            axes = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            spread = init_device_mesh(
                kind,
                (pipeline, self.copies, shard, tensor),
                mesh_dim_names=("pipeline", "copies", "shard", "tensor"),
            )
            self.weights_mesh = spread["copies", "shard"] if self.copies > 1 else spread["shard"]
            axes_of_weights = spread
            self.slow_group, self.checkpoint_group = (
                _slow_group(timeout, slow_timeout) for _ in range(2)
            )
        place = axes.get_coordinate() if axes is not None else [0, 0, 0, 0]
        assert place is not None
        found = {
            name: Axis(rank, size, axes[name] if axes is not None and size > 1 else None)
            for rank, (name, size) in zip(place, sizes.items(), strict=True)
        }
        if tensor > 1:
            # A weight's two cuts must lie on one mesh.
            found["tensor"] = Axis(found["tensor"].rank, tensor, axes_of_weights["tensor"])
        self.pipeline, self.data, self.context, self.tensor = found.values()

    def all_reduce_sum(self, *numbers: torch.Tensor | float) -> list[float]:
        """Each number summed over all processes. The step's one synchronisation with the device."""
        stacked = torch.stack(
            [torch.as_tensor(number, dtype=torch.float64, device=self.device) for number in numbers]
        )
        if self.size > 1:
            dist.all_reduce(stacked)
        values: list[float] = stacked.tolist()
        return values

    def barrier(self) -> None:
        """Until every process is here; for after long work on one of them."""
        if self.slow_group is not None:
            dist.barrier(self.slow_group)

    def broadcast(self, value: Any) -> Any:
        """What the first process has, on every process."""
        if self.slow_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.slow_group)
        return box[0]

    def close(self) -> None:
        """Leave the others."""
        if dist.is_initialized():
            dist.destroy_process_group()
