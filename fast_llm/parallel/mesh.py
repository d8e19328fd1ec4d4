"""The processes of a run, their devices, their place in each kind of parallelism, and simple
collectives.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. Without it there is one process, and no process
group.

Every process has a place on four axes, the innermost first:

tensor      each matrix is cut over it
context     each sequence is cut over it
data        the batch is split over it
pipeline    the layers are divided over it

Training state is sharded over context × data. With hybrid sharding these processes form `copies`
groups: the `shard` processes of each group hold one copy of the state between them.

Expert parallelism has no processes of its own. It divides those of `shard`: groups of `expert`
adjacent processes divide the experts of a layer, and exchange tokens. So experts are sharded over
the other `shard / expert` processes, all other weights over `shard`.

There are three groups of all processes:

default             a collective that waits longer than `model.distributed.timeout` ends the run
slow_group          waits `training.timeout`: exports, reading weights, other work of one process
checkpoint_group    waits as long; used by the thread that writes checkpoints during training
"""

import os
import socket
from collections.abc import Sequence
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
    """One axis of the mesh, and this process's place on it."""

    rank: int
    size: int
    device_mesh: DeviceMesh | None  # None if the size is 1


class Mesh:
    """This process's place among all processes of a run.

    rank, size              of this process, among all
    device                  of this process
    tensor, context, data, pipeline     the four axes
    copies                  how many groups of processes hold the same training state
    weights_mesh            over which weights are sharded: [shard] or [copies, shard]
    expert                  the axis of expert parallelism
    expert_weights_mesh     over which experts are sharded, if that is another mesh
    experts_mesh            over which experts and their matrices are cut: [expert] or
                            [expert, tensor]
    slow_group, checkpoint_group        see above

    With one process the mesh and the groups are None.
    """

    def __init__(
        self,
        timeout: float,
        slow_timeout: float,
        shard_size: int | None = None,
        *,
        tensor: int = 1,
        context: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        failures: Failures | None = None,
    ):
        """Join the other processes, if there are any. Timeouts are in seconds.

        Without `shard_size` all processes share one copy of the training state. `failures`: the
        connection to the other processes, if it is there already. config/checks.py ensures that the
        sizes divide the number of processes. Raises UserError if joining fails here, and
        ReportedElsewhere if it fails on another process.
        """
        self.failures = failures or Failures.connect(timeout)
        self.rank, self.size = self.failures.rank, self.failures.size
        self.device, problem = _find_device()
        self.failures.wait_for_all(problem, timeout)
        data = self.size // (pipeline * context * tensor)
        sharing = data * context  # processes that training state is spread over
        shard = min(shard_size or sharing, sharing)
        self.copies = sharing // shard
        self.slow_group: dist.ProcessGroup | None = None
        self.checkpoint_group: dist.ProcessGroup | None = None
        self.weights_mesh: DeviceMesh | None = None
        self.expert_weights_mesh: DeviceMesh | None = None
        self.experts_mesh: DeviceMesh | None = None
        self.pipeline = self.data = self.context = self.tensor = self.expert = Axis(0, 1, None)
        if self.size == 1:
            return
        self._init_process_group(timeout)
        kind = self.device.type
        axes = init_device_mesh(
            kind,
            (pipeline, data, context, tensor),
            mesh_dim_names=("pipeline", "data", "context", "tensor"),
        )
        spread = init_device_mesh(
            kind,
            (pipeline, self.copies, shard, tensor),
            mesh_dim_names=("pipeline", "copies", "shard", "tensor"),
        )
        self.weights_mesh = spread["copies", "shard"] if self.copies > 1 else spread["shard"]
        self.slow_group = _new_slow_group(timeout, slow_timeout)
        self.checkpoint_group = _new_slow_group(timeout, slow_timeout)
        self.pipeline, self.data, self.context = (
            _axis(axes, name) for name in ("pipeline", "data", "context")
        )
        # DTensor needs both cuts of a weight, by tensor and by shard, on one mesh.
        self.tensor = _axis(spread, "tensor")
        if expert > 1:
            self._add_experts((pipeline, self.copies, shard // expert, expert, tensor))

    def _add_experts(self, sizes: tuple[int, ...]) -> None:
        """Divide the processes that share training state into those with different experts."""
        names = ("pipeline", "copies", "shard", "expert", "tensor")
        experts = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        self.expert = _axis(experts, "expert")
        self.expert_weights_mesh = (
            experts["copies", "shard"] if self.copies > 1 else experts["shard"]
        )
        self.experts_mesh = experts["expert", "tensor"] if sizes[-1] > 1 else experts["expert"]

    def _init_process_group(self, timeout: float) -> None:
        if dist.is_initialized():
            return
        cuda = self.device.type == "cuda"
        assert self.failures.root_store is not None
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"default_pg/{self.failures.token}", self.failures.root_store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout),
            device_id=self.device if cuda else None,
        )

    def all_reduce_sum(
        self, *numbers: torch.Tensor | float, further: Sequence[torch.Tensor] = ()
    ) -> list[float]:
        """Sum each number over all processes, in float64; then each element of `further`.

        This is the only synchronisation with the device in a step. `further` has a collective of
        its own: the order of additions depends on the size of a collective, and the sums of
        `numbers` must not depend on what else is summed.
        """
        stacked = torch.stack(
            [torch.as_tensor(number, dtype=torch.float64, device=self.device) for number in numbers]
        )
        joined = torch.cat([each.double().flatten() for each in further]) if further else None
        if self.size > 1:
            dist.all_reduce(stacked)
            if joined is not None:
                dist.all_reduce(joined)
        values: list[float] = (stacked if joined is None else torch.cat((stacked, joined))).tolist()
        return values

    def barrier(self) -> None:
        """Wait for all processes, up to the timeout of `slow_group`."""
        if self.slow_group is not None:
            dist.barrier(self.slow_group)

    def broadcast(self, value: Any) -> Any:
        """The value of the first process, on every process."""
        if self.slow_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.slow_group)
        return box[0]

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _find_device() -> tuple[torch.device, ConfigError | None]:
    """The device of this process, and the problem if it has none. Makes the GPU the current
    one.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        return torch.device("cpu"), None
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank)
    if local_rank < gpus:
        torch.cuda.set_device(device)
        return device, None
    given = os.environ.get("LOCAL_WORLD_SIZE", str(local_rank + 1))
    problem = f"given {given}, must be at most {gpus}: {socket.gethostname()} has so many GPUs"
    return device, ConfigError([f"--nproc_per_node: {problem}"])


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    axis = mesh[name]
    return Axis(axis.get_local_rank(), axis.size(), axis if axis.size() > 1 else None)


def _new_slow_group(timeout: float, slow_timeout: float) -> dist.ProcessGroup:
    """A group of all processes whose collectives wait `slow_timeout`, in seconds.

    Making the group waits `timeout` for processes that are missing.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=slow_timeout), group)
    return group
