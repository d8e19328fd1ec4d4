"""The fast engine gives the ids of `tokenizers`, or is not used."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from fast_llm.data import choose_engine, engine, files
from fast_llm.data.documents import open_documents
from fast_llm.data.encode import Encoder
from fast_llm.data.engine import DifferentTokens, FastEncoder, NotAdmitted
from fast_llm.data.hard_texts import hard_texts
from fast_llm.data.job import make_job
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenizer import load
from fast_llm.errors import DataError, MissingPackage
from tests.data import synthetic
from tests.data.preparing import configure, content, everything, jsonl

TEXTS = [synthetic.text(seed, 40) for seed in range(700)]  # some of them are sampled
USED = f"Tokenizing with {engine.installed()}, compared with {engine.REFERENCE}."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return synthetic.train(synthetic.llama3_cut(), 1000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.llama(tmp_path_factory.mktemp("llama"))


def fast(tokenizer: Tokenizer, **settings: Any) -> FastEncoder:
    return FastEncoder(reference(tokenizer), **settings)


def reference(tokenizer: Tokenizer) -> Encoder:
    return Encoder(Tokenizer.from_str(tokenizer.to_str()), np.dtype(np.uint16))


class Wrong:
    """The engine, except that it doubles the tokens of texts that contain `where`, or changes
    their last token.
    """

    def __init__(self, right: Any, where: str, doubles: bool):
        self.right, self.where, self.doubles = right, where, doubles
        self.vocab = right.vocab

    def encode(self, text: str) -> Any:
        tokens = self.right.encode(text)
        if self.where not in text:
            return tokens
        # Two tokens of one byte.
        return np.concatenate([tokens, tokens]) if self.doubles else _other_last(tokens)


def _other_last(tokens: Any) -> Any:
    changed = tokens.copy()
    changed[-1] = 5 if tokens[-1] == 4 else 4
    return changed


def make_wrong(monkeypatch: pytest.MonkeyPatch, where: str, doubles: bool = False) -> None:
    """Make every engine of this process wrong."""
    from gigatoken import gigatoken_rs

    load = gigatoken_rs.load_hf_json
    monkeypatch.setattr(
        gigatoken_rs, "load_hf_json", lambda data: Wrong(load(data), where, doubles)
    )


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_same_ids(ignore_merges: bool) -> None:
    trained = synthetic.train(synthetic.llama3_cut(), 1000, ignore_merges=ignore_merges)
    trained.add_tokens([AddedToken("<tool>", special=False)])
    texts = [*hard_texts(["<tool>", synthetic.EOS]), *TEXTS]
    encoder = fast(trained)
    encoder.admit(TEXTS)
    expected = reference(trained).encode(texts)
    assert encoder.encode(texts, range(len(texts))) == expected
    assert trained.token_to_id("<tool>") in np.frombuffer(
        encoder.encode(["a <tool> b"], [0])[0] or b"", np.uint16
    )
    # Of memory without a bound it makes itself anew, with the same result.
    again = fast(trained, max_growth=-(2**40), rate=1)
    first = again.engine
    assert again.encode(texts, range(len(texts))) == expected
    assert again.engine is not first


def test_what_the_reference_fails_on_fails(tokenizer: Tokenizer) -> None:
    texts = ["fine", "\ud800", " " * 10_000_000 + "x", "x" * 600_000, "fine"]
    encoded = fast(tokenizer).encode(texts, range(5))
    assert [tokens is None for tokens in encoded] == [False, True, True, False, False]
    assert encoded == reference(tokenizer).encode(texts)


def test_text_that_is_not_normal_is_left_to_the_reference(tokenizer: Tokenizer) -> None:
    normalizing = Tokenizer.from_str(tokenizer.to_str())
    normalizing.normalizer = normalizers.NFC()
    encoder = fast(normalizing)
    make = ["e\u0301te\u0301", "\u1112\u1161\u11ab", "été", "\u0378 unassigned", "plain"]
    assert [encoder.is_safe(text) for text in make] == [False, False, True, False, True]
    assert encoder.encode(make, range(5)) == reference(normalizing).encode(make)


def test_character_on_which_it_differs(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wrong(monkeypatch, "ñ")
    encoder = fast(tokenizer, rate=1)
    encoder.admit(TEXTS)  # the hard texts have it: it is left to the reference before
    texts = ["a ñ b", "año", "plain", "été"]
    assert encoder.encode(texts, range(4)) == reference(tokenizer).encode(texts)


def test_difference_is_found(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in range(2000) if engine._hash(row) % 256 == 0]
    assert 3 < len(rows) < 15
    make_wrong(monkeypatch, "quite wrong")
    encoder = fast(tokenizer)
    encoder.admit(TEXTS)
    encoder.encode(["a quite wrong text"], [rows[0] + 1])  # not sampled
    with pytest.raises(DifferentTokens) as found:
        encoder.encode(["right", "a quite wrong text"], [rows[0], rows[1]])
    assert found.value.row == rows[1]
    # Of a long text, a part in 2^20 characters is compared.
    with pytest.raises(DifferentTokens):
        encoder.encode(["quite wrong, " * 200_000], [7])
    with pytest.raises(NotAdmitted, match=r"differs from tokenizers .* on 'a quite wrong text'"):
        encoder.admit(["a quite wrong text"])


def test_lost_text_is_found_in_every_document(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wrong(monkeypatch, "quite wrong", doubles=True)
    with pytest.raises(DifferentTokens):
        fast(tokenizer).encode(["a quite wrong text"], [1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": normalizers.Lowercase()}, "its normalizer Lowercase"),
        ({"model": models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")}, "WordLevel, not plain BPE"),
        ({"model": models.BPE({"a": 0}, [], dropout=0.1)}, "not plain BPE"),
        ({"pre_tokenizer": pre_tokenizers.Digits()}, "differs from tokenizers|cannot read"),
    ],
)
def test_not_admitted(tokenizer: Tokenizer, change: dict[str, Any], reason: str) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(NotAdmitted, match=reason):
        fast(other).admit([])


def test_any_order_and_spacing_of_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The engine reads the file's own text: neither truncated, nor with tokens read as special."""
    given = json.loads(tokenizer.to_str())
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    given["truncation"] = cut
    texts = [*TEXTS[:50], f"a{synthetic.EOS}b"]
    expected = reference(tokenizer).encode(texts)
    for number, names in enumerate((list(given), [*reversed(given)])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({name: given[name] for name in names}, indent=3))
        loaded = load(str(path))
        encoder = Encoder(loaded.tokenizer, np.dtype(np.uint16))
        made = FastEncoder(encoder, text=loaded.text)
        made.admit(texts)
        assert json.loads(made.json)["truncation"] is None
        assert made.encode(texts, range(1, 52)) == expected
        assert all(made._equal(*pair) for pair in zip(texts, expected, strict=True))


