"""Activation recomputation: the backward pass recomputes activations instead of keeping them.

(Chen et al. 2016; selective: Korthikanti et al. 2022.) Numbers kept per token and block, with F the
MLP size and E the hidden size:

level                   recomputed                                  kept
none                    nothing                                     3F + 2E
activation              SiLU and its product with the up projection 2F + 2E
activation_and_input    also the normalised input of the MLP        2F + E
full                    the MLP, including its matmuls              E

These levels also keep the activations of attention. Two more levels concern the block:

selective               all but matmuls and attention               their results, and E
block                   everything                                  E
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fast_llm.model.decoder import Block

_aten = torch.ops.aten
_SAVED_OPERATIONS = {
    # Collectives of tensor parallelism cost as much as matmuls.
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.linear.default,
    _aten._scaled_mm.default,
    torch.ops.fast_llm.attention.default,
    torch.ops.fast_llm.ragged_attention.default,
    torch.ops.fast_llm.matmul.default,
    torch.ops.fast_llm.grouped_matmul.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def apply_recompute(block: Block, level: str) -> None:
    """Recompute activations of `block` in its backward pass; `level`: see the table above."""
    if level == "none":
        return
    if level in ("selective", "block"):
        save = level == "selective"
        block.forward = _recomputed(block.forward, save_matmuls=save)  # type: ignore
    elif level == "activation":
        block.mlp.forward = _recomputed(block.mlp.forward, save_matmuls=True)
    else:
        keep = level == "activation_and_input"
        block.feed_forward = _recomputed(block.feed_forward, save_matmuls=keep)  # type: ignore


def _recomputed(function: Callable[..., Tensor], save_matmuls: bool) -> Callable[..., Tensor]:
    contexts: dict[str, Any] = {}
    if save_matmuls:
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _save_matmuls)

    def recomputed(x: Tensor, *further: Any) -> Tensor:
        out: Tensor = checkpoint(
            function, x, *further, use_reentrant=False, preserve_rng_state=False, **contexts
        )
        return out

    return recomputed


def _save_matmuls(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if operation in _SAVED_OPERATIONS
        else CheckpointPolicy.PREFER_RECOMPUTE
    )
