"""Order, shares, splits and windows, against counting and concatenation."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import Dataset, Split, open_dataset
from fast_llm.data.metadata import verify
from fast_llm.data.sampling import keys as _keys
from fast_llm.data.sampling import permute
from fast_llm.data.source import RandomSource
from fast_llm.data.tokenizer import load
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.test_tokenfile import write


def numbered(prefix: Path, lengths: Sequence[int], start: int = 0) -> str:
    """A file with the tokens start, start + 1 and so on."""
    edges = np.cumsum([0, *lengths])
    write(prefix, [list(range(start + a, start + b)) for a, b in pairwise(edges)])
    return str(prefix)


def write_metadata(path: Path, shards: Sequence[tuple[str, int, float]]) -> str:
    """A dataset.json of token files with their weights: [(prefix, tokens, weight)]."""
    entries = [
        {"prefix": prefix, "num_tokens": tokens, "weight": weight}
        for prefix, tokens, weight in shards
    ]
    path.write_text(json.dumps({"datasets": entries}))
    return str(path)


def opened(
    path: Any,
    length: int = 4,
    seed: int = 0,
    split: Sequence[float] = (1, 0, 0),
    **further: Any,
) -> Dataset:
    return open_dataset(DataConfig(path=path, split=list(split), **further), length, seed, 2**31)


@pytest.mark.parametrize("count", [*range(1, 40), 63, 64, 65, 100, 1000, 1023, 1024, 1025])
def test_permutation_is_a_bijection(count: int) -> None:
    for seed in range(3):
        assert sorted(permute(i, count, _keys(seed, 0, 0)) for i in range(count)) == list(
            range(count)
        )


@given(st.integers(1, 2**40), st.integers(0, 2**32), st.data())
def test_permutation_of_many(count: int, seed: int, data: st.DataObject) -> None:
    """For counts that cannot be gone through: it stays inside and no two collide."""
    values = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=20))
    images = [permute(value, count, _keys(seed, 0, 0)) for value in values]
    assert len(set(images)) == len(values) and all(0 <= image < count for image in images)


def test_permutation_looks_random() -> None:
    """Mean distance of adjacent items in a random order of n: (n + 1) / 3, ± n / 3 / sqrt(n)."""
    n = 10_000
    order = np.array([permute(i, n, _keys(1, 0, 0)) for i in range(n)])
    assert abs(np.abs(np.diff(order)).mean() - n / 3) < 5 * n / 3 / n**0.5  # five deviations
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / n**0.5


def test_order_is_the_documented_one(tmp_path: Path) -> None:
    """The order of a run must never change: the docstring's formula, computed independently."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def pi(x: int, n: int, keys: Sequence[int]) -> int:
        a = math.ceil(math.sqrt(n))  # exact for an n this small
        b = math.ceil(n / a)
        while True:
            left, right = x // b, x % b
            for j in (0, 2, 4, 6):
                left = (left + mix(right ^ keys[j])) % a
                right = (right + mix(left ^ keys[j + 1])) % b
            x = left * b + right
            if x < n:
                return x

    dataset = opened(numbered(tmp_path / "a", [403]), seed=7)  # 100 sequences
    for i in range(0, 400, 7):
        keys = np.frombuffer(hashlib.sha512(f"7 0 {i // 100}".encode()).digest(), "<u8").tolist()
        assert dataset.read("training", i).tokens[0] == 4 * pi(i % 100, 100, keys)


