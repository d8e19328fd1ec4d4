"""Arguments that cuDNN gets: rounded sizes of plans, and offsets of documents. Needs no GPU.

tests/gpu compares the results with float64.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_llm.kernels import cudnn


@pytest.mark.parametrize(
    ("number", "parts", "expected"),
    [
        (1, 1, 1),
        (2, 1, 2),
        (3, 1, 4),
        (8, 1, 8),
        (9, 1, 16),
        (1, 8, 1),
        (9, 8, 9),
        (17, 8, 18),
        (139264, 8, 147456),
    ],
)
def test_round_up(number: int, parts: int, expected: int) -> None:
    assert cudnn.round_up(number, parts) == expected


def test_plans_are_few_and_never_too_small() -> None:
    for parts, most in ((1, 18), (8, 18 * 8)):
        found = {number: cudnn.round_up(number, parts) for number in range(1, 2**17)}
        assert all(number <= up < number * (1 + 1 / parts) for number, up in found.items())
        assert len(set(found.values())) <= most


def test_padding_documents_are_empty() -> None:
    q, k = torch.empty(9, 4, 16), torch.empty(14, 2, 16)
    ends = (
        torch.tensor([0, 1, 4, 9], dtype=torch.int32),
        torch.tensor([0, 1, 7, 14], dtype=torch.int32),
    )
    documents, places = cudnn._ragged_layout(q, k, *ends)
    assert documents == 4
    assert places["query_lengths"].tolist() == [1, 3, 5, 0]
    assert places["key_lengths"].tolist() == [1, 6, 7, 0]
    # Offsets count elements, not tokens: in q and out, in k and v, and in the log sums.
    assert places["queries_begin"].tolist() == [n * 4 * 16 for n in (0, 1, 4, 9, 9)]
    assert places["keys_begin"].tolist() == [n * 2 * 16 for n in (0, 1, 7, 14, 14)]
    assert places["sums_begin"].tolist() == [n * 4 for n in (0, 1, 4, 9, 9)]
    assert (
        places["queries_begin"].dtype == torch.int64
        and places["query_lengths"].dtype == torch.int32
    )


@pytest.mark.parametrize(
    ("capability", "problem", "reason"),
    [
        ((8, 0), None, "it has no fast kernels for this GPU"),
        (
            (9, 0),
            ImportError("cudnn"),
            "the package nvidia-cudnn-frontend is not installed"
            " (pip install nvidia-cudnn-frontend)",
        ),
        ((9, 0), RuntimeError("No engine\nsupports it"), "No engine"),
        (
            (9, 0),
            AssertionError("its results are off by 2.0e-01"),
            "its results are off by 2.0e-01",
        ),
    ],
)
def test_why_cudnn_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    problem: Exception | None,
    reason: str,
) -> None:
    def fails(*_: object) -> None:
        assert problem is not None
        raise problem

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if isinstance(problem, ImportError):
        monkeypatch.setattr(cudnn, "import_module", fails)
    else:
        monkeypatch.setattr(cudnn, "import_module", lambda name: torch)
        monkeypatch.setattr(cudnn, "_check", fails)
    assert cudnn.load(torch.device("cuda", 0)) == reason
    assert cudnn.Loaded.library is None


def test_unusable_before_it_is_loaded() -> None:
    assert not cudnn.usable(torch.empty(1, 1, 8, dtype=torch.bfloat16))


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """Replace cuDNN's operators by plain attention on the CPU, document by document."""

    def parts(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Iterator[tuple[Tensor, ...]]:
        lengths = ends.diff().tolist()
        yield from zip(*(x.split(lengths) for x in (q, k, v)), strict=True)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        *longest: int,
    ) -> tuple[Tensor, Tensor]:
        assert cu_seqlens_k is None and longest == (5, 5)
        outs = []
        for each in parts(q, k, v, cu_seqlens_q):
            q_, k_, v_ = (x.transpose(0, 1) for x in each)
            out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(0, 1))
        return torch.cat(outs), q.new_zeros(q.shape[:2], dtype=torch.float32)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            return torch.autograd.grad(forward(q, k, v, *rest[2:])[0], (q, k, v), grad)

    library = torch.library.Library("fast_llm", "IMPL")
    library.impl("ragged_attention", forward, "CPU")
    library.impl("ragged_attention_backward", backward, "CPU")
    yield
    library._destroy()
    torch._dynamo.reset()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("compiled", [False, True])
def test_with_gradients_and_without(compiled: bool) -> None:
    """Validation runs the same compiled blocks as training, under no_grad."""
    ends = torch.tensor([0, 2, 7, 9], dtype=torch.int32)
    shapes = (9, 4, 16), (9, 2, 16), (9, 2, 16)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * cudnn.attention(q, k, v, ends, None, 5, 5)

    expected = attend(q, k, v)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    if compiled:
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), expected)
    found = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), expected)
