"""What is asked of cuDNN, where there is none: the round numbers of its plans, and where documents begin. (benchmarks/gpu.py compares
its results with float64.)"""

import pytest
import torch

from fast_llm.model import cudnn


@pytest.mark.parametrize(
    ("number", "parts", "expected"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 4), (8, 1, 8), (9, 1, 16), (1, 8, 1), (9, 8, 9), (17, 8, 18), (139264, 8, 147456)],
)
def test_round_numbers(number: int, parts: int, expected: int) -> None:
    assert cudnn.round_up(number, parts) == expected


def test_plans_are_few_and_never_too_small() -> None:
    for parts, most in ((1, 18), (8, 18 * 8)):
        found = {number: cudnn.round_up(number, parts) for number in range(1, 2**17)}
        assert all(number <= up < number * (1 + 1 / parts) for number, up in found.items())
        assert len(set(found.values())) <= most


def test_documents_that_fill_up_are_empty() -> None:
    q, k = torch.empty(9, 4, 16), torch.empty(14, 2, 16)
    ends = torch.tensor([0, 1, 4, 9], dtype=torch.int32), torch.tensor([0, 1, 7, 14], dtype=torch.int32)
    documents, places = cudnn._places(q, k, *ends)
    assert documents == 4
    assert places["query_lengths"].tolist() == [1, 3, 5, 0]
    assert places["key_lengths"].tolist() == [1, 6, 7, 0]
    # In numbers, not in tokens: where cuDNN finds each document in q and out, in k and v, and in the sums.
    assert places["queries_begin"].tolist() == [n * 4 * 16 for n in (0, 1, 4, 9, 9)]
    assert places["keys_begin"].tolist() == [n * 2 * 16 for n in (0, 1, 7, 14, 14)]
    assert places["sums_begin"].tolist() == [n * 4 for n in (0, 1, 4, 9, 9)]
    assert places["queries_begin"].dtype == torch.int64 and places["query_lengths"].dtype == torch.int32


@pytest.mark.parametrize(
    ("capability", "problem", "told"),
    [
        ((8, 0), None, "it has no fast kernels for this GPU"),
        (
            (9, 0),
            ImportError("cudnn"),
            "the package nvidia-cudnn-frontend is not installed (pip install 'fast-llm[cudnn]')",
        ),
        ((9, 0), RuntimeError("No engine\nsupports it"), "No engine"),
        ((9, 0), AssertionError("its results are off by 2.0e-01"), "its results are off by 2.0e-01"),
    ],
)
def test_why_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], problem: Exception | None, told: str
) -> None:
    def fails(*_: object) -> None:
        assert problem is not None
        raise problem

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if isinstance(problem, ImportError):
        monkeypatch.setattr(cudnn, "import_module", fails)
    else:
        monkeypatch.setattr(cudnn, "import_module", lambda name: torch)
        monkeypatch.setattr(cudnn, "_try", fails)
    assert cudnn.load(torch.device("cuda", 0)) == told
    assert cudnn._Loaded.library is None


def test_nothing_is_used_that_was_not_made_ready() -> None:
    assert not cudnn.usable(torch.empty(1, 1, 8, dtype=torch.bfloat16))
