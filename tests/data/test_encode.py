"""Encoding is that of `tokenizers`, one text at a time or many."""

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from fast_llm.data.encode import Encoder, is_panic
from tests.data import synthetic


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return synthetic.train(synthetic.llama3_cut())


def _encoder(tokenizer: Tokenizer, dtype: Any = np.uint16, **settings: int) -> Encoder:
    return Encoder(Tokenizer.from_str(tokenizer.to_str()), np.dtype(dtype), **settings)


def _tokens(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [
        np.frombuffer(content or b"", encoder.dtype).tolist() for content in encoder.encode(texts)
    ]


def test_in_batches_as_alone(tokenizer: Tokenizer) -> None:
    texts = [synthetic.text(seed, length) for seed, length in enumerate((1, 300, 5, 40, 40, 40, 2))]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert _tokens(_encoder(tokenizer, characters=100), texts) == expected


def test_truncation_and_padding_are_off(tokenizer: Tokenizer) -> None:
    cut = Tokenizer.from_str(tokenizer.to_str())
    cut.enable_truncation(3)
    cut.enable_padding(length=50)
    texts = [synthetic.text(0, 40)]
    assert _tokens(_encoder(cut), texts) == [
        tokenizer.encode(texts[0], add_special_tokens=False).ids
    ]


def test_special_tokens_are_text(tokenizer: Tokenizer) -> None:
    text = f"print('{synthetic.EOS}')\n{synthetic.BOS} x"
    (tokens,) = _tokens(_encoder(tokenizer), [text])
    assert 0 not in tokens and 1 not in tokens
    assert tokenizer.decode(tokens) == text


def test_added_tokens_that_are_not_special_are_tokens(tokenizer: Tokenizer) -> None:
    more = Tokenizer.from_str(tokenizer.to_str())
    more.add_tokens([AddedToken("<tool>", special=False)])
    assert more.token_to_id("<tool>") in _tokens(_encoder(more, np.int32), ["a <tool> b"])[0]


def test_texts_that_the_tokenizer_fails_on(tokenizer: Tokenizer) -> None:
    """Half a surrogate pair is not a character; ten million blanks overflow its regex engine."""
    encoder = _encoder(tokenizer)
    encoded = encoder.encode(["fine", "\ud800", "also fine", " " * 10_000_000 + "x", "fine"])
    assert [content is None for content in encoded] == [False, True, False, True, False]
    assert encoded[0] == encoded[4] == encoder.encode(["fine"])[0]


def test_a_lack_of_memory_is_no_failure_of_the_text() -> None:
    assert is_panic(ValueError()) and not is_panic(MemoryError())
