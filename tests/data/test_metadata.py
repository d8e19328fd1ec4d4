"""Opening datasets: dataset.json, system limits, moved folders, and messages for mistakes."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.metadata import verify
from fast_llm.data.sampling import keys as _keys
from fast_llm.data.sampling import permute
from fast_llm.data.tokenfile import TokenFile, TokenFileWriter
from fast_llm.data.tokenizer import load
from fast_llm.errors import DataError
from tests.data import synthetic

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000000\n"


def write_dataset(
    folder: Path, shards: int = 2, documents: int = 10, weights: list[float] | None = None
) -> Path:
    """A dataset.json of ours: token t of shard s is 1000·s + t, documents have ten tokens."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number in range(shards):
        writer = TokenFileWriter(folder / f"s{number}", np.dtype("int32"))
        writer.append_many(1000 * number + np.arange(10 * documents), np.full(documents, 10))
        info = writer.close()
        entries.append(
            {
                "prefix": f"s{number}",
                "num_tokens": info.tokens,
                "num_documents": info.documents,
                "dtype": "int32",
            }
            | {"weight": weights[number] if weights else 1 / shards}
            | {"sha256": {"bin": info.sha256_bin, "idx": info.sha256_idx}}
        )
    (folder / "dataset.json").write_text(json.dumps({"datasets": entries}))
    return folder / "dataset.json"


def opened(
    path: Any,
    length: int = 4,
    seed: int = 0,
    form: Any = "file",
    split: Sequence[float] = (1, 0, 0),
    **further: Any,
) -> Dataset:
    path = path if isinstance(path, list) else str(path)
    return open_dataset(
        DataConfig(format=form, path=path, split=list(split), **further), length, seed, 2**31
    )


def order(dataset: Dataset, count: int = 40) -> list[int]:
    return [int(dataset.read("training", index).tokens[0]) for index in range(count)]


