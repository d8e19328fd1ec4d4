"""Attention sinks: a trained score of each head, without a value (Xiao et al. 2023, "Efficient
Streaming Language Models with Attention Sinks"; gpt-oss).

A sink adds to the denominator of a head's softmax alone. So kernels of ordinary attention serve:
the sink is added to the log Σ exp that they return, and their results are scaled. Their backward
pass computes weights from log Σ exp, and needs of results only Σ gradient · result. Given the sums
and results with sinks, it returns the gradients of attention with sinks.

Letters: T tokens, H heads, D head dimensions.
"""

import torch
from torch import Tensor


def add_sinks(out: Tensor, log_sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Results [T, H, D] and their log Σ exp [T, H], in fp32, with sinks [H]."""
    total = torch.logaddexp(log_sums, sinks.float())
    return (out * (log_sums - total).exp()[..., None]).to(out.dtype), total


def sink_gradient(grad: Tensor, out: Tensor, total: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of sinks [H], from what `add_sinks` returned and the gradient of results."""
    weights = (sinks.float() - total).exp()  # T H
    return -(weights * (grad.float() * out.float()).sum(-1)).sum(0).to(sinks.dtype)
