"""Pipeline parallelism: layers are divided into stages on several processes.

Schedules: GPipe (Huang et al. 2019), 1F1B and interleaved (Narayanan et al. 2021), zero bubble (Qi
et al. 2023).

A stage is the model with its absent parts replaced by identities. PyTorch's schedules order the
forward and backward passes, send hidden states and their gradients between stages, and have FSDP2
reduce gradients after the last micro-batch. Every process of a pipeline reads the same batches,
because every stage needs positions and document boundaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from fast_llm.model.batch import Batch
from fast_llm.model.decoder import CausalLM
from fast_llm.models import family_of
from fast_llm.parallel.mesh import Axis
from fast_llm.tensors import local_part

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv_zero_bubble": "ZBVZeroBubble",
}
_FORWARD = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")  # actions of a pass without gradients


def stages_of_rank(schedule: str | None, rank: int, processes: int, stages: int) -> list[int]:
    """The stages of process `rank` of the pipeline."""
    if schedule == "zbv_zero_bubble":
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, processes))


def keep_stage(model: CausalLM, sizes: Sequence[int], stage: int) -> None:
    """Drop everything that is not part of `stage`; `sizes`: the layers of each stage."""
    first = sum(sizes[:stage])
    layers = range(first, first + sizes[stage])
    model.keep(layers, embedding=stage == 0, head=stage == len(sizes) - 1)


class _Stage(PipelineStage):
    """A PipelineStage that takes all inputs but hidden states from `batches`, by micro-batch."""

    batches: Sequence[Batch] = ()

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """Let the buffers for received hidden states require gradients.

        PyTorch 2.11 makes them at the first pass. If that is a validation, they would not, and the
        first training step would fail.
        """
        made = super()._prepare_forward_infra(*args, **kwargs)
        for received in self.args_recv_info.values():
            for each in received:
                buffer = getattr(each, "buffer", None)
                if isinstance(buffer, Tensor):
                    buffer.requires_grad_(True)
        return made

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        batch = self.batches[fwd_chunk_id]
        further = {"positions": batch.positions, "documents": batch.documents}
        if self.is_last:
            further |= {"labels": batch.labels, "sources": batch.sources}
        args = (batch.tokens,) if self.is_first else ()
        return super().forward_one_chunk(fwd_chunk_id, args, further, save_forward_output)


@dataclass(frozen=True)
class MicroBatches:
    """A kind of micro-batches that pass through a pipeline."""

    in_flight: int  # how many are in the pipeline at a time
    schedule: str
    tokens: torch.Size  # the shape [B, S] of a process's tokens
    hidden: Tensor  # a meta tensor with the shape [B, S, E] and dtype of what stages exchange


class Pipeline:
    """This process's stages, and the schedule that runs them."""

    def __init__(
        self,
        models: dict[int, CausalLM],
        stages: int,
        axis: Axis,
        micro_batches: Sequence[MicroBatches],
        device: torch.device,
    ):
        """`models`: stage number → model, on this process; `stages`: how many in all.

        `micro_batches`: each kind of them that steps or evaluations have.
        """
        assert axis.device_mesh is not None
        self.group = axis.device_mesh.get_group()
        self.axis, self.device = axis, device
        self.has_loss = stages - 1 in models
        ends = {0, stages - 1} & models.keys()
        # A tied embedding and head are one weight on two processes, whose gradients must be added.
        config = next(iter(models.values())).config
        tied = config.tie_word_embeddings
        self.tied_weight = family_of(config).embedding  # its name
        self.tied_peer_rank = (
            (axis.size - 1 if axis.rank == 0 else 0) if tied and len(ends) == 1 else None
        )
        # By the shape of a process's tokens: how many micro-batches, their stages, the schedule.
        self.runs: dict[torch.Size, tuple[int, list[_Stage], Any]] = {}
        for one in micro_batches:
            kind: Any = get_schedule_class(SCHEDULES[one.schedule])
            own = self._stages(models, stages, one.hidden)
            made = kind(
                own[0] if one.schedule in ("gpipe", "1f1b") else own,
                one.in_flight,
                loss_fn=self._scaled_loss,
                scale_grads=False,
            )
            self.runs[one.tokens] = one.in_flight, own, made
        self.seed = 1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def _stages(self, models: dict[int, CausalLM], stages: int, hidden: Tensor) -> list[_Stage]:
        """This process's stages, for hidden states of one shape."""
        tokens = torch.empty(hidden.shape[:2], dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        return [
            _Stage(
                model,
                stage,
                stages,
                self.device,
                input_args=tokens if stage == 0 else hidden,
                output_args=loss if stage == stages - 1 else hidden,
                group=self.group,
            )
            for stage, model in models.items()
        ]

    def forward_backward(self, batches: Sequence[Batch], seed: float) -> Tensor:
        """Run the micro-batches of a step. Gradients are those of `seed` times the loss.

        Returns their summed loss in float64, 0 on processes without the last stage.
        """
        return self._run(batches, seed, self._schedule(batches).step)

    def forward(self, batches: Sequence[Batch]) -> Tensor:
        """The summed loss of the micro-batches, without gradients."""
        schedule = self._schedule(batches)
        plans = getattr(schedule, "pipeline_order_with_comms", None)
        if plans is None:
            return self._run(batches, 1.0, schedule.eval)
        # PyTorch 2.13's eval also visits backward actions, and fails if two stages of a process are
        # adjacent. So it is given the forward actions only.
        full = plans[self.axis.rank]
        plans[self.axis.rank] = [
            action for action in full if action.computation_type.value in _FORWARD
        ]
        try:
            return self._run(batches, 1.0, schedule.eval)
        finally:
            plans[self.axis.rank] = full

    def add_tied_gradient(self, gradient: Tensor) -> None:
        """Add the other end's gradient of the tied weight to `gradient`, in place.

        The processes with the first and the last stage both call it.
        """
        assert self.tied_peer_rank is not None
        local = local_part(gradient)
        other = torch.empty_like(local)
        exchange = [
            dist.P2POp(
                dist.isend, local.contiguous(), group=self.group, group_peer=self.tied_peer_rank
            ),
            dist.P2POp(dist.irecv, other, group=self.group, group_peer=self.tied_peer_rank),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        local.add_(other)

    def _schedule(self, batches: Sequence[Batch]) -> Any:
        return self.runs[batches[0].tokens.shape][2]

    def _run(self, batches: Sequence[Batch], seed: float, run: Any) -> Tensor:
        self.seed = seed
        self.loss_sum = torch.zeros_like(self.loss_sum)
        device = self.loss_sum.device
        in_flight, stages, _ = self.runs[batches[0].tokens.shape]
        for begin in range(0, len(batches), in_flight):
            now = [batch.to(device) for batch in batches[begin : begin + in_flight]]
            for stage in stages:
                stage.batches = now
            run(target=torch.empty(len(now)), return_outputs=False)
        return self.loss_sum

    def _scaled_loss(self, loss: Tensor, target: Tensor) -> Tensor:
        self.loss_sum += loss.detach()
        return loss * self.seed