def test_each_sequence_once_per_epoch(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a", [30, 1, 0, 70, 5])  # 106 tokens: (106 - 1) // 4 = 26 sequences
    dataset = opened(path)
    assert dataset.sequences("training") == 26 and dataset.tokens("training") == 106
    epochs = [
        [int(dataset.read("training", 26 * e + i).tokens[0]) for i in range(26)] for e in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 104, 4))
    assert (
        len({tuple(epoch) for epoch in epochs}) == 4
    )  # two equal ones of 26! orders do not happen
    again = [int(opened(path).read("training", i).tokens[0]) for i in reversed(range(26))]
    assert again[::-1] == epochs[0]  # of the index alone, not of what was read before
    other = [int(opened(path, seed=1).read("training", i).tokens[0]) for i in range(26)]
    assert other != epochs[0]


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4),
    length=st.integers(1, 12),
)
def test_windows_are_the_concatenated_documents(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], length: int
) -> None:
    folder = tmp_path_factory.mktemp("windows")
    everything: list[int] = []
    shards, begins = [], []
    for number, lengths in enumerate(files):
        numbered(folder / f"s{number}", lengths, 1000 * number)
        shards.append((f"s{number}", sum(lengths), sum(lengths)))
        for document, size in enumerate(lengths):
            begins += [(len(everything), number, document)] if size else []
            first = 1000 * number + sum(lengths[:document])
            everything += range(first, first + size)
    path = write_metadata(folder / "d.json", shards)
    if len(everything) < length + 1:
        with pytest.raises(DataError, match=r"fewer than one sequence|holds no tokens"):
            opened(path, length)
        return
    source = opened(path, length).splits["training"].sources[0]
    assert source.sequences == (len(everything) - 1) // length
    for number in range(source.sequences):
        first = number * length
        packed = source.read(number)
        assert (
            packed.tokens.tolist() == everything[first : first + length + 1]
        )  # overlaps the next by one token
        inside = {begin - first for begin, _, _ in begins if first <= begin <= first + length}
        assert packed.starts.tolist() == sorted({0} | inside)
        found: list[int] = []
        for span in source.locate(number):
            shard = int(span.prefix[-1])
            at = 1000 * shard + sum(files[shard][: span.document]) + span.begin
            found += range(at, at + span.tokens)
        assert found == packed.tokens.tolist()


@pytest.mark.parametrize(
    "split", [(969, 30, 1), (0.9, 0.05, 0.05), (1, 1, 1), (0.5, 0, 0.5), (0.7, 0.3)]
)
@pytest.mark.parametrize("count", [1, 7, 100, 1001])
def test_split_by_documents(tmp_path: Path, split: list[float], count: int) -> None:
    path = numbered(tmp_path / "a", [3] * count)
    shares = [*split, 0][:3]
    edges = [0] + [round(sum(shares[: i + 1]) / sum(shares) * count) for i in range(3)]
    sizes = np.diff(edges) * 3
    if sizes[0] < 2:
        with pytest.raises(DataError, match="fewer than one sequence"):
            opened(path, 1, split=split)
        return
    dataset = opened(path, 1, split=split)
    for position, phase in enumerate(("training", "validation", "test")):
        assert dataset.tokens(phase) == sizes[position]
        seen = set()
        for i in range(dataset.sequences(phase)):
            seen |= set(dataset.read(phase, i).tokens.tolist())
        assert seen == set(
            range(3 * edges[position], 3 * edges[position + 1])
        )  # from front to back


def test_each_shard_is_split(tmp_path: Path) -> None:
    shards = [(f"s{n}", 300, 300) for n in range(3)]
    for n in range(3):
        numbered(tmp_path / f"s{n}", [3] * 100, 1000 * n)
    dataset = opened(write_metadata(tmp_path / "d.json", shards), 1, split=(0.9, 0.1, 0))
    seen = {
        int(t)
        for i in range(dataset.sequences("validation"))
        for t in dataset.read("validation", i).tokens
    }
    assert seen == {1000 * n + t for n in range(3) for t in range(270, 300)}


def found(dataset: Dataset, indices: Iterable[int]) -> list[tuple[str, int, int]]:
    return [
        (source.name, epoch, number)
        for source, number, epoch in (dataset.splits["training"].find(index) for index in indices)
    ]


