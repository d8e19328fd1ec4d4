"""Best-fit packing: no document that fits is cut, and each target comes once an epoch."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import DataConfig
from fast_llm.data.best_fit import pack
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.loader import Loader
from fast_llm.data.source import PackedSample, Source
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.model.loss import IGNORE_INDEX


def numbered(prefix: Path, lengths: Sequence[int], start: int = 0) -> str:
    """A token file whose documents have the tokens start, start + 1 and so on."""
    writer = TokenFileWriter(prefix, np.dtype("int32"))
    edges = np.cumsum([0, *lengths]) + start
    for begin, end in pairwise(edges):
        writer.append(np.arange(begin, end))
    writer.close()
    return str(prefix)


def opened(path: Any, length: int, seed: int = 0, **values: Any) -> Dataset:
    paths = path if isinstance(path, list) else [path]
    config = DataConfig(path=paths, packing="best_fit", **{"split": [1], **values})
    return open_dataset(config, length, seed, 2**31)


def targets_of(packed: PackedSample, isolate: bool = True) -> list[int]:
    """The targets that count, as the loader chooses them."""
    kept = np.ones(len(packed.targets), bool)
    kept[packed.ends if isolate else packed.breaks] = False
    kept[len(kept) - packed.padding :] = False
    return packed.targets[kept].tolist()  # type: ignore[no-any-return]


def lengths_for(length: int) -> st.SearchStrategy[list[int]]:
    """Lengths of documents around those where cutting changes."""
    some = [0, 1, 2, length - 1, length, length + 1, length + 2, 2 * length, 2 * length + 1]
    one = st.sampled_from(some) | st.integers(0, 4 * length)
    return st.lists(one, min_size=1, max_size=60)


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """The textbook algorithm, one item at a time."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [one for one in bins if sum(one) + size <= capacity]
        chosen = max(fitting, key=sum, default=None)
        if chosen is None:
            bins.append(chosen := [])
        chosen.append(size)
    return bins


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=120), st.integers(20, 33))
def test_groups_are_those_of_best_fit_decreasing(sizes: list[int], capacity: int) -> None:
    counts = np.bincount(sizes, minlength=capacity)
    groups = pack(counts, capacity)
    room: Counter[int] = Counter()  # which of two equally full sequences gets more is free
    rests: Counter[tuple[int, int]] = Counter()  # length and number
    for (begin, end), parts in zip(pairwise(groups.first.tolist()), groups.rests, strict=True):
        room[capacity - sum(size * copies for size, copies, _ in parts)] += end - begin
        for size, copies, first in parts:
            rests.update((size, n) for n in range(first, first + copies * (end - begin)))
    assert room == Counter(capacity - sum(one) for one in best_fit_decreasing(sizes, capacity))
    assert rests == Counter((size, n) for size, many in enumerate(counts) for n in range(many))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3, 8, 13]), st.sampled_from([[1], [3, 2, 1]]))
def test_each_epoch_has_each_document_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, length: int, shares: list[float]
) -> None:
    root = tmp_path_factory.mktemp("packed")
    documents = data.draw(lengths_for(length))
    path = numbered(root / "s", [length + 1, *documents, 2 * length])
    dataset = opened(path, length, split=shares)
    for name in dataset.splits:
        check_epochs(dataset, name, length)


def check_epochs(dataset: Dataset, name: str, length: int) -> None:
    split = dataset.splits[name]
    source = split.sources[0]
    assert isinstance(source, Source)
    own = [
        (begin, begin + size)
        for subset in source.subsets
        for begin, end in zip(subset.begins.tolist(), subset.ends.tolist(), strict=True)
        for begin, size in documents_in(subset.file, begin, end)
    ]
    expected = sorted(token for begin, end in own for token in range(begin + 1, end))
    count = source.sequences
    assert split.sequences == count
    orders = []
    for epoch in range(2):
        read = [dataset.read(name, epoch * count + index) for index in range(count)]
        spans = [dataset.locate(name, epoch * count + index) for index in range(count)]
        assert sorted(t for packed in read for t in targets_of(packed)) == expected
        lone = {begin for begin, end in own if end - begin == 1}
        assert lone <= {int(t) for packed in read for t in packed.tokens[packed.starts]}
        whole = Counter((span.document, span.begin, span.tokens) for one in spans for span in one)
        for begin, end in own:
            if end - begin <= length + 1:
                document = source.files[0].document_at(begin)
                assert whole[document, 0, end - begin] == 1
        unused = 0
        for packed, parts in zip(read, spans, strict=True):
            size = sum(part.tokens for part in parts)
            assert packed.padding == length + 1 - size >= 0
            unused += max(0, length - size)
        assert source.padding == pytest.approx(unused / (count * length))
        assert dataset.inputs_by_source(name, count) == [count * length]
        orders.append([packed.tokens.tolist() for packed in read])
    if count > 3:  # of 24 orders, one would be repeated by chance
        assert orders[0] != orders[1] or count < 8


def documents_in(file: Any, begin: int, end: int) -> list[tuple[int, int]]:
    first, last = file.document_at(begin), file.document_at(end - 1)
    found = zip(file.starts_of(first, last + 1), file.lengths_of(first, last + 1), strict=True)
    return [(int(start), int(size)) for start, size in found if size]


@pytest.mark.parametrize("isolate", [True, False])
def test_batches(tmp_path: Path, isolate: bool) -> None:
    """Padding and borders are no targets; positions begin at each document."""
    path = numbered(tmp_path / "s", [3, 4, 2, 20, 1, 5, 9, 8, 6, 1])
    data = opened(path, 8)
    count = data.sequences("training")
    sizes = BatchSizes(count, count, 1)
    kinds: dict[str, Any] = {"rank": 0, "processes": 1, "first_sample": 0, "steps": 1}
    with Loader(
        data, "training", sizes, vocab_size=100, isolate=isolate, workers=0, prefetch=1, **kinds
    ) as loader:
        ((batch,),) = loader
    labels, tokens = batch.labels.numpy(), batch.tokens.numpy()
    kept = labels != IGNORE_INDEX
    assert batch.targets == kept.sum()
    inner = sorted(set(range(59)) - set(np.cumsum([0, 3, 4, 2, 20, 1, 5, 9, 8, 6]).tolist()))
    ends = np.cumsum([3, 4, 2, 20, 1, 5, 9, 8, 6, 1]) - 1
    within = kept & ~np.isin(tokens, ends)
    assert sorted(labels[within].tolist()) == inner
    assert (labels[within] == tokens[within] + 1).all()
    if isolate:
        assert (kept == within).all()
        assert batch.documents is not None
        return
    # Only the beginning of a document is predicted from the document before it.
    begins = np.cumsum([0, 3, 4, 2, 20, 1, 5, 9, 8, 6])
    assert np.isin(labels[kept & ~within], begins).all() and (kept & ~within).any()
    assert (batch.positions.numpy() == np.arange(8)).all()
