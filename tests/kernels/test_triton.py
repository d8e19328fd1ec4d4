"""The Triton kernels in Triton's interpreter on the CPU.

Each check runs in its own process, because the interpreter is chosen at import."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is installed with PyTorch for NVIDIA GPUs alone")

CHECK = """
import torch
import torch.nn.functional as F
from fast_llm.kernels.triton import softmax_cross_entropy_
from fast_llm.model.loss import cross_entropy
for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for vocabulary in (5, 301, 8192, 9001):
        logits = (4 * torch.randn(6, vocabulary)).to(dtype)
        logits[1, 3] = 60  # a peak: nothing else is left of its softmax
        labels = torch.randint(vocabulary, (6,))
        labels[2] = -100
        exact = logits.double().requires_grad_()
        expected = F.cross_entropy(exact, labels, ignore_index=-100, reduction="none")
        wanted, = torch.autograd.grad(expected.sum(), exact)
        before = logits.clone()
        log_sums, chosen = softmax_cross_entropy_(logits, labels, -100, False)
        assert torch.equal(logits, before)
        again = softmax_cross_entropy_(logits, labels, -100, True)
        assert torch.equal(again[0], log_sums) and torch.equal(again[1], chosen)
        softmax_cross_entropy_(before, labels, -100, True, log_sums)
        assert torch.equal(before, logits)
        losses = torch.where(labels == -100, 0, log_sums - chosen)
        assert (losses - expected).norm() < 1e-5 * expected.norm(), (dtype, vocabulary)
        assert (logits.double() - wanted).norm() < bound * wanted.norm(), (dtype, vocabulary)
hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
labels = torch.randint(50, (9,))
labels[4] = -100
ways = [cross_entropy(hidden, weight, labels, way, None) for way in ("triton", "torch")]
for one, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in ways)):
    assert torch.allclose(one, other, atol=1e-6)
assert torch.allclose(*ways)
print("equal")
"""


ADAMW = """
import torch
from fast_llm.config.train import OptimizerConfig
from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.optim.optimizer import Optimizer
for moments in ("fp32", "bf16", "int8"):
    for halves in (False, True):
        config = OptimizerConfig(moments_dtype=moments, weight_decay=0.1, beta_2=0.95)
        generator = torch.Generator().manual_seed(0)
        start = {name: torch.randn(shape, generator=generator) for name, shape in {"a": (61, 37), "b": (5,), "c": (0, 3)}.items()}
        ways = []
        for kernel in (True, False):
            weights = {name: weight.clone() for name, weight in start.items()}
            low = {}
            if halves:
                low = {name: torch.empty_like(weight, dtype=torch.int16) for name, weight in weights.items()}
                for name, weight in weights.items():
                    weights[name] = torch.empty_like(weight, dtype=torch.bfloat16)
                    split_master_(weight, weights[name], low[name])
            elif moments == "fp32":  # PyTorch's own kernel does that
                kernel = False
            ways.append(Optimizer(weights, config, low, kernel))
        for step in range(1, 6):
            gradients = {name: torch.randn(weight.shape, generator=generator) for name, weight in start.items()}
            gradients["a"] *= torch.randn(61, 37, generator=generator).mul(4).exp()  # some are below the range of 8 bits
            gradients["a"][7:9] = 0
            for way in ways:  # PyTorch's kernel scales the gradients in place
                way.step({name: gradient.clone() for name, gradient in gradients.items()}, 1e-2 / step, 0.7)
        for name in start:
            one, other = (join_master(way.weights[name], way.master_low_bits[name]) if halves else way.weights[name] for way in ways)
            # A few roundings in fp32 (6e-8); a moment that is rounded another way for them, once in
            # some ten thousand, by 2^-8 or 2^-3.
            bound = {"fp32": 1e-6, "bf16": 1e-5, "int8": 1e-4}[moments]
            assert (one - other).norm() <= bound * other.norm(), (moments, halves, name)
            assert (one - start[name]).norm() > 0.005 * other.norm() or not one.numel()
            for part in ("exp_avg", "exp_avg_sq"):
                one, other = (getattr(way, part)[name] for way in ways)
                if moments == "int8":
                    tops, others = (way.block_absmax[name][part == "exp_avg_sq"] for way in ways)
                    assert torch.equal(tops, others) and (not tops.numel() or tops.any())
                differing = (one != other).float().mean() if one.numel() else 0
                assert moments == "fp32" or differing < 1e-3, (moments, halves, name, part, differing)
                if moments != "int8":
                    assert (one.float() - other.float()).norm() <= (1e-6 if moments == "fp32" else 1e-4) * other.float().norm()
                elif one.numel():
                    assert (one.int() - other.int()).abs().max() <= 1 and len(one.unique()) > min(one.numel() // 2, 60)
print("equal")
"""


RMS_NORM = """
import torch
from fast_llm.kernels import triton as triton_kernels
from fast_llm.model.norm import _FusedAddRMSNorm
# The rounding of sums over a row, and over the rows for the weight; fp16: each result is rounded
# once, by at most 2^-11; bf16: the interpreter truncates, by at most 2^-7, where a
# GPU rounds (tests/gpu has its bound).
for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 5e-4)):
    for rows, width in ((1, 5), (40, 33), (7, 576), (3, 4096), (5, 5000)):
        x, grad, other = ((3 * torch.randn(rows, width)).to(dtype) for _ in range(3))
        x[0] = 0  # its length is the root of epsilon
        weight = (1 + 0.3 * torch.randn(width)).to(dtype)
        exact = [t.double().requires_grad_() for t in (x, weight)]
        inverse = (exact[0].square().mean(-1) + 1e-5).rsqrt()
        normed = exact[0] * inverse[:, None] * exact[1]
        for residual_grad in (None, other):
            given = (grad,) if residual_grad is None else (grad, residual_grad)
            wanted = torch.autograd.grad((normed, exact[0] * 1)[: len(given)], exact, [g.double() for g in given], retain_graph=True)
            for found in (
                triton_kernels.rms_norm_backward(grad, residual_grad, x.detach(), weight.detach(), inverse.float().detach()),
                torch.autograd.grad(
                    _FusedAddRMSNorm.apply(x.requires_grad_().view(1, rows, width), weight.requires_grad_(), 1e-5)[: len(given)],
                    (x, weight), [g.view(1, rows, width) for g in given],
                ),
            ):
                for one, two in zip(found, wanted):
                    assert one.dtype == dtype and one.shape == two.shape
                    assert (one.double() - two).norm() <= bound * two.norm(), (dtype, rows, width, residual_grad is None)