@pytest.mark.parametrize(
    "weights", [[0.9, 0.1], [3, 1, 1], [0.5, 0.25, 0.125, 0.125], [1, 1, 1], [1, 0.05, 2, 3, 5]]
)
def test_blends_get_exact_shares(tmp_path: Path, weights: list[float]) -> None:
    names = [
        numbered(tmp_path / f"s{number}", [401 + 100 * number]) for number in range(len(weights))
    ]
    dataset = opened([one for pair in zip(weights, names, strict=True) for one in pair])
    sizes = {name: (401 + 100 * number - 1) // 4 for number, name in enumerate(names)}
    drawn = found(dataset, range(4096))
    # Half a sequence each time the sources are halved, on the way to one of them.
    allowed = 0.5 * math.ceil(math.log2(len(weights))) + 1e-6
    so_far: Counter[str] = Counter()
    for count, (name, _, _) in enumerate(drawn, 1):
        so_far[name] += 1
        for other, weight in zip(names, weights, strict=True):
            assert abs(so_far[other] - weight / sum(weights) * count) <= allowed
        if count % 500 == 0:
            assert dataset.splits["training"].counts(count) == [so_far[name] for name in names]
            found_epochs = {
                source.name: epochs for source, epochs in dataset.epochs("training", count)
            }
            assert found_epochs == {name: so_far[name] / sizes[name] for name in names}
    # Each sequence of a source at most once an epoch, and all of them in the epochs before the
    # last.
    for name, size in sizes.items():
        epochs: dict[int, list[int]] = {}
        for source, epoch, number in drawn:
            if source == name:
                epochs.setdefault(epoch, []).append(number)
        assert sorted(epochs) == list(range(max(epochs) + 1))
        for epoch, numbers in epochs.items():
            assert len(set(numbers)) == len(numbers)
            assert epoch == max(epochs) or sorted(numbers) == list(range(size))
        if max(epochs) >= 1:
            assert epochs[0] != epochs[1][: len(epochs[0])]
    assert found(dataset, [5, 4000, 17]) == [drawn[i] for i in (5, 4000, 17)]  # of the index alone
    before_repeats = next(i for i, (_, epoch, _) in enumerate(drawn) if epoch)
    assert dataset.sequences("training") == before_repeats


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=9), st.integers(0, 2**40))
def test_shares_far_into_a_run(weights: list[float], index: int) -> None:
    counts = Split("training", [RandomSource(4, 9, 0)] * len(weights), weights, 0).counts(index)
    assert sum(counts) == index
    for weight, count in zip(weights, counts, strict=True):
        # Besides the half sequences, weights are rounded to 2^-53 of all: 2^40 of those are below
        # 0.001.
        assert (
            abs(count - index * weight / sum(weights))
            <= 0.5 * math.ceil(math.log2(len(weights))) + 0.002
        )


