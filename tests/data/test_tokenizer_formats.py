"""Tokenizers without tokenizer.json: SentencePiece models of many settings, tekken, Meta's file.

tests/real/test_tokenizers.py has the published files. Here are small models, trained in a moment.
"""

import base64
import json
import random
import struct
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from fast_llm.data import tokenizer_formats
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenizer import load
from fast_llm.data.tokenizer_formats import HARD_TEXTS, check_sentencepiece, convert
from fast_llm.errors import DataError, MissingPackage
from tests.data import synthetic
from tests.data.preparing import configure, content, read

TEXTS = [
    *HARD_TEXTS,
    *(synthetic.text(seed, 60) for seed in range(40)),
    *("".join(random.Random(seed).choices("ab \n=1.é中\t", k=40)) for seed in range(200)),
]


def trained(**settings: Any) -> bytes:
    """A SentencePiece model like Llama 2's, with other settings."""
    written = BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    # Characters of special tokens: a unigram model without them would find the tokens in text.
    letters = " <s/>0xAunkpd"
    sentences = iter(synthetic.text(seed, 50).replace("\n", "") + letters for seed in range(60))
    SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=written, **{**options, **settings}
    )
    return written.getvalue()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 140},
        {"user_defined_symbols": ["<sep>", "[X]"]},
        {"user_defined_symbols": ["<sep>"], "add_dummy_prefix": False},
        {"control_symbols": ["[INST]"], "pad_id": 3},
        {"bos_id": -1},
        {"model_type": "unigram", "hard_vocab_limit": False},
        {
            "model_type": "unigram",
            "byte_fallback": False,
            "vocab_size": 60,
            "hard_vocab_limit": False,
        },
    ],
    ids=str,
)
def test_sentencepiece(tmp_path: Path, settings: dict[str, Any]) -> None:
    data = trained(**settings)
    (tmp_path / "tokenizer.model").write_bytes(data)
    loaded = load(str(tmp_path), compare=True)
    loaded.tokenizer.encode_special_tokens = True
    reference = SentencePieceProcessor(model_proto=data)
    for text in [*TEXTS, "a<sep>b <sep> [X]c[X]"]:
        found = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        assert found == reference.encode(text), text
    bos = reference.bos_id()
    assert (loaded.bos, loaded.adds_bos) == ((bos, True) if bos >= 0 else (None, False))
    assert (loaded.eos, loaded.vocab_size) == (reference.eos_id(), reference.get_piece_size())


def by_id(model: Any) -> list[tuple[str, str]]:
    """Merges in the order of ids instead of scores."""
    pieces = {piece: number for number, (piece, *_) in enumerate(model.pieces)}
    pairs = [(pieces[left + right], left, right) for left, right in MERGES(model)]
    return [(left, right) for _, left, right in sorted(pairs)]


MERGES: Callable[[Any], list[tuple[str, str]]] = tokenizer_formats._merges


def with_scores(data: bytes, change: Callable[[int, float], float]) -> bytes:
    """The model with other scores, for `number` and the old score of each piece."""
    model = tokenizer_formats._read_sentencepiece("", data)
    pieces = {piece: (n, score) for n, (piece, score, kind) in enumerate(model.pieces) if kind == 1}
    for piece, (number, score) in pieces.items():
        spelled = piece.encode()
        old, new = (b"\x15" + struct.pack("<f", value) for value in (score, change(number, score)))
        field = b"\x0a" + bytes([len(spelled)]) + spelled
        data = data.replace(field + old, field + new)
    return data


def test_merges_are_ordered_by_score_not_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's models have ids that are not in the order of scores."""
    data = trained()
    shuffled = list(range(-1000, 0))
    random.Random(1).shuffle(shuffled)
    data = with_scores(data, lambda number, score: float(shuffled[number]))
    check_sentencepiece("x", data)
    monkeypatch.setattr(tokenizer_formats, "_merges", by_id)
    with pytest.raises(DataError, match=r"x: tokenizer.json cannot express .* differ from senten"):
        check_sentencepiece("x", data)


