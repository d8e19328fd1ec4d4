"""Files of datatrove's DocumentTokenizer: the same data as a .bin/.idx pair, and damaged."""

import json
import shutil
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_llm.cli import main
from fast_llm.data.datatrove import DatatroveFile
from fast_llm.data.entries import open_path
from fast_llm.data.metadata import verify
from fast_llm.data.tokenizer import load
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.test_dataset import opened
from tests.data.test_tokenfile import write

# Written by DocumentTokenizer of datatrove 0.10.0, shuffled, with eos_token and
# save_loss_metadata, from "a b c", "d", "", "e d c b a", "b b" and a tokenizer with
# <eos>, a, b, c, d, e.
DS = bytes.fromhex("02000200 00000100 02000300 00000400 00000000 05000400 03000200 01000000")
INDEX = bytes.fromhex(
    "0300000000000000 0700000000000000 0900000000000000 0a00000000000000 1000000000000000"
)
DOCUMENTS = [[2, 2, 0], [1, 2, 3, 0], [4, 0], [0], [5, 4, 3, 2, 1, 0]]
METADATA = "tok.json|2\n16\n16.0 T"


def write_ds(path: Path, documents: Sequence[Sequence[int]], size: int = 2) -> Path:
    """A .ds file by the description of its format."""
    tokens = [token for document in documents for token in document]
    path.write_bytes(np.array(tokens, f"<u{size}").tobytes())
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64).tolist()
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return path


def read(path: Path) -> list[list[int]]:
    file = DatatroveFile(path)
    edges = [file.start_of(number) for number in range(file.documents + 1)]
    assert file.starts_of(0, file.documents).tolist() == edges[:-1]
    assert file.lengths_of(0, file.documents).tolist() == [b - a for a, b in pairwise(edges)]
    return [file.tokens_at(begin, end).tolist() for begin, end in pairwise(edges)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "00000_00000_doc_shuffled.ds"
    path.write_bytes(DS)
    path.with_name(path.name + ".index").write_bytes(INDEX)
    path.with_name(path.name + ".loss").write_bytes(b"\1" * 16)
    path.with_name(path.name + ".metadata").write_text(METADATA)
    return path


def test_a_file_of_datatrove(written: Path) -> None:
    assert read(written) == DOCUMENTS
    file = DatatroveFile(written)
    assert file.dtype == np.uint16 and file.documents == 5 and file.tokens == 16
    owners = [number for number, document in enumerate(DOCUMENTS) for _ in document]
    for first in range(5):
        known = [owner for owner in owners if owner >= first]
        at = range(16 - len(known), 16)
        assert [file.document_at(token, first) for token in at] == known
    assert file.starts_of(1, 4).tolist() == [3, 7, 9]
    assert file.lengths_of(3, 2**20).tolist() == [1, 6]


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=8),
    size=st.sampled_from([2, 4]),
)
def test_both_sizes_and_empty_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], size: int
) -> None:
    path = write_ds(tmp_path_factory.mktemp("ds") / "x.ds", documents, size)
    assert read(path) == documents
    file = DatatroveFile(path)
    assert not file.tokens or file.dtype.itemsize == size
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert [file.document_at(token) for token in range(file.tokens)] == owners


def test_large_tokens_stay_positive(tmp_path: Path) -> None:
    assert read(write_ds(tmp_path / "x.ds", [[2**32 - 1, 7]], 4)) == [[2**32 - 1, 7]]


@pytest.mark.parametrize("listed", [False, True])
def test_the_same_sequences_and_splits_as_from_a_pair(tmp_path: Path, listed: bool) -> None:
    random = np.random.default_rng(0)
    documents = [
        random.integers(100, size=length).tolist() for length in random.integers(9, size=300)
    ]
    pair, ds = str(tmp_path / "pair"), str(write_ds(tmp_path / "x.ds", documents))
    write(tmp_path / "pair", documents)
    if listed:
        for name in ("pair", "x.ds"):
            content = {"split": "hash-1", "datasets": [{"prefix": name}]}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        pair, ds = pair + ".json", ds + ".json"
        assert verify(Path(ds)) == 0
    first, second = (opened([path], 16, split=[8, 1, 1]) for path in (pair, ds))
    for split in ("training", "validation", "test"):
        assert first.documents(split) == second.documents(split) > 0
        assert first.sequences(split) == second.sequences(split) > 0
        for index in range(2 * first.sequences(split)):
            one, other = first.read(split, index), second.read(split, index)
            assert np.array_equal(one.tokens, other.tokens)
            assert np.array_equal(one.starts, other.starts)
            spans = [
                (span.document, span.begin, span.tokens) for span in first.locate(split, index)
            ]
            found = second.locate(split, index)
            assert [(span.document, span.begin, span.tokens) for span in found] == spans


