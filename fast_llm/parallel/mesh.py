"""The processes of a run, their device, and what they say to one another outside the model.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK; without it there is one process and no process group at all.
Two groups exist: the default one, whose timeout (`model.distributed.timeout`) catches a lost process
within a step, and a patient one (`training.timeout`) for what takes long on one process while the others
wait: saves, exports, reading weights.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Mesh:
    """This process's place among the others.

    The batch is spread over all of them. `data` is how weights are: sharded over `shard_size` neighbours, and copied
    between the `copies` groups of these; [shard], or [copies, shard] where there are several copies.
    """

    def __init__(self, timeout: float, patience: float, shard_size: int | None = None):
        """Join the other processes, if there are any; timeouts in seconds. Without `shard_size` there is one copy."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        shard_size = min(shard_size or self.size, self.size)
        self.copies = self.size // shard_size
        self.data: DeviceMesh | None = None
        self.patient: dist.ProcessGroup | None = None
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                    timeout=timedelta(seconds=timeout),
                    device_id=self.device if self.device.type == "cuda" else None,
                )
            shape, names = (
                ((self.copies, shard_size), ("copies", "shard")) if self.copies > 1 else ((self.size,), ("shard",))
            )
            self.data = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))

    def sum(self, *numbers: torch.Tensor | float) -> list[float]:
        """Each number summed over all processes. The step's one synchronisation with the device."""
        stacked = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=self.device) for number in numbers])
        if self.size > 1:
            dist.all_reduce(stacked)
        values: list[float] = stacked.tolist()
        return values

    def wait(self) -> None:
        """Until every process is here; for after long work on one of them."""
        if self.patient is not None:
            dist.barrier(self.patient)

    def share(self, value: Any) -> Any:
        """What the first process has, on every process."""
        if self.patient is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def close(self) -> None:
        """Leave the others."""
        if dist.is_initialized():
            dist.destroy_process_group()