def test_a_model_that_cannot_be_expressed(tmp_path: Path) -> None:
    """Pieces with one score: SentencePiece takes the first pair in the text, tokenizer.json not."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(with_scores(trained(), lambda number, score: 0.0))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"tokenizer.model: tokenizer.json cannot express this"):
        prepare(configure(tmp_path / "out", tmp_path / "a.txt", tmp_path))
    path.write_bytes(trained(treat_whitespace_as_suffix=True))
    with pytest.raises(DataError, match=r"cannot express .* \(spaces behind words, spaces kept"):
        load(str(tmp_path))
    path.write_bytes(trained(model_type="char", vocab_size=300, hard_vocab_limit=False))
    with pytest.raises(DataError, match="not a SentencePiece model of kind BPE or unigram"):
        load(str(tmp_path))


def test_preparing_needs_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    load(str(tmp_path))  # training does not
    with pytest.raises(MissingPackage, match=r"tokenizer.model is SentencePiece's, and comparing"):
        load(str(tmp_path), compare=True)


def test_settings_beside_a_model(tmp_path: Path) -> None:
    data = trained()
    (tmp_path / "tokenizer.model").write_bytes(data)
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            "2": {"content": "</s>", "special": True},
            "400": {"content": "<|end|>", "special": True},
            "401": {"content": "<think>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load(str(tmp_path))
    assert (loaded.bos, loaded.eos, loaded.adds_bos, loaded.vocab_size) == (1, 400, False, 402)
    assert 401 in loaded.tokenizer.encode("a <think> b").ids
    assert loaded.files["tokenizer_config.json"] == tmp_path / "tokenizer_config.json"

    settings["added_tokens_decoder"]["410"] = {"content": "<late>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="gives token 410 to '<late>', but 402 is the next free"):
        load(str(tmp_path))
    settings["added_tokens_decoder"] = {"x": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match=r"added_tokens_decoder of the tokenizer_config.json next to"
    ):
        load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400, "<think>": 401}))
    added = {token["content"]: token["special"] for token in load(str(tmp_path)).added}
    assert (added["<pad>"], added["<think>"]) == (True, False)


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    """The copy next to the data has tokenizer.json, and gives the same ids and fingerprint."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.model.v3").write_bytes(trained())
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS[-20:]):
        (texts / f"{number:03}.txt").write_text(text)
    metadata = prepare(configure(tmp_path / "out", texts, model))
    reference = SentencePieceProcessor(model_file=str(model / "tokenizer.model.v3"))
    assert read(metadata) == [[1, *reference.encode(text), 2] for text in TEXTS[-20:]]
    made_with = content(metadata)["tokenizer"]
    copy = tmp_path / made_with["path"]
    names = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3"}
    assert {path.name for path in copy.iterdir()} == names
    loaded = load(str(copy))
    assert loaded.path.name == "tokenizer.json"
    assert (loaded.bos, loaded.eos, loaded.adds_bos) == (1, 2, True)
    assert loaded.fingerprint([], [1, 2]) == made_with["fingerprint"]
    assert prepare(configure(tmp_path / "again", texts, copy)).exists()
    assert read(tmp_path / "again.json") == read(metadata)


def ranks(words: int) -> dict[bytes, int]:
    """Byte-level BPE's tokens by rank."""
    merged = json.loads(synthetic.train(synthetic.llama3_cut(), 256 + words, special=()).to_str())
    table = {char: byte for byte, char in tokenizer_formats._byte_characters().items()}
    found = [bytes([byte]) for byte in range(256)]
    found += [
        bytes(table[char] for char in "".join(pair)) for pair in merged["model"]["merges"][:words]
    ]
    return {word: rank for rank, word in enumerate(dict.fromkeys(found))}


def tekken(known: dict[bytes, int], **changes: Any) -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>", "[INST]"]
    return {
        "config": {
            "pattern": synthetic.LLAMA3,
            "default_vocab_size": len(known) + 10,
            "default_num_special_tokens": 10,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for word, rank in known.items()
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(special)
        ],
        **changes,
    }


def test_tekken(tmp_path: Path) -> None:
    known = ranks(60)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(known)))
    loaded = load(str(tmp_path))
    loaded.tokenizer.encode_special_tokens = True
    reference = tiktoken.Encoding(
        "x", pat_str=synthetic.LLAMA3, mergeable_ranks=known, special_tokens={}
    )
    for text in TEXTS:
        expected = [10 + token for token in reference.encode_ordinary(text)]
        assert loaded.tokenizer.encode(text, add_special_tokens=False).ids == expected, text
    assert (loaded.bos, loaded.eos, loaded.adds_bos) == (1, 2, True)
    assert loaded.tokenizer.id_to_token(9) == "<SPECIAL_9>"
    assert loaded.vocab_size == len(known) + 10
    assert list(loaded.files) == ["tokenizer.json", "tokenizer_config.json", "tekken.json"]

    # Old files do not list the special tokens.
    old = tekken(known, special_tokens=None)
    old["config"] |= {"default_vocab_size": len(known) + 30, "default_num_special_tokens": 30}
    made = convert("x", json.dumps(old).encode(), {}).content
    named = {token["id"]: token["content"] for token in made["added_tokens"]}
    assert (named[3], named[19], named[29]) == ("[INST]", "[TOOL_CONTENT]", "<SPECIAL_29>")


@pytest.mark.parametrize("changes", [{"vocab": [{}]}, {"config": {}}, {"special_tokens": []}])
def test_damaged_tekken(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = tekken({b"a": 0}, **changes)
    if changes == {"special_tokens": []}:
        content["config"]["default_num_special_tokens"] = 0
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tekken.json: not a tekken.json"):
        load(str(tmp_path))


def test_a_list_of_ranks_that_is_not_llama_3s(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(word).decode()} {rank}" for word, rank in ranks(9).items()]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"265 tokens in tiktoken's format.* only Llama 3's 128,000"
    ):
        load(str(tmp_path))
    (tmp_path / "tokenizer.model").write_text("\n".join([*lines, "!! 265"]))
    with pytest.raises(DataError, match=r"tokenizer.model: line 266 is not a token and its rank"):
        load(str(tmp_path))


@pytest.mark.parametrize("size", [0, 1, 500, 4000])
def test_damaged_sentencepiece(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained()[:size])
    with pytest.raises(DataError, match=r"tokenizer.model: not a SentencePiece model"):
        load(str(tmp_path))
    path.write_bytes(random.Random(size).randbytes(size))
    with pytest.raises(DataError, match=r"tokenizer.model: not a SentencePiece model"):
        load(str(tmp_path))
