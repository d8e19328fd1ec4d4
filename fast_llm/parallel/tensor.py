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
from fast_llm.model.layers import Attention, Embedding, GatedMLP, RMSNorm
from fast_llm.model.linear import linear
from fast_llm.model.loss import VocabShard, cross_entropy
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.parallel.mesh import Axis

ROWS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
COLUMNS = ("o_proj", "down_proj")


def apply_tensor_parallel(model: CausalLM, axis: Axis, sequence: bool) -> None:
    """Cut a model on the meta device; `sequence`: also what lies between the matrices.

    config/checks.py sees to it that heads, inner size, vocabulary and sequence divide.
    """
    if axis.device_mesh is None:
        return
    for name, module in model.named_modules():
        for kind, parameter in list(module.named_parameters(recurse=False)):
            cut = _cut(name.rpartition(".")[2], kind)
            spread = distribute_tensor(
                parameter.detach(), axis.device_mesh, [cut], src_data_rank=None
            )
            module.register_parameter(kind, nn.Parameter(spread))
    model.tie()
    between: Placement = Shard(1) if sequence else Replicate()
    gather = partial(_gather, mesh=axis.device_mesh, between=between)
    scatter = partial(_scatter, mesh=axis.device_mesh, between=between)
    # One function for all modules of a kind, bound to each: a `partial` for each would be compiled anew for each block.
    norm, summed = (
        partial(_norm, sequence=sequence),
        partial(_summed, sequence=sequence, scatter=scatter),
    )
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, Attention | GatedMLP):
            module.forward = _gathered(module.forward, gather)  # type: ignore[method-assign]
        elif isinstance(module, RMSNorm):
            module.with_residual = MethodType(norm, module)  # type: ignore[method-assign]
        elif isinstance(module, Embedding):
            module.forward = partial(_embedding, module, axis, scatter)  # type: ignore[method-assign]
        elif kind in COLUMNS and isinstance(module, nn.Linear):
            module.forward = MethodType(summed, module)  # type: ignore[method-assign]
        elif kind in ROWS and isinstance(module, nn.Linear):
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
    if isinstance(model.lm_head, Head):
        model.lm_head.forward = partial(_head, model.lm_head, axis, gather)  # type: ignore[method-assign]


def _cut(module: str, kind: str) -> Placement:
    if module in ROWS:
        return Shard(0)
    return Shard(1) if module in COLUMNS and kind == "weight" else Replicate()


def _gather(x: Tensor, mesh: DeviceMesh, between: Placement) -> Tensor:
    """What lies between the matrices, whole [B, S, E] on each process, each of which makes a part of its gradient."""
    whole = DTensor.from_local(x, mesh, [between], run_check=False).redistribute(
        placements=[Replicate()]
    )
    return whole.to_local(grad_placements=[Partial()])


def _scatter(x: Tensor, mesh: DeviceMesh, between: Placement) -> Tensor:
    """The sum of what each process has [B, S, E], as it lies between the matrices."""
    return (
        DTensor.from_local(x, mesh, [Partial()], run_check=False)
        .redistribute(placements=[between])
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


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, _local(module.weight), None if module.bias is None else _local(module.bias))


def _summed(
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
