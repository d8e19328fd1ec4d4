"""Micro-batches against a naive reimplementation; who gets which sequences; threads."""

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.batch import BatchSizes
from fast_llm.data.dataset import Dataset
from fast_llm.data.loader import Loader
from fast_llm.errors import DataError
from fast_llm.model.attention import PackedSequences
from fast_llm.model.batch import Batch
from tests.data.test_dataset import numbered, opened, write_metadata
from tests.data.test_tokenfile import write


def loader(dataset: Dataset, sizes: Any = None, phase: str = "training", **changes: Any) -> Loader:
    given = {
        "rank": 0,
        "processes": 1,
        "vocab_size": 2**31,
        "first_sample": 0,
        "steps": 3,
        "isolate": True,
        "workers": 0,
        "prefetch": 2,
    }
    return Loader(dataset, phase, sizes or BatchSizes(4, 2, 2), **{**given, **changes})


def steps(dataset: Dataset, *arguments: Any, **changes: Any) -> list[list[Batch]]:
    with loader(dataset, *arguments, **changes) as batches:
        return list(batches)


def first_tokens(step: list[Batch]) -> list[int]:
    return [int(token) for batch in step for token in batch.tokens[:, 0]]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=20).filter(
        lambda some: sum(some) > 12
    ),
    length=st.integers(1, 12),
    isolate=st.booleans(),
)
def test_labels_positions_and_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, isolate: bool
) -> None:
    """For each token: its label, its position in its document, and where documents end."""
    dataset = opened(numbered(tmp_path_factory.mktemp("naive") / "a", lengths), length)
    owner = [
        number for number, size in enumerate(lengths) for _ in range(size)
    ]  # token t is t itself
    for (batch,) in steps(dataset, BatchSizes(2, 2, 1), isolate=isolate, steps=5):
        labels, positions, runs = [], [], []
        for row in batch.tokens.tolist():
            assert row == list(range(row[0], row[0] + length))
            labels.append([t + 1 if not isolate or owner[t] == owner[t + 1] else -100 for t in row])
            at: list[int] = []
            for i, t in enumerate(row):
                fresh = i == 0 or (isolate and owner[t] != owner[t - 1])
                at.append(0 if fresh else at[-1] + 1)
                if fresh:
                    runs.append(0)
                runs[-1] += 1
            positions.append(at)
        assert batch.labels.tolist() == labels
        assert batch.positions.tolist() == positions
        assert batch.targets == sum(label != -100 for row in labels for label in row)
        if not isolate:
            assert batch.documents is None
            continue
        assert isinstance(batch.documents, PackedSequences)
        assert batch.documents.lengths == tuple(runs) and sum(runs) == 2 * length
        assert batch.documents.max_seqlen == max(runs)
        assert batch.documents.cu_seqlens.tolist() == [0, *np.cumsum(runs).tolist()]
        assert str(batch.documents.cu_seqlens.dtype) == "torch.int32"  # what the kernels take


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 3])
def test_layout_does_not_matter(
    tmp_path: Path, processes: int, micro_batch_size: int, workers: int
) -> None:
    """The sequences of a step are the same, in the same order, however they are dealt."""
    dataset = opened(numbered(tmp_path / "a", [11] * 100), 5)  # 219 sequences
    micro_batches = 32 // processes // micro_batch_size
    sizes = BatchSizes(32, micro_batch_size, micro_batches)
    dealt = [
        steps(dataset, sizes, rank=rank, processes=processes, workers=workers, steps=10)
        for rank in range(processes)
    ]
    for step in range(10):
        got = [
            int(token)
            for micro in range(micro_batches)
            for rank in range(processes)
            for token in dealt[rank][step][micro].tokens[:, 0]
        ]
        assert got == [int(dataset.read("training", 32 * step + i).tokens[0]) for i in range(32)]