def test_weights_inside_a_dataset_json(tmp_path: Path) -> None:
    """Files of which one is weighted above its tokens are a blend of their own."""
    for name in "abc":
        numbered(tmp_path / name, [401], 1000 * ord(name))
    dataset = opened(
        write_metadata(tmp_path / "d.json", [("a", 401, 0.25), ("b", 401, 0.25), ("c", 401, 0.5)])
    )
    assert len(dataset.splits["training"].sources) == 2
    drawn = Counter(int(dataset.read("training", i).tokens[0]) // 1000 for i in range(800))
    assert (
        drawn[ord("c")] == 400
        and 0 < drawn[ord("a")] < 400
        and drawn[ord("a")] + drawn[ord("b")] == 400
    )


def test_fingerprint_tells_of_what_may_not_change(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a", [50, 50]), numbered(tmp_path / "b", [50, 50])
    numbered(tmp_path / "c", [49, 51])
    path = [0.5, a, 0.5, b]
    same = opened(path).fingerprint()
    assert opened(path).fingerprint() == same
    for other in (
        opened(path, length=5),
        opened(path, seed=1),
        opened([0.6, a, 0.4, b]),
        opened(path, split=(0.5, 0.5, 0)),
        opened([0.5, a, 0.5, str(tmp_path / "c")]),
    ):
        assert other.fingerprint() != same


def test_validation_sets(tmp_path: Path) -> None:
    dataset = opened(
        numbered(tmp_path / "a", [50]),
        validation_sets={"old": numbered(tmp_path / "b", [40], 1000)},
        split=(1, 0, 0),
    )
    assert dataset.validation_sets == ["old"]
    assert sorted(int(dataset.read("old", i).tokens[0]) for i in range(9)) == list(
        range(1000, 1036, 4)
    )


def test_random() -> None:
    config = DataConfig(format="random", split=[1, 1, 0])
    one, two = (open_dataset(config, 8, 3, 50) for _ in range(2))
    first = one.read("training", 12).tokens
    assert (
        first.tolist()
        == two.read("training", 12).tokens.tolist()
        != two.read("validation", 12).tokens.tolist()
    )
    assert first.min() >= 0 and first.max() < 50 and "test" not in one.splits


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a dataset.json"),
        ("[]", "no list `datasets`"),
        ('{"datasets": []}', "no list `datasets`"),
        ('{"datasets": [{"prefix": 3}]}', "objects with a prefix"),
        ('{"datasets": [{"prefix": "a", "weight": -1}]}', "weight of a: given -1"),
        ('{"datasets": [{"prefix": "a", "num_tokens": "many"}]}', "num_tokens of a: given many"),
        ('{"datasets": [{"prefix": "../a"}]}', "must name files inside"),
        ('{"datasets": [{"prefix": "/a"}]}', "must name files inside"),
        ('{"datasets": [{"prefix": "a", "num_tokens": 51}]}', "num_tokens is 50, but"),
        ('{"datasets": [{"prefix": "a", "weight": NaN}]}', "weight of a: given nan"),
        (
            '{"datasets": [{"prefix": "a", "weight": Infinity}, {"prefix": "b", "weight": 1}]}',
            "weight of a: given inf",
        ),
        ('{"datasets": [{"prefix": "a", "weight": 0}, {"prefix": "b", "weight": 0}]}', "weight"),
        ('{"datasets": [{"prefix": "a", "weight": 1' + "0" * 400 + "}]}", "weight"),
        ('{"datasets": [{"prefix": "a\\u0000"}]}', "must name files inside"),
        ('{"datasets": [{"prefix": ""}]}', "must name files inside"),
        ('{"datasets": [{"prefix": "a", "sha256": 3}]}', "sha256"),
        ('{"datasets": [{"prefix": "a"}, {"prefix": "a"}]}', "twice"),
        ('{"datasets": [{"prefix": "a"}], "tokenizer": null}', "`tokenizer` must be"),
        ('{"datasets": [{"prefix": "a", "num_documents": 2}]}', "num_documents is 1, but"),
        ('{"datasets": [{"prefix": "a", "dtype": "int64"}]}', "dtype is int32, but"),
        ('{"datasets": [{"prefix": "gone"}]}', "no such file"),
        (
            '{"datasets": [{"prefix": "a"}], "sha256": "0"}',
            "its sha256 does not match its content: it is damaged, or was edited",
        ),
        ("[" * 100_000, "not a dataset.json"),
        ("\xff\xfe", "not a dataset.json"),
    ],
)
def test_damaged_metadata(tmp_path: Path, content: str, words: str) -> None:
    numbered(tmp_path / "a", [50])
    numbered(tmp_path / "b", [51])
    (tmp_path / "d.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError) as error:
        opened(str(tmp_path / "d.json"))
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_missing(tmp_path: Path) -> None:
    for name in ("x.json", "x"):
        with pytest.raises(DataError, match="no such file"):
            opened(str(tmp_path / name))


def test_too_little_names_what_to_do(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a", [10] * 10)
    with pytest.raises(DataError, match=r"lower batch\.sequence_length, prepare more data"):
        opened(path, 100)
    with pytest.raises(DataError, match=r"validation_sets\.old"):
        opened(path, 4, validation_sets={"old": numbered(tmp_path / "b", [3])})
    dataset = opened(path, 4, split=(0.8, 0.2, 0))  # 20 tokens: 4 sequences
    dataset.require_sequences("validation", 2, 2, "training.validation.iterations", [0.8, 0.2, 0])
    with pytest.raises(
        DataError,
        match=r"3 batches × 2 sequences = 6 .* leaves 4; lower training\.validation\.iterations to"
        r" 2, or give",
    ):
        dataset.require_sequences(
            "validation", 3, 2, "training.validation.iterations", [0.8, 0.2, 0]
        )
    with pytest.raises(
        DataError,
        match=r"lower training.validation.iterations \(one batch already needs 5 sequences\), and"
        r" give",
    ):
        dataset.require_sequences(
            "validation", 3, 5, "training.validation.iterations", [0.8, 0.2, 0]
        )


def test_tokenizer_and_vocabulary_must_fit(tmp_path: Path) -> None:
    numbered(tmp_path / "a", [50])
    llama = load(str(synthetic.llama(tmp_path / "llama")))
    gpt2 = load(str(synthetic.gpt2(tmp_path / "gpt2")))
    entries = [{"prefix": "a", "num_tokens": 50, "weight": 1.0}]
    made_with = {"fingerprint": llama.fingerprint([], [])}
    content = {"datasets": entries, "tokenizer": made_with, "max_token_id": 49}
    (tmp_path / "d.json").write_text(json.dumps(content))
    dataset = opened(str(tmp_path / "d.json"))
    dataset.check_vocabulary(50, llama)
    dataset.check_vocabulary(50, None)
    with pytest.raises(DataError, match="made with another tokenizer"):
        dataset.check_vocabulary(50, gpt2)
    with pytest.raises(DataError, match="holds token 49, but the model's vocab_size is 49"):
        dataset.check_vocabulary(49, llama)
    # A further validation set, whose losses would be nonsense.
    numbered(tmp_path / "b", [90])
    dataset = opened(str(tmp_path / "b"), validation_sets={"old": str(tmp_path / "d.json")})
    dataset.check_vocabulary(50, llama)
    with pytest.raises(DataError, match=r"d\.json: made with another tokenizer"):
        dataset.check_vocabulary(50, gpt2)


def test_verify(tmp_path: Path) -> None:
    info = write(tmp_path / "a", [[1, 2, 3]])
    entry = {
        "prefix": "a",
        "num_tokens": 3,
        "dtype": "int32",
        "sha256": {"bin": info.sha256_bin, "idx": info.sha256_idx},
    }
    (tmp_path / "d.json").write_text(json.dumps({"datasets": [entry]}))
    assert verify(tmp_path / "d.json") == 12 + 34 + 12 + 16
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, 4], "<i4").tobytes())
    with pytest.raises(DataError, match=r"a\.bin: its content is not what was prepared"):
        verify(tmp_path / "d.json")
    data = opened(str(tmp_path / "d.json"), length=2)
    with pytest.raises(DataError, match=r"a\.bin: its content is not what was prepared"):
        data.check_digests(12)
    data.check_digests(11)  # too large to be read at each start
    numbered(tmp_path / "b", [90])
    data = opened(str(tmp_path / "b"), 2, validation_sets={"old": str(tmp_path / "d.json")})
    with pytest.raises(DataError, match=r"a\.bin: its content is not what was prepared"):
        data.check_digests()


