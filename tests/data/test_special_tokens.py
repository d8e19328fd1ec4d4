"""Special tokens and added tokens in the text of documents."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fast_llm.data.dataset import open_dataset
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenizer import load
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, read
from tests.data.test_tokenizer import rewrite

TEXT = "def <|fim_prefix|>a<|fim_suffix|> <think>b</think> <|fim_middle|><|end_of_text|>"
SPECIAL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # 320, 321, 322
ORDINARY = ("<think>", "</think>")  # 323, 324


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tokenizer with special tokens, and with added tokens that are not special."""
    folder = synthetic.llama(tmp_path / "model")
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    added += [
        {**added[1], "id": 320 + number, "content": token, "special": token in SPECIAL}
        for number, token in enumerate(SPECIAL + ORDINARY)
    ]
    rewrite(folder, added_tokens=added)
    return folder


def prepared(tmp_path: Path, model: Path, text: str = TEXT, **changes: Any) -> Path:
    (tmp_path / "texts").mkdir(exist_ok=True)
    (tmp_path / "texts" / "a.txt").write_text(text)
    output = tmp_path / f"out{len(list(tmp_path.glob('out*.json')))}"
    return prepare(configure(output, tmp_path / "texts", model, **changes))


def added_in(metadata: Path) -> list[int]:
    (document,) = read(metadata)
    assert (document[0], document[-1]) == (0, 1) and not {0, 1} & {*document[1:-1]}
    return [token for token in document if token >= 320]


def test_special_tokens_are_plain_text_unless_listed(tmp_path: Path, model: Path) -> None:
    plain = prepared(tmp_path, model)
    assert added_in(plain) == [323, 324]
    assert "special_tokens" not in content(plain)["tokenizer"]
    some = prepared(tmp_path, model, tokenizer__special_tokens=["<|fim_middle|>"])
    assert added_in(some) == [323, 324, 322]
    every = prepared(tmp_path, model, tokenizer__special_tokens=list(SPECIAL), tokenize_workers=2)
    assert added_in(every) == [320, 321, 323, 324, 322]
    assert content(every)["tokenizer"]["special_tokens"] == list(SPECIAL)
    decode = load(str(model)).tokenizer.decode
    assert decode(read(every)[0][1:-1], skip_special_tokens=False) == TEXT
    # Training accepts all of them with the model's tokenizer, and no other.
    loaded = load(str(model))
    for path in (plain, some, every):
        dataset = open_dataset_of(path)
        dataset.check_vocabulary(325, loaded)
        with pytest.raises(DataError, match="made with another tokenizer"):
            dataset.check_vocabulary(325, load(str(synthetic.gpt2(tmp_path / "gpt2"))))


def open_dataset_of(metadata: Path) -> Any:
    from fast_llm.config.train import DataConfig

    return open_dataset(DataConfig(path=[str(metadata)], split=[1]), 4, 0, 325)


def test_added_tokens_that_are_not_special_are_as_in_transformers(
    tmp_path: Path, model: Path
) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    text = "a<think> b </think>\n<think>"
    expected = reference(text, add_special_tokens=False).input_ids
    assert expected.count(323) == 2
    assert read(prepared(tmp_path, model, text)) == [[0, *expected, 1]]


@pytest.mark.parametrize(("token", "name"), [(synthetic.BOS, "BOS"), (synthetic.EOS, "EOS")])
def test_bos_and_eos_are_refused(tmp_path: Path, model: Path, token: str, name: str) -> None:
    with pytest.raises(DataError) as error:
        prepared(tmp_path, model, tokenizer__special_tokens=[SPECIAL[0], token])
    assert str(error.value) == (
        f"tokenizer.special_tokens: {token} is {name}, which begins or ends documents: a text that"
        " spells it would become several; leave it out"
    )


def test_a_token_that_the_tokenizer_does_not_have(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError) as error:
        prepared(tmp_path, model, tokenizer__special_tokens=["<|fim_prefx|>"])
    assert str(error.value) == (
        "tokenizer.special_tokens: '<|fim_prefx|>' is not an added token of"
        f" {model}/tokenizer.json; did you mean <|fim_prefix|>?; its added tokens are"
        f" {synthetic.BOS}, {synthetic.EOS}, {', '.join(SPECIAL + ORDINARY)}"
    )


def test_other_special_tokens_do_not_resume(tmp_path: Path, model: Path) -> None:
    """Also not the preparation of an earlier version, which had none."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)

    def again(**changes: Any) -> Path:
        return prepare(configure(tmp_path / "out", tmp_path / "texts", model, **changes))

    metadata = again()
    for record in [*(tmp_path / "out").glob("*_0*.json")]:
        earlier = json.loads(record.read_text())
        del earlier["settings"]["tokenizer.special_tokens"]
        earlier["settings"]["tokenizer"] = load(str(model)).old_fingerprint
        record.write_text(json.dumps(earlier))
    before = metadata.stat().st_mtime_ns
    assert again() == metadata and metadata.stat().st_mtime_ns == before  # already finished
    with pytest.raises(DataError, match=r"was started with tokenizer.special_tokens \[\], now it"):
        again(tokenizer__special_tokens=[SPECIAL[0]])
    # An interrupted preparation of an earlier version is completed.
    metadata.unlink()
    (tmp_path / "out" / "rank_0.json").unlink()
    assert added_in(again()) == [323, 324]
    rewrite(model, normalizer={"type": "NFC"})
    with pytest.raises(DataError, match="was started with another tokenizer"):
        again()
