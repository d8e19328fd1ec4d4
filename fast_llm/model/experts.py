"""Mixture of experts: a router chooses a few gated MLPs, the experts, for each token.

The router is computed in fp32: a softmax over all experts, then the K largest probabilities,
normalised to a sum of 1 if the family says so (Shazeer et al. 2017; Fedus et al. 2021). No token is
dropped: rows are sorted by expert, and each matrix of all experts is one grouped matmul (Gale et
al. 2022, "MegaBlocks"). All sums have a fixed order, so results repeat to the bit.

Two losses are added to the cross entropy of a step: load balancing and z-loss. Their value never
passes through the model's output. `_AddLossGradient` adds their gradient at the router, as
Megatron-LM does; `RouterLosses` sums their values for the log. A bias of each expert may take part
in the choice (`Router.selection_bias`).

Written for one device. Parallelism replaces `Experts.core`, which gets rows sorted by expert, and
`RouterLosses.all_reduce`.

Letters: T tokens, N experts, K experts per token, M = T·K rows, E hidden size, F expert size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast_llm.config.model import TransformerConfig
from fast_llm.model.grouped import add_biases, grouped_linear
from fast_llm.model.swiglu import gate_function


class MixtureOfExperts(nn.Module):
    """A router and its experts, in the place of an MLP."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    # Counts of rows are data: the compiler would compile anew for each.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        weights, chosen = self.gate(x.flatten(0, -2))
        out: Tensor = self.experts(x, weights, chosen)
        return out


class Router(nn.Module):
    """Chooses K of N experts for each token, with a weight for each."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(experts)) if config.has_mlp_biases else None
        self.experts_per_token = config.num_experts_per_token
        self.normalize = config.normalize_expert_weights  # a token's weights sum to 1
        # [N] in fp32, added to probabilities where experts are chosen (Wang et al. 2024). It is no
        # parameter: the trainer sets and updates it.
        self.selection_bias: Tensor | None = None
        self.losses = RouterLosses(experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E] → weights [T, K] in fp32, and numbers of experts [T, K]."""
        return self.route(x, self.weight, self.bias)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `forward`, with a given weight and bias."""
        logits = router_logits(x, weight)
        if bias is not None:
            logits = logits + bias.float()
        probabilities = logits.softmax(-1)
        if self.selection_bias is None:
            weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        else:
            biased = probabilities.detach() + self.selection_bias
            chosen = biased.topk(self.experts_per_token, dim=-1).indices
            weights = probabilities.gather(-1, chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.losses(weights, logits, chosen), chosen


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, E] times weight [N, E], transposed, in fp32 → [T, N]."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        out: Tensor = _RouterLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x.float(), weight.float())


class _RouterLinear(torch.autograd.Function):
    """bf16 operands, fp32 result: the numbers of an fp32 matmul, at bf16's speed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        by_x, by_weight = ctx.needs_input_grad  # by a frozen weight none is needed
        return grad @ weight if by_x else None, grad.t() @ x if by_weight else None


class RouterLosses:
    """The losses of one router: their gradient, and sums over the micro-batches of a step.

    With f the average number of experts that a token sends to expert i, and P its mean probability:

        load balancing    N Σ f_i P_i               (K if balanced; Fedus et al. 2021)
        z                 mean of logsumexp(logits)²         (Zoph et al. 2022)

    f is counted over the tokens of all processes, in all micro-batches of the step up to the
    present one (global-batch load balancing, Qiu et al. 2025). P is this micro-batch's.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        # What the gradient of each loss's mean over a micro-batch is multiplied by: numbers, or
        # scalar tensors on the device. The step sets them.
        self.auxiliary_scale: Tensor | float = 0.0
        self.z_scale: Tensor | float = 0.0
        # Sums over data- and context-parallel processes.
        self.all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts
        self.counts: Tensor | None = None  # [N], rows of each expert in this step, all processes
        self.sums: Tensor | None = None  # [2], of both losses over this process's micro-batches
        self.micro_batches = 0

    def reset(self) -> None:
        """Start a step."""
        self.counts = self.sums = None
        self.micro_batches = 0

    def __call__(self, weights: Tensor, logits: Tensor, chosen: Tensor) -> Tensor:
        """`weights` [T, K], with the gradient of the losses added to that of `logits` [T, N].

        Without gradients, as in validation, nothing is counted. Nor when activations are
        recomputed: the backward pass uses the values of the first forward pass.
        """
        if not torch.is_grad_enabled():
            return weights
        load = None
        if torch._C._current_graph_task_id() == -1:  # not within a backward pass
            load = self._count(logits.detach(), chosen)
        out: Tensor = _AddLossGradient.apply(  # type: ignore[no-untyped-call]
            weights, logits, load, self.auxiliary_scale, self.z_scale
        )
        return out

    def _count(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Add a micro-batch. Returns f_i [N] of the step up to here."""
        counts = self.all_reduce(count_rows(chosen, self.num_experts))
        self.counts = counts if self.counts is None else self.counts + counts
        self.micro_batches += 1
        load = self.counts / self.counts.sum() * chosen.shape[-1]
        auxiliary = self.num_experts * (load * logits.softmax(-1).mean(0)).sum()
        sums = torch.stack((auxiliary, logits.logsumexp(-1).square().mean()))
        self.sums = sums if self.sums is None else self.sums + sums
        return load


