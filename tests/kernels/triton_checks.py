"""Checks of the Triton kernels, as a program.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_checks NAME

The kernels then run in Triton's interpreter on the CPU. It is chosen when Triton is imported, so
test_triton.py starts a process for each check. A check raises AssertionError, or "equal" is
printed.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.kernels import triton as triton_kernels
from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.model.loss import cross_entropy
from fast_llm.model.norm import _FusedAddRMSNorm
from fast_llm.optim.optimizer import Optimizer


def softmax_cross_entropy() -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for vocabulary in (5, 301, 8192, 9001):
            for z_loss in (0.0, 0.01):
                _softmax_cross_entropy(dtype, bound, vocabulary, z_loss)
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (9,))
    labels[4] = -100
    losses = [cross_entropy(hidden, weight, labels, way, None) for way in ("triton", "torch")]
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(losses[0], losses[1])


def _softmax_cross_entropy(
    dtype: torch.dtype, bound: float, vocabulary: int, z_loss: float
) -> None:
    kernel = triton_kernels.softmax_cross_entropy_
    logits = (4 * torch.randn(6, vocabulary)).to(dtype)
    logits[1, 3] = 60  # a peak: the rest of its softmax is 0
    labels = torch.randint(vocabulary, (6,))
    labels[2] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, ignore_index=-100, reduction="none")
    squares = torch.where(labels != -100, torch.logsumexp(exact, -1).square(), 0)
    (wanted,) = torch.autograd.grad(expected.sum() + z_loss * squares.sum(), exact)
    before = logits.clone()
    log_sums, chosen = kernel(logits, labels, -100, False)
    assert torch.equal(logits, before)
    again = kernel(logits, labels, -100, True, None, z_loss)
    assert torch.equal(again[0], log_sums) and torch.equal(again[1], chosen)
    kernel(before, labels, -100, True, log_sums, z_loss)
    assert torch.equal(before, logits)
    losses = torch.where(labels == -100, 0, log_sums - chosen)
    assert (losses - expected).norm() < 1e-5 * expected.norm(), (dtype, vocabulary)
    assert (logits.double() - wanted).norm() < bound * wanted.norm(), (dtype, vocabulary)


def adamw() -> None:
    for moments in ("fp32", "bf16", "int8"):
        for split in (False, True):
            _adamw(moments, split)


def _adamw(moments: str, split: bool) -> None:
    """Five steps with the kernel and with PyTorch's operations; `split`: of split masters."""
    config = OptimizerConfig.model_validate(
        {"moments_dtype": moments, "weight_decay": 0.1, "beta_2": 0.95}
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (61, 37), "b": (5,), "c": (0, 3)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    optimizers = []
    for kernel in (True, False):
        weights = {name: weight.clone() for name, weight in start.items()}
        low = {}
        if split:
            for name, weight in start.items():
                weights[name] = torch.empty_like(weight, dtype=torch.bfloat16)
                low[name] = torch.empty_like(weight, dtype=torch.int16)
                split_master_(weight, weights[name], low[name])
        elif moments == "fp32":  # PyTorch's own kernel is used then
            kernel = False
        optimizers.append(Optimizer(weights, config, low, kernel))
    for step in range(1, 6):
        gradients = {name: torch.randn(w.shape, generator=generator) for name, w in start.items()}
        # Some are below the range of 8 bits.
        gradients["a"] *= torch.randn(61, 37, generator=generator).mul(4).exp()
        gradients["a"][7:9] = 0
        for optimizer in optimizers:  # PyTorch's kernel scales the gradients in place
            given = {name: gradient.clone() for name, gradient in gradients.items()}
            optimizer.step(given, 1e-2 / step, 0.7)
    for name in start:
        _compare(optimizers, name, start[name], moments, split)


def _compare(
    optimizers: list[Optimizer], name: str, start: Tensor, moments: str, split: bool
) -> None:
    one, other = (
        join_master(o.weights[name], o.master_low_bits[name]) if split else o.weights[name]
        for o in optimizers
    )
    # A few roundings in fp32 (6e-8). They round one moment in some ten thousand the other way, by
    # 2^-8 or 2^-3.
    bound = {"fp32": 1e-6, "bf16": 1e-5, "int8": 1e-4}[moments]
    assert (one - other).norm() <= bound * other.norm(), (moments, split, name)
    assert (one - start).norm() > 0.005 * other.norm() or not one.numel()
    for number, part in enumerate(("exp_avg", "exp_avg_sq")):
        one, other = (getattr(o, part)[name] for o in optimizers)
        if moments == "int8":
            absmax, others = (o.block_absmax[name][number] for o in optimizers)
            assert torch.equal(absmax, others) and (not absmax.numel() or absmax.any())
        if not one.numel():
            continue
        differing = (one != other).float().mean()
        assert moments == "fp32" or differing < 1e-3, (moments, split, name, part, differing)
        if moments == "int8":
            assert (one.int() - other.int()).abs().max() <= 1
            assert len(one.unique()) > min(one.numel() // 2, 60)
        else:
            bound = 1e-6 if moments == "fp32" else 1e-4
            assert (one.float() - other.float()).norm() <= bound * other.float().norm()


def rms_norm() -> None:
    # The rounding of sums over a row, and over the rows for the weight. fp16: each result is
    # rounded once, by at most 2^-11. bf16: the interpreter truncates, by at most 2^-7, where a GPU
    # rounds (tests/gpu has its bound).
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 5e-4)):
        for rows, width in ((1, 5), (40, 33), (7, 576), (3, 4096), (5, 5000)):
            _rms_norm(dtype, bound, rows, width)
    x = torch.randn(3, 8, requires_grad=True)
    _, residual = _FusedAddRMSNorm.apply(x, torch.ones(8), 1e-5)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(residual.sum(), x)
    assert torch.equal(gradient, torch.ones(3, 8))