x = torch.randn(3, 8, requires_grad=True)
assert torch.equal(torch.autograd.grad(_FusedAddRMSNorm.apply(x, torch.ones(8), 1e-5)[1].sum(), x)[0], torch.ones(3, 8))
print("equal")
"""

ADD = """
import torch
from fast_llm.kernels.triton import add_
for shape in ((1,), (3, 4096), (41, 333)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        total, addend = torch.randn(shape), torch.randn(shape).to(dtype)
        expected = total + addend.float()
        add_(total, addend)
        assert torch.equal(total, expected), (shape, dtype)
print("equal")
"""

# Numbers that fp8 has, so that nothing is rounded: the interpreter truncates where a GPU rounds,
# and turns NaN into numbers (tests/gpu compares those).
QUANTIZE_FP8 = """
import torch
from fast_llm.kernels import triton as triton_kernels
for short, largest in ((torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)):
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((1, 5), (64, 128), (65, 130), (200, 48)):
            codes = torch.randint(256, (rows, columns), dtype=torch.uint8).view(short).float()
            codes[~codes.isfinite()] = 0
            given = codes.clone()
            given[0, 1:4] = torch.tensor([1e5, -1e5, torch.inf])
            codes[0, 1:4] = torch.tensor([1, -1, 1]) * largest
            for ways in ((True, True), (True, False), (False, True)):
                straight, turned = ((torch.zeros(size, dtype=short) if way else torch.empty(0, dtype=short))
                                    for way, size in zip(ways, ((rows, columns), (columns, rows))))
                assert triton_kernels.amax(given.to(dtype)) == given.abs().max()
                triton_kernels.quantize_fp8((given / 8).to(dtype), torch.tensor(0.125), straight, turned)
                for found, wanted in ((straight, codes), (turned, codes.t())):
                    assert not found.numel() or torch.equal(found.float(), wanted), (short, rows)
for number in (torch.nan, -torch.inf, 0.0, -1e-40, 3.0):
    assert str(triton_kernels.amax(torch.tensor([0, number] + 40000 * [0.0]))) == str(torch.tensor(number).abs())
print("equal")
"""


@pytest.mark.parametrize(
    "check",
    [CHECK, ADAMW, RMS_NORM, ADD, QUANTIZE_FP8],
    ids=["softmax_cross_entropy", "adamw", "rms_norm", "add", "quantize_fp8"],
)
def test_in_the_interpreter(check: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import torch\ntorch.manual_seed(0)\n" + check],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "equal", run.stderr