def test_the_named_tokenizer_is_the_models(
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By its path, next to the data, or in the cache of the Hub; a name alone only warns."""
    llama = load(str(synthetic.llama(tmp_path / "llama")))
    gpt2 = load(str(synthetic.gpt2(tmp_path / "gpt2")))
    metadata = written.with_name(written.name + ".metadata")
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--llama" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "llama", snapshot)
    (cache / "models--some--llama" / "refs").mkdir()
    (cache / "models--some--llama" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for name in (str(tmp_path / "llama"), "llama/tokenizer.json", "some/llama"):
        metadata.write_text(f"{name}|2\n16\n16.0 T")
        opened([str(written)], 4).check_vocabulary(6, llama)
        opened([str(written)], 4).check_vocabulary(6, None)
        with pytest.raises(DataError) as caught:
            opened([str(written)], 4).check_vocabulary(6, gpt2)
        assert str(caught.value) == (
            f"{written}: made with another tokenizer than the model's: its .metadata file names"
            f" {name}, which gives text other ids than {gpt2.path}; tokenize again with the"
            " model's tokenizer"
        )
    # The model itself, from the cache, is not read again.
    opened([str(written)], 4).check_vocabulary(6, load(str(snapshot)))
    assert not caplog.messages
    for name, warns in (("other/model", True), ("gone.json", True), ("Unknown Tokenizer", False)):
        caplog.clear()
        metadata.write_text(f"{name}|2\n16\n16.0 T")
        opened([str(written)], 4).check_vocabulary(6, llama)
        assert caplog.messages == warns * [
            f"{written}: its tokens are of the tokenizer {name}, which is not on this machine and"
            " is not compared with the model's."
        ]


def test_inspect(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["tokens"], found["lengths"]["longest"]) == (5, 16, 6)
    assert main(["inspect", str(written), "--json", "--document", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shown_documents"][0]["ids"] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".index", None, r"x\.ds\.index: no such file; .* tokenize again with `save_index=True`$"),
        ("", None, r"x\.ds: no such file"),
        (".index", INDEX[:-1], r"x\.ds\.index: 39 bytes, must be 8 for each document"),
        (".index", INDEX[:-8], r"x\.ds: 32 bytes, but its index lists 10 tokens, which need 20"),
        (".index", b"", r"x\.ds: 32 bytes, but its index lists 0 tokens"),
        ("", DS[:-2], r"x\.ds: 30 bytes, but its index lists 16 tokens, which need 32 .* or 64"),
        ("", DS + DS, r"x\.ds: tokens of 4 bytes by .*, but x\.ds\.metadata says 2"),
        (".index", INDEX[8:16] + INDEX[:8] + INDEX[16:], r"index: document 1 ends at token 3, bef"),
        (".loss", b"\1" * 15, r"x\.ds\.loss: 15 bytes, must be one for each of the 16 tokens"),
        (
            ".loss",
            b"\1" * 8 + b"\0" + b"\1" * 7,
            r"x\.ds\.loss: takes token 8 \(document 2\) .* Delete x\.ds\.loss to train on all",
        ),
    ],
)
def test_mistakes(tmp_path: Path, suffix: str, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.ds"
    files = {"": DS, ".index": INDEX, ".metadata": METADATA.encode()}
    for name, each in {**files, suffix: content}.items():
        if each is not None:
            (tmp_path / f"x.ds{name}").write_bytes(each)
    with pytest.raises(DataError, match=words):
        open_path(str(path), False, {})


def test_a_folder_of_files_is_explained(written: Path) -> None:
    with pytest.raises(
        DataError, match=r'give the dataset.json that lists its files, \{"datasets"'
    ):
        open_path(str(written.parent), False, {})