def count_rows(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs: [N], int64. `bincount` would wait for the device."""
    chosen = chosen.flatten()
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


class _AddLossGradient(torch.autograd.Function):
    """Returns `weights`; adds the gradient of both losses to that of `logits`."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        logits: Tensor,
        load: Tensor | None,
        auxiliary_scale: Tensor | float,
        z_scale: Tensor | float,
    ) -> Tensor:
        ctx.save_for_backward(logits)
        # Not saved tensors: recomputation would replace these.
        ctx.load, ctx.scales = load, (auxiliary_scale, z_scale)
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (logits,) = ctx.saved_tensors
        auxiliary_scale, z_scale = ctx.scales
        tokens, num_experts = logits.shape
        probabilities = logits.softmax(-1)
        # d mean(P·f)/d logits = p (f - Σ p f) / T; d lse²/d logits = 2 lse p
        centered = ctx.load - (probabilities @ ctx.load)[:, None]
        of_losses = centered * (auxiliary_scale * (num_experts / tokens))
        of_losses += logits.logsumexp(-1, keepdim=True) * (z_scale * (2 / tokens))
        return grad, of_losses * probabilities, None, None, None


class Experts(nn.Module):
    """N gated MLPs: down(act(gate(x)) · up(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden, size, biases = config.hidden_size, config.expert_size, config.has_mlp_biases
        self.num_experts = config.num_experts
        self.gate_proj = GroupedLinear(self.num_experts, hidden, size, biases)
        self.up_proj = GroupedLinear(self.num_experts, hidden, size, biases)
        self.down_proj = GroupedLinear(self.num_experts, size, hidden, biases)
        self.gated = gate_function(config)
        self.core: Callable[[Tensor, Tensor, Tensor], Tensor] = self.mlp

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [B, S, E] with weights and experts [T, K] of each token → [B, S, E]."""
        experts_per_token = chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        rows = copy_rows(x.flatten(0, -2), order, inverse, experts_per_token)
        row_weights = copy_rows(weights.flatten()[:, None], order, inverse, 1)
        rows = self.core(rows, row_weights, count_rows(chosen, self.num_experts))
        return _sum_rows(rows, order, inverse, experts_per_token).view(x.shape)

    def mlp(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """[M, E] → [M, E]; rows sorted by expert, `counts` [N] of each, each times its weight
        [M, 1].
        """
        ends = counts.cumsum(0).to(torch.int32)
        hidden = self.gated(self.gate_proj(rows, ends), self.up_proj(rows, ends))
        out: Tensor
        if self.down_proj.bias is not None:  # the weight is also that of the bias
            out = self.down_proj(hidden, ends) * weights
            return out.to(rows.dtype)
        out = self.down_proj((hidden * weights).to(rows.dtype), ends)
        return out


class GroupedLinear(nn.Module):
    """N linear layers, one for each expert. `main_grad`: see `Linear`."""

    main_grad: Tensor | None

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.register_buffer("main_grad", None, persistent=False)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """[M, in] → [M, out]; the rows of expert i end at `ends[i]`."""
        out = grouped_linear(rows, self.weight, ends, self.main_grad)
        return out if self.bias is None else add_biases(out, self.bias, ends)


def copy_rows(x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """`copies` of each row of x, in `order`, whose inverse permutation is `inverse`."""
    out: Tensor = _CopyRows.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return out


def _sum_rows(rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
    out: Tensor = _SumRows.apply(rows, order, inverse, copies)  # type: ignore[no-untyped-call]
    return out


def _copied(x: Tensor, order: Tensor, copies: int) -> Tensor:
    """`copies` of each row of x, in `order`."""
    return x.index_select(0, order // copies if copies > 1 else order)


def _summed(rows: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """The sum of the copies of each row: the transpose of `_copied`, always in the same order."""
    back = rows.index_select(0, inverse)
    return back.unflatten(0, (-1, copies)).sum(1) if copies > 1 else back


# The gradient that PyTorch has for an index adds rows in an order that differs from run to run.


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return _copied(x, order, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _summed(grad, ctx.saved_tensors[0], ctx.copies), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return _summed(rows, inverse, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _copied(grad, ctx.saved_tensors[0], ctx.copies), None, None, None
