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


def test_nothing_is_used_that_was_not_made_ready() -> None:
    assert not cudnn.usable(torch.empty(1, 1, 8, dtype=torch.bfloat16))