def test_a_validation_set_that_is_trained_on(tmp_path: Path) -> None:
    """Only its validation documents are used, however its path is spelled; all of other sets."""
    numbered(tmp_path / "a", [5] * 100)
    numbered(tmp_path / "b", [5] * 40, 1000)
    (tmp_path / "copies").mkdir()
    for name in ("a.bin", "a.idx"):
        (tmp_path / "copies" / name).write_bytes((tmp_path / name).read_bytes())
    both = write_metadata(tmp_path / "both.json", [("a", 500, 500), ("b", 200, 200)])
    sets = {
        "same": str(tmp_path / "a"),
        "copy": str(tmp_path / "copies" / ".." / "copies" / "a"),
        "other": str(tmp_path / "b"),
        "both": both,
    }
    dataset = opened(str(tmp_path / "a"), split=(0.8, 0.1, 0.1), validation_sets=sets)
    held_out = list(range(400, 450))
    assert dataset.tokens("validation") == 50
    for name, content in (
        ("same", held_out),
        ("copy", held_out),
        ("other", list(range(1000, 1200))),
        ("both", [*held_out, *range(1000, 1200)]),
    ):
        seen = {
            int(t) for i in range(dataset.sequences(name)) for t in dataset.read(name, i).tokens
        }
        assert seen == set(content[: dataset.sequences(name) * 4 + 1]), name
    with pytest.raises(
        DataError,
        match=r"data\.validation_sets\.same: .*a is trained on \(data\.path\).* data\.split \[1,"
        r" 0, 0\] leaves that"
        r" 0 documents.*give validation a larger share \(data\.split=\[99,1,0\]\), or leave the"
        r" set out",
    ):
        opened(str(tmp_path / "a"), validation_sets={"same": sets["copy"]})


