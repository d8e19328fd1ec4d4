"""Experts on a GPU: grouped matmuls against float64, and gradients that repeat to the bit.

Sizes of groups are as a router makes them: uneven, some zero, no multiples of anything.

Bounds: those of kernels.py.
"""

import torch
from torch import Tensor

from fast_llm.config.model import TransformerConfig
from fast_llm.model.experts import GroupedLinear, MixtureOfExperts, router_logits
from fast_llm.model.grouped import grouped_linear, has_kernel
from tests.gpu.checks import Rows, distance, report

DEVICE = torch.device("cuda", 0)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = {
    "uneven groups": [5, 1023, 0, 64, 333, 1, 0, 622],
    "one group": [0, 0, 0, 2048, 0, 0, 0, 0],
    "first and last empty": [0, 300, 300, 300, 300, 300, 548, 0],
}


def exactly(rows: Tensor, weight: Tensor, grad: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Result and gradients in float64."""
    wide, matrices = (x.detach().double().requires_grad_() for x in (rows, weight))
    parts = zip(wide.split(sizes), matrices, strict=True)
    out = torch.cat([part @ matrix.t() for part, matrix in parts])
    out.backward(grad.double())
    assert wide.grad is not None and matrices.grad is not None
    return out, wide.grad, matrices.grad


def grouped_matmuls() -> Rows:
    for dtype, bound in BOUNDS.items():
        for what, sizes in SIZES.items():
            name = f"grouped matmul, {str(dtype).removeprefix('torch.')}, {what}"
            # New memory holds NaN, so that rows or groups that a kernel leaves out are found.
            torch.full((2**26,), float("nan"), device=DEVICE)
            rows = torch.randn(sum(sizes), 256, device=DEVICE, dtype=dtype, requires_grad=True)
            weight = torch.randn(8, 384, 256, device=DEVICE, dtype=dtype, requires_grad=True)
            grad = torch.randn(sum(sizes), 384, device=DEVICE, dtype=dtype)
            ends = torch.tensor(sizes, device=DEVICE).cumsum(0).int()
            assert has_kernel(rows, weight) == (dtype == torch.bfloat16)
            out = grouped_linear(rows, weight, ends)
            out.backward(grad)
            exact = exactly(rows, weight, grad, sizes)
            assert rows.grad is not None and weight.grad is not None
            yield name, distance(out, exact[0]), bound
            yield f"{name}, gradient of rows", distance(rows.grad, exact[1]), bound
            yield f"{name}, gradient of weights", distance(weight.grad, exact[2]), bound
            main_grad = torch.ones(8, 384, 256, device=DEVICE)
            grouped_linear(rows, weight, ends, main_grad).backward(grad)
            yield f"{name}, into main_grad", distance(main_grad - 1, exact[2]), bound


def routers() -> Rows:
    x = torch.randn(4096, 2048, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(128, 2048, device=DEVICE, dtype=torch.bfloat16)
    found = router_logits(x, weight)
    assert found.dtype == torch.float32
    # The products of bf16 numbers are exact: only the order of the fp32 sums differs.
    yield "router in fp32 from bf16", distance(found, x.double() @ weight.double().t()), 1e-5


def repeats() -> Rows:
    """Numbers that differ between two equal passes."""
    config = TransformerConfig(
        hidden_size=512, expert_hidden_size=256, num_experts=32, num_experts_per_token=4
    )
    with DEVICE:
        layer = MixtureOfExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.05)
    layer.gate.losses.auxiliary_scale = 0.1
    x = torch.randn(2, 4096, 512, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        layer.zero_grad()
        layer.gate.losses.reset()
        given = x.clone().requires_grad_()
        out = layer(given)
        out.backward(x)
        assert given.grad is not None
        matrices = [m.weight for m in layer.modules() if isinstance(m, GroupedLinear)]
        grads = [each.grad for each in (layer.gate.weight, *matrices)]
        found.append([out, given.grad, *(each for each in grads if each is not None)])
    different = sum(int((a != b).sum()) for a, b in zip(*found, strict=True))
    yield "experts: numbers that differ in two equal passes", different, 0


def main() -> None:
    torch.manual_seed(0)
    report(grouped_matmuls, routers, repeats)


if __name__ == "__main__":
    main()
