"""Tensor parallelism: each matrix is cut over several processes (Megatron-LM, Shoeybi et al. 2019).

Projections into attention and MLP are cut by rows: each process has some heads, and a part of the
MLP's inner size. Projections out of them are cut by columns, and their results summed. Embedding
and head are cut by vocabulary. The family's `TENSOR_PLAN` says which module is which.

With `sequence` the residual stream is cut along the sequence (Korthikanti et al. 2022):

            gather (into attention, MLP, head)          scatter (out of embedding, attention, MLP)
            forward        backward                     forward           backward
plain       identity       all-reduce                   all-reduce        identity
sequence    all-gather     reduce-scatter               reduce-scatter    all-gather

Weights become DTensors, whose conversions communicate. The model computes with their local parts.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, cast

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
from fast_llm.model.experts import Router
from fast_llm.model.layers import XIELU, Embedding, RMSNorm
from fast_llm.model.linear import linear
from fast_llm.model.loss import VocabShard, cap_logits
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.model.swiglu import xielu
from fast_llm.models.tensor_plan import (
    Columns,
    Entry,
    ExpertColumns,
    ExpertRows,
    Gather,
    HeadNorm,
    Norm,
    ProjectionNorm,
    Route,
    Rows,
    Scalars,
    Scatter,
    TensorPlan,
    VocabEmbedding,
    VocabHead,
    find_entry,
)
from fast_llm.parallel.experts import grouped_local
from fast_llm.parallel.mesh import Axis


def apply_tensor_parallel(
    model: CausalLM, plan: TensorPlan, axis: Axis, sequence: bool = False
) -> None:
    """Cut a model on the meta device over `axis`, as its family's plan says.

    `sequence`: also cut the residual stream along the sequence. config/checks.py ensures that
    heads, MLP size, vocabulary and sequence length are divisible by the size of the axis.
    """
    if axis.device_mesh is None:
        return
    entries = {name: find_entry(plan, name) for name, _ in model.named_modules()}
    _cut_parameters(model, entries, axis.device_mesh)
    residual: Placement = Shard(1) if sequence else Replicate()
    gather = partial(_gather, mesh=axis.device_mesh, residual=residual)
    scatter = partial(_scatter, mesh=axis.device_mesh, residual=residual)
    # One function for all modules of a kind, bound to each. The compiler would compile a `partial`
    # of each module anew for each block.
    norm, head_norm = partial(_norm, partial_grad=sequence), partial(_norm, partial_grad=True)
    sum_squares = partial(_sum_squares, mesh=axis.device_mesh)
    projection_norm = partial(_projection_norm, size=axis.size, sum_squares=sum_squares)
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
                if getattr(module, "sinks", None) is not None:
                    module.core = partial(_with_local_sinks, module.core)
            case Norm():
                module.with_residual = MethodType(norm, module)
            case HeadNorm():
                module.with_residual = MethodType(head_norm, module)
            case ProjectionNorm():
                module.with_residual = MethodType(projection_norm, module)
            case ExpertRows():
                module.forward = MethodType(grouped_local, module)
            case ExpertColumns():
                module.forward = partial(grouped_local, module, adds_bias=axis.rank == 0)
            case Scatter():
                module.forward = _scattered(module.forward, scatter)
            case Scalars():
                module.forward = MethodType(_activation, module)
            case Route():
                module.forward = MethodType(_route, module)
            case VocabEmbedding():
                module.forward = partial(_embedding, module, axis, scatter)
            case VocabHead():
                module.forward = partial(_head, module, axis, gather)


def _cut_parameters(model: CausalLM, entries: Mapping[str, Entry | None], mesh: DeviceMesh) -> None:
    """Make each parameter a DTensor. `entries`: of the plan, by the name of the module."""
    for name, module in model.named_modules():
        for kind, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):  # experts: cut with expert parallelism
                continue
            placement = _placement(entries[name], kind)
            cut = distribute_tensor(weight.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(kind, nn.Parameter(cut))
    model.tie()


def _placement(entry: Entry | None, kind: str) -> Placement:
    """How the `kind` of parameter ("weight" or "bias") of a module with this entry is placed."""
    match entry:
        case Rows() | ProjectionNorm() | VocabEmbedding() | VocabHead():
            return Shard(0)
        case ExpertRows():
            return Shard(1)
        case ExpertColumns() if kind == "weight":
            return Shard(2)
        case Gather() if kind == "sinks":  # one of each head
            return Shard(0)
        case Columns() if kind == "weight":
            return Shard(1)
        case Columns() | ExpertColumns() | Norm() | HeadNorm() | Route() | Scalars():
            return Replicate()
    raise AssertionError(f"a module with a parameter {kind!r} is not in the tensor plan: {entry}")


def _gather(x: Tensor, mesh: DeviceMesh, residual: Placement) -> Tensor:
    """The full residual stream [B, S, E]. Each process computes a partial sum of its gradient."""
    full = DTensor.from_local(x, mesh, [residual], run_check=False).redistribute(
        placements=[Replicate()]
    )
    return full.to_local(grad_placements=[Partial()])


def _scatter(x: Tensor, mesh: DeviceMesh, residual: Placement) -> Tensor:
    """The sum over processes of `x` [B, S, E], placed as the residual stream is."""
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


def _scattered(
    forward: Callable[..., Tensor], scatter: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    def scattered(*inputs: Tensor) -> Tensor:
        return scatter(forward(*inputs))

    return scattered


def _local(weight: Tensor, partial_grad: bool = False) -> Tensor:
    """The local part of a weight. `partial_grad`: each process computes a part of its gradient.

    That is so for replicated weights when each process has other tokens.
    """
    return cast(DTensor, weight).to_local(grad_placements=[Partial()] if partial_grad else None)


def _rows(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, _local(module.weight), None if module.bias is None else _local(module.bias))


def _columns(
    module: nn.Linear, x: Tensor, sequence: bool, scatter: Callable[[Tensor], Tensor]
) -> Tensor:
    out = scatter(linear(x, _local(module.weight)))
    # The bias is added after the sum: once, not once per process.
    return out if module.bias is None else out + _local(module.bias, partial_grad=sequence)


def _route(module: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    # From its part of each expert, a process has a part of the gradient of the weights.
    bias = None if module.bias is None else _local(module.bias, partial_grad=True)
    return module.route(x, _local(module.weight, partial_grad=True), bias)


def _with_local_sinks(core: Callable[..., Tensor], *inputs: Any) -> Tensor:
    *others, sinks = inputs
    return core(*others, _local(sinks))


def _activation(module: XIELU, x: Tensor) -> Tensor:
    return xielu(x, _local(module.alpha_p, True), _local(module.alpha_n, True))


def _norm(module: RMSNorm, x: Tensor, partial_grad: bool) -> tuple[Tensor, Tensor]:
    weight = module.scale(_local(module.weight, partial_grad))
    return fused_add_rms_norm(x, weight, module.epsilon)


def _projection_norm(
    module: RMSNorm, x: Tensor, size: int, sum_squares: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    wide = x.float()
    mean = sum_squares(wide) / (size * x.shape[-1])
    normed = wide * (mean + module.epsilon).rsqrt() * module.scale(_local(module.weight))
    return normed.to(x.dtype), x


def _sum_squares(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of squares [..., 1] over the last dimension, which is cut over processes.

    Each process computes a partial sum of its gradient, because it normalises its own part.
    """
    squares = x.square().sum(-1, keepdim=True)
    return _gather(_scatter(squares, mesh, Replicate()), mesh, Replicate())


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
    sources: Tensor | None = None,
) -> Tensor:
    weight, hidden = _local(head.weight), head.scaled(gather(hidden))
    if labels is None:
        assert axis.device_mesh is not None
        part = DTensor.from_local(
            linear(hidden, weight), axis.device_mesh, [Shard(-1)], run_check=False
        )
        return cap_logits(part.full_tensor(), head.softcap)
    shard = VocabShard(axis.rank * len(weight), partial(_combine, axis))
    return head.loss(hidden, weight, labels, sources, shard)


def _combine(axis: Axis, log_sums: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the log-sum-exps and target logits [T] of all vocabulary shards."""
    assert axis.device_mesh is not None
    mine = torch.stack((log_sums, chosen))[None]
    parts = DTensor.from_local(
        mine, axis.device_mesh, [Shard(0)], run_check=False
    ).full_tensor()  # processes 2 T
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)