def test_spellings_that_the_engine_must_not_see(tokenizer: Tokenizer) -> None:
    made = fast(tokenizer)
    assert made.is_safe("[A1] [A2]")
    for hidden, safe, unsafe in (
        (["[A1]", "[A23]", "[A2]"], "[A] [A A2]", "x[A2]"),
        (["[A1]", "</s>"], "A1 /s", "x</s>y"),
        (["<x>"], "<y>", "<x>"),
    ):
        made.hidden, made.prefix = hidden, engine._common_prefix(hidden)
        assert made.is_safe(safe) and not made.is_safe(unsafe)
    assert [engine._common_prefix(some) for some in (["ab", "abc"], ["a", "b"], [])] == [
        "ab",
        "",
        "",
    ]


def write(folder: Path, texts: list[str]) -> Path:
    path = folder / "texts.jsonl"
    path.write_bytes(jsonl(texts))
    return path


def token_files(output: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in everything(output).items()
        if name.endswith((".bin", ".idx", ".npy"))
    }


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_same_files(
    tmp_path: Path, model: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fast_llm")
    source = write(tmp_path, [*TEXTS, f"with {synthetic.EOS} in it", "", "e\u0301", "中文 😀"] * 4)
    described = []
    for name in ("tokenizers", "gigatoken"):
        further = {"tokenizer__engine": name, "tokenize_workers": workers}
        described.append(
            content(prepare(configure(tmp_path / name / "x", source, model, **further)))
        )
    assert USED in caplog.messages
    assert token_files(tmp_path / "gigatoken") == token_files(tmp_path / "tokenizers")
    assert [each.pop("engines") for each in described] == [
        [engine.REFERENCE],
        [engine.installed()],
    ]
    for each in described:
        del each["sha256"]
    assert described[0] == described[1]


@pytest.mark.parametrize("world", [1, 2])
def test_difference_writes_everything_again(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    world: int,
) -> None:
    """Also token files or units that were complete; and later starts do not use the engine."""
    row = next(row for row in range(3000, 4000) if engine._hash(row) % 256 == 0)
    source = write(tmp_path, [*(TEXTS * 6)[:row], "a quite wrong text", *TEXTS])
    ranks = {"distributed__rank": 0, "distributed__world_size": world}
    right = configure(tmp_path / "right" / "x", source, model, tokenizer__engine="tokenizers")
    prepare(right)
    make_wrong(monkeypatch, "quite wrong")
    output = tmp_path / "wrong" / "x"
    config = configure(output, source, model, tokenizer__engine="gigatoken", **ranks)
    metadata = prepare(config)
    assert (
        f"{source}:{row + 1}: {engine.installed()} gives other tokens than {engine.REFERENCE}; all"
        f" documents are tokenized again with {engine.REFERENCE}."
    ) in caplog.messages
    assert token_files(tmp_path / "wrong") == token_files(tmp_path / "right")
    assert content(metadata)["engines"] == [engine.REFERENCE]
    (output / "shard_0_0.bin").unlink()
    assert content(prepare(config))["engines"] == [engine.REFERENCE]
    assert token_files(tmp_path / "wrong") == token_files(tmp_path / "right")


def chosen(source: Path, model: Path, output: Path, asked: str, sample: list[str]) -> bool:
    """Whether the fast engine tokenizes a corpus."""
    config = configure(output, source, model, tokenizer__engine=asked)
    corpus = open_documents(files.find(config.dataset), 1)
    return choose_engine.choose_engine(make_job(config), corpus, sample).fast is not None


def test_which_is_used(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fast_llm")
    small, large = write(tmp_path, TEXTS[:9]), tmp_path / "large.jsonl"
    large.write_bytes(jsonl([" ".join(TEXTS) * 40]))
    assert not chosen(small, model, tmp_path, "auto", [])
    assert chosen(small, model, tmp_path, "gigatoken", [])
    assert not caplog.messages[:-1]
    assert chosen(large, model, tmp_path, "auto", [])
    assert not chosen(large, model, tmp_path, "tokenizers", [])
    assert caplog.messages == [USED, USED]
    monkeypatch.setattr(choose_engine, "installed", lambda: None)
    assert not chosen(large, model, tmp_path, "auto", [])
    assert caplog.messages[-1] == (
        f"Tokenizing with {engine.REFERENCE}. With the package gigatoken, the same tokens take a"
        " fraction of the time: pip install gigatoken"
    )
    with pytest.raises(MissingPackage, match="gigatoken"):
        chosen(small, model, tmp_path, "gigatoken", [])


def test_refused_tokenizer(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fast_llm")
    make_wrong(monkeypatch, "sample")
    source = tmp_path / "large.jsonl"
    source.write_bytes(jsonl([" ".join(TEXTS) * 40]))
    reason = f"it differs from {engine.REFERENCE} on 'of the sample'"
    assert not chosen(source, model, tmp_path, "auto", ["of the sample"])
    assert caplog.messages == [
        f"Tokenizing with {engine.REFERENCE}; {engine.installed()} is not used: {reason}."
    ]
    with pytest.raises(DataError) as error:
        chosen(source, model, tmp_path, "gigatoken", ["of the sample"])
    assert str(error.value) == (
        f"tokenizer.engine: {engine.installed()} cannot be used: {reason}; set tokenizer.engine:"
        " auto"
    )