@pytest.mark.parametrize("name", ["s0.bin", "s1.idx", "dataset.json"])
def test_pointer_instead_of_a_file(tmp_path: Path, name: str) -> None:
    path = write_dataset(tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(POINTER)
    with pytest.raises(
        DataError,
        match=rf"{name}: a Git LFS pointer, not the file itself; fetch it with",
    ):
        opened(path)


def test_metadata_of_version_0_2(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d")
    # One line of prefix, num_documents, num_tokens and weight, next to the token files.
    entries = [
        {"prefix": f"s{n}", "num_documents": 10, "num_tokens": 100, "weight": 0.5} for n in range(2)
    ]
    path = tmp_path / "d" / "fast_llm_dataset.json"
    path.write_text(json.dumps({"datasets": entries}))
    dataset = opened(path)
    assert dataset.tokens("training") == 200 and dataset.documents("training") == 20
    assert dataset.sequences("training") == 49  # one source: the sequence over the border counts
    # It says nothing of tokenizer and tokens; the loader will look.
    dataset.check_vocabulary(10, load(str(synthetic.llama(tmp_path / "model"))))


def test_format_file_takes_any_name(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d")
    path.rename(tmp_path / "d" / "metadata")
    assert opened(tmp_path / "d" / "metadata").tokens("training") == 200


def test_paths_that_are_nearly_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dataset(tmp_path / "d")
    with pytest.raises(DataError, match=r"s0\.idx, must be without \.idx: .*/s0$"):
        opened(tmp_path / "d" / "s0.idx", form="list")
    with pytest.raises(DataError, match=r"/d: a folder; give the dataset\.json in it"):
        opened(tmp_path / "d")
    (tmp_path / "py").mkdir()
    with pytest.raises(
        DataError, match=r"/py: a folder; give the dataset.json that `fast-llm prepare` wrote, not"
    ):
        opened(tmp_path / "py", form="list")
    (tmp_path / "py.json").write_bytes(path.read_bytes())
    with pytest.raises(
        DataError, match=r"/py: a folder; give the dataset.json next to it, .*/py.json$"
    ):
        opened(tmp_path / "py")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened("~/d/dataset.json").fingerprint() == opened(path).fingerprint()
    assert opened("~/d/s0", form="list").tokens("training") == 100


def test_a_prefix_that_no_file_can_have(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d")
    path.write_text(json.dumps({"datasets": [{"prefix": "s0\ud800"}]}))
    with pytest.raises(DataError, match="must name files inside"):
        opened(path)


def test_more_files_than_the_shell_allows(tmp_path: Path) -> None:
    """40 pairs with a limit of 64 files: the limit is raised; if it cannot be, it is named."""
    write_dataset(tmp_path / "d", shards=40, documents=1)
    program = (
        "import resource, sys; from fast_llm.config.train import DataConfig;"
        "from fast_llm.data.dataset import open_dataset; from fast_llm.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))\n"
        "try: print(open_dataset(DataConfig(format='file', path=sys.argv[1], split=[1]), 4, 0,"
        " 9).tokens('training'))\n"
        "except DataError as error: print(error)"
    )

    def run(hard: int) -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "d" / "dataset.json"), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(256) == "400\n"
    assert "Too many open files; raise the limit with `ulimit -n`" in run(64)


def test_files_are_closed(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d")
    before = len(os.listdir("/proc/self/fd"))
    dataset = opened(path)
    assert len(os.listdir("/proc/self/fd")) > before
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_moved_data_keeps_its_order(tmp_path: Path) -> None:
    """Neither the order nor the fingerprint depends on where files lie or what they are called."""
    path = write_dataset(tmp_path / "d")
    shutil.copytree(tmp_path / "d", tmp_path / "elsewhere")
    one, two = opened(path), opened(tmp_path / "elsewhere" / "dataset.json")
    assert order(one) == order(two) and one.fingerprint() == two.fingerprint()
    mixed = [0.5, str(tmp_path / "d" / "s0"), 0.5, str(tmp_path / "d" / "s1")]
    moved = [
        part.replace("/d/", "/elsewhere/") if isinstance(part, str) else part for part in mixed
    ]
    assert order(opened(mixed, form="list")) == order(opened(moved, form="list"))
    swapped = [0.5, mixed[3], 0.5, mixed[1]]
    assert opened(swapped, form="list").fingerprint() != opened(mixed, form="list").fingerprint()


def test_replaced_tokens_change_the_fingerprint(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d")
    before = opened(path).fingerprint()
    tokens = np.fromfile(tmp_path / "d" / "s1.bin", "<i4")
    tokens[50] += 1
    tokens.tofile(tmp_path / "d" / "s1.bin")  # the same size under the same name
    assert opened(path).fingerprint() != before


def test_verify_names_all_that_is_wrong(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d", shards=3)
    sizes = sum(file.stat().st_size for file in (tmp_path / "d").glob("s*"))
    assert verify(path) == sizes
    flipped = bytearray((tmp_path / "d" / "s0.bin").read_bytes())
    flipped[7] ^= 1
    (tmp_path / "d" / "s0.bin").write_bytes(flipped)
    (tmp_path / "d" / "s2.idx").unlink()
    with pytest.raises(DataError) as error:
        verify(path)
    first, second = str(error.value).splitlines()
    assert (
        "s0.bin: its content is not what was prepared" in first and "s2.idx: no such file" in second
    )


def test_weights_of_zero_leave_out(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d", weights=[1, 0])
    assert max(order(opened(path))) < 1000


def test_a_source_without_validation_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of five sources weighted by hand, only the long one has a document for validation."""
    path = write_dataset(tmp_path / "d", shards=5, weights=[1, 2, 3, 4, 5])
    writer = TokenFileWriter(tmp_path / "d" / "s4", np.dtype("int32"))
    writer.append_many(np.arange(1000), np.full(100, 10))
    writer.close()
    content = json.loads(path.read_text())
    content["datasets"][4] = {"prefix": "s4", "weight": 5}
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "fast_llm"):
        dataset = opened(path, split=(99, 1, 0))
    assert dataset.tokens("validation") == 10
    (record,) = caplog.records
    assert (
        "validation less than one sequence of" in record.message
        and "(s2) and 1 more" in record.message
    )


def test_too_little_for_a_validation_set(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d")
    write_dataset(tmp_path / "other")
    other = tmp_path / "other" / "s1"  # of the sizes of one that is trained on, but not its content
    dataset = opened([str(tmp_path / "d" / "s0")], form="list", validation_sets={"old": str(other)})
    with pytest.raises(
        DataError,
        match=r"validation_sets\.old: needs one batch of 25 sequences of 4 tokens, but it has 24",
    ):
        dataset.require_sequences("old", 1, 25, "batch.batch_size", [1, 0, 0])
    dataset.require_sequences("old", 1, 24, "batch.batch_size", [1, 0, 0])
    with pytest.raises(
        DataError,
        match=r"data\.split: test needs .* but \[1, 0, 0\] of the documents leaves 0, because its"
        r" share contains no document;"
        r" lower training\.test_iters \(one .*\), and give test",
    ):
        dataset.require_sequences("test", 2, 8, "training.test_iters", [1, 0, 0])


def test_random_data_with_a_validation_set(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d")
    dataset = opened([], form="random", validation_sets={"old": str(tmp_path / "d" / "s0")})
    assert dataset.validation_sets == ["old"] and dataset.read("old", 0).tokens.max() < 100


def test_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fast_llm.data.tokenfile.LONGEST", 9)
    writer = TokenFileWriter(tmp_path / "x", np.dtype("int32"))
    with pytest.raises(DataError, match=r"x: document 1 has 10 tokens; .* up to 9: split it"):
        writer.append_many(np.arange(13), np.array([3, 10]))
    writer.abandon()


def test_sources_have_orders_of_their_own(tmp_path: Path) -> None:
    """Two sources of one size must not go through their sequences in step."""
    path = write_dataset(tmp_path / "d", weights=[1, 2])
    drawn = order(opened(path, seed=3), 72)  # 24 sequences of each at least once
    first, second = (
        [token % 1000 for token in drawn if token // 1000 == source][:24] for source in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(0, 96, 4)) and first != second


def test_a_crash_between_the_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new files of a pair of equal sizes are never read together."""

    def write(tokens: list[int], lengths: list[int]) -> None:
        writer = TokenFileWriter(tmp_path / "x", np.dtype("int32"))
        writer.append_many(np.array(tokens), np.array(lengths))
        writer.close()

    write([1, 2, 3], [1, 2])
    renamed: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        os.replace(source, target)
        renamed.append(target)

    monkeypatch.setattr("pathlib.Path.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write([4, 5, 6], [2, 1])
    assert renamed
    with pytest.raises(DataError, match=r"x\.idx: no such file"):
        TokenFile(tmp_path / "x")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_orders_are_alike(count: int) -> None:
    """All count! orders are equally frequent: chi-squared test at 0.1 %."""
    seen = Counter(
        tuple(permute(i, count, _keys(seed, 0, 0)) for i in range(count)) for seed in range(12_000)
    )
    orders = list(permutations(range(count)))
    expected = 12_000 / len(orders)
    chi = sum((seen[one] - expected) ** 2 / expected for one in orders)
    assert chi < {2: 10.8, 3: 20.5, 4: 49.7}[count]  # 1, 5 and 23 degrees of freedom


def test_places_are_uniform() -> None:
    """The place of one index of 1,000 in 20,000 epochs, in 20 bins: chi-squared, 19 degrees."""
    for index in (0, 1, 999):
        places = np.array([permute(index, 1000, _keys(3, 0, epoch)) for epoch in range(20_000)])
        counts = np.bincount(places // 50, minlength=20)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # the 0.1 % quantile
