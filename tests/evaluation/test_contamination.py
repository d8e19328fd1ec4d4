"""Texts of evaluations in the training data: every n-gram is found, none is made up."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fast_llm.data.tokenfile import TokenFile, TokenFileWriter
from fast_llm.evaluation import contamination
from fast_llm.evaluation.contamination import LENGTH, Ngrams, Overlap, scan


def token_file(prefix: Path, documents: list[np.ndarray], dtype: str = "uint16") -> TokenFile:
    writer = TokenFileWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.append(document)
    writer.close()
    return TokenFile(prefix)


def held(file: TokenFile, window: np.ndarray) -> bool:
    """Whether a file holds a window, looked for in the plainest way."""
    tokens = file.tokens_at(0, file.tokens).astype(np.int64)
    views = np.lib.stride_tricks.sliding_window_view(tokens, LENGTH)
    return bool((views == window).all(1).any())


def test_exactly_what_the_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few different tokens, so that windows nearly occur; chunks that cut what is found."""
    monkeypatch.setattr(contamination, "_CHUNK", 64)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 3, 400), random.integers(0, 70_000, 300)]
    file = token_file(tmp_path / "tokens", documents, "int32")
    texts = [[document[at : at + 20].tolist()] for document in documents for at in (0, 57, 64, 250)]
    texts += [[random.integers(0, 3, 20).tolist()] for _ in range(30)]
    texts += [[random.integers(70_000, 90_000, 20).tolist()]]  # tokens that the file lacks
    ngrams = Ngrams({"task": texts})
    seen = scan(ngrams.tokens, [file])
    assert seen is not None
    assert seen.tolist() == [held(file, window) for window in ngrams.tokens]
    assert 40 <= seen.sum() < len(seen)


def test_tokens_beyond_those_of_the_texts_are_not_confused(tmp_path: Path) -> None:
    """The scanner gives all larger tokens one value; the comparison keeps them apart."""
    text = list(range(LENGTH))
    file = token_file(tmp_path / "tokens", [np.array([*text[:-1], 40])])
    ngrams = Ngrams({"task": [[text], [[*text[:-1], 39]]]})
    assert not scan(ngrams.tokens, [file]).any()  # type: ignore[union-attr]


def test_a_last_chunk_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one with fewer tokens than an n-gram, in which there is nothing to find."""
    monkeypatch.setattr(contamination, "_CHUNK", 64)
    document = np.arange(64 + LENGTH + 1)
    ngrams = Ngrams({"task": [[document.tolist()]]})
    for tokens in (*range(1, LENGTH + 2), *range(64, len(document) + 1)):
        file = token_file(tmp_path / str(tokens), [document[:tokens]])
        seen = scan(ngrams.tokens, [file])
        assert seen is not None and seen.sum() == max(0, tokens - LENGTH + 1)


def test_counts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    document = random.integers(0, 1000, 500)
    file = token_file(tmp_path / "tokens", [document])

    def other(count: int) -> list[int]:
        return [int(token) for token in random.integers(1000, 2000, count)]

    whole = document[10:50].tolist()
    part = [*other(30), *document[100:113].tolist()]
    template = document[200:220].tolist()
    texts = [
        [whole],
        [part],
        [other(40), document[300:340].tolist()],  # one of its answers
        [other(LENGTH - 1)],
        *([[*template, *other(20)]] for _ in range(11)),
    ]
    ngrams = Ngrams({"task": texts, "small": [[[*template, *other(20)]] for _ in range(10)]})
    seen = scan(ngrams.tokens, [file])
    assert seen is not None
    assert ngrams.overlaps(seen) == {
        "task": Overlap(examples=14, found=3, mostly=2, short=1),
        "small": Overlap(examples=10, found=10, mostly=0, short=0),
    }


def test_the_program_writes_what_scan_finds(tmp_path: Path) -> None:
    document = np.random.default_rng(0).integers(0, 1000, 500)
    file = token_file(tmp_path / "tokens", [document])
    ngrams = Ngrams({"task": [[document[10:50].tolist()], [list(range(30))]]})
    job = tmp_path / "job.npz"
    contamination.write_job(job, ngrams, [file])
    command = [sys.executable, "-m", "fast_llm.evaluation.contamination", str(job)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(60) == 0
    found = contamination.read_result(tmp_path / "job.npy", ngrams)
    expected = scan(ngrams.tokens, [file])
    assert found is not None and expected is not None and found.any()
    assert found.tolist() == expected.tolist()
    assert not job.exists()
    assert contamination.read_result(tmp_path / "job.npy", Ngrams({"task": []})) is None


def test_the_program_ends_with_its_parent(tmp_path: Path) -> None:
    file = token_file(tmp_path / "tokens", [np.arange(500)])
    contamination.write_job(tmp_path / "job.npz", Ngrams({"task": [[list(range(30))]]}), [file])
    command = [sys.executable, "-m", "fast_llm.evaluation.contamination", str(tmp_path / "job.npz")]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 1
    assert not (tmp_path / "job.npy").exists()


def test_a_result_belongs_to_its_files_and_texts(tmp_path: Path) -> None:
    one = token_file(tmp_path / "one", [np.arange(100)])
    moved = token_file(tmp_path / "moved", [np.arange(100)])
    other = token_file(tmp_path / "other", [np.arange(100) + 1])
    ngrams, further = Ngrams({"a": [[list(range(20))]]}), Ngrams({"a": [[list(range(21))]]})
    same = contamination.fingerprint(ngrams, [one])
    assert contamination.fingerprint(ngrams, [moved]) == same
    assert contamination.fingerprint(ngrams, [other]) != same
    assert contamination.fingerprint(further, [one]) != same