def hashed(path: Path, shards: Sequence[tuple[str, float]], version: object = "hash-1") -> str:
    """A dataset.json whose documents are split by hash."""
    entries = [{"prefix": prefix, "weight": weight} for prefix, weight in shards]
    path.write_text(json.dumps({"datasets": entries, "split": version}))
    return str(path)


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 5), max_size=60), min_size=1, max_size=4),
    split=st.sampled_from([(8, 1, 1), (0.9, 0.1), (1, 0, 1), (1,), (1, 1, 1)]),
)
def test_split_by_hash_is_the_documented_one(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], split: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("hash")
    documents, numbers = [], [n for n, lengths in enumerate(files) if sum(lengths)]
    for n in range(len(files)):
        numbered(folder / f"s{n}", files[n], 1000 * n)
        ends = np.cumsum([0, *files[n]])
        documents += [list(range(1000 * n + a, 1000 * n + b)) for a, b in pairwise(ends)]
    if not numbers:
        return
    owner = [n for n, lengths in enumerate(files) for _ in lengths]
    path = hashed(folder / "d.json", [(f"s{n}", sum(lengths)) for n, lengths in enumerate(files)])

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    ranked = sorted(range(len(documents)), key=lambda d: mix((d + 0x9E3779B97F4A7C15) % 2**64))
    shares = np.cumsum([*split, 0, 0][:3]) / sum(split)
    edges = [0, *(round(float(share) * len(documents)) for share in shares)]
    expected = [sorted(ranked[a:b]) for a, b in pairwise(edges)]
    try:
        dataset = opened(path, 1, split=split)
    except DataError:
        assert sum(len(documents[d]) for d in expected[0]) < 2
        return
    for phase, mine in zip(("training", "validation", "test"), expected, strict=True):
        tokens = [t for d in mine for t in documents[d]]
        if len(tokens) < 2:
            assert phase not in dataset.splits
            continue
        counted = [
            d for d in mine if sum(files[owner[d]])
        ]  # token files without tokens have no weight
        assert dataset.documents(phase) == len(counted) and dataset.tokens(phase) == len(tokens)
        source = dataset.splits[phase].sources[0]
        assert [source.read(k).tokens[0] for k in range(source.sequences)] == tokens[:-1]
        assert [source.read(k).targets[0] for k in range(source.sequences)] == tokens[1:]


def test_split_by_hash_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are looked at a block at a time; nothing depends on how many that is."""
    numbered(tmp_path / "a", [3] * 500)
    numbered(tmp_path / "b", [2] * 333, 5000)
    path = hashed(tmp_path / "d.json", [("a", 1500), ("b", 666)])

    def drawn() -> dict[str, Any]:
        dataset = opened(path, 1, split=(6, 3, 1))
        return {
            phase: [
                int(dataset.splits[phase].sources[0].read(k).tokens[0])
                for k in range(dataset.sequences(phase))
            ]
            for phase in dataset.splits
        }

    once = drawn()
    assert sum(map(len, once.values())) == 1500 + 666 - 3
    for size in (1, 7, 64):
        monkeypatch.setattr("fast_llm.data.split._BLOCK", size)
        assert drawn() == once


def test_an_unknown_split(tmp_path: Path) -> None:
    numbered(tmp_path / "a", [50] * 3)
    for version in ("hash-9", 3):
        path = hashed(tmp_path / "d.json", [("a", 1)], version)
        with pytest.raises(
            DataError, match=r"its `split` is .*which this version does not know \(hash-1\)"
        ):
            opened(path)


def test_a_share_without_a_document(tmp_path: Path) -> None:
    numbered(tmp_path / "a", [50] * 3)
    dataset = opened(hashed(tmp_path / "d.json", [("a", 1)]), split=(0.9, 0.1, 0))
    with pytest.raises(
        DataError,
        match=r"leaves 0, because its share contains no document; give validation a larger share,"
        r" or prepare more",
    ):
        dataset.require_sequences(
            "validation", 1, 2, "training.validation.iterations", [0.9, 0.1, 0]
        )
