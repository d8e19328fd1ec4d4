"""Our Triton kernels, in Triton's interpreter on the CPU, in a process of their own: the interpreter is chosen at import."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is installed with PyTorch for NVIDIA GPUs alone")

CHECK = """
import torch
import torch.nn.functional as F
from fast_llm.model.kernels import softmax_cross_entropy_
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


def test_softmax_cross_entropy() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "equal", run.stderr
