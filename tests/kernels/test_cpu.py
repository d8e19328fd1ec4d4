"""The kernels of cpu.cpp against float64, in small odd sizes and in large ones."""

import ctypes
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.model.attention import attention
from fast_llm.model.norm import rms_norm
from fast_llm.model.swiglu import swiglu
from tests.helpers import needs_compiler
from tests.model.test_attention import by_hand, documents

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def built() -> None:
    assert cpu_kernels.load() == ""
    torch.manual_seed(0)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# fp32: a few roundings, and an exponential within 2e-7. bf16: the result is rounded once, to 2^-8
# at most.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("shape", [(3, 7), (2, 257, 33)])
def test_swiglu(dtype: torch.dtype, bound: float, shape: tuple[int, ...]) -> None:
    gate, up, cotangent = ((9 * torch.randn(shape)).to(dtype) for _ in range(3))
    inputs = gate.requires_grad_(), up.requires_grad_()
    exact = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    found, wanted = swiglu(*inputs), F.silu(exact[0]) * exact[1]
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, cotangent)),
        (wanted, *torch.autograd.grad(wanted, exact, cotangent.double())),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == dtype and distance(one, other) < bound


def test_swiglu_of_large_numbers() -> None:
    gate = torch.tensor([-1e30, -100.0, -88.5, 0.0, 88.5, 100.0, 1e30, torch.inf, torch.nan])
    found, wanted = swiglu(gate, torch.ones(9)), F.silu(gate)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


# The same checks as for the Triton kernel in tests/kernels/test_triton.py.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("vocabulary", [5, 301, 9001, 128_256])
def test_cross_entropy(dtype: torch.dtype, bound: float, vocabulary: int) -> None:
    logits = (4 * torch.randn(6, vocabulary)).to(dtype)
    logits[1, 3] = 60  # a peak: its softmax has a single 1
    labels = torch.randint(vocabulary, (6,))
    labels[2], labels[4] = -100, -1  # ignored labels, and labels of another shard of the vocabulary
    exact = logits.double()
    wanted = torch.where(labels[:, None] == -100, 0, exact.softmax(-1))
    wanted[labels >= 0] -= F.one_hot(labels[labels >= 0], vocabulary)
    before = logits.clone()
    log_sums, chosen = cpu_kernels.softmax_cross_entropy_(logits, labels, -100, False)
    assert torch.equal(logits, before)
    assert (log_sums - exact.logsumexp(-1)).abs().max() < 1e-5
    own = exact.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    assert torch.equal(chosen, torch.where(labels < 0, 0, own).float())
    cpu_kernels.softmax_cross_entropy_(logits, labels, -100, True)
    assert distance(logits, wanted) < bound
    again = before.clone()
    cpu_kernels.softmax_cross_entropy_(before, labels, -100, True, log_sums)
    assert torch.equal(before, logits)
    cpu_kernels.softmax_cross_entropy_(again, labels, -100, True, log_sums, 0.01)
    of_z_loss = 0.02 * exact.logsumexp(-1)[:, None] * exact.softmax(-1)
    wanted += torch.where(labels[:, None] == -100, 0, of_z_loss)
    assert distance(again, wanted) < bound


# Head sizes other than 64; no groups and large groups; full blocks, and one token more or less.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(
    ("heads", "keys", "width"), [(4, 4, 16), (8, 1, 2), (3, 3, 66), (2, 1, 128)]
)
@pytest.mark.parametrize("lengths", [(64, 64, 65, 63), (1, 255), (256,)])
def test_attention(
    dtype: torch.dtype, bound: float, heads: int, keys: int, width: int, lengths: tuple[int, ...]
) -> None:
    q, k, v = (
        torch.randn(1, 256, h, width).to(dtype).requires_grad_() for h in (heads, keys, keys)
    )
    cotangent = torch.randn(q.shape).to(dtype)
    out, wanted = attention(q, k, v, documents(*lengths), True), by_hand(q, k, v, lengths)
    gradients = zip(
        torch.autograd.grad(out, (q, k, v), cotangent),
        torch.autograd.grad((wanted * cotangent).sum(), (q, k, v)),
        strict=True,
    )
    for one, other in ((out, wanted), *gradients):
        # With a single key, gradients by its query are zero up to rounding.
        assert (one.double() - other.double()).norm() < bound * (other.double().norm() + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 200, 2, 8).to(dtype) for _ in range(3))
    found = attention(q * 100, k * 100, v, documents(150, 50), True)
    assert torch.isfinite(found).all()
    assert distance(found, by_hand(q * 100, k * 100, v, (150, 50))) < (
        1e-4 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_deterministic_and_nan_stays_nan(dtype: torch.dtype) -> None:
    """Elementwise results do not depend on the number of threads; sums do, by rounding."""

    def gradients(threads: int, poison: float = 0.0) -> list[Tensor]:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 500, h, 32, generator=generator).to(dtype) for h in (4, 2, 2))
        weight = torch.ones(32, dtype=dtype).requires_grad_()
        q[0, 77, 0, 5] += poison
        inputs = [x.requires_grad_() for x in (q, k, v)]
        q, k, v = (rms_norm(x, weight, 1e-5) for x in inputs)
        out = attention(q, k, v, documents(70, 430), True)
        return list(torch.autograd.grad(out.float().square().sum(), [*inputs, weight]))

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            once, again = gradients(threads), gradients(threads)
            assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        assert all(
            distance(one, other) < bound
            for one, other in zip(gradients(3), gradients(1), strict=True)
        )
        for poison in (torch.nan, torch.inf):
            assert not torch.isfinite(gradients(2, poison)[3]).all()
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with cpu_kernels.disabled():
        assert "no-such-compiler" in cpu_kernels.load(again=True)
        assert not cpu_kernels.usable(torch.ones(1))
        x = torch.randn(4, 8)
        expected = x / x.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(rms_norm(x, torch.ones(8), 0.0), expected, atol=1e-6)


def test_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library is cached; the message of a failing compiler is reported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cpu_kernels._built()
    monkeypatch.setenv("CXX", "false")
    assert cpu_kernels._built() == path and ctypes.CDLL(str(path)).kernel
    assert sorted((tmp_path / "fast_llm").iterdir()) == [path]
    path.unlink()
    with cpu_kernels.disabled():
        assert "returned non-zero exit status" in cpu_kernels.load(again=True)


def _short(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def test_fp32_matmuls_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's default stays if a test matmul is inexact, and with AMX."""
    before = torch.get_float32_matmul_precision()
    try:
        taken = cpu_kernels.use_faster_exact_matmul()
        assert (torch.get_float32_matmul_precision() == "medium") == taken
        for rows, inner, columns in ((512, 576, 1536), (1, 33, 7), (300, 2048, 64), (65, 64, 63)):
            left, right = torch.randn(rows, inner), torch.randn(inner, columns)
            exact = left.double() @ right.double()
            for one, other in (
                (left, right),
                (left.t().contiguous().t(), right.t().contiguous().t()),
            ):
                assert distance(one @ other, exact) < 1e-6
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert not cpu_kernels.use_faster_exact_matmul()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        product = Tensor.__matmul__
        monkeypatch.setattr(
            Tensor,
            "__matmul__",
            lambda a, b: product(a if a.dtype == torch.double else _short(a), b),
        )
        assert not cpu_kernels.use_faster_exact_matmul()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
