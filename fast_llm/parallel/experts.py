"""Expert parallelism: the experts of a layer are divided over several processes (GShard, Lepikhin
et al. 2020).

Each process routes its own tokens. An all-to-all sends rows to the processes that have their
experts, which compute them and send the results back. The sizes of these messages depend on the
routing. So each layer first exchanges counts, and the host waits for them.

A process computes with the rows of the whole group. Its gradients of experts are therefore sums
over the group, and FSDP2 divides them by the same number as all other gradients (fsdp.py).

Letters: N experts, n processes of a group, M rows, E hidden size.
"""

from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from fast_llm.model.decoder import CausalLM
from fast_llm.model.experts import Experts, GroupedLinear, Router, copy_rows
from fast_llm.model.grouped import add_biases, grouped_linear
from fast_llm.models.tensor_plan import ExpertRows, TensorPlan, find_entry
from fast_llm.parallel.mesh import Axis, Mesh


def apply_expert_parallel(model: CausalLM, plan: TensorPlan, mesh: Mesh) -> None:
    """Divide the experts of a model on the meta device over `mesh.expert`.

    With tensor parallelism the matrices of experts are cut here too, because a weight has one mesh.
    In any layout, routers count over all data- and context-parallel processes.
    """
    for name, module in model.named_modules():
        if isinstance(module, Router) and mesh.weights_mesh is not None:
            module.losses.all_reduce = partial(_sum_counts, mesh.weights_mesh)
        if mesh.experts_mesh is None:
            continue
        if isinstance(module, GroupedLinear):
            placements: list[Placement] = [Shard(0)]
            if mesh.tensor.size > 1:
                rows = isinstance(find_entry(plan, name), ExpertRows)
                placements.append(Shard(1 if rows else 2))
            for kind, parameter in list(module.named_parameters()):
                if kind == "bias" and placements[1:] == [Shard(2)]:
                    placements[1] = Replicate()
                cut = distribute_tensor(
                    parameter.detach(), mesh.experts_mesh, placements, src_data_rank=None
                )
                module.register_parameter(kind, nn.Parameter(cut))
            module.forward = MethodType(grouped_local, module)  # type: ignore[method-assign]
        elif isinstance(module, Experts):
            module.core = partial(_exchanged, module, mesh.expert)


def grouped_local(
    module: GroupedLinear, rows: Tensor, ends: Tensor, adds_bias: bool = True
) -> Tensor:
    """The forward pass of a grouped linear layer with the local parts of its weights.

    Of processes whose results are summed, one adds the bias.
    """
    out = grouped_linear(rows, cast(DTensor, module.weight).to_local(), ends, None)
    if module.bias is None:
        return out
    bias = cast(DTensor, module.bias)
    placements = [Partial() if each.is_replicate() else each for each in bias.placements]
    local = bias.to_local(grad_placements=placements)
    return add_biases(out, local if adds_bias else local * 0, ends)


def _sum_counts(mesh: DeviceMesh, counts: Tensor) -> Tensor:
    for dimension in range(mesh.ndim):
        dist.all_reduce(counts, group=mesh.get_group(dimension))
    return counts


def _exchanged(
    experts: Experts, axis: Axis, rows: Tensor, weights: Tensor, counts: Tensor
) -> Tensor:
    """As `Experts.mlp`: rows [M, E] of this process through the experts of all processes."""
    assert axis.device_mesh is not None
    group = axis.device_mesh.get_group()
    per_expert = torch.empty_like(counts)
    dist.all_to_all_single(per_expert, counts, group=group)
    per_expert = per_expert.view(axis.size, -1)  # by sender, and own expert
    own = counts.view(axis.size, -1).sum(1)
    sent, received = torch.stack((own, per_expert.sum(1))).tolist()  # waits for the device
    rows = _all_to_all(rows, received, sent, group)
    weights = _all_to_all(weights, received, sent, group)
    # Received rows are ordered by sender, and within that by expert.
    numbers = torch.arange(per_expert.shape[1], device=rows.device).repeat(axis.size)
    order = numbers.repeat_interleave(per_expert.flatten(), output_size=len(rows)).argsort(
        stable=True
    )
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    out = experts.mlp(
        copy_rows(rows, order, inverse, 1),
        copy_rows(weights, order, inverse, 1),
        per_expert.sum(0),
    )
    return _all_to_all(copy_rows(out, inverse, order, 1), sent, received, group)


def _all_to_all(
    x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[i]` rows to process i, in order; returns the rows received from each, in order."""
    out: Tensor = _AllToAll.apply(x, received, sent, group)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.further = sent, received, group
        out = collectives.all_to_all_single(x.contiguous(), received, sent, group)
        return cast(Tensor, collectives.wait_tensor(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = collectives.all_to_all_single(grad.contiguous(), *ctx.further)
        return collectives.wait_tensor(back), None, None, None
