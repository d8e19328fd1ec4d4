"""Which activations are computed again in the backward pass instead of being kept (Chen et al. 2016; selectively,
Korthikanti et al. 2022).

level                   computed again                              kept per token (F: MLP size, E: hidden size)
none                    nothing                                     3F + 2E
activation              SiLU and the product with the up projection     2F + 2E
activation_and_input    also the normalised input                   2F + E
full                    the whole MLP, its matrix products included     E

These keep what attention keeps besides. Two more are of the block as a whole:

selective               all but matrix products and attention           their results, and E
block                   everything                                      E
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
_PRODUCTS = {
    # Sums over processes, which cost as much.
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.linear.default,
    _aten._scaled_mm.default,
    torch.ops.fast_llm.attention.default,
    torch.ops.fast_llm.ragged_attention.default,
    torch.ops.fast_llm.matmul.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def apply_recompute(block: Block, level: str) -> None:
    """Change what a block keeps, not what it computes."""
    if level == "none":
        return
    if level in ("selective", "block"):
        block.forward = _recomputed(block.forward, keep_products=level == "selective")  # type: ignore
    elif level == "activation":
        block.mlp.forward = _recomputed(block.mlp.forward, keep_products=True)  # type: ignore
    else:
        keep = level == "activation_and_input"
        block.feed_forward = _recomputed(block.feed_forward, keep_products=keep)  # type: ignore


def _recomputed(function: Callable[..., Tensor], keep_products: bool) -> Callable[..., Tensor]:
    contexts: dict[str, Any] = {}
    if keep_products:
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def recomputed(x: Tensor, *further: Any) -> Tensor:
        out: Tensor = checkpoint(
            function, x, *further, use_reentrant=False, preserve_rng_state=False, **contexts
        )
        return out

    return recomputed


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
    )