def test_one_epoch_is_each_sequence_once(tmp_path: Path) -> None:
    dataset = opened(numbered(tmp_path / "a", [7] * 23), 4)  # 161 tokens: 40 sequences
    seen = [token for step in steps(dataset, steps=20) for token in first_tokens(step)]
    assert (
        sorted(seen[:40]) == sorted(seen[40:]) == list(range(0, 160, 4)) and seen[:40] != seen[40:]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resume(tmp_path: Path, workers: int) -> None:
    path = [
        0.7,
        numbered(tmp_path / "a", [11] * 50),
        0.3,
        numbered(tmp_path / "b", [9] * 50, 10_000),
    ]
    whole = [first_tokens(step) for step in steps(opened(path), steps=12, workers=workers)]
    for done in (1, 5, 11):
        rest = steps(opened(path), steps=12 - done, first_sample=4 * done, workers=workers)
        assert [first_tokens(step) for step in rest] == whole[done:]
    # With another batch size, the sequences continue too.
    rest = steps(opened(path), BatchSizes(2, 1, 2), steps=4, first_sample=8, workers=workers)
    assert [token for step in rest for token in first_tokens(step)] == whole[2] + whole[3]


def test_errors_of_threads_surface_and_no_thread_stays(tmp_path: Path) -> None:
    dataset = opened(numbered(tmp_path / "a", [11] * 50))
    with loader(dataset, workers=3, steps=100) as batches:
        iterator = iter(batches)
        next(iterator)
        assert threads()
    assert not threads()

    failing = loader(dataset, workers=2, steps=20)
    good, read = 3 * 4, dataset.read

    def fail(split: str, index: int) -> Any:
        return read(split, index if index < good else "no number")  # type: ignore[arg-type]

    dataset.read = fail  # type: ignore[method-assign]
    done = 0
    with pytest.raises(TypeError), failing:  # noqa: PT012 - some steps go well
        for _ in failing:
            done += 1
    assert done == 3  # where it is needed, not where it was read ahead
    assert not threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_token_that_the_model_does_not_have(tmp_path: Path, workers: int) -> None:
    good = [[1, 2, 3]] * 20
    write(tmp_path / "s0", good)
    write(tmp_path / "s1", [*good, [4, 5, 6, 99, 7, 8], *good])
    path = write_metadata(tmp_path / "d.json", [("s0", 60, 60), ("s1", 126, 126)])
    with pytest.raises(DataError) as error:
        steps(opened(path), steps=11, vocab_size=99, workers=workers)
    words = (
        f"{tmp_path / 's1'}: document 20 holds token 99 at position 3, but the model's vocab_size"
        " is 99"
    )
    assert str(error.value).startswith(words)
    assert not threads()
    assert len(steps(opened(path), steps=11, vocab_size=100, workers=workers)) == 11


def test_a_negative_token(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4, -5, 6]])
    with pytest.raises(DataError, match="document 1 holds token -5 at position 1"):
        steps(opened(str(tmp_path / "a")), BatchSizes(1, 1, 1))


def test_last_predicted_token_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3, 4, 99]])  # one sequence of four; 99 is only a label
    with pytest.raises(DataError, match="token 99 at position 4"):
        steps(opened(str(tmp_path / "a")), BatchSizes(1, 1, 1), vocab_size=50)


def test_slow_storage_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = opened(numbered(tmp_path / "a", [11] * 50))
    with caplog.at_level(logging.WARNING, "fast_llm"):
        steps(dataset, steps=1)
        assert not caplog.text
        steps(dataset, steps=1, warn_ms=1e-6)  # nothing is as fast as that
    assert "is the storage slow?" in caplog.text


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("size", "micro", "processes"), [(6, 1, 4), (5, 2, 2), (7, 4, 1), (3, 1, 3)]
)
def test_a_batch_that_does_not_divide_has_rows_without_targets(
    tmp_path: Path, size: int, micro: int, processes: int, isolate: bool
) -> None:
    """All processes do as many micro-batches; together they hold each sequence of the step once."""
    dataset = opened(numbered(tmp_path / "a", [40, 30, 50]), 4)
    many = -(-size // (micro * processes))
    sizes = BatchSizes(size, micro, many, micro * many * processes - size)
    whole = steps(dataset, BatchSizes(size, size, 1), steps=2, isolate=isolate)
    parts = [
        steps(dataset, sizes, steps=2, rank=rank, processes=processes, isolate=isolate)
        for rank in range(processes)
    ]
    for step, (expected,) in enumerate(whole):
        batches = [batch for part in parts for batch in part[step]]
        assert len(batches) == many * processes
        rows = [
            (int(row[0]), labels.tolist())
            for batch in batches
            for row, labels in zip(batch.tokens, batch.labels, strict=True)
            if bool((labels != -100).any())
        ]
        wanted = [
            (int(row[0]), labels.tolist())
            for row, labels in zip(expected.tokens, expected.labels, strict=True)
        ]
        assert sorted(rows) == sorted(wanted) and len(rows) == size
        assert sum(batch.targets for batch in batches) == expected.targets
        for batch in batches:
            assert batch.targets == int((batch.labels != -100).sum())
            if batch.documents is not None:
                assert isinstance(batch.documents, PackedSequences)
                assert sum(batch.documents.lengths) == micro * 4
