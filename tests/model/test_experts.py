"""Router, experts and their losses: against transformers, and against the formulas in float64."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from fast_llm.config.model import TransformerConfig
from fast_llm.model.experts import MixtureOfExperts
from fast_llm.model.grouped import grouped_linear


def pair(seed: int, family: str) -> tuple[MixtureOfExperts, Any, int]:
    """Random sizes; ours and transformers' layer with equal weights, and the hidden size."""
    rng = random.Random(f"{seed} {family}")
    hidden, ffn = rng.choice([24, 32, 40]), rng.choice([8, 20, 33])
    experts = rng.choice([2, 4, 7, 16])
    chosen = rng.randint(1, min(experts, 5))
    common: dict[str, Any] = {"hidden_size": hidden, "num_experts_per_tok": chosen}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    common |= {"experts_implementation": "eager"}
    theirs: Any
    if family == "mixtral":
        normalize = True
        theirs = MixtralSparseMoeBlock(
            MixtralConfig(num_local_experts=experts, intermediate_size=ffn, **common)
        )
    else:
        normalize = rng.random() < 0.5
        theirs = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                num_experts=experts,
                moe_intermediate_size=ffn,
                norm_topk_prob=normalize,
                **common,
            )
        )
    ours = MixtureOfExperts(
        TransformerConfig(
            hidden_size=hidden,
            expert_hidden_size=ffn,
            num_experts=experts,
            num_experts_per_token=chosen,
            normalize_expert_weights=normalize,
        )
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        ours.gate.weight.copy_(theirs.gate.weight)
        gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
        ours.experts.gate_proj.weight.copy_(gate)
        ours.experts.up_proj.weight.copy_(up)
        ours.experts.down_proj.weight.copy_(theirs.experts.down_proj)
    return ours, theirs, hidden


def gradients(module: MixtureOfExperts) -> list[Tensor]:
    experts = module.experts
    weights = (
        module.gate.weight,
        *(each.weight for each in (experts.gate_proj, experts.up_proj, experts.down_proj)),
    )
    return [weight.grad for weight in weights if weight.grad is not None]


def gradients_of_theirs(module: Any) -> list[Tensor]:
    gate, up = module.experts.gate_up_proj.grad.chunk(2, dim=1)
    return [module.gate.weight.grad, gate, up, module.experts.down_proj.grad]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("seed", range(12))
def test_as_transformers(seed: int, family: str) -> None:
    ours, theirs, hidden = pair(seed, family)
    x = torch.randn(2, 11, hidden)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    seed_gradient = torch.randn(2, 11, hidden)
    out, expected = ours(mine), theirs(other)
    out.backward(seed_gradient)
    expected.backward(seed_gradient)
    # Both are fp32, with sums in another order.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    for found, right in zip(gradients(ours), gradients_of_theirs(theirs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_losses_as_transformers(seed: int) -> None:
    """In one micro-batch, load balancing is transformers' loss of this layer."""
    ours, theirs, hidden = pair(seed, "qwen3_moe")
    x = torch.randn(2, 11, hidden)
    ours.gate.losses.auxiliary_scale, ours.gate.losses.z_scale = 0.5, 0.25
    ours(x).sum().backward()
    logits, _, _ = theirs.gate(x)
    k = ours.gate.experts_per_token
    auxiliary = load_balancing_loss_func((logits,), theirs.gate.num_experts, k)
    z = logits.logsumexp(-1).square().mean()
    (theirs(x).sum() + 0.5 * auxiliary + 0.25 * z).backward()
    assert ours.gate.losses.sums is not None
    torch.testing.assert_close(ours.gate.losses.sums, torch.stack((auxiliary, z)).detach())
    torch.testing.assert_close(ours.gate.weight.grad, theirs.gate.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_bias_chooses_experts_and_does_not_weigh_them(seed: int) -> None:
    ours, _, hidden = pair(seed, "qwen3_moe")
    gate, x = ours.gate, torch.randn(50, hidden)
    unbiased, chosen = gate(x)
    gate.selection_bias = torch.zeros(ours.experts.num_experts)
    assert torch.equal(gate(x)[1], chosen)
    assert torch.equal(gate(x)[0], unbiased)
    gate.selection_bias = torch.randn(ours.experts.num_experts)
    weights, chosen = gate(x)
    for token, probabilities in enumerate((x @ gate.weight.t()).softmax(-1)):
        ranked = sorted(
            range(len(probabilities)), key=lambda i: -(probabilities + gate.selection_bias)[i]
        )
        wanted = ranked[: gate.experts_per_token]
        assert chosen[token].tolist() == wanted
        expected = probabilities[wanted]
        expected = expected / expected.sum() if gate.normalize else expected
        torch.testing.assert_close(weights[token], expected)


def test_load_is_of_the_step_so_far() -> None:
    ours, _, hidden = pair(1, "qwen3_moe")
    losses = ours.gate.losses
    first, second = torch.randn(1, 30, hidden), torch.randn(1, 30, hidden) + 1
    counts = []
    for x in (first, second):
        losses.reset()
        ours(x)
        assert losses.counts is not None
        counts.append(losses.counts)
    losses.reset()
    ours(first)
    ours(second)
    assert losses.counts is not None
    assert torch.equal(losses.counts, counts[0] + counts[1])
    assert losses.micro_batches == 2
    with torch.no_grad():
        ours(first)
    assert losses.micro_batches == 2


def test_recomputation_counts_once_and_keeps_every_bit() -> None:
    found = []
    for recompute in (False, True):
        ours, _, hidden = pair(2, "qwen3_moe")
        ours.gate.losses.auxiliary_scale = 0.5
        torch.manual_seed(0)
        batches = [torch.randn(1, 30, hidden, requires_grad=True) for _ in range(2)]
        outs = [checkpoint(ours, x, use_reentrant=False) if recompute else ours(x) for x in batches]
        for out in outs:
            out.square().sum().backward()
        losses = ours.gate.losses
        assert losses.counts is not None
        assert losses.sums is not None
        assert losses.micro_batches == 2
        found.append([losses.counts, losses.sums, *gradients(ours), batches[0].grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_bits_repeat() -> None:
    ours, _, hidden = pair(3, "qwen3_moe")
    x = torch.randn(3, 50, hidden)
    found = []
    for _ in range(2):
        module = copy.deepcopy(ours)
        out = module(x)
        out.square().sum().backward()
        found.append([out, *gradients(module)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 0, 0, 0]])
def test_grouped_linear(dtype: torch.dtype, sizes: list[int]) -> None:
    """Values and gradients, also those added to `main_grad`, against float64."""
    torch.manual_seed(0)
    rows, weight = torch.randn(sum(sizes), 24), torch.randn(4, 40, 24)
    grad = torch.randn(sum(sizes), 40)
    rows, weight, grad = (x.to(dtype) for x in (rows, weight, grad))
    ends = torch.tensor(sizes).cumsum(0).int()
    wide = [x.double().requires_grad_() for x in (rows, weight)]
    exact = torch.cat(
        [part @ matrix.t() for part, matrix in zip(wide[0].split(sizes), wide[1], strict=True)]
    )
    exact.backward(grad.double())
    rows.requires_grad_()
    weight.requires_grad_()
    out = grouped_linear(rows, weight, ends)
    out.backward(grad)
    # A sum in fp32, of at most 40 products, rounded once.
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for found, right in ((out, exact), (rows.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert found is not None
        assert right is not None
        torch.testing.assert_close(found.double(), right, rtol=bound, atol=bound * 40)
    main_grad = torch.ones(4, 40, 24)
    weight.grad = None
    grouped_linear(rows, weight, ends, main_grad).backward(grad)
    assert weight.grad is None
    assert wide[1].grad is not None
    torch.testing.assert_close(main_grad.double() - 1, wide[1].grad, rtol=bound, atol=bound * 40)
