"""Tensor parallelism: each matrix is cut over a few neighbours (Megatron-LM, Shoeybi et al. 2019).

Projections into attention and MLP are cut by rows, so that each process has some heads and some of the MLP's inner
dimensions; projections out of them by columns, and their results are summed over the processes. Embedding and head
are cut by vocabulary. With `sequence` what lies between is cut along the sequence (Korthikanti et al. 2022):

                     gather (into attention, MLP, head)      scatter (out of embedding, attention, MLP)
plain                as it is;        backward: sum          sum;                   backward: as it is
sequence             all-gather;      backward: reduce-      reduce-scatter;        backward: all-gather
                                      scatter

Weights become DTensors, whose backward passes and conversions do this; the model computes with their local parts.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from fast_llm.model.decoder import CausalLM, Head
from fast_llm.model.embedding import embed
from fast_llm.model.layers import Embedding, RMSNorm
from fast_llm.model.linear import linear
from fast_llm.model.loss import VocabShard, cross_entropy
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.models.tensor_plan import (
    Columns,
    Entry,
    Gather,
    Norm,
    Rows,
    TensorPlan,
    VocabEmbedding,
    VocabHead,
    find_entry,
)
from fast_llm.parallel.mesh import Axis


def apply_tensor_parallel(
    model: CausalLM, plan: TensorPlan, axis: Axis, sequence: bool = False
) -> None:
    """Cut a model on the meta device over `axis`, as its family's plan says.

    `sequence`: also cut the residual stream along the sequence. config/checks.py ensures that heads,
    MLP size, vocabulary and sequence length are divisible by the size of the axis.
    """
    if axis.device_mesh is None:
        return
    entries = {name: find_entry(plan, name) for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        for kind, weight in list(module.named_parameters(recurse=False)):
            placement = _placement(entries[name], kind)
            cut = distribute_tensor(
                weight.detach(), axis.device_mesh, [placement], src_data_rank=None
            )
            module.register_parameter(kind, nn.Parameter(cut))
    model.tie()
    residual: Placement = Shard(1) if sequence else Replicate()
    gather = partial(_gather, mesh=axis.device_mesh, residual=residual)
    scatter = partial(_scatter, mesh=axis.device_mesh, residual=residual)
    # One function for all modules of a kind, bound to each. The compiler would compile a `partial`
    # of each module anew for each block.
    norm = partial(_norm, sequence=sequence)
    columns = partial(_columns, sequence=sequence, scatter=scatter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Identity):  # absent in this pipeline stage
            continue
        match entries[name]:
            case Rows():
                module.forward = MethodType(_rows, module)
            case Columns():
                module.forward = MethodType(columns, module)
            case Gather():
                module.forward = _gathered(module.forward, gather)
            case Norm():
                module.with_residual = MethodType(norm, module)
            case VocabEmbedding():
                module.forward = partial(_embedding, module, axis, scatter)
            case VocabHead():
                module.forward = partial(_head, module, axis, gather)


def _placement(entry: Entry | None, kind: str) -> Placement:
    """How the `kind` of parameter ("weight" or "bias") of a module with this entry is placed."""
    match entry:
        case Rows() | VocabEmbedding() | VocabHead():
            return Shard(0)
        case Columns() if kind == "weight":
            return Shard(1)
        case Columns() | Norm():
            return Replicate()
    raise AssertionError(f"a module with a parameter {kind!r} is not in the tensor plan: {entry}")


def _gather(x: Tensor, mesh: DeviceMesh, residual: Placement) -> Tensor:
    """What lies between the matrices, whole [B, S, E] on each process, each of which makes a part of its gradient."""
    whole = DTensor.from_local(x, mesh, [residual], run_check=False).redistribute(
        placements=[Replicate()]
    )
    return whole.to_local(grad_placements=[Partial()])


def _scatter(x: Tensor, mesh: DeviceMesh, residual: Placement) -> Tensor:
    """The sum of what each process has [B, S, E], as it lies between the matrices."""
    return (
        DTensor.from_local(x, mesh, [Partial()], run_check=False)
        .redistribute(placements=[residual])
        .to_local()
    )


def _gathered(
    forward: Callable[..., Tensor], gather: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    def gathered(x: Tensor, *further: object) -> Tensor:
        return forward(gather(x), *further)

    return gathered


def _local(weight: Tensor, shared: bool = False) -> Tensor:
    """This process's part of a weight; `shared`: each process sees other tokens and makes a part of its gradient."""
    return cast(DTensor, weight).to_local(grad_placements=[Partial()] if shared else None)


def _rows(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, _local(module.weight), None if module.bias is None else _local(module.bias))


def _columns(
    module: nn.Linear, x: Tensor, sequence: bool, scatter: Callable[[Tensor], Tensor]
) -> Tensor:
    out = scatter(linear(x, _local(module.weight)))
    return (
        out if module.bias is None else out + _local(module.bias, shared=sequence)
    )  # once, not once a process


def _norm(module: RMSNorm, x: Tensor, sequence: bool) -> tuple[Tensor, Tensor]:
    return fused_add_rms_norm(x, _local(module.weight, shared=sequence), module.epsilon)


def _embedding(
    module: Embedding, axis: Axis, scatter: Callable[[Tensor], Tensor], tokens: Tensor
) -> Tensor:
    weight = _local(module.weight)
    own = tokens - axis.rank * len(weight)
    elsewhere = (own < 0) | (own >= len(weight))
    rows = embed(own.masked_fill(elsewhere, 0), weight)
    return scatter(rows.masked_fill(elsewhere[..., None], 0))


def _head(
    head: Head,
    axis: Axis,
    gather: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    weight, hidden = _local(head.weight), gather(hidden)
    if labels is None:
        assert axis.device_mesh is not None
        part = DTensor.from_local(
            linear(hidden, weight), axis.device_mesh, [Shard(-1)], run_check=False
        )
        whole: Tensor = part.full_tensor()
        return whole
    return cross_entropy(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        head.cross_entropy_impl,
        head.cross_entropy_splits,
        VocabShard(axis.rank * len(weight), partial(_combine, axis)),
    )


def _combine(axis: Axis, log_sums: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    assert axis.device_mesh is not None
    mine = torch.stack((log_sums, chosen))[None]
    parts = DTensor.from_local(
        mine, axis.device_mesh, [Shard(0)], run_check=False
    ).full_tensor()  # processes, 2, T
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)