def _rms_norm(dtype: torch.dtype, bound: float, rows: int, width: int) -> None:
    x, grad, other = ((3 * torch.randn(rows, width)).to(dtype) for _ in range(3))
    x[0] = 0  # its norm is √ε
    weight = (1 + 0.3 * torch.randn(width)).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    inverse = (exact[0].square().mean(-1) + 1e-5).rsqrt()
    normed = exact[0] * inverse[:, None] * exact[1]
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    for residual_grad in (None, other):
        given = (grad,) if residual_grad is None else (grad, residual_grad)
        wanted = torch.autograd.grad(
            (normed, exact[0] * 1)[: len(given)],
            exact,
            [g.double() for g in given],
            retain_graph=True,
        )
        kernel = triton_kernels.rms_norm_backward(
            grad, residual_grad, x, weight, inverse.float().detach()
        )
        results = _FusedAddRMSNorm.apply(  # type: ignore[no-untyped-call]
            leaves[0].view(1, rows, width), leaves[1], 1e-5
        )
        function = torch.autograd.grad(
            results[: len(given)], leaves, [g.view(1, rows, width) for g in given]
        )
        for found in (kernel, function):
            for one, two in zip(found, wanted, strict=True):
                assert one.dtype == dtype and one.shape == two.shape
                case = dtype, rows, width, residual_grad is None
                assert (one.double() - two).norm() <= bound * two.norm(), case


def add() -> None:
    for shape in ((1,), (3, 4096), (41, 333)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            total, addend = torch.randn(shape), torch.randn(shape).to(dtype)
            expected = total + addend.float()
            triton_kernels.add_(total, addend)
            assert torch.equal(total, expected), (shape, dtype)


def quantize_fp8() -> None:
    """Of numbers that fp8 has, so that nothing is rounded.

    The interpreter truncates where a GPU rounds, and turns NaN into numbers (tests/gpu compares
    those).
    """
    for short, largest in ((torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)):
        for dtype in (torch.float32, torch.bfloat16):
            for rows, columns in ((1, 5), (64, 128), (65, 130), (200, 48)):
                _quantize_fp8(short, largest, dtype, rows, columns)
    for number in (torch.nan, -torch.inf, 0.0, -1e-40, 3.0):
        found = triton_kernels.amax(torch.tensor([0, number] + 40000 * [0.0]))
        assert str(found) == str(torch.tensor(number).abs())


def _quantize_fp8(
    short: torch.dtype, largest: int, dtype: torch.dtype, rows: int, columns: int
) -> None:
    wanted = torch.randint(256, (rows, columns), dtype=torch.uint8).view(short).float()
    wanted[~wanted.isfinite()] = 0
    given = wanted.clone()
    given[0, 1:4] = torch.tensor([1e5, -1e5, torch.inf])
    wanted[0, 1:4] = torch.tensor([1, -1, 1]) * largest
    assert triton_kernels.amax(given.to(dtype)) == given.abs().max()
    empty = torch.empty(0, dtype=short)
    for with_row_major, with_transposed in ((True, True), (True, False), (False, True)):
        row_major = torch.zeros(rows, columns, dtype=short) if with_row_major else empty
        transposed = torch.zeros(columns, rows, dtype=short) if with_transposed else empty
        triton_kernels.quantize_fp8(
            (given / 8).to(dtype), torch.tensor(0.125), row_major, transposed
        )
        for found, expected in ((row_major, wanted), (transposed, wanted.t())):
            assert not found.numel() or torch.equal(found.float(), expected), (short, rows)


CHECKS = {
    check.__name__: check for check in (softmax_cross_entropy, adamw, rms_norm, add, quantize_fp8)
}

if __name__ == "__main__":
    torch.manual_seed(0)
    CHECKS[sys.argv[1]]()
    print("equal")
